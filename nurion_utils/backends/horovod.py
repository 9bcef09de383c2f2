"""Horovod over MPI, Gloo and oneCCL: which library carries the bytes, chosen at run time.

>>> from nurion_utils import backends  # on every rank
>>> backends.init("oneCCL ring")

A backend is chosen before Horovod starts, by environment variables. `init` sets them and starts Horovod; so that one
process can go from one backend to the next, it ends a Horovod that is running first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurion_utils._checks import positive, whole_number

if TYPE_CHECKING:
    from mpi4py import MPI

# glibc gives the memory of a large buffer back to Linux as soon as it is freed, and Linux clears every page of the
# next one; an MPI library that needs a buffer for each large allreduce pays for that each time. With these settings a
# process keeps what it once had. They are read when a process starts: ranks.start(2, env=KEEP_MEMORY).
# One arena, because the arenas of further threads, Horovod's among them, cannot hold a block of 64 MiB.
_MALLOC = ["mmap_threshold=8589934592", "trim_threshold=8589934592", "arena_max=1", "hugetlb=1"]
KEEP_MEMORY = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in _MALLOC)}


@dataclass(frozen=True)
class Backend:
    """A library that carries Horovod's bytes, and how it is set.

    Attributes
    ----------
    operations : str
        Value of HOROVOD_CPU_OPERATIONS: "MPI", "GLOO" or "CCL".
    env : Mapping of str to str
        Further environment variables, such as the algorithm of oneCCL. They are set when ranks already run: MPICH's
        own, and those of the C library, belong into ``ranks.start(n, env=...)``.
    """

    operations: str
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def activity(self) -> str:
        """What Horovod's timeline calls an allreduce that this library carried."""
        return f"{self.operations}_ALLREDUCE"


# Over MPI, oneCCL by default hands an allreduce on to MPI (its algorithm "direct"); "ring" is its own.
BACKENDS = {
    "MPI": Backend("MPI"),
    "Gloo": Backend("GLOO"),
    "oneCCL": Backend("CCL"),
    "oneCCL ring": Backend("CCL", {"CCL_ALLREDUCE": "ring"}),
}

# The Gloo of this Horovod gives up the core where Gloo as it is shipped polls for a lock that another thread of the
# same rank holds; see tools/horovod_wheel.py.  This one polls.
GLOO_AS_SHIPPED = Backend("GLOO", {"NURION_GLOO_SPINS": "1"})


class BackendError(RuntimeError):
    """This build of Horovod, or this process, cannot run the backend; the message says why, and what would."""


# -- on a rank ----------------------------------------------------------------------------------------------------

# What `init` sets by its arguments, and a Backend therefore cannot
ARGUMENTS = [
    *["HOROVOD_CPU_OPERATIONS", "HOROVOD_CONTROLLER", "HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD"],
    *["HOROVOD_TIMELINE", "HOROVOD_AUTOTUNE", "HOROVOD_AUTOTUNE_LOG"],
]
_settled: dict[str, Mapping[str, str]] = {}  # what this process has run oneCCL or Gloo with, by operations
_has_searched = False
_before: dict[str, str | None] = {}  # the environment as it was before `init`


