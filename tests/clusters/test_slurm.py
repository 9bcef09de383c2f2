"""Ranks on the nodes of a real Slurm, on virtual nodes: the promises of one machine hold across them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from helpers import PATIENCE_S
from helpers.clusters import (
    BEGIN,
    Notebook,
    answer,
    at_work,
    leaves_nothing,
    make,
    notebooks,
    script_of,
    traces,
    until_at_work,
)

from nurion_utils import recordings
from nurion_utils.cluster import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.ranks]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with make() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no job is in the queue, no process of ours on a node, and no folder on any."""
    with leaves_nothing() as found:
        yield
        if "cluster" in request.fixturenames:
            cluster = request.getfixturevalue("cluster")
            found.append(partial(traces, cluster, ["squeue", "--noheader"]))


@pytest.fixture
def notebook(cluster: Cluster) -> Iterator[Notebook]:
    """Run code on the head as a notebook would be, in a job of `nodes` nodes if so many are named."""
    with notebooks(cluster) as start:

        def run(code: str, nodes: int | None = None, **env: str) -> subprocess.Popen[str]:
            job = ["salloc", "--quiet", f"--nodes={nodes}", "--time=5"] if nodes else []
            return start([*job, sys.executable, "-c", BEGIN + code], **env)

        yield run


FOUR = [[rank, 4, f"n{rank + 1}"] for rank in range(4)]


def test_in_a_job_ranks_start_on_its_nodes(notebook: Notebook) -> None:
    code = "with ranks.start(4) as world:\n    say(world.run(who))"
    assert answer(notebook(code, nodes=4)) == FOUR


def test_from_outside_a_job_is_submitted_and_ended(notebook: Notebook) -> None:
    code = "with ranks.start(4, site='slurm', minutes=5) as world:\n    say(world.run(who))"
    assert answer(notebook(code)) == FOUR


def test_sixteen_ranks_share_four_nodes(notebook: Notebook) -> None:
    code = "with ranks.start(16, site='slurm', nodes=4) as world:\n    say(world.run(who))"
    assert answer(notebook(code)) == [[rank, 16, f"n{rank // 4 + 1}"] for rank in range(16)]


def test_two_worlds_live_in_one_job(notebook: Notebook) -> None:
    code = """
with ranks.start(4) as one, ranks.start(2, nodes=2) as two:
    say([one.run(who), two.run(who), one.run(who)])
"""
    assert answer(notebook(code, nodes=4)) == [FOUR, [[0, 2, "n1"], [1, 2, "n2"]], FOUR]


FAIL = """
def fail(how):
    from mpi4py import MPI
    if MPI.COMM_WORLD.rank == 2:
        time.sleep(0.5)
        if how == "raises":
            raise ValueError("no data")
        os.kill(os.getpid(), signal.SIGSTOP if how == "stops" else signal.SIGKILL)
    MPI.COMM_WORLD.barrier()

with ranks.start(4) as world:
    try:
        world.run(fail, {how!r}, timeout_s={timeout_s})
    except ranks.RankError as error:
        say(str(error))
"""


@pytest.mark.parametrize(
    ("how", "timeout_s", "says"),
    [
        ("raises", None, "^rank 2 of 4 raised ValueError: no data"),
        ("dies", None, "^rank 2 on node n3 was ended by SIGKILL"),
        ("stops", 3, "--- where rank 2 was ---\n  it gave no answer: it is stopped"),
    ],
)
def test_a_rank_that_fails_is_named_and_the_others_say_where_they_stood(
    notebook: Notebook, how: str, timeout_s: float | None, says: str
) -> None:
    code = FAIL.replace("{how!r}", repr(how)).replace("{timeout_s}", repr(timeout_s))
    message = answer(notebook(code, nodes=4))
    assert re.search(says, message)
    for rank in (0, 1, 3):
        assert message.split(f"--- where rank {rank} was ---\n")[1].splitlines()[0].endswith("in fail")


