"""What the verbs of ``idlm plan`` share: targets and meshes as words, and the report."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import arg

from idlm_jax.cli.render import Notice, make_console
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from idlm_jax.planning.report import Report
    from idlm_jax.planning.targets import Target
    from idlm_jax.training.config import MeshSettings

Targets = Annotated[tuple[str, ...], arg(metavar="TARGET …")]


def parse_mesh(text: str) -> "MeshSettings":
    """The mesh of ``data=1,fsdp=8,tp=1``; an axis that is left out is 1, and -1 takes what is left."""
    from idlm_jax.training.config import MeshSettings

    known = [field.name for field in fields(MeshSettings)]
    sizes = dict.fromkeys(known, 1)
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in known:
            raise UserError(f"--mesh: unknown axis '{name}' (data=…,fsdp=…,tp=…){did_you_mean(name, known)}")
        if not size.removeprefix("-").isdecimal() or (int(size) < 1 and size != "-1"):
            raise UserError(f"--mesh: {name} must be a number of devices, or -1 for those that are left, not '{size}'")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError("--mesh: -1 takes the devices that are left, so at most one axis can have it")
    return MeshSettings(**sizes)


def make_plans(names: Sequence[str], make: "Callable[[Target], Report]", as_json: bool) -> None:
    """Compile for one target after the other and print what comes out; a table, or a line of JSON each."""
    from idlm_jax.planning.targets import parse_target

    reports = []
    for target in [parse_target(name) for name in names]:
        with Notice(f"compiling for {target.name} (minutes)"):
            reports.append(make(target))
        if as_json:
            print(json.dumps(reports[-1].as_dict()), flush=True)
    if not as_json:
        _show(reports)


def without_accelerators() -> None:
    """Take no accelerator of this machine: programs are compiled here, not run."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _show(reports: "Sequence[Report]") -> None:
    from idlm_jax.checkpoint.atomic import gigabytes

    console = make_console()
    kinds = list(reports[0].given)
    table = Table("target", "mesh", *kinds, "temporary", "needed of available", "fits", box=SIMPLE_HEAD, pad_edge=False)
    for report in reports:
        table.add_row(
            report.target,
            report.mesh,
            *(gigabytes(report.given[kind]) for kind in kinds),
            "?" if report.temporary is None else gigabytes(report.temporary),
            f"{gigabytes(report.total)} of {gigabytes(report.available)}",
            "yes" if report.fits else "no",
        )
    console.print("Memory of one device", soft_wrap=True)
    console.print(table)
    table = Table("target", "collective", "count", "sent", box=SIMPLE_HEAD, pad_edge=False)
    for report in reports:
        for kind, traffic in (report.collectives or {}).items():
            table.add_row(report.target, kind, str(traffic.count), gigabytes(traffic.sent))
    if table.row_count:
        console.print("Collectives of a step, and the bytes that one device sends by them", soft_wrap=True)
        console.print(table)
    table = Table(
        "target", "compute", "memory", "links", "at least", "bound by", "at most", box=SIMPLE_HEAD, pad_edge=False
    )
    for report in reports:
        if report.seconds is None:
            continue
        seconds = report.seconds
        times = (seconds.compute, seconds.memory, seconds.links, seconds.estimate)
        rate = f"{report.tokens / seconds.estimate:,.0f} tokens/s"
        table.add_row(report.target, *map(_duration, times), seconds.bound, rate)
    if table.row_count:
        console.print(
            "Estimate of a step: each resource at the rate of its data sheet, all at the same time", soft_wrap=True
        )
        console.print(table)
    for report in reports:
        if not report.fits:
            print(f"idlm: {report.target}: does not fit with {report.mesh}", file=sys.stderr)


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-6 else "0"