def init(
    backend: str | Backend = "MPI",
    *,
    cycle_ms: float | None = 1.0,
    fusion_bytes: int | None = 128 << 20,
    timeline: str | Path | None = None,
    autotune_log: str | Path | None = None,
) -> None:
    """Start Horovod on this rank over a backend; every rank calls it, and a Horovod that runs is ended first.

    Parameters
    ----------
    backend
        Name in `BACKENDS`, or one of your own making.
    cycle_ms
        How often Horovod looks for tensors to reduce, in milliseconds (HOROVOD_CYCLE_TIME; 1 is its default). None
        leaves it at what it was in this process or is in its environment, or at the default.
    fusion_bytes
        Longest buffer that tensors are packed into (HOROVOD_FUSION_THRESHOLD; 128 MiB is its default). 0 packs none;
        None as above.
    timeline
        File that rank 0 writes Horovod's timeline to. It is complete after `shutdown`.
    autotune_log
        File that rank 0 writes the log of Horovod's search for a good cycle time and fusion threshold to. It searches
        for what is None here and not in the environment, and only in a process in which neither was set before.

    Raises
    ------
    BackendError
        This build lacks the backend, or this process cannot change to it: Gloo goes with no other, it and oneCCL read
        their settings once, and a search does not end with Horovod. `World.restart` gives fresh processes.
    ValueError
        An argument is not possible; nothing was changed.

    Notes
    -----
    `shutdown` restores the environment.  After Gloo, Horovod must be started by this function again.  To Gloo each rank
    is a host of its own, so ``hvd.local_rank()`` is 0 on all of them, and no process set can be added while it runs.
    """
    backend = _known(backend)
    cycle = None if cycle_ms is None else f"{positive(cycle_ms, 'cycle_ms'):g}"
    threshold = None if fusion_bytes is None else str(whole_number(fusion_bytes, "fusion_bytes", 0))
    for file in (timeline, autotune_log):
        if file is not None and not isinstance(file, str | os.PathLike):
            raise ValueError(f"timeline and autotune_log are names of files, not {file!r}")
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no directory {Path(file).absolute().parent}")
    outside = {**os.environ, **_before}  # the environment without what a Horovod that runs was started with
    fixed = [
        value is not None or outside.get(name) is not None
        for name, value in (("HOROVOD_CYCLE_TIME", cycle), ("HOROVOD_FUSION_THRESHOLD", threshold))
    ]
    if autotune_log is not None and all(fixed):
        raise ValueError("with cycle_ms and fusion_bytes both set there is nothing to search: pass None for one")
    require_built(backend)

    import horovod.tensorflow as hvd
    from mpi4py import MPI  # before Horovod, which would otherwise end MPI with itself

    global _has_searched
    if hvd.mpi_enabled() if backend.operations == "GLOO" else hvd.gloo_enabled():
        raise BackendError("Gloo and other backends cannot take turns in one process; use ranks of their own for Gloo")
    if _settled.get(backend.operations, backend.env) != backend.env:
        name = "oneCCL" if backend.operations == "CCL" else "Gloo"
        raise BackendError(f"{name} reads its settings once in a process; use fresh ranks to change them")
    if _has_searched:
        raise BackendError("Horovod goes on searching in this process: call world.restart() for other measurements")
    if autotune_log is not None and (hvd.mpi_enabled() or hvd.gloo_enabled()):
        raise BackendError("Horovod's search needs ranks that nothing else has used: call world.restart() first")

    shutdown()
    settings = {
        **backend.env,
        "HOROVOD_CPU_OPERATIONS": backend.operations,
        "HOROVOD_CONTROLLER": "gloo" if backend.operations == "GLOO" else "mpi",
        **({} if cycle is None else {"HOROVOD_CYCLE_TIME": cycle}),
        **({} if threshold is None else {"HOROVOD_FUSION_THRESHOLD": threshold}),
        "HOROVOD_TIMELINE": None if timeline is None else str(timeline),
        "HOROVOD_AUTOTUNE": None if autotune_log is None else "1",
        "HOROVOD_AUTOTUNE_LOG": None if autotune_log is None else str(autotune_log),
    }
    with contextlib.ExitStack() as stack:
        given = {**os.environ, **backend.env}
        if backend.operations == "CCL" and not given.get("CCL_WORKER_AFFINITY"):
            settings["CCL_WORKER_AFFINITY"] = _worker_cores(MPI.COMM_WORLD, int(given.get("CCL_WORKER_COUNT", 1)))
        if backend.operations == "GLOO":
            settings |= stack.enter_context(_rendezvous(MPI.COMM_WORLD))
        _before.update({name: os.environ.get(name) for name in settings})
        _set_environment(settings)
        _has_searched = autotune_log is not None
        if backend.operations != "MPI":
            _settled[backend.operations] = backend.env
        hvd.init()


