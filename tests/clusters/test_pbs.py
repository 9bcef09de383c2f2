"""Ranks through PBS Pro: played on virtual nodes by a stand-in for its commands, or where the real ones are."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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

from nurion_utils.cluster import Cluster
from nurion_utils.ranks.launchers.nodes import SHM

pytestmark = [pytest.mark.lab, pytest.mark.ranks]

STAND_IN = Path(__file__).parents[1] / "jobs" / "scheduler_stand_in.py"
COMMANDS = ("qsub", "qstat", "qdel", "qselect", "pbs_tmrsh")


def real() -> SimpleNamespace:
    """A machine with PBS Pro, as if it were a cluster of ours."""
    listed = subprocess.run(["pbsnodes", "-a"], capture_output=True, text=True, check=True).stdout
    usual = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return SimpleNamespace(
        nodes=re.findall(r"^(\S+)$", listed, re.MULTILINE),
        environment=dict(os.environ),
        command=list,
        run=lambda words, **options: subprocess.run(words, **usual, **options),
    )


@contextlib.contextmanager
def played() -> Iterator[Cluster]:
    """Virtual nodes on which a server of the stand-in runs jobs; it sets little for them, as a real one."""
    with make() as cluster:
        records, commands = cluster.directory / "records", cluster.directory / "commands"
        records.mkdir()
        commands.mkdir()
        for name in COMMANDS:
            (commands / name).symlink_to(STAND_IN)
        rules = f'{{"on": "{SHM}/on", "nodes": {len(cluster.nodes)}, "cores": 8}}'
        stand_in = {"STAND_IN": str(records), "STAND_IN_RULES": rules}
        own = {**stand_in, "PATH": f"{commands}:/usr/bin:/bin", "HOME": str(Path.home())}
        cluster.environment |= {**stand_in, "PATH": f"{commands}:{cluster.environment['PATH']}"}
        server = subprocess.Popen(cluster.command(["python3", str(STAND_IN), "--serve"]), env=own)
        try:
            yield cluster
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster | SimpleNamespace]:
    with contextlib.nullcontext(real()) if shutil.which("pbs_version") else played() as cluster:
        yield cluster


def mine(cluster: Cluster) -> list[str]:
    return cluster.run(["sh", "-c", "qselect -u $(id -un)"], check=True).stdout.split()


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """After each test no job is in the queue, no process of ours on a node, and no folder on any."""
    with leaves_nothing() as found:
        yield
        if isinstance(cluster, Cluster):
            found.append(partial(traces, cluster, ["qselect"]))
        else:
            found.append(lambda: mine(cluster))


@pytest.fixture
def notebook(cluster: Cluster) -> Iterator[Notebook]:
    """Run code where jobs are submitted, or in a job of `nodes` nodes if so many are named."""
    with notebooks(cluster) as start, tempfile.TemporaryDirectory(dir=Path.home()) as directory:

        def run(code: str, nodes: int | None = None) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", BEGIN + code]
            if nodes is None:
                return start(command)
            script, output = Path(directory, "job.sh"), shlex.quote(f"{directory}/output")
            script.write_text(f"cd {shlex.quote(os.getcwd())}\n{shlex.join(command)} > {output}\n")
            options = f"-V -W block=true -o {output}.log -j oe -l select={nodes}:ncpus=2:mpiprocs=2 -l place=scatter"
            submit = f"qsub {options} {shlex.quote(str(script))} >&2 || {{ cat {output}.log >&2; exit 1; }}"
            return start(["sh", "-c", f"{submit}; cat {output}"])

        yield run


def two_on_two(found: list) -> bool:
    return [each[:2] for each in found] == [[0, 2], [1, 2]] and found[0][2] != found[1][2]


def test_in_a_job_ranks_start_on_its_nodes(notebook: Notebook) -> None:
    code = "with ranks.start(2, nodes=2) as world:\n    say(world.run(who))"
    assert two_on_two(answer(notebook(code, nodes=2)))


def test_a_world_takes_a_part_of_a_job_beside_another(notebook: Notebook) -> None:
    code = """
with ranks.start(4, nodes=2) as four, ranks.start(1, nodes=1) as one:
    say([four.run(who), one.run(who)])
"""
    four, one = answer(notebook(code, nodes=2))
    hosts = [host for _, _, host in four]
    assert [each[:2] for each in four] == [[rank, 4] for rank in range(4)]
    assert hosts == sorted(hosts) and len({*hosts}) == 2 and one == [[0, 1, hosts[0]]]


def test_from_outside_a_job_is_submitted_and_ended(notebook: Notebook) -> None:
    code = "with ranks.start(2, site='pbs', minutes=5) as world:\n    say(world.run(who))"
    assert two_on_two(answer(notebook(code)))


def test_a_command_as_a_job_has_its_ranks_on_all_nodes(notebook: Notebook) -> None:
    code = """
from nurion_utils import jobs
import shlex, tempfile
from pathlib import Path

program = "from mpi4py.MPI import *; h = COMM_WORLD.allgather(Get_processor_name()); COMM_WORLD.rank or print(h)"
with tempfile.TemporaryDirectory(dir=Path.home()) as directory:
    command = shlex.join([sys.executable, "-c", program])
    job = jobs.submit(jobs.Job(command, "pbs", 2, hours=0.1, options={"-V": ""}, directory=directory))
    while not jobs.status(job).ended:
        time.sleep(0.1)
    say(job.log.read_text())
