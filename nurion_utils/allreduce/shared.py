"""The faster executor for ranks of one node: the same schedules over memory that all of them see.

A message between two ranks of a node is copied into the MPI library's memory and out of it again. Here the arrays
themselves lie in a shared window, so that the receiver reads the sender's chunk where it is, and a step needs no
message at all, only the knowledge that the chunk is ready.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
from mpi4py import MPI

from nurion_utils._checks import whole_number
from nurion_utils.allreduce.running import OPERATIONS, TYPES, agree, disagreement
from nurion_utils.allreduce.schedule import Schedule

LINE = 64  # bytes of a cache line: counters that different ranks write must not share one
STRETCH_BYTES = 2**19  # of each chunk in a pass: with the neighbour's it fits the cache of a core
SPINS = 20  # looks at a counter before the core is offered to somebody else


class SharedArray:
    """One array of `n` elements per rank of `comm`, all in memory that every rank of the node can read.

    All ranks create it together, with the same arguments. `dtype` is float16, float32, float64, int32 or int64.
    ValueError on every rank if the arguments cannot be used or differ, or if the ranks share no memory.
    """

    def __init__(self, comm: MPI.Comm, n: int, dtype: Any = "float32"):
        asked = _problem(n, dtype, comm.size), f"{n} x {dtype}"
        if any(problem or what != asked[1] for problem, what in comm.allgather(asked)):
            raise disagreement(comm, *asked, "length and dtype")
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        apart = comm.allreduce(node.size, op=MPI.MIN) < comm.size
        node.Free()
        if apart:
            raise ValueError("the ranks of a SharedArray must be on one node; use allreduce.run between nodes")
        self._comm = comm.Dup()
        self._window = MPI.Win.Allocate_shared(_window_bytes(n, dtype), comm=self._comm)
        memory = [self._window.Shared_query(rank)[0] for rank in range(comm.size)]
        self._arrays = [np.frombuffer(m, dtype, count=int(n), offset=2 * LINE) for m in memory]
        # For every rank: how far its values are right, and how far it has read those of others, counted in steps.
        self._ready = [memoryview(m)[:8].cast("q") for m in memory]
        self._read = [memoryview(m)[LINE : LINE + 8].cast("q") for m in memory]
        self._ready[comm.rank][0] = self._read[comm.rank][0] = self._base = 0
        self._window.Lock_all()
        self._comm.Barrier()

    @property
    def array(self) -> np.ndarray:
        """This rank's own array, of shape (n,): ``shared.array[:] = values``, call `allreduce`, read it."""
        if self._arrays is None:
            raise ValueError("this SharedArray has been closed")
        return self._arrays[self._comm.rank]

    def allreduce(self, schedule: Schedule, op: str = "sum") -> None:
        """Do what ``run(schedule, comm, array, op)`` does, with the same result to the last bit.

        A long array is taken in several passes, a stretch of every chunk in each, so that what one rank has just
        written is still in the cache when the next one reads it.
        """
        comm, own = self._comm, self.array
        agree(comm, schedule, own, op)
        ready, read, wait, combine = self._ready[comm.rank], self._read[comm.rank], self._wait, OPERATIONS[op]
        passes, last_readers = _passes(schedule, comm.rank, own.size, STRETCH_BYTES // own.itemsize)
        with np.errstate(all="ignore"):  # see running.run
            for moves in passes:
                base = self._base
                for step, source, pieces, reduce, apart, readers in moves:
                    self._window.Sync()  # what was written is there before the counter says so
                    ready[0] = base + step
                    pairs = []
                    if source is not None:
                        wait(self._ready[source], base + step)
                        pairs = [(own[piece], self._arrays[source][piece]) for piece in pieces]
                    if apart:
                        pairs = [(mine, theirs.copy()) for mine, theirs in pairs]
                        read[0] = base + step + 1
                    for reader, their_step in readers:  # who must have read what is about to be overwritten
                        wait(self._read[reader], base + their_step + 1)
                    for mine, theirs in pairs:
                        if reduce:
                            combine(mine, theirs, mine)
                        else:
                            mine[:] = theirs
                    self._window.Sync()
                    read[0] = base + step + 1
                self._base += len(schedule.steps)
                ready[0] = read[0] = self._base
        for reader, step in last_readers:  # then the caller may write again
            wait(self._read[reader], base + step + 1)
        if op == "mean":
            own /= comm.size

    def _wait(self, counter: memoryview, least: int) -> None:
        looks = 0
        while counter[0] < least:
            looks += 1
            if looks > SPINS:
                os.sched_yield()
        self._window.Sync()

    def close(self) -> None:
        """Give the memory back; all ranks together. The arrays must not be used any more."""
        if self._arrays is None:
            return
        self._arrays = self._ready = self._read = None
        self._window.Unlock_all()
        self._window.Free()
        self._comm.Free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # otherwise the other ranks may never come to close it together
            self.close()


@lru_cache(maxsize=64)
def _passes(schedule: Schedule, rank: int, n: int, at_once: int) -> tuple[list[list[tuple]], list[tuple[int, int]]]:
    """What `rank` does with an array of n elements, in passes over `at_once` or a little more of each chunk's.

    A pass takes its part of every chunk, so that each element is in the chunk it belongs to. Its moves are: step,
    source or None, slices, whether to reduce, whether what is written is being read in this very step, and rank and
    step of those that read, up to now, what is overwritten. Returns as well who reads from this rank, and in which step
    for the last time.
    """
    bounds = [c * n // schedule.chunks for c in range(schedule.chunks + 1)]
    passes: list[list[tuple]] = [[] for _ in range(max(1, n // (schedule.chunks * at_once)))]
    cuts = [[a + k * (b - a) // len(passes) for k in range(len(passes) + 1)] for a, b in pairwise(bounds)]
    sent = []
    for a in schedule.actions(rank):
        if a.send_to is not None:
            sent.append((a.send_to, a.step, *a.send))
        r0, r1 = a.receive
        readers = {reader: step for reader, step, s0, s1 in sent if s0 < r1 and r0 < s1}
        for k, moves in enumerate(passes):
            pieces = [slice(*cuts[c][k : k + 2]) for c in range(r0, r1)]
            if len(passes) == 1:  # then chunks that follow one another are one piece
                pieces = [slice(bounds[r0], bounds[r1])]
            apart = a.step in readers.values()
            moves.append((a.step, a.receive_from, pieces, a.reduce, apart, list(readers.items())))
    return passes, list({reader: step for reader, step, *_ in sent}.items())


def _window_bytes(n: int, dtype: Any) -> int:
    return -(-(2 * LINE + int(n) * np.dtype(dtype).itemsize) // LINE) * LINE


def _problem(n: Any, dtype: Any, ranks: int) -> str:
    try:
        whole_number(n, "the number of elements", least=0)
        if dtype is None or np.dtype(dtype) not in TYPES:
            return f"dtype must be float16, float32, float64, int32 or int64, not {dtype!r}"
        # Where memory files do not fit, the ranks would not hear of it before they die of a bus error.
        if os.path.exists("/dev/shm"):
            memory = os.statvfs("/dev/shm")
            needed, free = ranks * _window_bytes(n, dtype), memory.f_bavail * memory.f_frsize
            if needed > free:
                return f"{ranks} arrays of {n} elements need {needed:,} bytes in /dev/shm, which has {free:,}"
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
