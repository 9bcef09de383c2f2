"""What the communication in a timeline came to in each training step, and how much of it delayed the step."""

import math

import numpy as np
import pandas as pd

from nurion_utils._checks import require_columns
from nurion_utils.backends.timeline.file import OPERATIONS


def steps(table: pd.DataFrame, compute: pd.DataFrame) -> pd.DataFrame:
    """What the communication of each training step came to, and how much of it the step had to wait for.

    A step lasts from its first computation to that of the next step; the last one to the end of its last computation or
    operation, so leave out of the table what came after the training. ValueError if columns are missing, times of
    `compute` cannot be, or its steps do not come one after the other.

    `table` is as of `read`. `compute` says when rank 0 computed: ``step, start_s, duration_s``; if there is a column
    ``rank``, its rows of rank 0 count. It is on the clock of the timeline: subtract ``table.attrs["epoch_s"]`` from
    seconds since 1970.

    Returns
    -------
    pandas.DataFrame
        One row per step: ``step, step_s``; ``compute_s``, in which rank 0 computed; ``communication_s``, in which an
        operation was under way, and ``exposed_s``, the part of that in which rank 0 did not compute; ``tensors,
        buffers, tensors_per_buffer`` of the buffers that began in the step.
    """
    require_columns(table, ["phase", "start_s", "duration_s", "buffer"])
    starts, computing = _compute_of_rank_0(compute)
    whole = table[table["phase"].isin(OPERATIONS)].sort_values("start_s", kind="stable")
    operating, start = intervals(whole), starts.to_numpy()
    last = max(end[begin >= start[-1]].max(initial=start[-1]) for begin, end in (computing, operating))
    bounds = np.append(start, last)

    def within_s(*kinds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """How much of each step the intervals of these kinds cover."""
        begin, end = merge(*map(np.concatenate, zip(*kinds, strict=True)))
        n_begun = np.searchsorted(begin, bounds, side="right")
        yet_to_come = np.maximum(np.append(-math.inf, end)[n_begun] - bounds, 0)
        covered_s = np.append(0, np.cumsum(end - begin))[n_begun] - yet_to_come
        return np.maximum(np.diff(covered_s), 0)  # rounding may go below

    compute_s, communication_s = within_s(computing), within_s(operating)
    _, first, number = np.unique(whole["buffer"], return_index=True, return_inverse=True)
    step_of_buffer = np.searchsorted(start, operating[0][first], side="right") - 1
    tensors, buffers = (
        np.bincount(each[each >= 0], minlength=len(start)) for each in (step_of_buffer[number], step_of_buffer)
    )
    return pd.DataFrame(
        {
            "step": starts.index,
            "step_s": np.diff(bounds),
            "compute_s": compute_s,
            "communication_s": communication_s,
            "exposed_s": np.clip(within_s(computing, operating) - compute_s, 0, communication_s),
            "tensors": tensors,
            "buffers": buffers,
            "tensors_per_buffer": tensors / np.where(buffers > 0, buffers, np.nan),
        }
    )


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
    return by_step["min"], intervals(rows)


def intervals(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each row, in seconds."""
    start = rows["start_s"].to_numpy(float)
    return start, start + rows["duration_s"].to_numpy(float)


def merge(begin: np.ndarray, end: np.ndarray, gap_s: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The union of intervals as disjoint ones in order; what no more than the gap parts becomes one."""
    order = np.argsort(begin)
    begin, reached = begin[order], np.maximum.accumulate(end[order])
    new = np.ones(len(begin), bool)
    new[1:] = begin[1:] > reached[:-1] + gap_s
    return begin[new], reached[np.roll(new, -1)]
