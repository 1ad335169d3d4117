"""What a compiled step takes on one device: memory by kind, traffic, and the least time that it can take."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from idlm_jax.errors import UserError
from idlm_jax.planning.hlo import Program, Traffic
from idlm_jax.planning.targets import Target

# How libtpu tells that a program is too large: "Used 31.91G of 15.75G hbm".
_TOO_LARGE = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|memory required[^(]*\(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Seconds:
    """What a step takes at least of each resource of a device, by its data sheet."""

    compute: float
    memory: float
    links: float

    @property
    def bound(self) -> str:
        """The resource that is needed longest."""
        return max(asdict(self), key=asdict(self).__getitem__)

    @property
    def estimate(self) -> float:
        """All three at the same time, at full speed: an estimate from below."""
        return max(asdict(self).values())


@dataclass(frozen=True)
class Report:
    """One step on one target; bytes are those of one device."""

    target: str
    mesh: str
    # Tokens of a training step, or the most that a decode step can emit; of all devices.
    tokens: int
    # In what it is given, by kind; and what it holds besides while it runs, unknown where the compiler gave up.
    given: dict[str, int]
    temporary: int | None
    total: int
    available: int
    # Unknown where the compiler gave up.
    collectives: dict[str, Traffic] | None
    seconds: Seconds | None

    @property
    def fits(self) -> bool:
        """Whether it can run there."""
        return self.total <= self.available

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        seconds = self.seconds
        estimate = {"estimate": seconds.estimate, "bound": seconds.bound, **asdict(seconds)} if seconds else None
        return {**asdict(self), "fits": self.fits, "seconds": estimate}


def examine(
    lowered: jax.stages.Lowered, target: Target, mesh: str, tokens: int, given: Mapping[str, int], flops: float
) -> Report:
    """Compile and weigh a step; ``given`` are its arguments by kind, ``flops`` those of one device."""
    chip, known = target.chip, (target.name, mesh, tokens, dict(given))
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise UserError(f"{target.name}: does not compile: {str(error).splitlines()[0]}") from error
        total = max(needed, sum(given.values()))
        return Report(*known, None, total, chip.memory, None, None)
    memory = compiled.memory_analysis()
    assert memory is not None, "every backend of ours tells the memory of a program"
    # What is donated becomes the result; anything else that is returned comes on top.
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text()
    assert text is not None, "every compiler of ours tells its program"
    program = Program(text, target.count)
    collectives = program.collectives()
    seconds = Seconds(
        compute=flops / chip.peak,
        memory=program.moved_bytes() / chip.bandwidth,
        links=sum(traffic.sent for traffic in collectives.values()) / chip.links,
    )
    total = sum(given.values()) + temporary
    return Report(*known, temporary, total, chip.memory, collectives, seconds)


def _needed(message: str) -> int | None:
    """Bytes that a program which is too large would have taken, from what the compiler says of it."""
    found = _TOO_LARGE.search(message)
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * _UNITS[unit])
