"""Carry a schedule out on MPI ranks, as the notebook teaches it: one Sendrecv per step, reduced with numpy."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import numpy as np
from mpi4py import MPI

from nurion_utils.allreduce.checking import check
from nurion_utils.allreduce.schedule import Schedule

OPERATIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply, "mean": np.add}
TYPES = [np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64")]


def run(
    schedule: Schedule, comm: MPI.Comm, array: np.ndarray, op: str = "sum", trace: list[dict] | None = None
) -> None:
    """Allreduce `array` in place; every rank of `comm` calls this with the same schedule, length, dtype and `op`.

    The array is contiguous, of any shape and length, of float16, float32, float64, int32 or int64. `op` is "sum",
    "max", "min", "prod" or, of floating-point arrays, "mean": the sum, which must fit the type, divided. `trace` gets
    one entry per step that this rank takes part in: ``rank, step, sent_bytes, begin_s, received_s, end_s`` (seconds on
    the clock of `time.perf_counter`).

    ValueError on every rank, before anything is sent, if any brought what cannot be reduced or ranks disagree.
    """
    agree(comm, schedule, array, op, trace)
    flat = array.reshape(-1)
    moves, longest = _moves(schedule, comm.rank, flat.size)
    received = np.empty(longest, flat.dtype)
    as_bytes, received_bytes, each = flat.view(np.uint8), received.view(np.uint8), flat.itemsize
    combine = OPERATIONS[op]
    with np.errstate(all="ignore"):  # an overflow that one rank took for an error would leave the others waiting
        for step, send_to, s0, s1, receive_from, r0, r1, reduce, apart in moves:
            begin_s = time.perf_counter()
            target = received_bytes[: (r1 - r0) * each] if apart else as_bytes[r0 * each : r1 * each]
            sent = as_bytes[s0 * each : s1 * each]
            # as bytes, because MPI knows no float16
            comm.Sendrecv([sent, MPI.BYTE], send_to, recvbuf=[target, MPI.BYTE], source=receive_from)
            received_s = time.perf_counter()
            if reduce:
                mine = flat[r0:r1]
                combine(mine, received[: r1 - r0], mine)
            elif apart:
                flat[r0:r1] = received[: r1 - r0]
            if trace is not None:
                times = {"begin_s": begin_s, "received_s": received_s, "end_s": time.perf_counter()}
                trace.append({"rank": comm.rank, "step": step, "sent_bytes": sent.nbytes, **times})
    if op == "mean":
        flat /= comm.size


@lru_cache(maxsize=64)
def _moves(schedule: Schedule, rank: int, n: int) -> tuple[list[tuple], int]:
    """This rank's steps in elements of an array of n, and how many elements it takes apart at once at most.

    The last entry of a step says whether what is received goes into a place apart first: to be reduced, or because its
    own place is being sent.
    """
    bounds = [c * n // schedule.chunks for c in range(schedule.chunks + 1)]
    moves = []
    for a in schedule.actions(rank):
        s0, s1, r0, r1 = (bounds[chunk] for chunk in (*a.send, *a.receive))
        to, source = (MPI.PROC_NULL if peer is None else peer for peer in (a.send_to, a.receive_from))
        moves.append((a.step, to, s0, s1, source, r0, r1, a.reduce, a.reduce or (s0 < r1 and r0 < s1)))
    return moves, max((r1 - r0 for *_, r0, r1, _, apart in moves if apart), default=0)


def agree(comm: MPI.Comm, schedule: Schedule, array: np.ndarray, op: str, trace: list | None = None) -> None:
    """Raise the same `ValueError` on all ranks unless all brought the same, which otherwise might hang them.

    One native allreduce of 16 bytes, the only message beside those of the schedule.
    """
    problem = _problem(comm, schedule, array, op, trace)
    mine = _PROBLEM if problem else _same_for_all(schedule, array.size, array.dtype, op)
    least = np.empty_like(mine)
    comm.Allreduce([mine, MPI.INT64_T], [least, MPI.INT64_T], MPI.MIN)
    if least[0] != -least[1] or problem:  # the least and the greatest of all ranks' numbers
        brought = "" if problem else f"{array.size} x {array.dtype}, {op}, {schedule!r}"
        raise disagreement(comm, problem, brought, "length, dtype, op and schedule")


_PROBLEM = np.array([-1, 1])


@lru_cache(maxsize=64)
def _same_for_all(schedule: Schedule, n: int, dtype: np.dtype, op: str) -> np.ndarray:
    number = hash((schedule.fingerprint, n, TYPES.index(dtype), list(OPERATIONS).index(op))) >> 1 & 2**62 - 1
    return np.array([number, -number])


def _problem(comm: MPI.Comm, schedule: Schedule, array: Any, op: Any, trace: Any) -> str:
    """What is wrong with this rank's own arguments, in words."""
    if not isinstance(schedule, Schedule):
        return f"a schedule is needed, such as allreduce.ring({comm.size}), not {schedule!r}"
    if comm.size != schedule.ranks:
        return f"{schedule!r} cannot run on the {comm.size} ranks of this communicator"
    if not isinstance(array, np.ndarray) or isinstance(array, np.matrix | np.ma.MaskedArray):
        return f"a numpy array is needed, not {type(array).__name__}"
    if array.dtype not in TYPES:
        return f"the array must be of float16, float32, float64, int32 or int64, not {array.dtype}"
    if not array.flags.c_contiguous:
        return "the array is not contiguous; pass numpy.ascontiguousarray(array)"
    if not array.flags.writeable:
        return "the array is read-only; pass a copy"
    if not isinstance(op, str) or op not in OPERATIONS:
        return f"op must be one of {', '.join(OPERATIONS)}, not {op!r}"
    if op == "mean" and array.dtype.kind == "i":
        return f"the mean of integers is not of {array.dtype}; pass floating-point numbers, or op='sum'"
    try:
        check(schedule)
    except ValueError as error:
        return f"{schedule!r} is broken: {error}"
    return "" if trace is None or isinstance(trace, list) else f"trace must be a list, or None, not {trace!r}"


def disagreement(comm: MPI.Comm, problem: str, brought: str, same: str) -> ValueError:
    """The same words on all ranks, about those that are to blame: who has a problem, or what each has brought."""
    everyone = comm.allgather((problem, brought))
    if problems := [f"rank {rank}: {what}" for rank, (what, _) in enumerate(everyone) if what]:
        return ValueError("refused on all ranks, because of " + "; ".join(problems))
    everything = "; ".join(f"rank {rank}: {what}" for rank, (_, what) in enumerate(everyone))
    return ValueError(f"all ranks must bring the same {same}, not {everything}")


class CountingComm(MPI.Intracomm):
    """A communicator that counts what `run` sends through it: messages, and bytes in them."""

    def __init__(self, comm: MPI.Intracomm):
        self.messages = self.bytes_sent = 0

    def Sendrecv(self, sendbuf: Any, dest: int, *args: Any, **kwargs: Any) -> None:  # as mpi4py's name
        if dest != MPI.PROC_NULL:
            self.messages += 1
            self.bytes_sent += memoryview(sendbuf[0]).nbytes
        super().Sendrecv(sendbuf, dest, *args, **kwargs)
