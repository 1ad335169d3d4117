"""Time of collectives over all devices of this machine, by size: what a sharded step cannot beat.

Run on several accelerators, by hand::

    python scripts/bench_links.py

Each collective runs many times inside one program, every one waiting for the one before. Bytes are those that one
device sends if they go round a ring: (n - 1)/n of what is gathered or scattered, twice that for an all-reduce.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

AXIS, REPEATS, STEPS = "device", 5, 20
# Bytes of an array that is whole on each device (before an all-reduce, after a gathering, before a scattering).
SIZES = (2**13, 2**17, 2**20, 2**24, 2**28)


def all_reduce(x: jax.Array, devices: int) -> jax.Array:
    """The mean of all devices' arrays."""
    return jax.lax.psum(x, AXIS) / devices


def all_gather(x: jax.Array, devices: int) -> jax.Array:
    """Every device's part of the array, gathered; then one's own part of it again."""
    part = x.size // devices
    here = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * part, part)
    return jax.lax.all_gather(here, AXIS, tiled=True)


def reduce_scatter(x: jax.Array, devices: int) -> jax.Array:
    """One's own part of the mean, in place of the first part of the array."""
    part = jax.lax.psum_scatter(x, AXIS, tiled=True) / devices
    return jax.lax.dynamic_update_slice_in_dim(x, part, 0, 0)


def seconds_of(collective: Callable[[jax.Array, int], jax.Array], size: int, devices: int) -> float:
    """Median time of one collective in bfloat16."""

    @jax.jit
    @partial(jax.shard_map, out_specs=PartitionSpec(AXIS), check_vma=False)
    def many(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, STEPS, lambda _, x: collective(x, devices).astype(x.dtype), x)

    x = jnp.ones((devices * size // 2,), jnp.bfloat16, out_sharding=PartitionSpec(AXIS))
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        jax.block_until_ready(many(x))
        times.append((time.perf_counter() - began) / STEPS)
    return statistics.median(times[1:])


def main() -> None:
    """Measure all and print a table."""
    devices = len(jax.devices())
    if devices < 2:
        raise SystemExit("needs at least two devices")
    jax.set_mesh(jax.make_mesh((devices,), (AXIS,)))
    print(f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16\n")
    print("| collective | bytes | microseconds | sent, GB/s |\n|---|---|---|---|")
    for collective, rounds in ((all_reduce, 2), (all_gather, 1), (reduce_scatter, 1)):
        for size in SIZES:
            seconds = seconds_of(collective, size, devices)
            sent = rounds * size * (devices - 1) / devices
            print(f"| {collective.__name__} | {size} | {1e6 * seconds:.1f} | {sent / seconds / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
