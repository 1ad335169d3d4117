"""What a compiled program sends between devices, and what it reads and writes, counted in the text of its HLO.

XLA's own cost analysis counts the body of a loop once. Here an instruction counts as often as it runs: bodies as many
times as their loops go round, where the program says so, else once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "sufc" for bits in (1, 2, 4, 8, 16, 32, 64, 128)
}
# dtype[sizes]{order:tiles, memory space}; S(n) is a memory on the chip.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(?:ROOT )?%([^ ]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([^ ]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%([\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
# One of output_to_operand_aliasing={{0}: (2, {}), …}.
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}")
# These move nothing, or what they move is told by others.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "while", "conditional", "call", "async-start", "async-update", "async-done",
}  # fmt: skip
_IN_PLACE = ("dynamic-update-slice", "scatter")
_FREE_CALLS = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    is_root: bool
    # The result, in words.
    type: str
    opcode: str
    operands: list[str]
    # What follows the operands, and all of it.
    attributes: str

    @property
    def called(self) -> list[str]:
        """Computations that run once whenever this does (of a loop: each time round)."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        either = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes)
        return _CALLED.findall(self.attributes) + either + (_NAME.findall(branches[1]) if branches else [])


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes what each instruction gives; through bitcasts."""
        users = defaultdict(list)
        for instruction in reversed(self.instructions.values()):
            seen_by = users[instruction.name] if instruction.opcode == "bitcast" else [instruction]
            for operand in instruction.operands:
                users[operand] += seen_by
        return users


def array_bytes(text: str, everywhere: bool = True) -> int:
    """Bytes of a type, all parts of a tuple; of those in main memory alone, unless ``everywhere``."""
    return sum(size for size, in_main in _arrays(text) if everywhere or in_main)


def _arrays(text: str) -> list[tuple[int, bool]]:
    """Bytes of every array of a type, and whether it is in main memory."""
    arrays = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        bits = _BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
        size = math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
        arrays.append((size, not re.search(r"S\([1-9]", layout)))
    return arrays


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in each instance of a collective, in any of the ways that XLA writes it."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(counted[1].split(",")[-1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    return devices


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that each device takes part in, and the bytes that it sends by them."""

    count: int
    sent: int


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str, devices: int):
        """``text`` is what ``compiled.as_text()`` gives, for so many devices."""
        self.devices = devices
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = self.computations[head[2]] = Computation(head[2])
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (instruction := _parse(line.strip())):
                current.instructions[instruction.name] = instruction

    def runs(self, into_fusions: bool) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction of the program with how often it runs; of a conditional, all branches."""

        def walk(name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times
                if instruction.opcode == "fusion" and not into_fusions:
                    continue
                rounds = times * (self.trips(instruction) if instruction.opcode == "while" else 1)
                for called in instruction.called:
                    if not _is_operator(instruction):
                        yield from walk(called, rounds)

        yield from walk(self.entry, 1)

    def trips(self, loop: Instruction) -> int:
        """How often a loop goes round: said by the compiler, or a bound that its condition compares with, else 1."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        name = re.search(r"condition=%([\w.\-]+)", loop.attributes)
        condition = self.computations[name[1]] if name else None
        while condition and condition.root.opcode in ("fusion", "call") and len(condition.root.called) == 1:
            # The bound may stand outside of the comparison, and goes in with it.
            outside = _constants(condition)
            condition = self.computations[condition.root.called[0]]
            if outside and not _constants(condition):
                return outside[0] if condition.root.opcode == "compare" and len(outside) == 1 else 1
        if condition is None or condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes:
            return 1
        bounds = _constants(condition)
        return bounds[0] if len(bounds) == 1 else 1

    def collectives(self) -> dict[str, Traffic]:
        """By kind: how many run, and the bytes that one device sends if each goes round a ring."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for computation, instruction, times in self.runs(into_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or _goes_on(computation, instruction):
                continue
            if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # so a TPU calls an all-reduce of which a device keeps its part
            given = sum(array_bytes(computation.instructions[name].type) for name in instruction.operands)
            taken = array_bytes(instruction.type)
            if instruction.opcode.endswith("-start"):
                # The type also holds what was given.
                taken = taken - given if kind in ("all-gather", "reduce-scatter") else given
            size = group_size(instruction.attributes, self.devices)
            found[kind][0] += times
            found[kind][1] += times * _sent(kind, given, taken, size)
        return {kind: Traffic(*found[kind]) for kind in COLLECTIVES if kind in found}

    def moved_bytes(self) -> int:
        """Bytes that instructions read from main memory and write to it, each fusion as one."""
        return sum(
            times * self._moved(computation, instruction)
            for computation, instruction, times in self.runs(into_fusions=False)
        )

    def _moved(self, computation: Computation, instruction: Instruction) -> int:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        operands = [computation.instructions[name] for name in instruction.operands]
        sizes = [array_bytes(operand.type, everywhere=False) for operand in operands]
        # Kernels are given some arrays in place of others that they lack.
        sizes = [0 if name in instruction.operands[:i] else sizes[i] for i, name in enumerate(instruction.operands)]
        result = array_bytes(instruction.type, everywhere=False)
        if opcode == "copy-start":  # its type is the copy, what is copied, and a flag
            return sum(size for size, in_main in _arrays(instruction.type)[:2] if in_main)
        if opcode.endswith("-start") and opcode.removesuffix("-start") not in COLLECTIVES:
            # The type also holds what was given.
            made = _arrays(instruction.type)[len(operands) :]
            result = sum(size for size, in_main in made if in_main)
            if opcode != "fusion-start":
                return made[0][0] + result  # a slice reads as much as it makes
        if opcode in ("fusion", "fusion-start"):
            return self._moved_by_fusion(self.computations[instruction.called[0]], sizes, result)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * result
        if opcode in _IN_PLACE:
            return 2 * array_bytes(computation.instructions[_update(instruction)].type)
        if opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            if target and target[1] in _FREE_CALLS:
                return 0
            # An operand that the result takes the place of is changed in few places.
            for operand in _ALIAS.findall(instruction.attributes):
                result -= sizes[int(operand)]
                sizes[int(operand)] = 0
        if opcode.endswith("-start"):
            return result  # of a collective the type tells both sides
        return sum(sizes) + max(result, 0)

    def _moved_by_fusion(self, body: Computation, sizes: list[int], result: int) -> int:
        parameters = {
            int(i.operands[0]) if i.operands else 0: i for i in body.instructions.values() if i.opcode == "parameter"
        }
        total = 0
        for number, size in enumerate(sizes):
            users = body.users[parameters[number].name] if number in parameters else []
            if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
                size = min(size, sum(array_bytes(user.type) for user in users))
            elif users and all(_updates(user, parameters[number], body) for user in users):
                size = 0
            total += size
        for updated in _updated(body):
            result -= array_bytes(updated.type) - array_bytes(body.instructions[_update(updated)].type)
        return total + max(result, 0)


def _parse(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    rest = re.sub(r"/\*index=\d+\*/", "", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    operands = [inside] if opcode == "parameter" else _NAME.findall(inside)
    attributes = inside + rest[end:] if opcode == "constant" else rest[end:]
    return Instruction(head[1], line.startswith("ROOT "), kind, opcode, operands, attributes)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _is_operator(instruction: Instruction) -> bool:
    """Whether what it calls is how elements are combined, such as the sum of a reduction."""
    return instruction.opcode not in ("while", "conditional", "call", "fusion", "async-start", "custom-call")


def _goes_on(computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective of a TPU has begun in another fusion: each that it runs beside names it again."""
    if "chain_id=" not in instruction.attributes:
        return False
    return not any("AsyncCollectiveStart" in other.attributes for other in computation.instructions.values())


