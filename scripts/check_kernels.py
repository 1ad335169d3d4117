"""Check the GPU kernels on the chip: alone, inside decoding, and inside training. They are made for Hopper GPUs.

    python scripts/check_kernels.py models/smollm2 --adapter smollm2-n4 --data data/smollm2-held-out

Runs by hand, needs the packages of the tests, and exits with 1 if anything fails. ``pallas_kernels.BY_DEFAULT`` may be
true where this passes:

1. the tests marked ``gpu``: every kernel against its reference in float32, gradients too, repeated bit for bit;
2. the test of distributions, with the kernels where the plain implementation would run;
3. texts of the model, greedy and with common random numbers. In float32 all must be those of AR without kernels (the
   attention stays in plain JAX there); in bfloat16 near ties flip, so the kernels may flip no more than twice as many
   texts as a window of another width does without them;
4. losses of an adapter's first steps: those in bfloat16 may be, on average, no more than twice as far from those in
   float32 with the kernels as they are without.

Without ``--data`` the last is left out, without a model the last two. It takes about a quarter of an hour, most of it
compiling; the four parts can run side by side (``--checks kernels``, ``--checks texts``, …).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

# The tests run in other processes on the same GPU, several at a time.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import tyro
from tqdm import tqdm

import idlm_jax
import pallas_kernels
from idlm_jax.model import LanguageModel
from idlm_jax.training.config import load_train_config
from idlm_jax.training.loop import train

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "scripts" / "prompts.txt"
RECIPE = ROOT / "configs" / "train" / "smollm2_gated_lora_n4.yaml"
TEST_PROCESSES = "8"
# They compile many small programs for one run each.
NO_AUTOTUNING = " --xla_gpu_autotune_level=0"


@dataclass(frozen=True)
class Settings:
    """What to check."""

    # A model of the llama or Qwen3 family, small enough to decode in float32.
    model: tyro.conf.Positional[str | None] = None
    adapter: str | None = None
    # Token store to train an adapter on for a few steps.
    data: str | None = None
    mask_token: str = "16"
    checks: tuple[Literal["kernels", "distributions", "texts", "losses"], ...] = (
        "kernels",
        "distributions",
        "texts",
        "losses",
    )
    max_tokens: int = 64
    limit: int = 32
    steps: int = 40


def main(settings: Settings) -> int:
    """Run the checks and print a line for each; the number of those that failed."""
    device = jax.devices()[0]
    # Elsewhere tests are skipped and plain JAX is compared with itself: nothing would be checked.
    if str(getattr(device, "compute_capability", "")) != "9.0" or find_spec("jax_triton") is None:
        raise idlm_jax.UserError(f"needs a Hopper GPU and jax-triton, not {device.device_kind}")
    print(f"jax {jax.__version__}, {device.device_kind}", flush=True)
    pallas_kernels.BY_DEFAULT = True
    results = {}
    if "kernels" in settings.checks:
        results["kernels alone"] = run_tests("-m", "gpu", "tests/kernels")
    if "distributions" in settings.checks:
        results["distributions"] = run_tests("tests/decoding/test_distribution.py")
    if "texts" in settings.checks and settings.model:
        for dtype in ("float32", "bfloat16"):
            results[f"texts, {dtype}"] = check_texts(settings, dtype)
    if "losses" in settings.checks and settings.model and settings.data:
        results["training losses"] = check_losses(settings)
    for name, passed in results.items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return sum(not passed for passed in results.values())


def run_tests(*arguments: str) -> bool:
    """Whether the chosen tests pass."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.by_default", "-q", "-n", TEST_PROCESSES, *arguments]
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + NO_AUTOTUNING}
    return subprocess.run(command, check=False, env=environment, cwd=ROOT).returncode == 0


def check_texts(settings: Settings, dtype: str) -> bool:
    """Decode prompts with and without kernels, by AR and ISD, and count the texts that differ from AR without."""
    assert settings.model
    model = idlm_jax.load(settings.model, settings.adapter, dtype, settings.mask_token)
    prompts = [model.as_chat(line) for line in PROMPTS.read_text().splitlines()[: settings.limit]]
    decodes = [idlm_jax.DecodeConfig(stride=1)]
    decodes += [idlm_jax.DecodeConfig(stride, layout) for stride in (2, 4, 8) for layout in ("standard", "branch")]
    passed = True
    for temperature in (0.0, 0.8):
        wanted, other_width = (
            texts(model, prompts, replace(decode, kernels="xla"), temperature, settings) for decode in decodes[:2]
        )
        flipped = count_different(wanted, other_width)
        allowed = 0 if dtype == "float32" else 2 * max(flipped, 1)
        print(f"temperature {temperature:g}, {dtype}: N = 2 without kernels: {flipped} of {len(wanted)} texts differ")
        for decode in tqdm(decodes, disable=not sys.stderr.isatty()):
            different = count_different(wanted, texts(model, prompts, decode, temperature, settings))
            passed &= different <= allowed
            print(f"  N = {decode.stride}, {decode.layout}, kernels: {different} differ", flush=True)
    return passed


def texts(
    model: LanguageModel, prompts: list, decode: idlm_jax.DecodeConfig, temperature: float, settings: Settings
) -> list[list[int]]:
    """The tokens of every answer; top-k and top-p come in with the temperature."""
    top_k, top_p = (50, 0.95) if temperature else (0, 1.0)
    sampling = idlm_jax.SamplingParams(temperature, top_k, top_p, seed=7, max_tokens=settings.max_tokens)
    return [answer.token_ids for answer in model.generate(prompts, sampling, decode)]


def count_different(wanted: list[list[int]], given: list[list[int]]) -> int:
    """How many texts are not the same."""
    return sum(ours != theirs for ours, theirs in zip(wanted, given, strict=True))


def check_losses(settings: Settings) -> bool:
    """Train an adapter for some steps with and without kernels, and compare the losses with those in float32."""
    exact = train_losses(settings, "xla", "float32")
    far = {}
    for kernels in pallas_kernels.KERNELS:
        losses = train_losses(settings, kernels, "bfloat16")
        differences = [abs(ours / right - 1) for ours, right in zip(losses, exact, strict=True)]
        far[kernels] = sum(differences) / len(differences)
        about = f"from {losses[0]:.4f} to {losses[-1]:.4f}, beside float32 {exact[0]:.4f} to {exact[-1]:.4f}"
        away = f"{far[kernels]:.3%} away on average, {max(differences):.2%} at most"
        print(f"training, bfloat16, kernels {kernels}: {len(losses)} losses {about}: {away}", flush=True)
    return far["auto"] <= 2 * far["xla"]


def train_losses(settings: Settings, kernels: str, dtype: str) -> list[float]:
    """The loss of every step."""
    assert settings.model and settings.data
    with tempfile.TemporaryDirectory() as directory:
        config = load_train_config(RECIPE)
        config = replace(
            config,
            model=settings.model,
            data=(settings.data,),
            output=str(Path(directory) / "run"),
            stages=(replace(config.stages[0], steps=settings.steps),),
            length=1024,
            batch_size=16 * jax.device_count(),
            remat="block",  # plain JAX holds every score
            evaluation=replace(config.evaluation, documents=0),
            dtype=dtype,
            kernels=kernels,
        )
        train(config)
        lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    try:
        sys.exit(1 if main(tyro.cli(Settings, description=__doc__)) else 0)
    except idlm_jax.UserError as error:
        sys.exit(f"error: {error}")
