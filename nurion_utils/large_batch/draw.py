"""Pictures of large-batch training; every function takes a table and returns a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nurion_utils import style
from nurion_utils._checks import require_columns
from nurion_utils.large_batch.experiment import summarise

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart without colour too.
STYLES = {
    "fixed": {"color": style.VERMILION, "ls": "--", "marker": "s"},
    "square root": {"color": style.ORANGE, "ls": "-.", "marker": "v"},
    "linear": {"color": style.SKY, "ls": ":", "marker": "^"},
    "linear, warm-up": {"color": style.BLUE, "ls": "-", "marker": "o"},
    "SGD, tuned": {"color": style.BLACK, "ls": (0, (5, 1)), "marker": "x"},
    "LARS": {"color": style.GREEN, "ls": "-", "marker": "D"},
    "LAMB": {"color": style.PINK, "ls": "--", "marker": "P"},
}


def errors(table: pd.DataFrame, base_error: float | None = None, axis: Axes | None = None) -> Figure:
    """Test error against batch: the mean over seeds of each method, and its 95 % interval.

    `table` has the columns method, batch, test_error, and a row per training. `base_error`, in per cent, becomes a
    line: that of the batch from which the rules start. The figure is a new one unless an axis is given.
    """
    import matplotlib.pyplot as plt

    summary = summarise(table).sort_values("batch")
    axis = axis or plt.subplots(figsize=(7, 4.2), layout="constrained")[1]
    for method, look in STYLES.items():
        if len(rows := summary[summary["method"] == method]):
            settings = {"label": method, "ms": 5, "capsize": 3, "lw": 1.3, **look}
            axis.errorbar(rows["batch"], rows["mean"], rows["half_interval"], **settings)
    if base_error is not None:
        axis.axhline(base_error, color="black", lw=0.8)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (2, -3), "textcoords": "offset points", "fontsize": 8}
        axis.annotate("error at a batch of 32", (0.25, base_error), va="top", **place)
    batch_axis(axis, table["batch"])
    axis.set(yscale="log", ylabel="test error, %", ylim=(10, 100))
    axis.set_yticks([10, 15, 20, 30, 50, 100], [10, 15, 20, 30, 50, 100])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return axis.figure


def courses(table: pd.DataFrame, batch: int) -> Figure:
    """Validation error after each epoch at one batch, a line for each training.

    `table` has the columns method, batch, and validation_errors: a list, or a text of numbers as in recorded tables.
    """
    require_columns(table, ["method", "batch", "validation_errors"])
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    rows = table[table["batch"] == batch]
    for method, look in STYLES.items():
        for i, course in enumerate(rows.loc[rows["method"] == method, "validation_errors"]):
            course = [float(error) for error in (course.split() if isinstance(course, str) else course)]
            axis.plot(range(1, len(course) + 1), course, ms=4, lw=1.2, label=None if i else method, **look)
    axis.set(xlabel="epoch", ylabel="validation error, %", ylim=(0, 100))
    axis.legend(fontsize=8)
    return figure


def tradeoff(points: pd.DataFrame, curve: pd.DataFrame, critical: float) -> Figure:
    """Steps and samples that it takes to come to an error, against the batch; points measured, lines fitted.

    `points` and `curve` have the columns batch, steps, samples; at the batch `critical` both are twice their least.
    """
    for table in (points, curve):
        require_columns(table, ["batch", "steps", "samples"])
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"steps": "steps: the time it takes", "samples": "samples: the node-hours it costs"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.loglog(points["batch"], points[name], "o", color=style.BLUE, label="measured")
        axis.loglog(curve["batch"], curve[name], color=style.BLUE, lw=1, label="fitted")
        axis.axvline(critical, color="black", ls=":", lw=1)
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom", "fontsize": 8}
        axis.annotate(f"critical batch {critical:,.0f}", (critical, 1.0), **place)
        batch_axis(axis, points["batch"])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.set_title(title, pad=16)
        axis.set(ylabel=f"{name} to the target error")
        axis.legend(fontsize=8, loc="lower left" if name == "steps" else "upper left")
    return figure


def batch_axis(axis: Axes, batches: pd.Series) -> None:
    """A logarithmic axis with these batches as its ticks."""
    style.log2_axis(axis, batches)
    axis.tick_params("x", rotation=45)
    axis.set_xlabel("batch of all ranks")
