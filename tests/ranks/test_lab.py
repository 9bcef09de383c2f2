"""A lab's ranks talk across its links alone, names what fails, and it leaves nothing behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import PATIENCE_S

from nurion_utils.ranks.launchers import lab, lab_host
from nurion_utils.ranks.launchers.lab import LabError

pytestmark = pytest.mark.lab

READY = "ranks are at work"


@pytest.fixture(scope="module")
def lab4(permitted: None) -> Iterator[lab.Lab]:
    with lab.start(4, rate_mbit=200) as network:
        yield network


def here() -> tuple[int, int, str, int]:
    from mpi4py import MPI

    network, memory = os.readlink("/proc/self/ns/net"), os.stat("/dev/shm").st_dev
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.allreduce(1), network, memory


def test_each_rank_has_a_network_and_the_lab_a_shared_memory_of_its_own(lab4: lab.Lab) -> None:
    ranks, sizes, networks, memories = zip(*lab4.run(here), strict=True)
    assert ranks == (0, 1, 2, 3) and sizes == (4, 4, 4, 4)
    assert len({*memories}) == 1 and os.stat("/dev/shm").st_dev not in memories
    assert len({*networks, os.readlink("/proc/self/ns/net")}) == 5


def fails_on_rank_1(then_wait: bool) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        raise KeyError("no such cable")
    if then_wait:
        MPI.COMM_WORLD.Barrier()


def dies_on_rank_1() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    MPI.COMM_WORLD.Barrier()


def late_on_rank_0() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        time.sleep(60)


def test_an_error_that_all_ranks_survive_names_its_rank(lab4: lab.Lab) -> None:
    with pytest.raises(LabError, match=r"rank 1 of 4 raised KeyError: 'no such cable'\n[\s\S]*in fails_on_rank_1"):
        lab4.run(fails_on_rank_1, False)
    assert [rank for rank, *_ in lab4.run(here)] == [0, 1, 2, 3]


FAILURES = {
    "an error": (
        lambda network: network.run(fails_on_rank_1, True),
        "rank 1 of 2 raised KeyError: 'no such cable'",
        "where rank 0 was",
    ),
    "a death": (lambda network: network.run(dies_on_rank_1), "rank 1 was ended by SIGKILL", ""),
    "a delay": (
        lambda network: network.run(late_on_rank_0, timeout_s=0.5),
        "rank 0 did not finish within 0.5 s",
        "where rank 0 was",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_that_ranks_would_wait_for_is_named_soon_and_ends_the_lab(permitted: None, failure: str) -> None:
    act, words, others = FAILURES[failure]
    with lab.start(2, rate_mbit=200) as network:
        begin_s = time.monotonic()
        with pytest.raises(LabError) as caught:
            act(network)
        assert time.monotonic() - begin_s < PATIENCE_S
        assert str(caught.value).startswith(words) and others in str(caught.value)
        assert "open a new lab with lab.start(2, 200)" in str(caught.value)
        assert (1 in caught.value.died) == (failure == "a death")
        with pytest.raises(LabError, match=f"this lab has ended because {words}.*; open a new one"):
            network.run(here)


def test_answers_that_nobody_waited_for_are_not_those_of_the_next_question(permitted: None) -> None:
    def too_late(*_: object) -> None:
        raise TimeoutError

    with lab.start(2, rate_mbit=200) as network:
        before = signal.signal(signal.SIGALRM, too_late)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(TimeoutError):
                network.run(time.sleep, 2)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        with pytest.raises(LabError, match="closed by a TimeoutError while its ranks were at work; open a new one"):
            network.run(os.getpid)


def test_a_lab_whose_building_stalls_gives_up_and_leaves_nothing(
    permitted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stalls = tmp_path / "tc"
    stalls.write_text("#!/bin/sh\nsleep 1000\n")
    stalls.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(lab_host, "START_TIMEOUT_S", 2.0)
    before, begin_s = psutil.Process().children(recursive=True), time.monotonic()
    with pytest.raises(LabError, match="the network lab was not built within 2 s"):
        lab.start(2)
    assert time.monotonic() - begin_s < PATIENCE_S
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(stalls) in (p.info["cmdline"] or [])]


@pytest.mark.parametrize("ranks", [0, 1, -2, 33, 2.0, True, "2", None])
def test_impossible_numbers_of_ranks_are_refused(ranks: object) -> None:
    with pytest.raises(ValueError, match="the number of ranks in a lab must be a whole number from 2 to 32, not"):
        lab.start(ranks)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, "fast", None])
def test_impossible_rates_are_refused(rate: object) -> None:
    with pytest.raises(ValueError, match="rate_mbit must be a number from 1 up to 10,000"):
        lab.start(2, rate)


def test_impossible_calls_are_refused(lab4: lab.Lab) -> None:
    with pytest.raises(TypeError, match="run needs a function"):
        lab4.run("here")
    with pytest.raises(TypeError, match="cannot be sent to the ranks"):
        lab4.run(print, (i for i in range(3)))
    with pytest.raises(ValueError, match="timeout_s must be a positive number"):
        lab4.run(here, timeout_s=0)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    which = lab_host.shutil.which
    monkeypatch.setattr("shutil.which", lambda name, **path: None if name == "tc" else which(name, **path))
    with pytest.raises(LabError, match=r"needs the command 'tc': install iproute2.*recordings\.load\('network_lab'\)"):
        lab.start(2)


def test_a_machine_that_permits_no_namespaces_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    unshare.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(LabError) as caught:
        lab.start(2)
    message = str(caught.value)
    assert "does not permit the network lab (unshare: unshare failed: Operation not permitted)" in message
    assert "recordings.load('network_lab')" in message and "\n" not in message


SCRIPT = "import os, signal, time\n"
SCRIPT += "from nurion_utils.ranks.launchers import lab\nnetwork = lab.start(2, rate_mbit=200)\n"
AT_WORK = f"print({READY!r}, flush=True)\nnetwork.run(time.sleep, 1000)\n"
ENDS = {
    "its normal end": ("with network:\n    network.run(int)", 0),
    "an end without close()": ("network.run(int)", 0),
    "an error": ("network.run(divmod, 1, 0)", 1),
    "a lab that nobody holds any more": (
        "import psutil\ndel network\nassert not psutil.Process().children()",
        0,
    ),
    "close() beside a forked child": (
        "child = os.fork()\nif not child:\n    time.sleep(60)\nnetwork.close()\nos.kill(child, 9)",
        0,
    ),
}
FORKED = "if not os.fork():\n    time.sleep(60)\n    os._exit(0)\n"


class Machine:
    """What a lab could leave on it."""

    def __init__(self, directory: Path):
        self.directory, self.mark = directory, f"test of {directory}"

    def processes(self) -> list[psutil.Process]:
        """Those that inherited the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("NURION_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def of_the_lab(self) -> set[str]:
        """All but the script and what it forked, whose command is the script."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.add(" ".join(process.cmdline()))
        return {command for command in found if SCRIPT not in command}

    def traces(self) -> set[str]:
        folders = [Path("/sys/class/net"), Path("/run/netns"), self.directory]
        files = {str(path) for folder in folders if folder.exists() for path in folder.iterdir()}
        return files | {*Path("/proc/mounts").read_text().splitlines()} | self.of_the_lab()


@pytest.fixture
def machine(permitted: None, tmp_path: Path) -> Iterator[Machine]:
    """Afterwards it must be as before, whatever a forked process of the test still does."""
    machine = Machine(tmp_path)
    before = machine.traces()
    yield machine
    deadline = time.monotonic() + PATIENCE_S
    while (after := machine.traces()) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in machine.processes():
        process.kill()
    assert after == before


def run_script(machine: Machine, code: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TMPDIR": str(machine.directory), "NURION_TEST": machine.mark}
    return subprocess.Popen([*by, sys.executable, "-c", SCRIPT + code], env=environment, **pipes)


@pytest.mark.parametrize("end", ENDS)
def test_a_script_leaves_nothing_after(machine: Machine, end: str) -> None:
    code, status = ENDS[end]
    script = run_script(machine, code)
    output, errors = script.communicate(timeout=30)
    assert script.returncode == status and output == ""
    assert ("LabError: rank 0 of 2 raised ZeroDivisionError" in errors) if status else errors == ""


@pytest.mark.parametrize(
    "number, forked", [(signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGKILL, ""), (signal.SIGKILL, FORKED)]
)
def test_a_script_ended_at_work_leaves_nothing(machine: Machine, number: signal.Signals, forked: str) -> None:
    """Not even while a child that it forked, which shares its files, lives on."""
    script = run_script(machine, forked + AT_WORK)
    assert READY in script.stdout.readline()
    assert machine.of_the_lab()
    script.send_signal(number)
    assert script.wait(timeout=PATIENCE_S) == -number


def test_an_interrupt_while_a_lab_that_nobody_holds_is_closed_is_raised(machine: Machine) -> None:
    strike = "network._resources.callback(os.kill, os.getpid(), signal.SIGINT)\ndel network\n"
    script = run_script(machine, strike + "time.sleep(600)")
    errors = script.communicate(timeout=30)[1]
    assert script.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt") and "Exception ignored" not in errors


def test_after_its_first_process_was_killed_the_lab_says_so_and_leaves_nothing(machine: Machine) -> None:
    script = run_script(machine, AT_WORK)
    assert READY in script.stdout.readline()
    (unshare,) = psutil.Process(script.pid).children()
    unshare.kill()
    assert re.search(r"LabError: rank \d died", script.communicate(timeout=30)[1])


def test_it_needs_no_rights(machine: Machine) -> None:
    """Run by root, take root's rights away, as a container does; an ordinary user has none to begin with."""
    # but for the one that Linux asks of root, not of others, who wants to be root of a user namespace
    by = ("setpriv", "--bounding-set=-all,+setfcap", "--inh-caps=-all") if os.geteuid() == 0 else ()
    script = run_script(machine, "print(network.run(os.getuid))", by)
    assert script.communicate(timeout=30) == ("[0, 0]\n", "")
