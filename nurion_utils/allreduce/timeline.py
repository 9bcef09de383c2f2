"""Horovod's timeline as a table: what each tensor waited for, how it travelled, and what steps had to bear of that.

>>> table = timeline.read("timeline.json")
>>> compute["start_s"] -= table.attrs["epoch_s"]  # from time.time() or tf.timestamp() to the clock of the timeline
>>> timeline.steps(table, compute)

Read here is what Horovod 0.28.1 writes, by its horovod/common/timeline.cc: Chrome's trace format, with a process for
each tensor.  Such a file may break off anywhere: at shutdown the writer drops what it has not written yet.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nurion_utils._checks import require_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Whole operations, by horovod/common/message.cc; activities, which are parts of them, by horovod/common/common.h.
OPERATIONS = ["allreduce", "allgather", "broadcast", "reducescatter", "adasum", "alltoall", "error"]
ACTIVITIES = {
    "queue": r"WAIT_FOR_(OTHER_TENSOR_)?DATA|QUEUE",
    "fuse": r"MEMCPY_IN_.*",
    "wire": r"(MPI|CCL|GLOO|NCCL|DDL)_.*",
    "unfuse": r"MEMCPY_OUT_.*|COPY_ALLGATHER_OUTPUT",
    "prepare": r".*",  # INIT_FUSION_BUFFER, ALLOCATE_OUTPUT and the like
}
PHASES = ["negotiate", *OPERATIONS, *ACTIVITIES, "ready", "cycle"]

# A file is units and a bracket: the head, the names of tensors and the events, each with the separator before it.
# A name is written as it is, quotes and all, and goes on until the next line begins.
NUMBER = rb"\d{1,18}"
NAMED = rb'"pid": (\d{1,9}), "args": \{(?:"start_time_since_epoch_in_micros": ?(%b)|"name": "((?:%b)*)")\}\},\s*' % (
    NUMBER,
    rb'(?!"\}\},\s*\{"name": "process_|\{"ph": ")[\s\S]',
)
ARGS = rb', "args": \{"dtype": "[a-z]+\d*", "shape": "\[(?:%b(?:, %b)*)?\]"\}' % (NUMBER, NUMBER)
SEPARATOR = re.compile(rb"(?:\A\s*\[|\s*,)\s*")
UNIT = re.compile(
    rb'%b\{"(?:ph": "(B", "name": "[A-Z_]+|E|X", "name": "\d{1,6}|i", "name": "CYCLE_START)", '
    rb'"ts": (%b), ("pid": \d{1,9}(?:, "dur": 0)?(?:%b)?|"s": "g")|name": "process_name", "ph": "M", %b'
    rb'\{"name": "process_sort_index", "ph": "M", "pid": \d{1,9}, "args": \{"sort_index": \d{1,9}\})\}'
    % (SEPARATOR.pattern, NUMBER, ARGS, NAMED)
)
EVENT, TIME, REST, PID, EPOCH, NAME, LEFT = range(7)  # its groups, and whatever is left where no unit is
UNIT_OR_LEFT = re.compile(UNIT.pattern + rb"|([\s\S]+)")
SAMPLES = [
    b',{"ph": "B", "name": "A", "ts": 1, "pid": 1}',
    b',{"ph": "X", "name": "0", "ts": 1, "pid": 1, "dur": 0}',
    b',{"ph": "E", "ts": 1, "pid": 1, "args": {"dtype": "a", "shape": "[1, 1]"}}',
    b',{"ph": "i", "name": "CYCLE_START", "ts": 1, "s": "g"}',
    b',{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "A"}},'
    b'{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}}',
    b',{"name": "process_name", "ph": "M", "pid": 1, "args": {"start_time_since_epoch_in_micros":1}},'
    b'{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}}',
]
HEAD = "the head of a Horovod timeline"
CHUNK_BYTES, LONGEST_UNIT_BYTES = 1 << 17, 1 << 16

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


class TimelineError(ValueError):
    """A file that is no readable timeline; the sentence names the file, the byte and what was expected there."""


def read(path: str | Path) -> pd.DataFrame:
    """The spans of a Horovod timeline, in the order in which they ended.

    Parameters
    ----------
    path
        What HOROVOD_TIMELINE or ``hvd.start_timeline`` named.  The file may be cut off, as if its run was killed.

    Returns
    -------
    pandas.DataFrame
        One row per span:

        - ``tensor``: its name; empty for "cycle".  TensorFlow's eager operations share HorovodAllreduce and the like.
        - ``phase``: "negotiate" (since the first rank announced the tensor, until the last did); an operation, one of
          `OPERATIONS`; its parts "queue" (for data), "prepare" (buffers), "fuse" and "unfuse" (copies into and out of
          the fused buffer) and "wire" (the transfer itself); "ready" (a rank announced the tensor, of duration 0;
          written until the ranks have cached what to do with it); "cycle" (of Horovod's background thread, a start;
          written with HOROVOD_TIMELINE_MARK_CYCLES=1).
        - ``activity``: Horovod's own word for it; empty for "ready".
        - ``rank``: of a "ready" the rank, else -1.
        - ``start_s``, ``duration_s``: in seconds, since the start of the timeline.
        - ``bytes``: of the tensor that came out on rank 0, in all rows from its negotiation to the end of its
          operation; NaN where the file does not say, as after a broadcast from rank 0.
        - ``buffer``: the number, from 0 in order of time, of the fused buffer in which it travelled; -1 if in none.
          Horovod works operations off one after the other, so those that are open at a time travelled together (true
          on CPUs; those of NCCL may overlap).

        Its ``attrs`` are ``epoch_s``, the start in seconds since 1970 (NaN if the file is cut off before it), and
        ``unfinished``, the number of spans that have no end and are left out.

    Raises
    ------
    TimelineError
        If the file is missing, empty, no timeline, or malformed other than by being cut off.
    """
    data = _load(path)
    time_us, kind, rest, kinds, rests, names, epoch_us = _scan(path, data)

    def fail(i: int, expected: str) -> None:
        events = (unit for unit in UNIT.finditer(data) if unit[1 + EVENT])
        raise _malformed(path, data, data.index(b"{", next(islice(events, int(i), None)).start()), expected)

    meanings = [_meaning(each) for each in kinds]
    phases = [phase for phase, _, _ in meanings]
    tensors, tensor_of, bytes_of = _tensors(names, rests)
    tensor = tensor_of[rest]
    if (tensor < 0).any():
        fail(np.argmax(tensor < 0), "a tensor that has a name")
    if (np.diff(time_us) < 0).any():
        fail(np.argmax(np.diff(time_us) < 0) + 1, "a time no earlier than that of the event before")
    rows, occurrences, unfinished = _pair([phases[each] for each in kind.tolist()], tensor.tolist(), fail)

    (begin, end, occurrence), (end_of, buffer_of) = rows, occurrences
    types = {"phase": pd.CategoricalDtype(PHASES), "activity": "category", "rank": "int32"}
    table = pd.DataFrame(meanings, columns=[*types]).astype(types).take(kind[begin]).reset_index(drop=True)
    table.insert(0, "tensor", pd.Categorical.from_codes(tensor[begin], tensors))
    table["start_s"] = time_us[begin] / 1e6
    table["duration_s"] = (time_us[end] - time_us[begin]) / 1e6
    table["bytes"] = np.where(end_of < 0, np.nan, bytes_of[rest[end_of]])[occurrence]
    table["buffer"] = buffer_of[occurrence].astype(np.int32)
    table.attrs = {"epoch_s": epoch_us / 1e6, "unfinished": unfinished}
    return table


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


def _load(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TimelineError(f"{path} cannot be read: {error.strerror}; rank 0 writes to HOROVOD_TIMELINE") from None
    if not data:
        raise TimelineError(f"{path} is empty: Horovod writes nothing before the first operation")
    return data


def _malformed(path: str | Path, data: bytes, offset: int, expected: str) -> TimelineError:
    return TimelineError(f"{path}, byte {offset}: expected {expected}; found {data[offset : offset + 60]!r}")


def _scan(
    path: str | Path, data: bytes
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], list[str], dict[int, str], float]:
    """Time, beginning and rest of each event, the latter two as indices; beginnings, rests, names, and the epoch."""
    kinds, rests = defaultdict(int), defaultdict(int)  # few different ones, numbered as they come
    kinds.default_factory, rests.default_factory = kinds.__len__, rests.__len__
    names, epoch_us, parts, start, end = {}, math.nan, [], 0, 0
    while end < len(data):
        end = min(end + CHUNK_BYTES, len(data))
        units = UNIT_OR_LEFT.findall(data, start, end)
        left = units[-1][LEFT]
        events = [unit for unit in units if unit[EVENT]]
        time_us, kind, rest = ([unit[group] for unit in events] for group in (TIME, EVENT, REST))
        columns = map(int, time_us), map(kinds.__getitem__, kind), map(rests.__getitem__, rest)
        parts.append(np.array([np.fromiter(column, np.int64, len(events)) for column in columns]))
        for unit in units:
            if unit[EPOCH]:
                epoch_us = int(unit[EPOCH])
            elif unit[PID]:
                names[int(unit[PID])] = unit[NAME].decode(errors="backslashreplace")
        start = end - len(left)
        whole = start > 0 and left.strip() == b"]"
        if len(left) > LONGEST_UNIT_BYTES or end == len(data) and not (whole or _begins_a_unit(left)):
            expected = 'an event like {"ph": "B", "name": ..., "ts": ..., "pid": ...} or the end of the list'
            offset = re.compile(rb"(?:%b|\]?)\s*" % SEPARATOR.pattern).match(data, start).end()
            raise _malformed(path, data, offset, expected if start else HEAD)
    if math.isnan(epoch_us) and start > 0:
        raise _malformed(path, data, 0, HEAD)
    decoded = ([each.decode() for each in codes] for codes in (kinds, rests))
    return *np.concatenate(parts, axis=1), *decoded, names, epoch_us


def _begins_a_unit(left: bytes) -> bool:
    """Whether something would make a unit of this: then the end of one of the samples does."""
    return any(UNIT.fullmatch(left + sample[i:]) for sample in SAMPLES for i in range(len(sample)))


def _meaning(kind: str) -> tuple[str | None, str, int]:
    """Phase, activity and rank of what begins with an event; an end has none."""
    letter, _, word = kind.partition('", "name": "')
    if letter == "E":
        return None, "", -1
    if letter == "X":
        return "ready", "", int(word)
    if letter == "i":
        return "cycle", word, -1
    if word.startswith("NEGOTIATE_"):
        return "negotiate", word, -1
    if word.lower() in OPERATIONS:
        return word.lower(), word, -1
    return next(phase for phase, pattern in ACTIVITIES.items() if re.fullmatch(pattern, word)), word, -1


def _tensors(names: dict[int, str], rests: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, the first that of no tensor; for each rest of an event which of them (-1 if unknown), and its bytes."""
    tensors = {"": 0}
    of_pid = {pid: tensors.setdefault(name, len(tensors)) for pid, name in names.items()}
    tensor, size = np.zeros(len(rests), np.int32), np.full(len(rests), np.nan)
    for i, rest in enumerate(rests):
        if pid := re.match(r'"pid": (\d+)', rest):
            tensor[i] = of_pid.get(int(pid[1]), -1)
        if shape := re.search(r'"dtype": "(?:bool|(?:u?int|float)(\d+))", "shape": "\[(.*)\]"', rest):
            size[i] = int(shape[1] or 8) // 8 * math.prod(map(int, re.findall(r"\d+", shape[2])))
    return [*tensors], tensor, size


