"""What a decode step costs: the floor that bytes and FLOPs set, steps that were measured, and a prediction of others.

``scripts/bench_decode_step.py --json`` measures. A step reads weights and cache and multiplies; the larger of the two
times is a floor. How far real steps lie above it is fitted to those of the same device that were measured.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import lsq_linear

from idlm_jax.backbone.adapter import AdapterConfig, adapter_shapes
from idlm_jax.backbone.weights import parameter_count
from idlm_jax.checkpoint.atomic import gigabytes
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.cache import cache_bytes
from idlm_jax.errors import UserError

# What a line of a cost table must say; the script writes more.
_NAMES, _SIZES, _RATES = ("device", "dtype", "kernels"), ("batch", "rows", "context", "rank"), ("bandwidth", "peak")
_SECONDS = ("step", "byte_floor")
# How much the floor itself counts in a fit, in measured steps: little, but it decides what they leave open.
_PRIOR = 0.01
# The bytes of a table's steps and of the model that it is used for may differ by so much: seconds are often rounded.
_BYTES_TOLERANCE = 0.02


@dataclass(frozen=True)
class Shape:
    """One decode step."""

    batch: int
    # Window rows a request.
    rows: int
    # Tokens in the cache.
    context: int
    # Of the gated LoRA; 0 is none.
    rank: int = 0


@dataclass(frozen=True)
class Device:
    """What bounds a step, as measured."""

    name: str
    # Bytes/s read and written by a large copy, FLOP/s of a large matrix product.
    bandwidth: float
    peak: float


@dataclass(frozen=True)
class CostTable:
    """Measured steps on one device."""

    device: Device
    dtype: jnp.dtype
    # "auto" or "xla"
    kernels: str
    # Median seconds of every shape.
    seconds: dict[Shape, float]
    # Fewest bytes that each must move.
    moved: dict[Shape, float]


def demand(config: ModelConfig, shape: Shape, dtype: jnp.dtype) -> tuple[int, int]:
    """Fewest bytes a step must move (weights, adapter and cache read once) and the FLOPs that it must do."""
    read = _parameters_read(config, shape.rank)
    keys = shape.context + shape.rows
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    flops = shape.batch * shape.rows * (2 * read + attention)
    return read * jnp.dtype(dtype).itemsize + cache_bytes(config, shape.batch, keys, dtype), flops


@cache
def _parameters_read(config: ModelConfig, rank: int) -> int:
    embedding = config.vocab_size * config.hidden_size
    read = parameter_count(config) - (0 if config.tie_word_embeddings else embedding)
    if rank:
        shapes = adapter_shapes(config, AdapterConfig(rank, 2 * rank))
        read += sum(a * b for a, b in jax.tree.leaves(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)))
    return read


@dataclass(frozen=True)
class StepCosts:
    """Seconds of any decode step: measured where they were, else predicted.

    A prediction is ``above`` × the larger of the times of bytes and FLOPs + ``exposed`` × the smaller: 1 and 0 are the
    floor, 1 and 1 work that never overlaps.
    """

    config: ModelConfig
    device: Device
    dtype: jnp.dtype
    measured: dict[Shape, float]

    @classmethod
    def of_table(cls, config: ModelConfig, table: CostTable) -> "StepCosts":
        """Costs of the model whose steps were measured; raises UserError if it cannot be this one."""
        for shape, moved in table.moved.items():
            needed = demand(config, shape, table.dtype)[0]
            if abs(needed / moved - 1) > _BYTES_TOLERANCE:
                raise UserError(
                    f"the cost table is of another model: a step of batch {shape.batch} and {shape.rows} rows reads "
                    f"{gigabytes(moved)} there, {gigabytes(needed)} with this one"
                )
        return cls(config, table.device, table.dtype, table.seconds)

    def floors(self, shape: Shape) -> tuple[float, float]:
        """Seconds that the bytes and the FLOPs of a step take at least."""
        moved, flops = demand(self.config, shape, self.dtype)
        return moved / self.device.bandwidth, flops / self.device.peak

    def predicted(self, shape: Shape) -> float:
        """Seconds by the fit."""
        above, exposed = self.fit(shape.rank)
        return above * max(self.floors(shape)) + exposed * min(self.floors(shape))

    def seconds(self, shape: Shape) -> tuple[float, bool]:
        """Seconds of a step, and whether they were measured."""
        if shape in self.measured:
            return self.measured[shape], True
        return self.predicted(shape), False

    def fit(self, rank: int) -> tuple[float, float]:
        """``above`` and ``exposed``: least squares of relative errors over measured steps of this rank, if any."""
        shapes = [shape for shape in self.measured if shape.rank == rank] or list(self.measured)
        terms = [sorted(self.floors(shape), reverse=True) for shape in shapes]
        relative = [[term / self.measured[shape] for term in both] for shape, both in zip(shapes, terms, strict=True)]
        weight = math.sqrt(_PRIOR)
        matrix = np.array([*relative, [weight, 0], [0, weight]])
        wanted = np.array([*[1.0] * len(shapes), weight, 0])
        above, exposed = lsq_linear(matrix, wanted, bounds=([1, 0], [np.inf, 1]), method="bvls").x
        return float(above), float(exposed)


def read_costs(path: Path) -> CostTable:
    """Read the lines that ``scripts/bench_decode_step.py --json`` printed; a shape measured again counts by its median.

    Raises UserError for what is not such a table, and for steps that cannot be compared with each other.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"cannot read {path}: {reason}") from None
    lines = [_parse(line, f"{path}:{i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} has no lines; print them with scripts/bench_decode_step.py --json")
    for name in _NAMES:
        values = sorted({line[name] for line in lines})
        if len(values) > 1:
            raise UserError(f"{path}: steps of {' and '.join(values)} cannot be compared; keep those of one {name}")

    def median(name: str, among: Sequence[dict[str, Any]] = lines) -> float:
        return statistics.median(line[name] for line in among)

    first = lines[0]
    shapes: dict[Shape, list[dict[str, Any]]] = {}
    for line in lines:
        shapes.setdefault(Shape(*(line[name] for name in _SIZES)), []).append(line)
    return CostTable(
        Device(first["device"], median("bandwidth"), median("peak")),
        jnp.dtype(first["dtype"]),
        first["kernels"],
        {shape: median("step", measured) for shape, measured in shapes.items()},
        {shape: measured[0]["byte_floor"] * measured[0]["bandwidth"] for shape, measured in shapes.items()},
    )


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not JSON; give the output of scripts/bench_decode_step.py --json") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object; give the output of scripts/bench_decode_step.py --json")
    for name in (*_NAMES, *_SIZES, *_RATES, *_SECONDS):
        if name not in values:
            raise UserError(f"{where}: '{name}' is missing; give the output of scripts/bench_decode_step.py --json")
        if not _is_valid(name, values[name]):
            raise UserError(f"{where}: '{name}' cannot be {values[name]!r}")
    return values


def _is_valid(name: str, value: Any) -> bool:
    if name == "dtype":
        return value in ("bfloat16", "float32")
    if name in _NAMES:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if name in _SIZES else int | float):
        return False
    return value >= 0 if name in ("rank", "context") else 0 < value < math.inf
