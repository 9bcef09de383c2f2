"""From the events of a Horovod timeline to spans: what began and ended together, and in which fused buffer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

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


def meaning(letter: str, name: str) -> tuple[str | None, str, int]:
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


def pair(
    phases: list[str | None], tensors: list[int], fail: Callable[[int, str], None]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows (events that begin and end them, occurrence), occurrences (end and buffer, or -1), the number of open spans.

    A tensor is negotiated, then in an operation with one activity after the other inside it, and so on. Two things
    make an end without a beginning. `hvd.start_timeline` begins a file amid operations: then there are ends before
    the tensor's first beginning. And if two process sets negotiate the same name at a time, Horovod writes one
    beginning and two ends, the second right before its operation.
    """
    rows, occurrences, under_way, buffer = [], [], 0, -1
    operations, began, strays = set(OPERATIONS), set(), {}
    spans_of, occurrence_of = defaultdict(list), {}
    for i, (phase, tensor) in enumerate(zip(phases, tensors, strict=True)):
        spans, occurrence = spans_of[tensor], occurrence_of.setdefault(tensor, len(occurrences))
        if occurrence == len(occurrences):
            occurrences.append([-1, -1])
        if tensor in strays and phase not in operations:
            fail(strays[tensor], "no end of what has not begun")
        strays.pop(tensor, None)
        if phase in ("ready", "cycle"):
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
                del occurrence_of[tensor]
        elif tensor in began:
            strays[tensor] = i
    columns = (np.array(each, np.int64).reshape(-1, n).T for each, n in ((rows, 3), (occurrences, 2)))
    return *columns, sum(map(len, spans_of.values()))
