"""The look of all figures: colours that colour-blind readers tell apart too, axes, legends.

The colours are those of Okabe and Ito, "Color universal design" (2008). Where two things lie on each other, or meet in
grey print, give them a marker or a hatch as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PINK, SKY, YELLOW, GREY, BLACK = "#CC79A7", "#56B4E9", "#F0E442", "#BBBBBB", "#000000"


def use() -> None:
    """Have matplotlib draw all figures from now on in this project's style."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    )


def log2_axis(axis: Axes, values: Any) -> None:
    """Make x a logarithmic axis with a tick at each of `values`, such as numbers of nodes or batches."""
    axis.set_xscale("log", base=2)
    ticks = sorted({float(value) for value in values})
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.minorticks_off()


def legend_above(figure: Figure, ncols: int, **keywords: Any) -> None:
    """One legend for the whole figure, above its axes; the figure needs ``layout="constrained"``."""
    figure.legend(loc="outside upper center", ncols=ncols, frameon=False, **keywords)
