"""Is this environment fit for distributed training, and if not, what would mend it?

``python -m nurion_utils.health --ranks 4 --site slurm --nodes 4`` says so from a shell.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurion_utils.ranks.environment import PACKAGES, installed

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

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
    "ranks on each node": "The launcher crowds ranks on some nodes: have it spread them, as mpiexec -ppn does.",
    "a folder here is on all nodes": "Work in a folder that all nodes share, as on a cluster's scratch file system.",
    "clocks of the nodes": "They differ by more than a second: tell those who run the machine; its NTP is at fault.",
    "MPI's bytes travel by": "They do not use the network between the nodes: unset UCX_TLS, UCX_NET_DEVICES and FI_*.",
    "operation in use": "HOROVOD_CPU_OPERATIONS is set in your environment: unset it, the ranks choose MPI.",
}


def report(world: World) -> pd.DataFrame:
    """Check this machine and the ranks of `world`.

    One row per check: ``check``, ``value``, ``ok`` (bool) and, where it is not, ``remedy`` in one sentence.
    """
    import pandas as pd

    try:
        here = tempfile.NamedTemporaryFile(dir=".", prefix=".nurion-health-")
    except OSError:  # not ours to write to
        here = contextlib.nullcontext(sys.executable)
    with here:
        answers = world.run(_rank_report, os.path.abspath(getattr(here, "name", sys.executable)), timeout_s=120)
    rows = [*_machine_checks(world.n), *_shared_out(answers), *_rank_checks(answers), *_node_checks(answers)]
    table = pd.DataFrame(rows, columns=["check", "value", "ok"])
    return table.assign(remedy=table["check"].map(REMEDIES).where(~table["ok"], ""))


def _machine_checks(n_ranks: int) -> list[tuple[str, str, bool]]:
    import psutil

    cores = len(os.sched_getaffinity(0))
    busy = psutil.cpu_percent(interval=0.3) / 100 * psutil.cpu_count()
    shared_gb = shutil.disk_usage("/dev/shm").free / 1e9
    return [
        ("Python", sys.version.split()[0], sys.version_info[:2] == (3, 11)),
        *[(name, installed(name), installed(name) != "missing") for name in PACKAGES],
        ("cores busy with something else", f"{busy:.1f} of {cores}", busy < 0.3 * cores),
        ("free shared memory (/dev/shm)", f"{shared_gb:.1f} GB", shared_gb > 0.1 * n_ranks),
    ]


def _rank_checks(answers: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    n, first = len(answers), answers[0]
    order = [answer["rank"] for answer in answers]
    pinned = [answer["cores"] for answer in answers if answer["node"] == first["node"]]
    disjoint = len(pinned) > first["all_cores"] or len(set().union(*pinned)) == sum(map(len, pinned))
    if first["node"] != os.uname().nodename:  # where a job shares nodes with others, their scheduler places them
        disjoint = disjoint or all(len(cores) == first["all_cores"] for cores in pinned)
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


def _shared_out(answers: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """What the ranks of a node share, where it is least for each."""
    nodes: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        nodes.setdefault(answer["node"], []).append(answer)
    cores = {node: len(set().union(*(answer["cores"] for answer in there))) for node, there in nodes.items()}
    memory_gb = {node: there[0]["memory_gb"] for node, there in nodes.items()}
    least, poorest = (min(nodes, key=lambda node: given[node] / len(nodes[node])) for given in (cores, memory_gb))
    return [
        ("cores for the ranks", f"{cores[least]} for {len(nodes[least])} on {least}", True),
        (
            "free memory",
            f"{memory_gb[poorest]:.1f} GB for {len(nodes[poorest])} on {poorest}",
            memory_gb[poorest] > 1.0 * len(nodes[poorest]),
        ),
    ]


def _node_checks(answers: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """What can be wrong only where ranks sit on several nodes."""
    nodes = Counter(answer["node"] for answer in answers)
    if len(nodes) == 1:
        return []
    unseen = sorted({answer["node"] for answer in answers if not answer["sees_folder"]})
    clocks_s = [answer["clock_s"] for answer in answers]
    carried = Counter()
    for answer in answers:
        carried.update(answer["sent"])
    way, most = carried.most_common(1)[0] if carried else ("no interface that is counted", 0)
    return [
        ("ranks on each node", ", ".join(f"{node}: {n}" for node, n in nodes.items()), len({*nodes.values()}) == 1),
        ("a folder here is on all nodes", f"not on {', '.join(unseen)}" if unseen else "yes", not unseen),
        ("clocks of the nodes", f"{max(clocks_s) - min(clocks_s):.3f} s apart", max(clocks_s) - min(clocks_s) < 1),
        ("MPI's bytes travel by", f"{way} ({most / 1e6:.0f} MB)", way != "lo"),
    ]


def _memory_gb() -> float:
    """What there is for programs here: what the machine has free, unless a job or a container is given less."""
    import psutil

    least = [psutil.virtual_memory().available]
    least.append(int(os.environ.get("SLURM_MEM_PER_NODE", "0")) * 2**20)
    each, cores = os.environ.get("SLURM_MEM_PER_CPU", "0"), os.environ.get("SLURM_JOB_CPUS_PER_NODE", "0")
    least.append(int(each) * int(cores.partition("(")[0]) * 2**20)
    group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().strip("/"))
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max"
            least.append(int((folder / "memory.max").read_text()))
    return min(filter(None, least)) / 1e9


def _rank_report(folder: str) -> dict[str, Any]:
    """Runs on every rank; `folder` is a file that only the notebook's machine may see."""
    import time

    import horovod.tensorflow as hvd
    import numpy as np
    import psutil
    import tensorflow as tf
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    hvd.init()
    before, numbers = psutil.net_io_counters(pernic=True, nowrap=False), np.ones(2**20)
    comm.Allreduce(MPI.IN_PLACE, numbers)
    comm.barrier()
    clock_s, after = time.time(), psutil.net_io_counters(pernic=True, nowrap=False)
    sent = {name: after[name].bytes_sent - before[name].bytes_sent for name in before.keys() & after.keys()}
    return {
        "node": os.uname().nodename,
        "sees_folder": os.path.exists(folder),
        "clock_s": clock_s,
        "sent": {name: number for name, number in sent.items() if number > 1e5},
        "all_cores": os.cpu_count(),
        "rank": comm.rank,
        "cores": sorted(os.sched_getaffinity(0)),
        "memory_gb": _memory_gb(),
        "mpi_library": MPI.Get_library_version().split("\n")[0].replace("\t", " ").strip(),
        "MPI_sum": comm.allreduce(comm.rank),
        "Horovod_sum": float(hvd.allreduce(tf.constant(float(comm.rank)), op=hvd.Sum, name="health")),
        "horovod_operations": {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "oneCCL": hvd.ccl_built()},
        "operation": os.environ.get("HOROVOD_CPU_OPERATIONS", "the first one built"),
    }


def main() -> int:
    from nurion_utils import ranks

    parser = argparse.ArgumentParser("python -m nurion_utils.health", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="how many ranks to start (default: 2)")
    parser.add_argument("--site", help="a machine with a scheduler, on whose nodes they start")
    parser.add_argument("--nodes", type=int, help="on how many nodes (default: as many as ranks)")
    arguments = parser.parse_args()
    wanted = {"nodes": arguments.nodes} if arguments.nodes else {}
    try:
        with ranks.start(max(arguments.ranks, arguments.nodes or 1), site=arguments.site, **wanted) as world:
            table = report(world)
    except (ValueError, ranks.RankError) as error:
        print(error, file=sys.stderr)
        return 2
    for row in table.itertuples():
        print(f"{'ok  ' if row.ok else 'NO  '} {row.check}: {row.value}{f'  -> {row.remedy}' * (not row.ok)}")
    return 0 if table.ok.all() else 1


if __name__ == "__main__":
    sys.exit(main())