def test_an_interrupt_reaches_ranks_on_nodes_and_the_world_stays_usable(notebook: Notebook) -> None:
    code = """
with ranks.start(2, site="slurm") as world:
    threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        world.run(time.sleep, 1000)
    except KeyboardInterrupt:
        say(world.run(who))
"""
    assert answer(notebook(code)) == [[0, 2, "n1"], [1, 2, "n2"]]


AT_WORK = at_work("slurm", 4)


@pytest.mark.parametrize("nodes", [None, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_notebook_that_is_ended_leaves_nothing_on_any_node(
    notebook: Notebook, nodes: int | None, number: signal.Signals
) -> None:
    process = notebook(AT_WORK, nodes)
    until_at_work(process)
    script_of(process).send_signal(number)
    process.communicate(timeout=PATIENCE_S)


@contextlib.contextmanager
def full(cluster: Cluster) -> Iterator[None]:
    """All nodes are somebody else's meanwhile."""
    job = cluster.run(
        ["sbatch", "--parsable", "-N4", "--exclusive", "-t1", "--wrap=sleep 60", "--output=/dev/null"]
    ).stdout
    try:
        while cluster.run(["squeue", "--noheader", "--states=running"]).stdout == "":
            time.sleep(0.1)
        yield
    finally:
        cluster.run(["scancel", job.strip()])


def test_a_pending_start_can_be_interrupted_and_its_job_leaves_the_queue(cluster: Cluster, notebook: Notebook) -> None:
    with full(cluster):
        process = notebook("try:\n    ranks.start(4, site='slurm')\nexcept KeyboardInterrupt:\n    say('interrupted')")
        assert any("waiting (Resources)" in line for line in iter(process.stdout.readline, ""))
        script_of(process).send_signal(signal.SIGINT)
        assert answer(process) == "interrupted"


def test_a_start_that_gets_no_nodes_in_time_is_given_up(cluster: Cluster, notebook: Notebook) -> None:
    with full(cluster):
        code = """
try:
    ranks.start(4, site="slurm", wait_s=3)
except ranks.RankError as error:
    say(str(error))
"""
        assert "had no nodes within 3 s (Resources)" in answer(notebook(code))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("4, site='slurm', queue='small'", "can never run: Partition"),
        ("4, site='slurm', minutes=1000", "can never run: Partition"),
        ("4, site='slurm', queue='nowhere'", "refused the job: .*[Ii]nvalid partition"),
    ],
)
def test_what_will_never_run_is_an_error_at_once(notebook: Notebook, arguments: str, says: str) -> None:
    code = f"try:\n    ranks.start({arguments})\nexcept ranks.RankError as error:\n    say(str(error))"
    assert re.search(says, answer(notebook(code)))


def test_a_job_that_is_cancelled_by_others_is_named(cluster: Cluster, notebook: Notebook) -> None:
    process = notebook(AT_WORK)
    until_at_work(process)
    cluster.run(["scancel", "--user=root"])
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert "RankError" in errors


