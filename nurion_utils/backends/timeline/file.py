"""A Horovod timeline from its file to a table.

Read here is what Horovod 0.28.1 writes, by its horovod/common/timeline.cc: Chrome's trace format, with a process for
each tensor. Such a file may break off anywhere: at shutdown the writer drops what it has not written yet.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import pandas as pd

from nurion_utils.backends.timeline.spans import PHASES, meaning, pair

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
ENTRY, ENTRIES = msgspec.json.Decoder(_Entry), msgspec.json.Decoder(list[_Entry])

# The name of a tensor is written as it is, quotes and all, and goes on until the next line begins, or the file ends.
TENSOR = re.compile(rb'"args": \{"name": "((?:(?!\{"ph": ")[\s\S])*?)(?:"\}\},\s*\{"name": "process_sort_index"|\Z)')
HEAD = "the head of a Horovod timeline"
AN_EVENT = 'an event like {"ph": "B", "name": ..., "ts": ..., "pid": ...} or the end of the list'


class TimelineError(ValueError):
    """A file that is no readable timeline; the sentence names the file, the byte and what was expected there."""

    __module__ = "nurion_utils.backends.timeline"  # where the reader finds it


def read(path: str | Path) -> pd.DataFrame:
    """The spans of a Horovod timeline, in the order in which they ended.

    Parameters
    ----------
    path
        What HOROVOD_TIMELINE or ``hvd.start_timeline`` named. The file may be cut off, as if its run was killed.

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
        ``unfinished``, the number of spans that have no end and are left out.

    Raises
    ------
    TimelineError
        The file is missing, empty, not a timeline, or malformed other than by being cut off.
    """
    data = _load(path)
    text, names = _without_names(data)
    entries = _entries(path, data, text)
    numbers: dict[tuple[str, str], int] = defaultdict(lambda: len(numbers))  # few kinds, numbered as they come
    kind = np.array([numbers[entry.ph, entry.name] for entry in entries], np.int32)
    place = np.flatnonzero(~np.isin(kind, [number for (letter, _), number in numbers.items() if letter == "M"]))
    events, kind = [entries[i] for i in place.tolist()], kind[place]

    def fail(i: int, expected: str) -> None:
        raise _malformed(path, data, next(islice(_places(text), int(place[i]), None)), expected)

    meanings = [meaning(*each) for each in numbers]
    tensors, of_pid = _tensors(entries, names)
    tensor = np.array([of_pid.get(event.pid, -1) for event in events], np.int32)
    if (tensor < 0).any():
        fail(np.argmax(tensor < 0), "a tensor that has a name")
    time_us = np.fromiter((event.ts for event in events), np.int64, len(events))
    if (np.diff(time_us) < 0).any():
        fail(np.argmax(np.diff(time_us) < 0) + 1, "a time no earlier than that of the event before")
    phases = [phase for phase, _, _ in meanings]
    rows, occurrences, unfinished = pair([phases[each] for each in kind.tolist()], tensor.tolist(), fail)

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


def _without_names(data: bytes) -> tuple[bytearray, list[str]]:
    """The file as JSON of the same length, in which names of tensors are blank, and the names in their order."""
    text, names = bytearray(data), []
    for name in TENSOR.finditer(data):
        names.append(name[1].decode(errors="backslashreplace"))
        text[slice(*name.span(1))] = b" " * len(name[1])
    return text, names


def _entries(path: str | Path, data: bytes, text: bytearray) -> list[_Entry]:
    """All entries of a file, without the one in which it is cut off."""
    texts, entries, cut = [text], None, False
    while texts and entries is None:
        try:
            entries = ENTRIES.decode(texts.pop())
        except msgspec.DecodeError as error:
            if not cut and "truncated" in str(error):
                cut = True
                begun = max(
                    text.rfind(separator) + 1 for separator in (b",{", b",\n{", b"[\n{")
                )  # where the last begins
                texts = [text[:end].rstrip(b", \n") + b"]" for end in (begun, len(text))]
    if entries is None or not all(KINDS.fullmatch(kind) for kind in {entry.ph + entry.name for entry in entries}):
        *before, offset = _places(text)
        raise _malformed(path, data, offset, AN_EVENT if before else HEAD)
    headed = entries and entries[0].args and entries[0].args.start_time_since_epoch_in_micros is not None
    if not headed and (entries or not cut):
        raise _malformed(path, data, 0, HEAD)
    return entries


def _places(text: bytearray) -> Iterator[int]:
    """The byte where each entry begins, up to the first that is not valid; found one by one, so only to tell of it."""
    characters, at, separator = text.decode("latin-1"), 0, re.compile(r"\s*\[\s*")  # one character per byte
    while match := separator.match(characters, at):
        at, separator = match.end(), re.compile(r"\s*[,\]]\s*")
        yield at
        try:
            _, end = json.JSONDecoder().raw_decode(characters, at)
            entry = ENTRY.decode(text[at:end])
            if not KINDS.fullmatch(entry.ph + entry.name):
                return
        except (ValueError, msgspec.DecodeError):
            return
        at = end
    yield at


def _tensors(entries: list[_Entry], names: list[str]) -> tuple[list[str], dict[int, int]]:
    """The names of tensors, the first that of none, and which of them each process is."""
    tensors, of_pid = {"": 0}, {0: 0}
    processes = [entry.pid for entry in entries if entry.ph == "M" and entry.name == "process_name"]
    for pid, name in zip(processes[1:], names, strict=False):  # the first is the head; a last name may be cut off
        of_pid[pid] = tensors.setdefault(name, len(tensors))
    return [*tensors], of_pid


@lru_cache
def _bytes(dtype: str, shape: str) -> float:
    bits = re.fullmatch(r"(?:u?int|float)(\d+)|bool", dtype)
    return int(bits[1] or 8) // 8 * math.prod(map(int, re.findall(r"\d+", shape))) if bits else math.nan
