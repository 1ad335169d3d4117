"""Time of one round's verification and drafting, kernels beside the reference, and the bytes' floor.

Run on a GPU, by hand (``--vocabulary 2000 --batch 2 --repeats 1`` is a check on a CPU, of the reference alone)::

    python scripts/bench_verify.py --batch 1 64 --stride 4

A round of the standard layout: logits of 2N - 1 rows a request, verify N, draft from N - 1. Correctness comes first:
the share of accepted counts, next tokens and drafts in which kernels and reference differ (ties within float32
rounding may). A case is timed inside one program of many rounds that feed each other, so that launches are queued as in
decoding. The floor is one read of the logits at the copy bandwidth measured here.
"""

import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.verify.api import draft, verify
from pallas_kernels.verify.reference import COUPLINGS, Drafts, Filters

# Temperature, top-k, top-p of every request of a batch.
FILTERS = {
    "greedy": (0.0, 0, 1.0),
    "none": (1.0, 0, 1.0),
    "k 50, p .95": (1.0, 50, 0.95),
    "p .95": (1.0, 0, 0.95),
}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    batch: tuple[int, ...] = (1, 64)
    stride: tuple[int, ...] = (4,)
    vocabulary: int = 151_936
    # Standard deviation of the random logits: at 3, top-p .95 keeps 9 % of the vocabulary; at 5, 0.04 %.
    spread: float = 5.0
    # Rounds a program runs, and how often it is timed.
    rounds: int = 20
    repeats: int = 7


def one_round(
    logits: jax.Array, filters: Filters, drafts: Drafts, emitted: jax.Array, coupling: str, implementation: str
) -> tuple[jax.Array, jax.Array, Drafts]:
    """Verify and draft again: accepted counts, next tokens, drafts."""
    batch, rows, _ = logits.shape
    stride, rule = (rows + 1) // 2, COUPLINGS[coupling]
    warm = jnp.ones(batch, bool)
    positions = emitted[:, None] + jnp.arange(stride)
    accepted, token = verify(logits, filters, rule, drafts, warm, positions, 0, implementation=implementation)
    mask_rows = jnp.broadcast_to(stride + jnp.arange(stride - 1), (batch, stride - 1))
    after = (positions + accepted[:, None] + 1)[:, :-1]
    return accepted, token, draft(logits, mask_rows, filters, rule, after, 0, implementation=implementation)


def many_rounds(
    logits: jax.Array, filters: Filters, drafts: Drafts, coupling: str, implementation: str, rounds: int
) -> tuple[jax.Array, Drafts]:
    """Rounds that feed each other their drafts and counts."""

    def body(_: int, carry: tuple[jax.Array, Drafts]) -> tuple[jax.Array, Drafts]:
        emitted, drafts = carry
        accepted, _, drafts = one_round(logits, filters, drafts, emitted, coupling, implementation)
        return emitted + accepted + 1, drafts

    return jax.lax.fori_loop(0, rounds, body, (jnp.zeros(len(logits), jnp.int32), drafts))


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    elements, inner = (2**22, 2) if jax.default_backend() == "cpu" else (2**29, 10)
    x = jnp.ones(elements, jnp.float32)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, inner, lambda _, y: -y, x))
    return 2 * inner * x.nbytes / median_seconds(lambda: copy(x), 5)


def median_seconds(call, repeats: int) -> float:
    """Median wall time of a call, its result awaited, after one that warms up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(batch: int, stride: int, coupling: str, name: str, settings: Settings) -> dict[str, float | tuple]:
    """Compare the implementations on one case, then time them; seconds a round."""
    seeds = jax.random.split(jax.random.key(1), batch)
    temperature, top_k, top_p = (jnp.full(batch, value) for value in FILTERS[name])
    filters = Filters(temperature.astype(jnp.float32), top_k, top_p.astype(jnp.float32), seeds)
    shape = (batch, 2 * stride - 1, settings.vocabulary)
    logits = settings.spread * jax.random.normal(jax.random.key(2), shape, jnp.float32)
    # Mask rows resemble the clean rows that verify their drafts, so that drafts are often right.
    logits = logits.at[:, stride:].set(logits[:, : stride - 1] + 0.1 * logits[:, stride:])
    log_q = jnp.zeros((batch, stride - 1, settings.vocabulary)) if COUPLINGS[coupling].stores_q else None
    drafts = Drafts(jnp.zeros((batch, stride - 1), jnp.int32), log_q)
    implementations = ("xla", "triton") if jax.default_backend() == "gpu" else ("xla",)
    rounds = jax.jit(many_rounds, static_argnames=("coupling", "implementation", "rounds"))
    once = jax.jit(one_round, static_argnames=("coupling", "implementation"))
    first = jax.device_get(once(logits, filters, drafts, jnp.zeros(batch, jnp.int32), coupling, "xla"))
    outcomes, seconds = {}, {}
    for implementation in implementations:
        accepted, token, new = once(logits, filters, first[2], first[0] + 1, coupling, implementation)
        outcomes[implementation] = [jax.device_get(array) for array in (accepted, token, new.tokens)]
        call = lambda chosen=implementation: rounds(logits, filters, drafts, coupling, chosen, settings.rounds)  # noqa: E731
        seconds[implementation] = median_seconds(call, settings.repeats) / settings.rounds
    ours = outcomes[implementations[-1]]
    differing = tuple(float((a != b).mean()) for a, b in zip(outcomes["xla"], ours, strict=True))
    return {**seconds, "differing": differing, "bytes": logits.nbytes, "accepted": float(ours[0].mean())}


def main(settings: Settings) -> None:
    """Measure every case and print a table."""
    device, copied = jax.devices()[0].device_kind, bandwidth()
    title = (
        f"one round, vocabulary {settings.vocabulary}, {device}, jax {jax.__version__}, copy {copied / 1e12:.2f} TB/s"
    )
    columns = ("batch", "N", "coupling", "filters", "xla ms", "triton ms", "floor ms", "accepted", "differing")
    table = Table(*columns, title=title)
    for batch in settings.batch:
        for stride in settings.stride:
            for coupling in COUPLINGS:
                for name in FILTERS:
                    case = measure(batch, stride, coupling, name, settings)
                    milliseconds = [f"{1e3 * case[key]:.3f}" if key in case else "-" for key in ("xla", "triton")]
                    row = [str(batch), str(stride), coupling, name, *milliseconds]
                    row += [f"{1e3 * case['bytes'] / copied:.3f}", f"{case['accepted']:.2f}"]
                    table.add_row(*row, " ".join(f"{share:.3f}" for share in case["differing"]))
                    print("measured", *row, flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