def test_a_node_that_is_lost_is_named(notebook: Notebook) -> None:
    with make() as cluster:
        process = subprocess.Popen(
            cluster.command([sys.executable, "-c", BEGIN + AT_WORK]),
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until_at_work(process)
        cluster.unplug("n3")
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert "RankError: rank 2 was lost with its node n3" in errors


IN_A_JOB = ["salloc", "--quiet", "--nodes=4", "--time=5", "srun", "--overlap", "--nodes=1", "--nodelist=n1"]


@pytest.mark.parametrize(("way", "on"), [(IN_A_JOB, "head"), ([], "n1")], ids=["in a job", "that submitted one"])
def test_when_the_notebooks_own_node_is_lost_nothing_is_left_on_others(way: list[str], on: str) -> None:
    code = at_work("slurm", 3).replace("site=", "options=['--exclude=n1'], site=")
    with make() as cluster:
        process = subprocess.Popen(
            cluster.command([*way, sys.executable, "-c", BEGIN + code], on),
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until_at_work(process)
        cluster.unplug("n1")
        process.communicate(timeout=PATIENCE_S)
        with leaves_nothing() as found:
            # In a job all are killed with it; a folder that nobody could remove then goes with a later start.
            found.append(lambda: [x for x in traces(cluster, ["squeue", "--noheader"]) if not way or "/run-" not in x])


@pytest.mark.parametrize("blocked", ["to head", "from head"])
def test_one_open_direction_between_head_and_nodes_is_enough(blocked: str) -> None:
    with make(blocked=blocked) as cluster:
        code = BEGIN + "with ranks.start(4, site='slurm') as world:\n    say(world.run(who))"
        ran = cluster.run([sys.executable, "-c", code], timeout=PATIENCE_S)
    assert json.loads(ran.stdout.splitlines()[-1]) == FOUR, ran.stderr


def test_health_tells_of_all_nodes(cluster: Cluster) -> None:
    job = ["salloc", "--quiet", "--nodes=2", "--mem=700", "--time=5"]
    command = [*job, sys.executable, "-m", "nurion_utils.health", "--nodes", "2"]
    lines = cluster.run(command, timeout=2 * PATIENCE_S).stdout.splitlines()
    for expected in ("ranks on each node: n1: 1, n2: 1", "a folder here is on all nodes: yes"):
        assert f"ok   {expected}" in lines
    assert any(line.startswith("NO   free memory: 0.7 GB for 1 on n1  -> A rank") for line in lines)
    assert any(line.startswith("ok   MPI's bytes travel by: eth0") for line in lines)


REFUSED = "try:\n    ranks.start(4, site={site!r})\nexcept ranks.RankError as error:\n    say(str(error))"


@pytest.mark.parametrize(
    ("launcher", "says"),
    [
        ("srun --mpi=none -N {nodes} -n {ranks}", "there is no world of 4 ranks, but .* srun with --mpi=pmi2"),
        (
            "mpiexec -n {ranks} -ppn {ranks}",
            "ranks are not where they should be, 1 on each node, but 4 on n1: .* -ppn 1",
        ),
    ],
)
def test_a_launcher_that_does_not_make_the_world_is_found_out(
    cluster: Cluster, notebook: Notebook, launcher: str, says: str
) -> None:
    site = cluster.directory / "nurion" / "sites" / "other.toml"
    site.parent.mkdir(parents=True, exist_ok=True)
    site.write_text(
        'title = "a launcher that does something else"\n[scheduler]\n'
        'kind = { value = "Slurm", status = "chosen", source = "test" }\n'
        f'launcher = {{ value = "{launcher}", status = "chosen", source = "test" }}\n'
    )
    code = REFUSED.format(site="other")
    assert re.match(says, answer(notebook(code, nodes=4, XDG_CONFIG_HOME=str(cluster.directory))))


@contextlib.contextmanager
def hidden(cluster: Cluster, node: str, what: Path, behind: str) -> Iterator[None]:
    """The node sees something else there."""
    cluster.run(["mount", *behind.split(), str(what)], on=node, check=True)
    try:
        yield
    finally:
        cluster.run(["umount", str(what)], on=node, check=True)


@pytest.mark.parametrize(
    ("node", "nodes", "says"),
    [
        (
            "n3",
            4,
            r"node n3 does not see \S+/rank.sh: the home folder and the environment must be on file systems that",
        ),
        ("n3", None, r"node n3 does not see \S+/rank.sh"),
        (
            "n1",
            None,
            r"(?s)job \d+ ended before its ranks .*it wrote nothing: its first node must see \S+/.nurion, as all",
        ),
    ],
)
def test_a_node_that_lacks_the_home_folder_is_named(
    cluster: Cluster, notebook: Notebook, node: str, nodes: int | None, says: str
) -> None:
    folder = cluster.directory / ".nurion"
    folder.mkdir(exist_ok=True)
    with hidden(cluster, node, folder, "-t tmpfs other"):
        assert re.match(says, answer(notebook(REFUSED.format(site="slurm"), nodes)))


def test_a_node_with_another_version_of_a_package_is_named(cluster: Cluster, notebook: Notebook) -> None:
    (metadata,) = Path(sys.prefix).glob("lib/python*/site-packages/mpi4py-*.dist-info")
    other = cluster.directory / "other"
    other.mkdir()
    (other / "METADATA").write_text("Name: mpi4py\nVersion: 0.1\n")
    with hidden(cluster, "n3", metadata, f"--bind {other}"):
        message = answer(notebook(REFUSED.format(site="slurm"), nodes=4))
    version = metadata.name.split("-")[1].removesuffix(".dist")
    assert message.startswith(
        f"node n3 has another environment than the notebook, mpi4py 0.1 instead of {version}: put it in a folder that"
    )


ATTACK = """
import json, os, psutil, zmq, sys
from pathlib import Path
ports = sorted({each.laddr.port for each in psutil.net_connections("tcp") if each.status == "LISTEN"})
os.setuid(65534)
try:
    files = os.listdir(sys.argv[1])
except PermissionError:
    files = []
answers = []
for port in ports:
    for kind in (zmq.DEALER, zmq.SUB):
        for curve in (False, True):
            stranger = zmq.Context.instance().socket(kind)
            if kind == zmq.SUB:
                stranger.subscribe(b"")
            if curve:  # with keys of its own, and one that the server may take for its own
                public, secret = zmq.curve_keypair()
                stranger.curve_publickey, stranger.curve_secretkey, stranger.curve_serverkey = public, secret, public
            stranger.connect(f"tcp://{sys.argv[2]}:{port}")
            if kind == zmq.DEALER:
                stranger.send_multipart([b"0", b"signal", b"9"])
            if stranger.poll(200):
                answers.append(port)
            stranger.close(0)
print(json.dumps([len(ports), files, answers]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_who_knows_the_ports_reaches_no_rank(cluster: Cluster, notebook: Notebook) -> None:
    code = """
with ranks.start(4, site="slurm") as world:
    say("at work")
    sys.stdin.read() if False else time.sleep(30)
    say(world.run(who))
"""
    process = notebook(code)
    until_at_work(process)
    ran = cluster.run([sys.executable, "-c", ATTACK, str(cluster.directory / ".nurion"), "head"], timeout=PATIENCE_S)
    ports, files, answers = json.loads(ran.stdout)
    assert ports > 5 and files == [] and answers == [], ran.stderr
    assert answer(process) == FOUR  # and nobody disturbed them


SHELL = [sys.executable, "-m", "nurion_utils.cluster", "--nodes", "2"]


def test_a_command_on_a_little_cluster_of_its_own_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([*SHELL, "sinfo"], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    if ran.returncode == 2:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0 and re.search(r"main\* .* 2 +idle n\[1-2\]", ran.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_shell_that_is_killed_takes_its_cluster_along(cluster: Cluster, tmp_path: Path) -> None:
    marked = {**os.environ, "TMPDIR": str(tmp_path), "NURION_TEST": str(tmp_path)}
    shell = subprocess.Popen([*SHELL, "sh", "-c", "echo up; sleep 1000"], env=marked, stdout=subprocess.PIPE, text=True)
    assert shell.stdout.readline() == "up\n" and processes_with(tmp_path) > 5
    shell.kill()
    shell.wait()
    deadline = time.monotonic() + PATIENCE_S
    while (processes_with(tmp_path) or [*tmp_path.iterdir()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(tmp_path) == 0 and list(tmp_path.iterdir()) == []


def processes_with(mark: Path) -> int:
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += process.environ().get("NURION_TEST") == str(mark) and process.status() != psutil.STATUS_ZOMBIE
    return found


def test_the_recorded_session_of_notebook_06_is_what_slurm_answers() -> None:
    recorded = recordings.load("slurm_session").query("command != 'ranks.start'").fillna("")
    with make() as fresh:  # its jobs are numbered from 1
        for command, output in zip(recorded["command"], recorded["output"], strict=True):
            ran = fresh.run(["sh", "-c", command], timeout=PATIENCE_S)
            assert (ran.stdout + ran.stderr).rstrip() == output, command
