"""Staging to disks of the nodes' own, on virtual nodes of a real Slurm: each has its /tmp and a slow link."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PATIENCE_S
from helpers.clusters import BEGIN, answer, make, notebooks, script_of

from nurion_utils.cluster import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.ranks]

FILES, SIZE_BYTES = 1024, 60_000  # so many that each rank's share goes round the ring in several blocks
STAGE = """
from pathlib import Path
from nurion_utils import staging

def read_bytes():
    return int(Path("/proc/self/io").read_text().split()[1])

source, empty, copy, n = sys.argv[1:]
with ranks.start(int(n)) as world:
    staging.stage(empty, "/tmp/empty", world, replicate=True)  # what Python imports is read here
    before = world.run(read_bytes)
    say(world.run(os.getpid))
    try:
        report = staging.stage(source, copy, world, replicate=True)
        say([report.copied_files, sum(world.run(read_bytes)) - sum(before)])
    except staging.StageError as error:
        say([str(error), error.failures])
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with make(rate_mbit=100) as cluster:
        for name, files in (("source", FILES), ("empty", 0)):
            (cluster.directory / name).mkdir()
            for i in range(files):
                (cluster.directory / name / f"{i:04}").write_bytes(os.urandom(SIZE_BYTES))
        copy(cluster).write_text("on the disk of the head, which is not asked")
        yield cluster
        copy(cluster).unlink()


def copy(cluster: Cluster) -> Path:
    """A folder in /tmp, which the head has as well."""
    return Path("/tmp", f"{cluster.directory.name}-copy")


@pytest.fixture
def stage(cluster: Cluster) -> Iterator:
    """Stage from a shared folder to /tmp of the nodes, in a job that has them."""
    with notebooks(cluster) as start:

        def begin(nodes: list[str]) -> subprocess.Popen:
            job = ["salloc", "--quiet", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "--time=5"]
            folders = [cluster.directory / "source", cluster.directory / "empty", copy(cluster)]
            return start([*job, sys.executable, "-c", BEGIN + STAGE, *map(str, folders), str(len(nodes))])

        yield begin


def checksums(cluster: Cluster, node: str, folder: Path | None = None) -> dict[str, str]:
    """By name, of the files that a reader of the copy, or of another folder, finds there."""
    command = ["sh", "-c", f"cd {folder or copy(cluster)} && sha256sum [0-9]*"]
    lines = cluster.run(command, on=node, timeout=PATIENCE_S).stdout.splitlines()
    return {name: digest for digest, name in map(str.split, lines)}


def truth_of(cluster: Cluster) -> dict[str, str]:
    return checksums(cluster, "head", cluster.directory / "source")


def on_all(cluster: Cluster, nodes: list[str]) -> set[str]:
    """The files that a reader finds on each of the nodes."""
    return set.intersection(*(set(cluster.run(["ls", str(copy(cluster))], on=node).stdout.split()) for node in nodes))


def wait_for_some(cluster: Cluster, nodes: list[str], process: subprocess.Popen) -> list[int]:
    """Until all nodes have some of the files; returns the process ids of the ranks, each as its node counts."""
    pids = json.loads(process.stdout.readline())
    deadline = time.monotonic() + PATIENCE_S
    while not on_all(cluster, nodes) and time.monotonic() < deadline:
        time.sleep(0.01)
    return pids


def test_each_file_is_read_once_and_all_nodes_get_it(cluster: Cluster, stage) -> None:
    copied_files, read_bytes = answer(stage(cluster.nodes))
    assert copied_files == FILES
    assert FILES * SIZE_BYTES <= read_bytes < 1.05 * FILES * SIZE_BYTES
    truth = truth_of(cluster)
    assert len(truth) == FILES
    for node in cluster.nodes:
        assert checksums(cluster, node) == truth


@pytest.mark.parametrize("killed", ["a rank", "the notebook"])
def test_killed_at_work_what_all_nodes_have_is_not_read_again(cluster: Cluster, stage, killed: str) -> None:
    process, truth = stage(cluster.nodes), truth_of(cluster)
    pids = wait_for_some(cluster, cluster.nodes, process)
    if killed == "a rank":
        cluster.run(["kill", "-KILL", str(pids[2])], on="n3")
        message, failures = answer(process)
        assert message.startswith("rank 2 on node n3 was ended by SIGKILL; ") and set(failures) == set(cluster.nodes)
    else:
        script_of(process).kill()
        process.communicate(timeout=PATIENCE_S)
    for node in cluster.nodes:
        assert checksums(cluster, node).items() <= truth.items()
    there, first = len(on_all(cluster, cluster.nodes)), len(checksums(cluster, "n1"))
    assert 0 < there < FILES
    copied_files, read_bytes = answer(stage(cluster.nodes))
    assert copied_files == FILES - first
    missing_bytes = (FILES - there) * SIZE_BYTES
    assert missing_bytes <= read_bytes < missing_bytes + 0.05 * FILES * SIZE_BYTES
    for node in cluster.nodes:
        assert checksums(cluster, node) == truth


def test_when_a_node_is_lost_the_others_go_on_with_a_new_one(cluster: Cluster, stage) -> None:
    nodes = ["n1", "n2", "n3"]
    process, truth = stage(nodes), truth_of(cluster)
    wait_for_some(cluster, nodes, process)
    cluster.unplug("n3")
    message, failures = answer(process)
    assert message.startswith("rank 2 was lost with its node n3; ") and set(failures) == set(nodes)
    for node in ("n1", "n2"):
        assert 0 < len(found := checksums(cluster, node)) < FILES and found.items() <= truth.items()
    answer(stage(["n1", "n2", "n4"]))
    for node in ("n1", "n2", "n4"):
        assert checksums(cluster, node) == truth


def test_disks_of_the_nodes_are_not_taken_for_a_shared_one(cluster: Cluster) -> None:
    code = """
from nurion_utils import staging
with ranks.start(2) as world:
    staging.stage(*sys.argv[1:], world, replicate=True)
    try:
        staging.stage(*sys.argv[1:], world)
    except staging.StageError as error:
        say(str(error))
"""
    command = ["salloc", "--quiet", "--nodes=2", "--time=5", sys.executable, "-c", BEGIN + code]
    with notebooks(cluster) as start:
        message = answer(start([*command, str(cluster.directory / "empty"), str(copy(cluster))]))
    assert message.startswith(f"rank 1 on n2 does not see {str(copy(cluster))!r} of rank 0; choose a folder that all")
