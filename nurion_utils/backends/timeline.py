"""Horovod's timeline as a table: what each tensor waited for, how it travelled, and what steps had to bear of that.

>>> table = timeline.read("timeline.json")
>>> compute["start_s"] -= table.attrs["epoch_s"]  # from time.time() or tf.timestamp() to the clock of the timeline
>>> timeline.steps(table, compute)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nurion_utils._checks import require_columns
from nurion_utils.backends.timeline_file import TimelineError, read
from nurion_utils.backends.timeline_spans import OPERATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OPERATIONS", "TimelineError", "draw", "read", "steps"]

ALWAYS_SHOWN = ["compute", "negotiate", "fuse", "wire", "unfuse"]  # lanes; others if there is something in them
MOST_RANKS = 16  # more do not fit a page
MOST_BARS = 1000  # in a lane; what is closer together than that is drawn as one
STYLE = {  # colours that all eyes tell apart, hatches for those who print in grey
    "compute": ("#009E73", ""),
    "negotiate": ("#F0E442", ".."),
    "queue": ("#BBBBBB", ""),
    "prepare": ("#CC79A7", "xx"),
    "fuse": ("#56B4E9", "\\\\"),
    "wire": ("#D55E00", "//"),
    "unfuse": ("#0072B2", "--"),
}


def steps(table: pd.DataFrame, compute: pd.DataFrame) -> pd.DataFrame:
    """What the communication of each training step came to, and how much of it the step had to wait for.

    A step lasts from its first computation to that of the next step; the last one to the end of its last span, so
    leave out of the table what came after the training.

    Parameters
    ----------
    table
        As of `read`.
    compute
        When rank 0 computed: ``step, start_s, duration_s``; if there is a column ``rank``, its rows of rank 0 count.
        On the clock of the timeline: subtract ``table.attrs["epoch_s"]`` from seconds since 1970.

    Returns
    -------
    pandas.DataFrame
        One row per step; an instant counts once in a figure in seconds, however many spans cover it:

        - ``step``, ``step_s``
        - ``compute_s``: rank 0 computed
        - ``communication_s``: an operation was under way
        - ``exposed_s``: the part of that in which rank 0 did not compute
        - ``negotiation_s``: some ranks had announced a tensor and others had not
        - ``exposed_negotiation_s``: the part of that without computation or operation
        - ``tensors``, ``buffers``, ``tensors_per_buffer``, ``bytes``: of the buffers that began in the step;
          ``bytes`` is NaN where the file does not tell those of each tensor

    Raises
    ------
    ValueError
        If columns are missing, times of compute cannot be, or its steps do not come one after the other.
    """
    require_columns(table, ["phase", "start_s", "duration_s", "bytes", "buffer"])
    starts, computing = _compute_of_rank_0(compute)
    whole = table[table["phase"].isin(OPERATIONS)].sort_values("start_s", kind="stable")
    operating, negotiating = _intervals(whole), _intervals(table[table["phase"] == "negotiate"])
    start = starts.to_numpy()
    last = max(end[begin >= start[-1]].max(initial=start[-1]) for begin, end in (computing, operating, negotiating))
    bounds = np.append(start, last)

    def within_s(*kinds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """How much of each step the intervals of these kinds cover."""
        begin, end = _merge(*map(np.concatenate, zip(*kinds, strict=True)))
        n_begun = np.searchsorted(begin, bounds, side="right")
        yet_to_come = np.maximum(np.append(-math.inf, end)[n_begun] - bounds, 0)
        covered_s = np.append(0, np.cumsum(end - begin))[n_begun] - yet_to_come
        return np.maximum(np.diff(covered_s), 0)  # rounding may go below

    compute_s, communication_s, negotiation_s = within_s(computing), within_s(operating), within_s(negotiating)
    busy_s = within_s(computing, operating)
    waiting_s = within_s(computing, operating, negotiating) - busy_s

    _, first, number = np.unique(whole["buffer"], return_index=True, return_inverse=True)
    step_of_buffer = np.searchsorted(start, operating[0][first], side="right") - 1
    step, within = step_of_buffer[number], step_of_buffer[number] >= 0
    tensors = np.bincount(step[within], minlength=len(start))
    buffers = np.bincount(step_of_buffer[step_of_buffer >= 0], minlength=len(start))
    return pd.DataFrame(
        {
            "step": starts.index,
            "step_s": np.diff(bounds),
            "compute_s": compute_s,
            "communication_s": communication_s,
            "exposed_s": np.clip(busy_s - compute_s, 0, communication_s),
            "negotiation_s": negotiation_s,
            "exposed_negotiation_s": np.clip(waiting_s, 0, negotiation_s),
            "tensors": tensors,
            "buffers": buffers,
            "tensors_per_buffer": tensors / np.where(buffers > 0, buffers, np.nan),
            "bytes": np.bincount(step[within], whole["bytes"].to_numpy()[within], len(start)),
        }
    )


def draw(
    table: pd.DataFrame, compute: pd.DataFrame | None = None, first_s: float | None = None, last_s: float | None = None
) -> Figure:
    """What went on when: lanes for the computation and the announcements of each rank, and for each phase.

    What is less than a thousandth of the picture apart is drawn as one.

    Parameters
    ----------
    table
        As of `read`.
    compute
        ``start_s, duration_s`` and, if of more than one rank, ``rank``, on the clock of the timeline as in `steps`.
    first_s, last_s
        The part to draw, in seconds since the start of the timeline; None stands for the first and the last span.

    Returns
    -------
    matplotlib.figure.Figure
        The lane "wire" has the numbers of the buffers, where there is room.
    """
    import matplotlib.pyplot as plt

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

    spans = [_intervals(rows) for *_, rows in lanes]
    begin, end = (np.concatenate(times) for times in zip(*spans, strict=True))
    first_s = begin.min(initial=math.inf) if first_s is None else first_s
    last_s = end.max(initial=-math.inf) if last_s is None else last_s
    if not (first_s < last_s and ((begin <= last_s) & (end >= first_s)).any()):
        raise ValueError(f"there is nothing to draw between {first_s:g} and {last_s:g} s")

    within = [((begin <= last_s) & (end >= first_s)).any() for begin, end in spans]
    shown = [i for i, (_, phase, _) in enumerate(lanes) if within[i] or phase in ALWAYS_SHOWN]
    lanes, spans = [lanes[i] for i in shown], [spans[i] for i in shown]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(lanes) + 0.9), layout="constrained")
    bar_s = (last_s - first_s) / MOST_BARS
    for y, ((_, phase, rows), (begin, end)) in enumerate(zip(lanes, spans, strict=True)):
        shown = (begin <= last_s) & (end >= first_s)
        begin, end, rows = np.maximum(begin[shown], first_s), np.minimum(end[shown], last_s), rows[shown]
        left, right = _merge(begin, end, gap_s=bar_s)
        if phase not in STYLE:
            axis.vlines(np.unique(np.round(begin / bar_s)) * bar_s * 1e3, y - 0.35, y + 0.35, color="black", lw=0.8)
            continue
        colour, hatch = STYLE[phase]
        bars = np.column_stack([left, np.maximum(right - left, bar_s)]) * 1e3
        axis.broken_barh(bars, (y - 0.35, 0.7), facecolor=colour, hatch=hatch, edgecolor="black", lw=0.3)
        if phase == "wire":
            of_buffer = pd.DataFrame({"begin": begin, "end": end}).groupby(rows["buffer"].to_numpy())
            of_buffer = of_buffer.agg({"begin": "min", "end": "max"}).query("index >= 0 and end - begin > 9 * @bar_s")
            for number, first, last in of_buffer.itertuples():
                if last - first > 9 * len(str(number)) * bar_s:
                    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                    middle_ms = (first + last) / 2 * 1e3
                    axis.text(middle_ms, y, str(number), ha="center", va="center", fontsize=6, bbox=box)
    axis.set_yticks(range(len(lanes)), [label for label, *_ in lanes])
    axis.set(xlabel="time since the start of the timeline, ms", xlim=(first_s * 1e3, last_s * 1e3))
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    return figure


def _compute_of_rank_0(compute: pd.DataFrame) -> tuple[pd.Series, tuple[np.ndarray, np.ndarray]]:
    """The start of each step, by step and in order; and the intervals in which rank 0 computed."""
    require_columns(compute, ["step", "start_s", "duration_s"])
    rows = compute[compute["rank"] == 0] if "rank" in compute else compute
    if rows.empty:
        raise ValueError("compute has no row of rank 0, so there is no step")
    if not np.isfinite(rows[["start_s", "duration_s"]]).all(axis=None) or rows["duration_s"].min() < 0:
        raise ValueError("start_s and duration_s of compute must be finite, and no duration below 0")
    if rows["start_s"].max() > 1e9:
        raise ValueError('start_s of compute is in seconds since 1970; subtract table.attrs["epoch_s"] from it')
    by_step = rows.groupby("step")["start_s"].agg(["min", "max"]).sort_values("min")
    if not (by_step["max"].to_numpy()[:-1] < by_step["min"].to_numpy()[1:]).all():
        raise ValueError("the steps of compute must come one after the other, each with a number of its own")
    return by_step["min"], _intervals(rows)


def _intervals(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    start = rows["start_s"].to_numpy(float)
    return start, start + rows["duration_s"].to_numpy(float)


def _merge(begin: np.ndarray, end: np.ndarray, gap_s: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The union of intervals as disjoint ones in order; what no more than the gap parts becomes one."""
    order = np.argsort(begin)
    begin, reached = begin[order], np.maximum.accumulate(end[order])
    new = np.ones(len(begin), bool)
    new[1:] = begin[1:] > reached[:-1] + gap_s
    return begin[new], reached[np.roll(new, -1)]