def _pair(
    phases: list[str | None], tensors: list[int], fail: Callable[[int, str], None]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows (events that begin and end them, occurrence), occurrences (end and buffer, or -1), the number of open spans.

    A tensor is negotiated, then in an operation with one activity after the other inside it, and so on.  Two things
    make an end without a beginning.  `hvd.start_timeline` begins a file amid operations: then there are ends before
    the tensor's first beginning.  And if two process sets negotiate the same name at a time, Horovod writes one
    beginning and two ends, the second right before its operation.
    """
    rows, occurrences, under_way, buffer = [], [], 0, -1

    def new_occurrence() -> int:
        occurrences.append([-1, -1])
        return len(occurrences) - 1

    operations, began, strays = set(OPERATIONS), set(), {}
    spans_of, occurrence_of = defaultdict(list), defaultdict(new_occurrence)
    for i, (phase, tensor) in enumerate(zip(phases, tensors, strict=True)):
        spans, occurrence = spans_of[tensor], occurrence_of[tensor]
        if tensor in strays and phase not in operations:
            fail(strays[tensor], "no end of what has not begun")
        strays.pop(tensor, None)
        if phase == "ready" or phase == "cycle":
            rows += (i, i, occurrence)
        elif phase in ACTIVITIES:
            if len(spans) > 1 or not spans and tensor in began:
                fail(i, "an activity inside an operation")
            spans.append(i)
        elif phase:
            if spans:
                fail(i, "the end of what the tensor is in")
            spans.append(i)
            began.add(tensor)
            if phase in operations:
                buffer += not under_way  # a buffer begins while no operation is under way
                under_way += 1
                occurrences[occurrence][1] = buffer
        elif spans:
            begin = spans.pop()
            rows += (begin, i, occurrence)
            if phases[begin] in operations:
                under_way -= 1
                occurrences[occurrence][0] = i
                occurrence_of[tensor] = new_occurrence()
        elif tensor in began:
            strays[tensor] = i
    columns = (np.array(each, np.int64).reshape(-1, n).T for each, n in ((rows, 3), (occurrences, 2)))
    return *columns, sum(map(len, spans_of.values()))


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
