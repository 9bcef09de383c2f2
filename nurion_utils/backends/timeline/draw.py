"""Pictures of Horovod's timeline."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nurion_utils import style
from nurion_utils._checks import require_columns
from nurion_utils.backends.timeline.overlap import intervals, merge

ALWAYS_SHOWN = ["compute", "negotiate", "fuse", "wire", "unfuse"]  # lanes; others if there is something in them
MOST_RANKS = 16  # more do not fit a page
MOST_BARS = 1000  # in a lane; what is closer together than that is drawn as one
LOOKS = {  # hatches are for those who print in grey
    "compute": (style.GREEN, ""),
    "negotiate": (style.YELLOW, ".."),
    "queue": (style.GREY, ""),
    "prepare": (style.PINK, "xx"),
    "fuse": (style.SKY, "\\\\"),
    "wire": (style.VERMILION, "//"),
    "unfuse": (style.BLUE, "--"),
}


def timeline(
    table: pd.DataFrame, compute: pd.DataFrame | None = None, first_s: float | None = None, last_s: float | None = None
) -> Figure:
    """What went on when: lanes for the computation and the announcements of each rank, and for each phase.

    `table` is as of `read`, `compute` as of `steps`, and drawn is what lies between `first_s` and `last_s`, in seconds
    since the start of the timeline; None stands for the first and the last span. What is less than a thousandth of the
    picture apart is drawn as one. The lane "wire" has the numbers of the buffers, where there is room. ValueError if a
    column is missing, there are more than 16 ranks, or there is nothing to draw.
    """
    lanes = _lanes(table, compute)
    begin, end = (np.concatenate(times) for times in zip(*(intervals(rows) for *_, rows in lanes), strict=True))
    first_s = begin.min(initial=math.inf) if first_s is None else first_s
    last_s = end.max(initial=-math.inf) if last_s is None else last_s
    shown = []
    for label, phase, rows in lanes:
        rows = rows[(rows["start_s"] <= last_s) & (rows["start_s"] + rows["duration_s"] >= first_s)]
        if len(rows) or phase in ALWAYS_SHOWN:
            shown.append((label, phase, rows))
    if not (first_s < last_s and any(len(rows) for *_, rows in shown)):
        raise ValueError(f"there is nothing to draw between {first_s:g} and {last_s:g} s")
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(shown) + 0.9), layout="constrained")
    for y, (_, phase, rows) in enumerate(shown):
        begin, end = intervals(rows)
        _lane(axis, y, phase, np.maximum(begin, first_s), np.minimum(end, last_s), (last_s - first_s) / MOST_BARS)
        if phase == "wire":
            _numbers(axis, y, rows, first_s, last_s)
    axis.set_yticks(range(len(shown)), [label for label, *_ in shown])
    axis.set(xlabel="time since the start of the timeline, ms", xlim=(first_s * 1e3, last_s * 1e3))
    axis.set_ylim(len(shown) - 0.5, -0.5)
    return figure


def _lanes(table: pd.DataFrame, compute: pd.DataFrame | None) -> list[tuple[str, str, pd.DataFrame]]:
    """Label, phase and rows of each lane from the top."""
    require_columns(table, ["phase", "rank", "start_s", "duration_s", "buffer"])
    computing = []
    if compute is not None:
        require_columns(compute, ["start_s", "duration_s"])
        computing = compute.groupby("rank") if "rank" in compute else [(0, compute)]
    ready = table[table["phase"] == "ready"].groupby("rank")
    if max(len(computing), len(ready)) > MOST_RANKS:
        raise ValueError(f"a drawing has room for {MOST_RANKS} ranks; choose the rows of some")
    lanes = [(f"rank {rank} computes", "compute", rows) for rank, rows in computing]
    lanes += [(f"rank {rank} is ready", "ready", rows) for rank, rows in ready]
    for phase in ("cycle", "negotiate", "queue", "prepare", "fuse", "wire", "unfuse"):
        lanes.append((phase, phase, table[table["phase"] == phase]))
    return lanes


def _lane(axis: Axes, y: int, phase: str, begin: np.ndarray, end: np.ndarray, bar_s: float) -> None:
    """Bars no thinner than `bar_s`; strokes for what has no duration."""
    if phase in LOOKS:
        left, right = merge(begin, end, gap_s=bar_s)
        colour, hatch = LOOKS[phase]
        bars = np.column_stack([left, np.maximum(right - left, bar_s)]) * 1e3
        axis.broken_barh(bars, (y - 0.35, 0.7), facecolor=colour, hatch=hatch, edgecolor="black", lw=0.3)
    else:
        axis.vlines(np.unique(np.round(begin / bar_s)) * bar_s * 1e3, y - 0.35, y + 0.35, color="black", lw=0.8)


def _numbers(axis: Axes, y: int, rows: pd.DataFrame, first_s: float, last_s: float) -> None:
    """The numbers of the buffers on what was sent, where they fit."""
    begin, end = intervals(rows)
    spans = pd.DataFrame({"begin": np.maximum(begin, first_s), "end": np.minimum(end, last_s)})
    spans = spans.groupby(rows["buffer"].to_numpy()).agg({"begin": "min", "end": "max"})
    for number, begin_s, end_s in spans[spans.index >= 0].itertuples():
        if end_s - begin_s > 9e-3 * len(str(number)) * (last_s - first_s):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            middle_ms = (begin_s + end_s) / 2 * 1e3
            axis.text(middle_ms, y, str(number), ha="center", va="center", fontsize=6, bbox=box)