def shutdown() -> None:
    """End Horovod on this rank, every rank calls it; a timeline is written to its end first."""
    import horovod.tensorflow as hvd

    if hvd.is_initialized() and os.environ.get("HOROVOD_TIMELINE"):
        hvd.stop_timeline()  # waits for the thread that writes it, which shutdown does not
    hvd.shutdown()
    _set_environment(_before)
    _before.clear()


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def require_built(backend: str | Backend) -> None:
    """BackendError unless the Horovod of this environment was built with the backend."""
    backend = _known(backend)
    try:
        hvd = importlib.import_module("horovod.tensorflow")
    except Exception as error:  # a library that it needs may be missing, too
        raise BackendError(f"Horovod cannot be imported here ({error}); make setup builds it") from None
    if not getattr(hvd, f"{backend.operations.lower()}_built")():
        raise BackendError(f"this Horovod was built without {backend.operations}; make setup builds it with all three")


def _known(backend: Any) -> Backend:
    if isinstance(backend, Backend):
        if backend.operations not in ("MPI", "GLOO", "CCL"):
            raise ValueError(f"the operations of a backend are 'MPI', 'GLOO' or 'CCL', not {backend.operations!r}")
        if not all(isinstance(text, str) for pair in backend.env.items() for text in pair):
            raise ValueError(f"environment variables are strings, not {dict(backend.env)!r}")
        if own := [name for name in ARGUMENTS if name in backend.env]:
            raise ValueError(f"{own[0]} is set by an argument of init, not by a backend")
        return backend
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}; choose from {', '.join(BACKENDS)}, or make a Backend")
    return BACKENDS[backend]


def named(backends: Sequence[str] | Mapping[str, Backend]) -> dict[str, Backend]:
    """Backends by name; ValueError for what is none."""
    if isinstance(backends, str) or not isinstance(backends, Sequence | Mapping) or not len(backends):
        raise ValueError(f"backends are a list of names such as ['MPI', 'Gloo'], not {backends!r}")
    if not all(isinstance(name, str) for name in backends):
        raise ValueError("backends of your own need names: pass a dictionary such as {'mine': Backend('MPI')}")
    return {name: _known(backends[name] if isinstance(backends, Mapping) else name) for name in backends}


def _worker_cores(comm: MPI.Comm, workers: int) -> str:
    """The cores for the worker threads of oneCCL on this node: each rank's own, where ranks have cores of their own.

    Left to itself, oneCCL takes the last cores of the machine, which belong to other ranks.
    """
    from mpi4py import MPI

    cores = sorted(os.sched_getaffinity(0))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    of_node = node.allgather([cores[-1 - (comm.rank + worker) % len(cores)] for worker in range(workers)])
    node.Free()
    return ",".join(map(str, sum(of_node, [])))


@contextlib.contextmanager
def _rendezvous(comm: MPI.Comm) -> Iterator[dict[str, str]]:
    """The server at which Gloo's ranks find each other, on rank 0, while they start; the settings that tell of it."""
    import psutil
    from horovod.runner.common.util.hosts import SlotInfo
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    interface = os.environ.get("HOROVOD_GLOO_IFACE", "lo")
    known = psutil.net_if_addrs()
    hosts = [a.address for a in known.get(interface, []) if a.family.name == "AF_INET"]
    if not all(comm.allgather(bool(hosts))):
        found = ", ".join(known)
        raise BackendError(f"HOROVOD_GLOO_IFACE must name an interface that has an IPv4 address; there are {found}")
    with contextlib.ExitStack() as stack:
        address = None
        if comm.rank == 0:
            server = stack.enter_context(RendezvousHTTPServer((hosts[0], 0), RendezvousHandler, 0))
            server.init([SlotInfo(f"rank{rank}", rank, 0, rank, comm.size, 1, comm.size) for rank in range(comm.size)])
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            address = server.server_address
        host, port = comm.bcast(address)
        numbers = {"RANK": comm.rank, "SIZE": comm.size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        numbers |= {"CROSS_RANK": comm.rank, "CROSS_SIZE": comm.size, "HOSTNAME": f"rank{comm.rank}"}
        numbers |= {"GLOO_RENDEZVOUS_ADDR": host, "GLOO_RENDEZVOUS_PORT": port, "GLOO_IFACE": interface}
        yield {f"HOROVOD_{name}": str(value) for name, value in numbers.items()}
