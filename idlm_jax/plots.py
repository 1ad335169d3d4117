"""How our pictures look: one palette, light grids, no boxes; drawn without a display and returned as PNG."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from idlm_jax.errors import require_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Told apart by colour-blind readers too (Okabe and Ito).
ORANGE, AMBER, PINK, BLUE, SKY = "#d55e00", "#e69f00", "#cc79a7", "#0072b2", "#56b4e9"
DARK, GREY = "#555555", "#888888"


def require_matplotlib() -> None:
    """Raise UserError that says how to install what draws."""
    require_installed("matplotlib", "train")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axis: "Axes", grid: Literal["both", "x", "y"] = "both") -> None:
    """Frame and, behind what is drawn, grid as everywhere."""
    axis.grid(alpha=0.25, axis=grid)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def plain_ticks(axis: "Axis", at: Sequence[float]) -> None:
    """Numbers instead of powers of ten on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_locator(NullLocator())


def shade(number: int, count: int) -> tuple[float, float, float, float]:
    """The colour of one of several lines that have an order, dark to light."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * number / max(count - 1, 1))


def to_png(figure: "Figure") -> bytes:
    """The file's content."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
