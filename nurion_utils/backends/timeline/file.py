"""A Horovod timeline from its file to a table of spans.

Read here is what Horovod 0.28.1 writes, by its horovod/common/timeline.cc: Chrome's trace format, with a process for
each tensor. Such a file may break off anywhere: at shutdown the writer drops what it has not written yet.
"""

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
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

Count = Annotated[int, msgspec.Meta(ge=0, le=10**18)]


class _Args(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str = ""
    start_time_since_epoch_in_micros: Count | None = None
    sort_index: Count | None = None
    dtype: Annotated[str, msgspec.Meta(pattern=r"^([a-z]+\d*)?$")] = ""
    shape: Annotated[str, msgspec.Meta(pattern=r"^\[(\d{1,18}(, \d{1,18})*)?\]$")] = "[]"


class _Entry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What a timeline is a list of: begins, ends, ranks that are ready (X), cycles (i), names of tensors (M)."""

    ph: Literal["B", "E", "X", "i", "M"]
    name: str = ""
    ts: Count = 0
    pid: Count = 0
    args: _Args | None = None
    dur: Literal[0] = 0
    s: Literal["g"] = "g"


KINDS = re.compile(r"B[A-Z_]+|E|X\d{1,6}|iCYCLE_START|Mprocess_(name|sort_index)")  # ph and name
ENTRIES = msgspec.json.Decoder(list[_Entry])


class TimelineError(ValueError):
    """A file that is not a readable timeline; the sentence names the file, the place in it and what is wrong there."""

    __module__ = "nurion_utils.backends.timeline"  # where the reader finds it


def read(path: str | Path) -> pd.DataFrame:
    """The spans of a Horovod timeline, in the order in which they ended.

    The file is what HOROVOD_TIMELINE or ``hvd.start_timeline`` named. It may be cut off, as if its run was killed; one
    that is missing, empty, not a timeline, or malformed otherwise is a `TimelineError`.

    Returns
    -------
    pandas.DataFrame
        One row per span:

        - ``tensor``: its name; empty for "cycle". TensorFlow's eager operations share HorovodAllreduce and the like.
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
        ``unfinished``, the number of spans without an end, which are left out.
    """
    entries = _entries(path)
    numbers: dict[tuple[str, str], int] = defaultdict(lambda: len(numbers))  # few kinds, numbered as they come
    kind = np.array([numbers[entry.ph, entry.name] for entry in entries], np.int32)
    place = np.flatnonzero(~np.isin(kind, [number for (letter, _), number in numbers.items() if letter == "M"]))
    events, kind = [entries[i] for i in place.tolist()], kind[place]

    def fail(i: int, expected: str) -> None:
        raise TimelineError(f"{path}, entry {place[i]}: expected {expected}; found {msgspec.to_builtins(events[i])}")

    names = {entry.pid: entry.args.name for entry in entries if entry.args and entry.name == "process_name"}
    codes, tensors = pd.factorize(np.array([*names.values()], object))
    of_pid = dict(zip(names, codes.tolist(), strict=True))
    tensor = np.array([of_pid.get(event.pid, -1) for event in events], np.int32)
    if (tensor < 0).any():
        fail(np.argmax(tensor < 0), "a tensor that has a name")
    time_us = np.fromiter((event.ts for event in events), np.int64, len(events))
    if (np.diff(time_us) < 0).any():
        fail(np.argmax(np.diff(time_us) < 0) + 1, "a time no earlier than that of the event before")
    meanings = [_meaning(*each) for each in numbers]
    phases = [phase for phase, _, _ in meanings]
    rows, occurrences, unfinished = _pair([phases[each] for each in kind.tolist()], tensor.tolist(), fail)

    (begin, end, occurrence), (end_of, buffer_of) = rows, occurrences
    types = {"phase": pd.CategoricalDtype(PHASES), "activity": "category", "rank": "int32"}
    table = pd.DataFrame(meanings, columns=[*types]).astype(types).take(kind[begin]).reset_index(drop=True)
    table.insert(0, "tensor", pd.Categorical.from_codes(tensor[begin], tensors))
    table["start_s"] = time_us[begin] / 1e6
    table["duration_s"] = (time_us[end] - time_us[begin]) / 1e6
    ends = [events[i].args if i >= 0 else None for i in end_of.tolist()]
    table["bytes"] = np.array([_bytes(end.dtype, end.shape) if end else math.nan for end in ends])[occurrence]
    table["buffer"] = buffer_of[occurrence].astype(np.int32)
    epoch_us = entries[0].args.start_time_since_epoch_in_micros if entries else math.nan
    table.attrs = {"epoch_s": epoch_us / 1e6, "unfinished": unfinished}
    return table


def _entries(path: str | Path) -> list[_Entry]:
    """All entries of a file, without the one in which it is cut off."""
    try:
        data = Path(path).read_bytes()
        entries = _decoded(data) if data else []
    except OSError as error:
        raise TimelineError(f"{path} cannot be read: {error.strerror}; rank 0 writes to HOROVOD_TIMELINE") from None
    except msgspec.DecodeError as error:
        raise TimelineError(f"{path} is not a Horovod timeline: {error}") from None
    if not data:
        raise TimelineError(f"{path} is empty: Horovod writes nothing before the first operation")
    if strange := {entry.ph + entry.name for entry in entries if not KINDS.fullmatch(entry.ph + entry.name)}:
        raise TimelineError(f"{path} is not a Horovod timeline: it has an event {min(strange)!r}")
    if entries and not (entries[0].args and entries[0].args.start_time_since_epoch_in_micros is not None):
        raise TimelineError(f"{path} is not a Horovod timeline: its first entry does not say when it was started")
    return entries


def _decoded(text: bytes) -> list[_Entry]:
    try:
        if entries := ENTRIES.decode(text):
            return entries
        raise msgspec.ValidationError("it has no entries")
    except msgspec.DecodeError as error:
        if "truncated" not in str(error):
            raise
    with contextlib.suppress(msgspec.DecodeError):  # unless it is cut off within an entry
        return ENTRIES.decode(text.rstrip(b", \n") + b"]")
    last = max(text.rfind(separator) + 1 for separator in (b",{", b",\n{", b"[\n{"))  # where the last one begins
    return ENTRIES.decode(text[:last].rstrip(b", \n") + b"]")


def _meaning(letter: str, name: str) -> tuple[str | None, str, int]:
    """Phase, activity and rank of an event; an end has none."""
    if letter in "EM":
        return None, "", -1
    if letter == "X":
        return "ready", "", int(name)
    if letter == "i":
        return "cycle", name, -1
    if name.startswith("NEGOTIATE_"):
        return "negotiate", name, -1
    if name.lower() in OPERATIONS:
        return name.lower(), name, -1
    return next(phase for phase, pattern in ACTIVITIES.items() if re.fullmatch(pattern, name)), name, -1


def _pair(
    phases: list[str | None], tensors: list[int], fail: Callable[[int, str], None]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows (events that begin and end them, occurrence), occurrences (end and buffer, or -1), the number of open spans.

    A tensor is negotiated, then in an operation with one activity after the other inside it, and so on. A missing
    beginning is passed over: `hvd.start_timeline` may begin a file amid operations, and if two process sets negotiate
    the same name at a time, Horovod writes one beginning and two ends.
    """
    rows, occurrences, under_way, buffer = [], [], 0, -1
    operations = set(OPERATIONS)
    spans_of, occurrence_of = defaultdict(list), {}
    for i, (phase, tensor) in enumerate(zip(phases, tensors, strict=True)):
        spans, occurrence = spans_of[tensor], occurrence_of.setdefault(tensor, len(occurrences))
        if occurrence == len(occurrences):
            occurrences.append([-1, -1])
        if phase in ("ready", "cycle"):
            rows += (i, i, occurrence)
        elif phase in ACTIVITIES:
            if len(spans) > 1:
                fail(i, "an activity inside an operation")
            spans.append(i)
        elif phase:
            if spans:
                fail(i, "the end of what the tensor is in")
            spans.append(i)
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
                del occurrence_of[tensor]
    columns = (np.array(each, np.int64).reshape(-1, n).T for each, n in ((rows, 3), (occurrences, 2)))
    return *columns, sum(map(len, spans_of.values()))


@lru_cache
def _bytes(dtype: str, shape: str) -> float:
    bits = re.fullmatch(r"(?:u?int|float)(\d+)|bool", dtype)
    return int(bits[1] or 8) // 8 * math.prod(map(int, re.findall(r"\d+", shape))) if bits else math.nan
