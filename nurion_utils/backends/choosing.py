"""The libraries that can carry Horovod's bytes, and the environment variables that choose one.

>>> settings("oneCCL ring", cycle_ms=0.5)["CCL_ALLREDUCE"]
'ring'
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nurion_utils._checks import number, one_of, whole_number
from nurion_utils.training.memory import FUSION_BUFFER_BYTES

# glibc gives the memory of a large buffer back to Linux as soon as it is freed, and Linux clears every page of the
# next one; an MPI library that needs a buffer for each large allreduce pays for that each time. With these settings a
# process keeps what it once had. They are read when a process starts: ranks.start(2, env=KEEP_MEMORY).
# One arena, because the arenas of further threads, Horovod's among them, cannot hold a block of 64 MiB.
_MALLOC = ["mmap_threshold=8589934592", "trim_threshold=8589934592", "arena_max=1", "hugetlb=1"]
KEEP_MEMORY = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in _MALLOC)}

LONGEST_CYCLE_MS = 10_000
LONGEST_FUSION_BYTES = 2**31 - 1  # MPI counts with 32 bits, and there are tensors of bytes
CYCLE, FUSION = "HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD"
TIMELINE, OPERATIONS, CONTROLLER = "HOROVOD_TIMELINE", "HOROVOD_CPU_OPERATIONS", "HOROVOD_CONTROLLER"
ARGUMENTS = [OPERATIONS, CONTROLLER, CYCLE, FUSION, TIMELINE]  # which a Backend cannot set


class BackendError(RuntimeError):
    """This build of Horovod, or this process, cannot run the backend; the message says why, and what would."""

    __module__ = "nurion_utils.backends"  # where the reader finds it


@dataclass(frozen=True)
class Backend:
    """A library that carries Horovod's bytes, and how it is set; ValueError if it cannot be set so.

    The variables of ``env`` are set when ranks already run: those that MPICH or the C library read when a process
    starts belong into ``ranks.start(n, env=...)``.
    """

    operations: str  # value of HOROVOD_CPU_OPERATIONS: "MPI", "GLOO" or "CCL"
    env: Mapping[str, str] = field(default_factory=dict)  # further variables, such as the algorithm of oneCCL

    def __post_init__(self) -> None:
        one_of(self.operations, "the operations of a backend", ("MPI", "GLOO", "CCL"))
        if not isinstance(self.env, Mapping) or not all(isinstance(t, str) for pair in self.env.items() for t in pair):
            raise ValueError(f"env must be a dictionary of environment variables, which are strings, not {self.env!r}")
        for name, value in self.env.items():
            if name in ARGUMENTS:
                raise ValueError(f"{name} is set by an argument of init, not by a backend")
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "\0" in value:
                raise ValueError(f"{name!r} cannot be set to {value!r} in an environment")

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
# same rank holds; see tools/horovod_wheel.py. This one polls.
GLOO_AS_SHIPPED = Backend("GLOO", {"NURION_GLOO_SPINS": "1"})


def named(backends: Sequence[str] | Mapping[str, Backend]) -> dict[str, Backend]:
    """Backends by name; ValueError for what is not a backend, and for a name given twice."""
    if isinstance(backends, str) or not isinstance(backends, Sequence | Mapping) or not len(backends):
        raise ValueError(f"backends are a list of names such as ['MPI', 'Gloo'], not {backends!r}")
    if not all(isinstance(name, str) for name in backends):
        raise ValueError("backends of your own need names: pass a dictionary such as {'mine': Backend('MPI')}")
    if len(set(backends)) < len(backends):
        raise ValueError(f"a backend is given twice in {backends!r}; give each once, and more repeats")
    return {name: known(backends[name] if isinstance(backends, Mapping) else name) for name in backends}


def known(backend: str | Backend) -> Backend:
    """The backend of a name, or the backend itself."""
    if isinstance(backend, Backend):
        return backend
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}; choose from {', '.join(BACKENDS)}, or make a Backend")
    return BACKENDS[backend]


def settings(
    backend: str | Backend = "MPI",
    *,
    cycle_ms: float | None = 1.0,
    fusion_bytes: int | None = FUSION_BUFFER_BYTES,
    timeline: str | Path | None = None,
) -> dict[str, str]:
    """Environment variables that make Horovod run over a backend: what `init` sets, and what a job script exports.

    ValueError for an argument that is not possible.

    Parameters
    ----------
    backend
        Name in `BACKENDS`, or one of your own making.
    cycle_ms
        How often Horovod looks for tensors to reduce, in milliseconds (HOROVOD_CYCLE_TIME; 1 is its default), up to
        10,000. None leaves it at what it was in this process or is in its environment, or at the default, from which
        Horovod searches for a better one where HOROVOD_AUTOTUNE is 1.
    fusion_bytes
        Longest buffer that tensors are packed into (HOROVOD_FUSION_THRESHOLD; 128 MiB is its default), below 2 GiB.
        0 packs none; None as above.
    timeline
        File that rank 0 writes Horovod's timeline to. It is complete after `shutdown`.
    """
    backend = known(backend)
    file = isinstance(timeline, str | os.PathLike) and os.fspath(timeline)
    if timeline is not None and (not isinstance(file, str) or file in ("", "DYNAMIC") or "\0" in file):
        raise ValueError(f"timeline is the name of a file, not {timeline!r}")
    chosen = {**backend.env, OPERATIONS: backend.operations}
    chosen[CONTROLLER] = "gloo" if backend.operations == "GLOO" else "mpi"
    if cycle_ms is not None:
        chosen[CYCLE] = f"{number(cycle_ms, 'cycle_ms', above=0, most=LONGEST_CYCLE_MS):g}"
    if fusion_bytes is not None:
        chosen[FUSION] = str(whole_number(fusion_bytes, "fusion_bytes", 0, LONGEST_FUSION_BYTES))
    if timeline is not None:
        chosen[TIMELINE] = file
    return chosen
