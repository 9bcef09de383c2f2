"""Horovod started and ended over a backend, on every rank, and what a process cannot take back of that.

A backend is chosen before Horovod starts, by the environment variables of `settings`. `init` sets them and starts
Horovod; so that one process can go from one backend to the next, it ends a Horovod that is running first.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nurion_utils.backends.choosing import TIMELINE, Backend, BackendError, known, settings

if TYPE_CHECKING:
    from mpi4py import MPI


_settled: dict[str, Mapping[str, str]] = {}  # what oneCCL and Gloo, which read their settings once, were run with
_before: dict[str, str | None] = {}  # the environment before Horovod was started; empty while it is not running


def init(backend: str | Backend = "MPI", **how: Any) -> None:
    """Start Horovod on this rank over a backend; every rank calls it, and a Horovod that runs is ended first.

    Arguments are those of `settings`, the same on all ranks. The file of the timeline is one of rank 0's, relative to
    the folder that it runs in.

    Raises
    ------
    BackendError
        This build lacks the backend, or this process cannot change to it: Gloo goes with no other, and it and oneCCL
        read their settings once. `World.restart` gives fresh processes.
    ValueError
        An argument is not possible, or the file cannot be written. Either error is raised on all ranks if it is on one,
        and then nothing was changed.

    Notes
    -----
    `shutdown` restores the environment. After Gloo, Horovod must be started by this function again. To Gloo each rank
    is a host of its own, so ``hvd.local_rank()`` is 0 on all of them, and no process set can be added while it runs.
    """
    from mpi4py import MPI  # before Horovod, which would otherwise end MPI with itself

    comm = MPI.COMM_WORLD
    chosen = _agreed(comm, lambda: possible(known(backend), settings(backend, **how), comm.rank))
    shutdown()
    backend = known(backend)

    import horovod.tensorflow as hvd

    with contextlib.ExitStack() as stack:
        if backend.operations == "CCL" and not {**os.environ, **chosen}.get("CCL_WORKER_AFFINITY"):
            chosen["CCL_WORKER_AFFINITY"] = worker_cores(comm, chosen)
        if backend.operations == "GLOO":
            chosen = {**stack.enter_context(rendezvous(comm, chosen)), **chosen}
        variables = {TIMELINE: None, **chosen}
        _before.update((name, os.environ.get(name)) for name in variables)
        if backend.operations != "MPI":
            _settled[backend.operations] = backend.env
        _set_environment(variables)
        hvd.init()


def shutdown() -> None:
    """End Horovod on this rank, every rank calls it; a timeline is written to its end first."""
    import horovod.tensorflow as hvd

    if hvd.is_initialized() and os.environ.get(TIMELINE):
        hvd.stop_timeline()  # waits for the thread that writes it, which shutdown does not
    hvd.shutdown()
    _set_environment(_before)
    _before.clear()


def possible(backend: Backend, chosen: dict[str, str], rank: int) -> dict[str, str]:
    """The settings, if Horovod can be started with them here and now; BackendError or ValueError if not."""
    try:
        hvd = importlib.import_module("horovod.tensorflow")
    except Exception as error:  # a library that it needs may be missing, too
        raise BackendError(f"Horovod cannot be imported here ({error}); make setup builds it") from None
    name = backend.operations
    if not getattr(hvd, f"{name.lower()}_built")():
        raise BackendError(f"this Horovod was built without {name}; make setup builds it with all three")
    given = {**os.environ, **_before, **chosen}  # without what a Horovod that runs was started with
    if name == "GLOO":
        gloo_address(given)
    if name == "CCL" and not re.fullmatch("[1-9][0-9]?", given.get("CCL_WORKER_COUNT") or "1"):
        raise ValueError(f"CCL_WORKER_COUNT must be a whole number from 1 up, not {given['CCL_WORKER_COUNT']!r}")
    if hvd.mpi_enabled() if name == "GLOO" else hvd.gloo_enabled():
        raise BackendError("Gloo and other backends cannot take turns in one process; give Gloo ranks of its own")
    if _settled.get(name, backend.env) != backend.env:
        library = "oneCCL" if name == "CCL" else "Gloo"
        raise BackendError(f"{library} reads its settings once in a process; use fresh ranks to change them")
    if rank == 0 and TIMELINE in chosen:
        require_writable(chosen[TIMELINE])
    return chosen


def _agreed(comm: MPI.Comm, check: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `check` returns, alike on all ranks; where it raises on one all raise, so that none of them waits."""
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
        if other != everywhere[0][0]:
            raise ValueError(
                f"rank {rank} starts Horovod with {other}, rank 0 with {everywhere[0][0]}; give all the same"
            )
    return found


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def require_writable(path: str) -> None:
    """ValueError if Horovod could not write this file."""
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "it is not a file, but a directory, a device or the like")
        open(path, "ab").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; choose another file") from None


def worker_cores(comm: MPI.Comm, chosen: Mapping[str, str]) -> str:
    """The cores for the worker threads of oneCCL on this node: each rank's own, where ranks have cores of their own.

    Left to itself, oneCCL takes the last cores of the machine, which belong to other ranks.
    """
    from mpi4py import MPI

    workers = int({**os.environ, **chosen}.get("CCL_WORKER_COUNT") or 1)
    cores = sorted(os.sched_getaffinity(0))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    of_node = node.allgather([cores[-1 - (comm.rank + worker) % len(cores)] for worker in range(workers)])
    node.Free()
    return ",".join(map(str, sum(of_node, [])))


def gloo_address(environment: Mapping[str, str]) -> tuple[str, str]:
    """The network interface for Gloo and its IPv4 address; BackendError if there is none."""
    import psutil

    interface, known = environment.get("HOROVOD_GLOO_IFACE") or "lo", psutil.net_if_addrs()
    for address in known.get(interface, []):
        if address.family.name == "AF_INET":
            return interface, address.address
    found = ", ".join(known)
    raise BackendError(f"HOROVOD_GLOO_IFACE must name an interface that has an IPv4 address; there are {found}")


@contextlib.contextmanager
def rendezvous(comm: MPI.Comm, chosen: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The server at which Gloo's ranks find each other, on rank 0, while they start; the settings that tell of it."""
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars

    from nurion_utils.ranks.launchers.elastic import Rendezvous

    interface, address = gloo_address({**os.environ, **chosen})
    with contextlib.ExitStack() as stack:
        if comm.rank == 0:
            server = Rendezvous([f"rank{rank}" for rank in range(comm.size)], address)
            stack.callback(server.close)
        slots, host, port = comm.bcast((server.slots, server.address, server.port) if comm.rank == 0 else None)
        variables = create_run_env_vars(host, [interface], port) | create_slot_env_vars(slots[f"rank{comm.rank}"])
        yield {name: str(value) for name, value in variables.items()}
