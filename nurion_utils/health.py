"""Is this environment fit for distributed training, and if not, what would mend it?"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

PACKAGES = ("tensorflow-cpu", "keras", "horovod", "mpi4py", "mpich", "ipyparallel")
AFRESH = "remove .venv and run make setup"
REMEDIES = dict.fromkeys(PACKAGES, "Run make setup.") | {
    "Python": "Set up again with Python 3.11.",
    "cores busy with something else": "Timings will be noisy: end other programs, or read only ratios of one run.",
    "free memory": "A rank with TensorFlow takes about 1 GB: start fewer ranks or end other programs.",
    "free shared memory (/dev/shm)": "MPI needs it for messages: in a container, start that with a larger --shm-size.",
    "ranks in order": "Restart the ranks: world.restart().",
    "cores per rank": "Ranks sit on the same cores: start them with ranks.start.",
    "MPI adds up the rank numbers": f"mpi4py uses another MPI than the one that started the ranks: {AFRESH}.",
    "Horovod adds up the rank numbers": f"Horovod does not see all ranks: it was built without MPI; {AFRESH}.",
    "operations Horovod was built with": f"Horovod was built elsewhere: {AFRESH}, for MPI, Gloo and oneCCL.",
    "operation in use": "HOROVOD_CPU_OPERATIONS is set in your environment: unset it, the ranks choose MPI.",
}


def report(world: World) -> pd.DataFrame:
    """Check this machine and the ranks of `world`.

    One row per check: ``check``, ``value``, ``ok`` (bool) and, where it is not, ``remedy`` in one sentence.
    """
    import pandas as pd

    answers = world.run(_rank_report, timeout_s=120)
    rows = [*_machine_checks(world.n), *_rank_checks(answers)]
    table = pd.DataFrame(rows, columns=["check", "value", "ok"])
    return table.assign(remedy=table["check"].map(REMEDIES).where(~table["ok"], ""))


def _machine_checks(n_ranks: int) -> list[tuple[str, str, bool]]:
    import psutil

    cores = len(os.sched_getaffinity(0))
    busy = psutil.cpu_percent(interval=0.3) / 100 * psutil.cpu_count()
    memory_gb = psutil.virtual_memory().available / 1e9
    shared_gb = shutil.disk_usage("/dev/shm").free / 1e9
    return [
        ("Python", sys.version.split()[0], sys.version_info[:2] == (3, 11)),
        *[(name, installed(name), installed(name) != "missing") for name in PACKAGES],
        ("cores for the ranks", f"{cores} for {n_ranks} ranks", True),
        ("cores busy with something else", f"{busy:.1f} of {cores}", busy < 0.3 * cores),
        ("free memory", f"{memory_gb:.1f} GB", memory_gb > 1.0 * n_ranks),
        ("free shared memory (/dev/shm)", f"{shared_gb:.1f} GB", shared_gb > 0.1 * n_ranks),
    ]


def _rank_checks(answers: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    n, first = len(answers), answers[0]
    order = [answer["rank"] for answer in answers]
    pinned = [answer["cores"] for answer in answers]
    disjoint = n > len(os.sched_getaffinity(0)) or len(set().union(*pinned)) == sum(map(len, pinned))
    operations = [name for name, built in first["horovod_operations"].items() if built]
    sums, expected = {name: {answer[f"{name}_sum"] for answer in answers} for name in ("MPI", "Horovod")}, sum(range(n))
    return [
        ("MPI library", first["mpi_library"], True),
        ("ranks in order", str(order), order == list(range(n))),
        ("cores per rank", str(pinned), disjoint),
        *[
            (f"{name} adds up the rank numbers", f"{max(found):g} (expected {expected})", found == {expected})
            for name, found in sums.items()
        ],
        ("operations Horovod was built with", ", ".join(operations), len(operations) == 3),
        ("operation in use", first["operation"], first["operation"] == "MPI"),
    ]


def installed(package: str) -> str:
    """Version of an installed package, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _rank_report() -> dict[str, Any]:
    """Runs on every rank."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    hvd.init()
    return {
        "rank": comm.rank,
        "cores": sorted(os.sched_getaffinity(0)),
        "mpi_library": MPI.Get_library_version().split("\n")[0].replace("\t", " ").strip(),
        "MPI_sum": comm.allreduce(comm.rank),
        "Horovod_sum": float(hvd.allreduce(tf.constant(float(comm.rank)), op=hvd.Sum, name="health")),
        "horovod_operations": {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "oneCCL": hvd.ccl_built()},
        "operation": os.environ.get("HOROVOD_CPU_OPERATIONS", "the first one built"),
    }
