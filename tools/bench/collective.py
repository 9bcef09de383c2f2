"""Schedules on real ranks against MPI's own Allreduce, in place, on memory that is handled alike for all."""

import time
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from blocks import alternate

from nurion_utils import allreduce, ranks

# Fresh pages for every large buffer, glibc's default, would cost the library's buffers more than ours.
SETTINGS = ("mmap_threshold=8589934592", "trim_threshold=8589934592", "hugetlb=1")
MALLOC = ":".join(f"glibc.malloc.{setting}" for setting in SETTINGS)
_calls: dict[str, Any] = {}


def measure(n_ranks: int, size_bytes: int, pairs: int = 9, block_s: float = 0.7) -> pd.DataFrame:
    """Time one allreduce of float32: "native", "ring" (`allreduce.run`) and "shared" (`SharedArray.allreduce`)."""
    with ranks.start(n_ranks, env={"GLIBC_TUNABLES": MALLOC}) as world:
        first_s = dict(world.run(prepare, n_ranks, size_bytes)[0])
        calls = {name: max(1, round(block_s / time_s)) for name, time_s in first_s.items()}
        return alternate({name: partial(_block_of, world, name, n) for name, n in calls.items()}, pairs)


def _block_of(world: ranks.World, name: str, calls: int) -> float:
    return max(world.run(block, name, calls))


def prepare(n_ranks: int, size_bytes: int) -> list[tuple[str, float]]:
    """On every rank: make the contenders, and say how long each takes at first."""
    from mpi4py import MPI

    comm, ring = MPI.COMM_WORLD, allreduce.ring(n_ranks)
    array, shared = np.zeros(size_bytes // 4, np.float32), allreduce.SharedArray(comm, size_bytes // 4)
    shared.array[:] = 0
    _calls["native"] = lambda: comm.Allreduce(MPI.IN_PLACE, array)
    _calls["ring"] = lambda: allreduce.run(ring, comm, array)
    _calls["shared"] = lambda: shared.allreduce(ring)
    for name in _calls:
        block(name, 3)
    return [(name, comm.allreduce(block(name, 3), op=MPI.MAX)) for name in _calls]


def block(name: str, calls: int) -> float:
    """On every rank: seconds per call, after one for warming up."""
    from mpi4py import MPI

    call = _calls[name]
    call()
    MPI.COMM_WORLD.Barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls
