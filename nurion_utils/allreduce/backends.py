"""Horovod over MPI, Gloo and oneCCL: which library carries the bytes, chosen at run time.

>>> from nurion_utils.allreduce import backends  # on every rank
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
KEEP_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{setting}" for setting in ("mmap_threshold=8589934592", "trim_threshold=8589934592", "hugetlb=1")
    )
}


@dataclass(frozen=True)
class Backend:
    """A library that carries Horovod's bytes, and how it is set.

    Attributes
    ----------
    operations : str
        Value of HOROVOD_CPU_OPERATIONS: "MPI", "GLOO" or "CCL".
    env : Mapping of str to str
        Further environment variables, such as the algorithm of oneCCL.
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


class BackendError(RuntimeError):
    """This build of Horovod, or this process, cannot run the backend; the message says why, and what would."""


# -- on a rank ----------------------------------------------------------------------------------------------------

_used: dict[str, Backend] = {}  # what this process has run Horovod over, by operations


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
        How often Horovod looks for tensors to reduce, in milliseconds (HOROVOD_CYCLE_TIME; 1 is its default).
    fusion_bytes
        Longest buffer that tensors are packed into (HOROVOD_FUSION_THRESHOLD; 128 MiB is its default). 0 packs none.
    timeline
        File that rank 0 writes Horovod's timeline to. It is complete after `shutdown`.
    autotune_log
        File that rank 0 writes the log of Horovod's search for a good cycle time and fusion threshold to. It searches
        only for what is None here, and was not set before in this process.

    Raises
    ------
    BackendError
        This build lacks the backend, or this process cannot change to it: Gloo goes with no other, and oneCCL reads
        its settings once. `World.restart` gives fresh processes.
    """
    from mpi4py import MPI  # before Horovod, which would otherwise end MPI with itself

    backend = _known(backend)
    require_built(backend)
    if "GLOO" in {*_used, backend.operations} and {*_used} - {backend.operations}:
        raise BackendError("Gloo and other backends cannot take turns in one process; use ranks of their own for Gloo")
    if backend.operations == "CCL" and _used.setdefault("CCL", backend).env != backend.env:
        raise BackendError("oneCCL reads its settings once in a process; use fresh ranks to change them")
    _used[backend.operations] = backend

    import horovod.tensorflow as hvd

    shutdown()
    cycle = None if cycle_ms is None else f"{positive(cycle_ms, 'cycle_ms'):g}"
    threshold = None if fusion_bytes is None else str(whole_number(fusion_bytes, "fusion_bytes", 0))
    settings = {
        **backend.env,
        "HOROVOD_CPU_OPERATIONS": backend.operations,
        "HOROVOD_CONTROLLER": "gloo" if backend.operations == "GLOO" else "mpi",
        "HOROVOD_CYCLE_TIME": cycle,
        "HOROVOD_FUSION_THRESHOLD": threshold,
        "HOROVOD_TIMELINE": timeline and str(timeline),
        "HOROVOD_AUTOTUNE": autotune_log and "1",
        "HOROVOD_AUTOTUNE_LOG": autotune_log and str(autotune_log),
    }
    if backend.operations == "CCL":
        settings["CCL_WORKER_AFFINITY"] = os.environ.get("CCL_WORKER_AFFINITY") or _worker_cores(MPI.COMM_WORLD)
    os.environ.update({name: value for name, value in settings.items() if value is not None})
    for name in [name for name, value in settings.items() if value is None]:
        os.environ.pop(name, None)
    with _rendezvous(MPI.COMM_WORLD) if backend.operations == "GLOO" else contextlib.nullcontext():
        hvd.init()


def shutdown() -> None:
    """End Horovod on this rank, every rank calls it; a timeline is written to its end first."""
    import horovod.tensorflow as hvd

    if hvd.is_initialized() and os.environ.get("HOROVOD_TIMELINE"):
        hvd.stop_timeline()  # waits for the thread that writes it, which shutdown does not
    hvd.shutdown()


def require_built(backend: str | Backend) -> None:
    """BackendError unless the Horovod of this environment was built with the backend."""
    backend = _known(backend)
    try:
        hvd = importlib.import_module("horovod.tensorflow")
    except ImportError as error:
        raise BackendError(f"Horovod cannot be imported here ({error})") from None
    if not getattr(hvd, f"{backend.operations.lower()}_built")():
        raise BackendError(f"this Horovod was built without {backend.operations}; make setup builds it with all three")


def _known(backend: Any) -> Backend:
    if isinstance(backend, Backend) and backend.operations in ("MPI", "GLOO", "CCL"):
        return backend
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}; choose from {', '.join(BACKENDS)}, or make a Backend")
    return BACKENDS[backend]


def named(backends: Sequence[str] | Mapping[str, Backend]) -> dict[str, Backend]:
    """Backends by name; ValueError for what is none."""
    if isinstance(backends, str) or not isinstance(backends, Sequence | Mapping) or not len(backends):
        raise ValueError(f"backends are a list of names such as ['MPI', 'Gloo'], not {backends!r}")
    return {name: _known(backends[name] if isinstance(backends, Mapping) else name) for name in backends}


def _worker_cores(comm: MPI.Comm) -> str:
    """The cores for the worker threads of oneCCL on this node: each rank's own, where ranks have cores of their own.

    Left to itself, oneCCL takes the last cores of the machine, which belong to other ranks.
    """
    from mpi4py import MPI

    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, comm.Split_type(MPI.COMM_TYPE_SHARED).allgather(cores[-1 - comm.rank % len(cores)])))


@contextlib.contextmanager
def _rendezvous(comm: MPI.Comm) -> Iterator[None]:
    """The server at which Gloo's ranks find each other, on rank 0, while they start; to it each rank is a host."""
    import psutil
    from horovod.runner.common.util.hosts import SlotInfo
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    interface = os.environ.get("HOROVOD_GLOO_IFACE", "lo")
    server, address = None, None
    if comm.rank == 0:
        host = next(a.address for a in psutil.net_if_addrs()[interface] if a.family.name == "AF_INET")
        server = RendezvousHTTPServer((host, 0), RendezvousHandler, 0)
        server.init([SlotInfo(f"rank{rank}", rank, 0, rank, comm.size, 1, comm.size) for rank in range(comm.size)])
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = server.server_address
    host, port = comm.bcast(address)
    numbers = {"RANK": comm.rank, "SIZE": comm.size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
    numbers |= {"CROSS_RANK": comm.rank, "CROSS_SIZE": comm.size, "HOSTNAME": f"rank{comm.rank}"}
    numbers |= {"GLOO_RENDEZVOUS_ADDR": host, "GLOO_RENDEZVOUS_PORT": port, "GLOO_IFACE": interface}
    os.environ.update({f"HOROVOD_{name}": str(value) for name, value in numbers.items()})
    try:
        yield
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
