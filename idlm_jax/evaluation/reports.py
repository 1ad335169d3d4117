"""What reports are made of: tables whose cells are text, and a directory of files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.errors import UserError


@dataclass(frozen=True)
class Grid:
    """A table whose cells are text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def markdown(grids: Sequence[Grid]) -> str:
    """The tables, each below its title."""
    parts = []
    for grid in grids:
        lines = [grid.header, ("---",) * len(grid.header), *grid.rows]
        parts.append(f"{grid.title}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)


def write_files(output: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files into a directory, which is made if need be; raises UserError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_file(output / name, content)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
