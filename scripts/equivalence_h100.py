"""Is our text PyTorch's? Logits, distributions and greedy texts of both, on one GPU, and a report of it.

Run by hand on a machine with a GPU, torch, transformers and gguf (minutes; the report says how many)::

    python -m scripts.equivalence_h100 models/SmolLM2-135M-Instruct.Q4_1.gguf

writes docs/equivalence.json, .md and .png. PyTorch's side runs first, then ours, each in a process of its own; they
share token ids, the weights' files and nothing else. ``--parts logits`` runs one part (of logits, draws, texts, greedy)
and keeps what the file has of the others; ``--render docs/equivalence.json`` writes the report again from the numbers.
Minutes on a CPU, with numbers too small for a report::

    python -m scripts.equivalence_h100 FILE.gguf --device cpu --limit 2 --draws 16 --texts 8 --shapes --output runs/e
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro
import yaml

from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.checkpoint.open import open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.checkpoint.shipped import shipped_directory
from scripts.equivalence.analyse import analyse
from scripts.equivalence.plan import PARTS, Clock, Plan
from scripts.equivalence.report import render


@dataclass(frozen=True)
class Settings:
    """What to compare."""

    gguf: tyro.conf.Positional[Path | None] = None
    # PEFT directory, or the name of an adapter that comes with the package; acts on mask rows only.
    adapter: str = "smollm2-n4"
    # One prompt a line; each becomes a chat.
    prompts: Path = Path("scripts/prompts.txt")
    # Only the first so many prompts.
    limit: int | None = None
    # What to run; the numbers of other parts stay as they are in the output.
    parts: tuple[Literal["logits", "draws", "texts", "greedy"], ...] = PARTS
    # Shapes with random weights: files of configs/models.
    shapes: tuple[str, ...] = ("qwen3-0.6b", "qwen3-8b")
    # Of ours after each prefix, two for every prompt; PyTorch draws four times as many.
    draws: int = 400
    # Long texts of each writer after each prefix.
    texts: int = 40
    # Of PyTorch; ours runs where JAX does.
    device: Literal["cuda", "cpu"] = "cuda"
    # Without ending: .json, .md and .png are added.
    output: Path = Path("docs/equivalence")
    # Only write the report again, from the numbers of a run.
    render: Path | None = None


def make_plan(settings: Settings, gguf: Path) -> Plan:
    """Token ids and numbers for both sides."""
    source, adapter = open_source(gguf), shipped_directory(settings.adapter) or Path(settings.adapter).resolve()
    tokenizer, config = source.tokenizer(), load_adapter(adapter, source.config).config
    assert config.mask_token_id is not None
    chats = [[{"role": "user", "content": line}] for line in settings.prompts.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts[: settings.limit]]
    return Plan(
        gguf=str(gguf.resolve()),
        adapter=str(adapter),
        mask_token=config.mask_token_id,
        end_token=source.config.eos_token_ids[0],
        prompts=prompts,
        parts=settings.parts,
        shapes={name: yaml.safe_load(Path(f"configs/models/{name}.yaml").read_text()) for name in settings.shapes},
        draws=settings.draws,
        reference_draws=4 * settings.draws,
        isd_draws=max(settings.draws // 16, 2),
        texts=settings.texts,
        device=settings.device,
    )


def main(settings: Settings) -> None:
    """Run both sides, test, and write the report."""
    jax.config.update("jax_platforms", "cpu")  # the GPU is for the two sides
    numbers = settings.render
    if numbers is None:
        if settings.gguf is None:
            sys.exit("give the GGUF file of SmolLM2-135M-Instruct, or --render with the numbers of a run")
        settings.output.parent.mkdir(parents=True, exist_ok=True)  # now: the results of minutes go there
        clock = Clock("both", {})
        with tempfile.TemporaryDirectory() as name, clock.part("the whole run"):
            folder = Path(name)
            plan = make_plan(settings, settings.gguf)
            plan.save(folder)
            # One side at a time has the whole GPU.
            environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
            for side in ("theirs", "ours"):
                subprocess.run([sys.executable, "-m", f"scripts.equivalence.{side}", name], check=True, env=environment)
            with clock.part("tests"):
                results = analyse(folder, plan)
        command = shlex.join(["python", "-m", "scripts.equivalence_h100", *sys.argv[1:]])
        run = results.pop("run") | {"command": command, "all_seconds": clock.seconds["the whole run"]}
        numbers = settings.output.with_suffix(".json")
        before = json.loads(numbers.read_text()) if numbers.is_file() else {"runs": []}
        kept = [each for each in before["runs"] if not set(each["parts"]) & set(settings.parts)]
        write_file(numbers, json.dumps(before | results | {"runs": [*kept, run]}) + "\n")
    render(json.loads(numbers.read_text()), settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
