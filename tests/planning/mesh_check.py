"""Programs on 8 simulated devices whose traffic and memory are known by hand; run by test_planning.py."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import math  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from idlm_jax.checkpoint.source import Configuration  # noqa: E402
from idlm_jax.decoding.config import DecodeConfig  # noqa: E402
from idlm_jax.planning.decoding import Workload, plan_decoding  # noqa: E402
from idlm_jax.planning.hlo import Program, Traffic  # noqa: E402
from idlm_jax.planning.targets import Chip, Target  # noqa: E402
from idlm_jax.planning.training import plan_training  # noqa: E402
from idlm_jax.training.config import AdapterSettings, MeshSettings, Stage, TrainConfig  # noqa: E402
from tests.decoding.support import tiny_config  # noqa: E402

CHIP = Chip("cpu", 10**9, 1e12, 1e11, 1e10, {8: ""})


@dataclass(frozen=True)
class Here(Target):
    """The simulated devices as a target."""

    def devices(self) -> list[jax.Device]:
        """Those of this process."""
        return jax.devices()


def check_traffic() -> None:
    """Each collective once outside of a scan of 5 rounds, and once inside."""
    mesh = jax.make_mesh((2, 4), ("a", "b"))

    def collectives(x: jax.Array) -> jax.Array:  # [8, 128] float32 on each device: 4096 bytes
        gathered = jax.lax.all_gather(x, "b", axis=0, tiled=True)  # 16384 bytes, of which 3/4 come from others
        part = jax.lax.psum_scatter(gathered * 2, "b", scatter_dimension=0, tiled=True)
        total = jax.lax.psum(part + 1, "a")
        exchanged = jax.lax.all_to_all(total * 3, "b", 0, 0, tiled=True)
        return jax.lax.ppermute(exchanged + 1, "a", [(0, 1), (1, 0)])

    def program(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (collectives(x), None), collectives(x), length=5)[0]

    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(program, out_specs=P(("a", "b")), check_vma=False))
        x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
        text = mapped.lower(x).compile().as_text()
    once = {
        "all-gather": 16384 * 3 // 4,
        "reduce-scatter": 16384 * 3 // 4,
        "all-reduce": 2 * 4096 // 2,
        "all-to-all": 4096 * 3 // 4,
        "collective-permute": 4096,
    }
    wanted = {kind: Traffic(6, 6 * sent) for kind, sent in once.items()}
    assert Program(text, 8).collectives() == wanted, Program(text, 8).collectives()


def check_training_memory() -> None:
    """Weights and both moments of Adam, those of the full model over 8 devices and an adapter's beside a frozen one."""
    model = tiny_config(vocab_size=64)
    source = Configuration(Path("model.yaml"), model.replace(max_position_embeddings=64))
    common = {"stages": (Stage(10, 3),), "length": 32, "batch_size": 8, "mask_token": "63"}
    # By hand: embedding and head of 64 × 16, per layer 16 × 32, twice 16 × 16, 32 × 16 and thrice 16 × 32 of kernels.
    matrices = 2 * 64 * 16 + 2 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 32)
    vectors = 16 + 2 * (2 * 16 + 2 * 8)
    report = plan_training(
        TrainConfig("", (), "", mode="full", **common), Here("cpux8", CHIP, 8), source, MeshSettings(1, 4, 2)
    )
    each = matrices // 8 + vectors
    assert report.given["weights"] == 4 * each, report
    counters = report.given["optimizer"] - 2 * 4 * each
    assert 0 < counters <= 16, report  # the numbers of steps that schedule and moments have seen
    assert report.fits and report.total == sum(report.given.values()) + report.temporary
    assert report.collectives["all-gather"].count and report.mesh == "data=1 fsdp=4 tp=2"

    settings = AdapterSettings(rank=4, target_modules=("q_proj",))
    lora = TrainConfig("", (), "", mode="gated-lora", adapter=settings, **common)
    report = plan_training(lora, Here("cpux8", CHIP, 8), source, MeshSettings(8, 1, 1))
    adapter = 16 + 2 * 4 * (16 + 32)
    assert report.given["weights"] == 2 * (matrices + vectors) + 4 * adapter, report


def check_decoding_memory() -> None:
    """A copy of the model on each pair of devices, and a cache split over requests and heads."""
    model = tiny_config(vocab_size=64)
    work = Workload(DecodeConfig(stride=3, layout="branch").policy(), 8, 55)
    report = plan_decoding(model, work, Here("cpux8", CHIP, 8), 2)
    assert report.given["KV cache"] == 2 * 2 * 8 * 2 * (55 + 9) * 8 * 2 // 8, report
    kernels = 2 * 64 * 16 + 2 * (2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 32)
    assert report.given["weights"] == 2 * (kernels // 2 + 16 + 2 * (2 * 16 + 2 * 8)), report
    # Sums after attention and MLP of 2 layers, and of what was looked up; logits of 2 requests and 9 rows.
    rows = 2 * 9
    assert report.collectives["all-reduce"].sent >= 4 * rows * 16 * 2, report
    assert report.collectives["all-to-all"] == Traffic(1, rows * 32 * 4 // 2), report
    assert math.isfinite(report.seconds.estimate) and report.seconds.bound in ("compute", "memory", "links")

    adapted = plan_decoding(model, replace(work, rank=4), Here("cpux8", CHIP, 8), 2)
    # Of q, k, v, gate and up the second matrices are split, of o and down the first: [in, 4] and [4, out] of each.
    first, second = 5 * 16 + (32 + 32) // 2, (32 + 2 * 16 + 2 * 32) // 2 + 2 * 16
    assert adapted.given["weights"] == report.given["weights"] + 2 * 2 * 4 * (first + second), adapted


if __name__ == "__main__":
    check_traffic()
    check_training_memory()
    check_decoding_memory()
    print("ok")
