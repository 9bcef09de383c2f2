"""Horovod started and ended over a backend, on every rank.

>>> from nurion_utils import backends
>>> backends.init("oneCCL ring", timeline="timeline.json")  # doctest: +SKIP

A backend is chosen before Horovod starts, by the environment variables of `settings`. `init` sets them and starts
Horovod; so that one process can go from one backend to the next, it ends a Horovod that is running first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from nurion_utils.backends.choosing import (
    OPERATIONS,
    SEARCH,
    SEARCH_LOG,
    TIMELINE,
    Backend,
    BackendError,
    known,
    settings,
)
from nurion_utils.backends.process import Process, rendezvous, worker_cores

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_process = Process()


def init(backend: str | Backend = "MPI", **how: Any) -> None:
    """Start Horovod on this rank over a backend; every rank calls it, and a Horovod that runs is ended first.

    Parameters
    ----------
    backend, **how
        ``cycle_ms``, ``fusion_bytes``, ``timeline``, ``autotune_log``: as of `settings`, the same on all ranks. Files
        are those of rank 0, relative to the folder that it runs in.

    Raises
    ------
    BackendError
        This build lacks the backend, or this process cannot change to it: Gloo goes with no other, it and oneCCL read
        their settings once, and a search does not end with Horovod. `World.restart` gives fresh processes.
    ValueError
        An argument is not possible, or a file cannot be written. Either error is raised on all ranks if it is on one,
        and then nothing was changed.

    Notes
    -----
    `shutdown` restores the environment. After Gloo, Horovod must be started by this function again. To Gloo each rank
    is a host of its own, so ``hvd.local_rank()`` is 0 on all of them, and no process set can be added while it runs.
    """
    from mpi4py import MPI  # before Horovod, which would otherwise end MPI with itself

    comm = MPI.COMM_WORLD
    chosen = _agreed(comm, lambda: _process.possible(known(backend), settings(backend, **how)))
    files = _agreed(comm, lambda: _process.locked(chosen) if comm.rank == 0 else None, alike=False)  # rank 0 writes
    shutdown()

    import horovod.tensorflow as hvd

    chosen |= {name: path for name, (path, _) in files.items()}
    with contextlib.ExitStack() as stack:
        if chosen[OPERATIONS] == "CCL" and not {**os.environ, **chosen}.get("CCL_WORKER_AFFINITY"):
            chosen["CCL_WORKER_AFFINITY"] = worker_cores(comm, chosen)
        if chosen[OPERATIONS] == "GLOO":
            chosen = {**stack.enter_context(rendezvous(comm, chosen)), **chosen}
        _process.begin(
            known(backend), {TIMELINE: None, SEARCH: None, SEARCH_LOG: None, **chosen}, files if comm.rank == 0 else {}
        )
        hvd.init()


def shutdown() -> None:
    """End Horovod on this rank, every rank calls it; a timeline is written to its end first."""
    import horovod.tensorflow as hvd

    if hvd.is_initialized() and os.environ.get(TIMELINE):
        hvd.stop_timeline()  # waits for the thread that writes it, which shutdown does not
    hvd.shutdown()
    _process.end()


def _agreed(comm: MPI.Comm, check: Callable[[], T], alike: bool = True) -> T:
    """What `check` returns on rank 0; where it raises on one rank all raise, so that none of them waits for others."""
    found, error = None, None
    try:
        found = check()
    except Exception as raised:
        error = raised
    everywhere = comm.allgather((found, error and f"{error}"))
    if error:
        raise error
    for rank, (other, words) in enumerate(everywhere):
        if words is not None:
            raise BackendError(f"rank {rank} cannot start Horovod: {words}")
        if alike and other != everywhere[0][0]:
            raise ValueError(
                f"rank {rank} starts Horovod with {other}, rank 0 with {everywhere[0][0]}; give all the same"
            )
    return everywhere[0][0]
