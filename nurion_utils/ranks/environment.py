"""What launchers and ranks tell each other in environment variables: who a rank is, and how it is set up."""

import contextlib
import os
import platform
import re
import sys
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

# Launchers tell a rank who it is by these variables: rank, world size, rank on its node. The first pair that is
# complete counts, and the nearest launcher comes first: Horovod's own, then MPI's, then the scheduler's.
VARIANTS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)

# What an outer launch (mpiexec, srun, horovodrun) tells its own processes, and a rank of ours must not hear: it
# would look for the outer launch's server, or take the outer rank for its own. What a user sets to tune a library
# stays, such as HOROVOD_FUSION_THRESHOLD, MPIR_CVAR_*, UCX_* and I_MPI_FABRICS; so does what describes a whole job.
OUTER = re.compile(
    r"(PMI|PMI2|PMIX|PALS|APRUN|ALPS|OMPI|ORTE|OPAL|PRTE|JSM|MV2_COMM_WORLD|MPISPAWN|HYDRA|HYDI|MPIEXEC|GFORKER)(_|$)"
    r"|MPI_LOCALN?RANK|MPI_UNIVERSE|MPICH_INTERFACE_HOSTNAME|MPIRUN_|FLUX_(TASK|PMI)"
    r"|I_MPI_(HYDRA|MPIRUN|INFO|PMI|SPAWN|JOB|LOCALRANK|RANK|PROCESS_MANAGER)"
    r"|SLURM_(STEP|SRUN|TASK|MPI|PMI|LAUNCH|GTIDS|PROCID|LOCALID|NODEID|NTASKS|NPROCS|NNODES|NODELIST|DISTRIBUTION"
    r"|CPU_BIND|MEM_BIND|UMASK|PRIO_PROCESS|CPUS_ON_NODE|JOB_NODELIST|JOB_NUM_NODES|WORKING_CLUSTER)"
    r"|PMI_|PBS_(TASKNUM|NODENUM|VNODENUM|MOMPORT|NODEFILE)$"
    r"|HOROVOD_(RANK|SIZE|LOCAL_RANK|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|CONTROLLER|HOSTNAME|RENDEZVOUS|GLOO_RENDEZVOUS"
    r"|GLOO_IFACE|ELASTIC|MPI_THREADS_DISABLE|WORLD)"
)

# What must be the same on all nodes, for ranks to understand each other and the notebook.
PACKAGES = ("tensorflow-cpu", "keras", "horovod", "mpi4py", "mpich", "ipyparallel")


class Identity(NamedTuple):
    """A rank among all: its number, the number of all, and its number on its node."""

    rank: int
    size: int
    local_rank: int


def identity(environment: Mapping[str, str] = os.environ) -> Identity:
    """Who this process is, by what its launcher says of it: Hydra, gforker, Intel MPI, Open MPI, PALS, srun, Horovod.

    A process that no launcher started is alone: ``Identity(0, 1, 0)``. So is a batch script of Slurm's, in which
    ``SLURM_PROCID`` is set although nobody started ranks.
    """
    for names in VARIANTS:
        rank, size, local_rank = (environment.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            if environment.get("SLURM_STEP_ID") == "batch" or int(size) < 1:
                continue
            return Identity(int(rank), int(size), int(local_rank) if local_rank.isdecimal() else int(rank))
    return Identity(0, 1, 0)


def end_of_job(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the job ends that this process belongs to, in seconds since 1970; None if nobody says.

    A job script says it in ``NURION_ENDS_AT``, Slurm in ``SLURM_JOB_END_TIME``; ValueError if that is no number.
    """
    for name in ("NURION_ENDS_AT", "SLURM_JOB_END_TIME"):
        if told := environment.get(name):
            if not re.fullmatch(r"\d+(\.\d+)?", told):
                raise ValueError(f"{name} must be the seconds since 1970 at which the job ends, not {told!r}")
            return float(told)
    return None


@cache
def note_progress() -> None:
    """Say once that this process has saved something new: to a job that submits itself again as long as that is so."""
    if path := os.environ.get("NURION_PROGRESS"):
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")


def own_environment() -> dict[str, str]:
    """The environment of this process without what an outer launch told it: for ranks that are started from here."""
    return {name: value for name, value in os.environ.items() if not OUTER.match(name)}


def installed(package: str) -> str:
    """Version of an installed package, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def installation() -> dict[str, str]:
    """Versions of what ranks run on, by name, without importing it; of this package a checksum of its files."""
    checksum = 0
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        checksum = zlib.crc32(file.read_bytes(), checksum)
    own = {"Python": platform.python_version(), "nurion_utils": f"{checksum:08x}"}
    return own | {name: installed(name) for name in PACKAGES}


def rank_environment(threads: int) -> dict[str, str]:
    """Environment variables that every rank starts with, for `threads` cores of its own."""
    environment = Path(sys.prefix)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        # One hands gradients to Horovod while another computes. Medians of steps with one core per rank, in turn: with
        # 50 MB of gradients 0.92 of the time of one thread on one machine, 0.87 at 4 Gbit/s; small networks within 2 %.
        "TF_NUM_INTEROP_THREADS": str(max(2, threads)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "1",  # its default here; said explicitly, TensorFlow does not log it on every rank
        "KERAS_BACKEND": "tensorflow",
        "UCX_TLS": "self,sm",  # MPI between ranks of one machine needs shared memory only, and no open port
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",  # into a log that is kept, and read when ranks wait in vain
        "HOROVOD_CPU_OPERATIONS": "MPI",  # this build would take oneCCL, which loses when ranks share cores
        "CCL_ROOT": str(environment),
        "CCL_ATL_TRANSPORT": "mpi",
        "CCL_LOG_LEVEL": "error",
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, [f"{environment}/lib", f"{environment}/lib/cpu", os.environ.get("LD_LIBRARY_PATH")])
        ),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # ranks import what the caller can
        "IPP_DISABLE_JS": "1",
    }