"""
    ((first, second),) = re.findall(r"^\['(.+)', '(.+)'\]$", answer(notebook(code)), re.MULTILINE)
    assert first != second


def test_a_job_that_has_more_to_do_goes_on_in_another_on_all_nodes(notebook: Notebook) -> None:
    code = """
from nurion_utils import jobs
import shlex, tempfile
from pathlib import Path

program = '''
import os, sys
from mpi4py.MPI import COMM_WORLD
first = os.path.exists("begun")
hosts = COMM_WORLD.allgather(os.uname().nodename)
if COMM_WORLD.rank == 0:
    print(hosts, flush=True)
    open("begun", "a").close()
sys.exit(0 if first else 75)
'''
with tempfile.TemporaryDirectory(dir=Path.home()) as directory:
    Path(directory, "program.py").write_text(program)
    command = shlex.join([sys.executable, "program.py"])
    job = jobs.submit(jobs.Job(command, "pbs", 2, hours=0.1, options={"-V": ""}, directory=directory, requeue=True))
    while not jobs.status(job).ended:
        time.sleep(0.1)
    say([jobs.status(job).name, job.log.read_text(), job.last.log.read_text()])
"""
    name, *logs = answer(notebook(code))
    assert name == "done" and re.search(r"^job \d+ goes on as job \d+$", logs[0], re.MULTILINE)
    for log in logs:
        ((first, second),) = re.findall(r"^\['(.+)', '(.+)'\]$", log, re.MULTILINE)
        assert first != second


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("1000, site='pbs'", r"job \S+ can never run: Can Never Run: Not enough total nodes available"),
        ("2, site='pbs', queue='nowhere'", "qsub refused the job: qsub: Unknown queue"),
        ("2, site='pbs', options=['-l', 'nothing=1']", "qsub refused the job: qsub: Unknown resource"),
    ],
)
def test_what_will_never_run_is_an_error_at_once(notebook: Notebook, arguments: str, says: str) -> None:
    code = f"try:\n    ranks.start({arguments})\nexcept ranks.RankError as error:\n    say(str(error))"
    assert re.match(says, answer(notebook(code)))


@contextlib.contextmanager
def full(cluster: Cluster) -> Iterator[None]:
    """All nodes are somebody else's meanwhile."""
    with tempfile.NamedTemporaryFile("w", dir=Path.home()) as script:
        script.write("sleep 600\n")
        script.flush()
        shape = [
            "-l",
            f"select={len(cluster.nodes)}:ncpus=1",
            "-l",
            "place=scatter:excl",
            "-o",
            "/dev/null",
            "-j",
            "oe",
        ]
        job = cluster.run(["qsub", *shape, script.name], check=True).stdout.strip()
    try:
        while '"job_state":"R"' not in cluster.run(["qstat", "-f", "-F", "json", job]).stdout.replace(" ", ""):
            time.sleep(0.1)
        yield
    finally:
        cluster.run(["qdel", job])


def test_a_pending_start_can_be_interrupted_and_its_job_leaves_the_queue(cluster: Cluster, notebook: Notebook) -> None:
    code = """
threading.Timer(6, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    ranks.start(2, site="pbs")
except KeyboardInterrupt:
    say("interrupted")
"""
    with full(cluster):
        output, _ = notebook(code).communicate(timeout=PATIENCE_S)
        waits, last = output.splitlines()
        assert "waiting (Not Running: Insufficient amount of resource" in waits and last == '"interrupted"'
        assert len(mine(cluster)) == 1


def test_a_notebook_that_is_killed_while_it_waits_takes_its_job_with_it(cluster: Cluster, notebook: Notebook) -> None:
    def until_mine_are(count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(mine(cluster)) != count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with full(cluster):
        process = notebook('ranks.start(2, site="pbs")')
        until_mine_are(2)
        script_of(process).kill()
        until_mine_are(1)


def test_a_start_that_gets_no_nodes_in_time_is_given_up(cluster: Cluster, notebook: Notebook) -> None:
    code = """
try:
    ranks.start(2, site="pbs", wait_s=3)
except ranks.RankError as error:
    say(str(error))
"""
    with full(cluster):
        assert "had no nodes within 3 s (Not Running" in answer(notebook(code))
        assert len(mine(cluster)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_notebook_that_is_ended_leaves_nothing_on_any_node(
    cluster: Cluster, notebook: Notebook, number: signal.Signals
) -> None:
    process = notebook(at_work("pbs", 2))
    until_at_work(process)
    assert len(mine(cluster)) == 1
    script_of(process).send_signal(number)
    process.communicate(timeout=PATIENCE_S)


def test_a_job_that_is_ended_by_others_is_named(cluster: Cluster, notebook: Notebook) -> None:
    process = notebook(at_work("pbs", 2))
    until_at_work(process)
    cluster.run(["qdel", *mine(cluster)], check=True)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert re.search(r"RankError: job \S+ has ended \(cancelled.*\): rank \d", errors)
