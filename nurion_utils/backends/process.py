"""Horovod started and ended over a backend, on every rank, and what a process cannot take back of that.

>>> from nurion_utils import backends
>>> backends.init("oneCCL ring", timeline="timeline.json")  # doctest: +SKIP

A backend is chosen before Horovod starts, by the environment variables of `settings`. `init` sets them and starts
Horovod; so that one process can go from one backend to the next, it ends a Horovod that is running first.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from nurion_utils.backends.choosing import (
    CYCLE,
    FUSION,
    OPERATIONS,
    SEARCH,
    SEARCH_LOG,
    TIMELINE,
    Backend,
    BackendError,
    known,
    settings,
)

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


@dataclass
class Process:
    """The state of this process.

    Attributes
    ----------
    settled
        What oneCCL and Gloo, which read their settings once, have been run with, by their operations.
    searches
        Whether Horovod has begun to search for settings: it does not stop.
    before
        The environment as it was before Horovod was started; empty while it is not running.
    files
        What Horovod writes, by variable: the path, and a descriptor by which the file is locked.
    """

    settled: dict[str, Mapping[str, str]] = field(default_factory=dict)
    searches: bool = False
    before: dict[str, str | None] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)

    def possible(self, backend: Backend, chosen: dict[str, str]) -> dict[str, str]:
        """The settings, if Horovod can be started with them here and now; BackendError or ValueError if not."""
        try:
            hvd = importlib.import_module("horovod.tensorflow")
        except Exception as error:  # a library that it needs may be missing, too
            raise BackendError(f"Horovod cannot be imported here ({error}); make setup builds it") from None
        name, running = backend.operations, hvd.mpi_enabled() or hvd.gloo_enabled()
        if not getattr(hvd, f"{name.lower()}_built")():
            raise BackendError(f"this Horovod was built without {name}; make setup builds it with all three")
        given = {**os.environ, **self.before, **chosen}  # without what a Horovod that runs was started with
        if SEARCH_LOG in chosen and None not in (given.get(CYCLE), given.get(FUSION)):
            raise ValueError(f"with {CYCLE} and {FUSION} both in the environment there is nothing to search")
        if name == "GLOO":
            gloo_address(given)
        if name == "CCL" and not re.fullmatch("[1-9][0-9]?", given.get("CCL_WORKER_COUNT") or "1"):
            raise ValueError(f"CCL_WORKER_COUNT must be a whole number from 1 up, not {given['CCL_WORKER_COUNT']!r}")
        if hvd.mpi_enabled() if name == "GLOO" else hvd.gloo_enabled():
            raise BackendError("Gloo and other backends cannot take turns in one process; give Gloo ranks of its own")
        if self.settled.get(name, backend.env) != backend.env:
            library = "oneCCL" if name == "CCL" else "Gloo"
            raise BackendError(f"{library} reads its settings once in a process; use fresh ranks to change them")
        if self.searches:
            raise BackendError("Horovod goes on searching in this process: call world.restart() for other measurements")
        if SEARCH_LOG in chosen and running:
            raise BackendError("Horovod's search needs ranks that nothing else has used: call world.restart() first")
        return chosen

    def locked(self, chosen: Mapping[str, str]) -> dict[str, tuple[str, int]]:
        """The files that Horovod is to write, as `files`; ValueError if one cannot be, or another Horovod writes it."""
        held = dict(self.files.values())  # by the Horovod that runs, which will be ended
        with contextlib.ExitStack() as stack:  # closes what was opened if something raises
            files = {}
            for name in (TIMELINE, SEARCH_LOG):
                if name in chosen:
                    path = os.path.abspath(chosen[name])
                    files[name] = path, os.dup(held[path]) if path in held else _locked(path)
                    stack.callback(os.close, files[name][1])
            stack.pop_all()
        return files

    def begin(self, backend: Backend, variables: Mapping[str, str | None], files: dict[str, tuple[str, int]]) -> None:
        """Set the environment, and remember what cannot be taken back."""
        self.before = {name: os.environ.get(name) for name in variables}
        self.files, self.searches = files, variables.get(SEARCH_LOG) is not None
        _set_environment(variables)
        if backend.operations != "MPI":
            self.settled[backend.operations] = backend.env

    def end(self) -> None:
        """Restore the environment, and leave the files to others."""
        _set_environment(self.before)
        for _, descriptor in self.files.values():
            os.close(descriptor)
        self.before, self.files = {}, {}


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


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _locked(path: str) -> int:
    """A descriptor of the file, locked; ValueError says why Horovod could not write it."""
    if not os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"{path} cannot be written: there is no directory {os.path.dirname(path)}")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} cannot be written: it is not a file, but a directory, a device or the like")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; choose another file") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{path} cannot be written: another Horovod is writing it; choose another file") from None
    except OSError:  # not all file systems have locks
        pass
    return descriptor


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
