"""A Horovod timeline from its file to a table.

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

import numpy as np
import pandas as pd

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


class TimelineError(ValueError):
    """A file that is no readable timeline; the sentence names the file, the byte and what was expected there."""

    __module__ = "nurion_utils.backends.timeline"  # where the reader finds it


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