def _constants(computation: Computation) -> list[int]:
    whole = (i for i in computation.instructions.values() if i.opcode == "constant" and re.match(r"[su]\d", i.type))
    values = (re.match(r"-?\d+(?=\))", i.attributes) for i in whole)
    return [int(value[0]) for value in values if value]


def _sent(kind: str, given: int, taken: int, size: int) -> int:
    """Bytes that a device sends in a collective of ``size`` devices: those of a ring."""
    if kind == "collective-permute":
        return given
    share = {"all-gather": taken, "reduce-scatter": given, "all-reduce": 2 * given}.get(kind, given)
    return share * (size - 1) // size


def _updated(body: Computation) -> list[Instruction]:
    """Updates in place that a fusion returns."""
    roots = [body.root]
    if body.root.opcode == "tuple":
        roots = [body.instructions[name] for name in body.root.operands]
    found = []
    for root in roots:
        while root.opcode in ("bitcast", "copy") and root.operands:
            root = body.instructions[root.operands[0]]
        if root.opcode in _IN_PLACE:
            found.append(root)
    return found


def _update(instruction: Instruction) -> str:
    """What an update in place puts there."""
    return instruction.operands[1] if instruction.opcode == "dynamic-update-slice" else instruction.operands[-1]


def _updates(user: Instruction, parameter: Instruction, body: Computation) -> bool:
    """Whether a parameter is only what an update in place changes."""
    if user.opcode not in _IN_PLACE:
        return False
    first = body.instructions[user.operands[0]]
    while first.opcode == "bitcast":
        first = body.instructions[first.operands[0]]
    return first.name == parameter.name
