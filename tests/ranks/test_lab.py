"""A lab's ranks talk across its links alone, its counters agree with the schedules, and it leaves nothing behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nurion_utils import allreduce
from nurion_utils.allreduce import Schedule
from nurion_utils.ranks.launchers import lab, lab_host
from nurion_utils.ranks.launchers.lab import LabError

pytestmark = pytest.mark.lab

ALGORITHMS = [
    *[allreduce.ring, allreduce.naive, allreduce.tree],
    *[allreduce.recursive_doubling, allreduce.rabenseifner],
]
COLUMNS = [
    *["contender", "ranks", "rate_mbit", "size_bytes", "repeat"],
    *["time_s", "theory_s", "bytes_sent", "wire_bytes"],
]
PATIENCE_S = 10.0
READY = "ranks are at work"


@pytest.fixture(scope="module")
def lab4(permitted: None) -> Iterator[lab.Lab]:
    with lab.start(4, rate_mbit=200) as network:
        yield network


def here() -> tuple[int, int, str, int]:
    from mpi4py import MPI

    network, memory = os.readlink("/proc/self/ns/net"), os.stat("/dev/shm").st_dev
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.allreduce(1), network, memory


# -- the network ----------------------------------------------------------------------------------------------------


def test_each_rank_has_a_network_and_the_lab_a_shared_memory_of_its_own(lab4: lab.Lab) -> None:
    ranks, sizes, networks, memories = zip(*lab4.run(here), strict=True)
    assert ranks == (0, 1, 2, 3) and sizes == (4, 4, 4, 4)
    assert len({*memories}) == 1 and os.stat("/dev/shm").st_dev not in memories
    assert len({*networks, os.readlink("/proc/self/ns/net")}) == 5


def test_a_measurement_has_a_row_for_each_observation_and_contenders_take_turns(lab4: lab.Lab) -> None:
    ring, native = allreduce.ring(4), None
    table = lab4.measure({"ring": ring, "native": native}, sizes_bytes=[64, 1000], repeats=2)
    assert list(table) == COLUMNS
    assert list(table.contender) == 4 * ["ring", "native"]
    assert list(table.size_bytes) == 4 * [64] + 4 * [1000] and list(table.repeat) == 2 * [0, 0, 1, 1]
    assert set(table.ranks) == {4} and set(table.rate_mbit) == {200.0} and (table.time_s > 0).all()
    rings = table[table.contender == "ring"]
    assert list(rings.theory_s) == [ring.time(size, allreduce.Link(0, 8 / 200e6)) for size in rings.size_bytes]
    assert table[table.contender == "native"][["theory_s", "bytes_sent"]].isna().all(axis=None)


@given(make=st.sampled_from(ALGORITHMS), elements=st.integers(1, 2**17))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interfaces_send_what_the_schedule_says_and_headers(
    lab4: lab.Lab, make: Callable[[int], Schedule], elements: int
) -> None:
    schedule = make(4)
    row = lab4.measure({"it": schedule}, sizes_bytes=[4 * elements], repeats=1).iloc[0]
    assert row.bytes_sent == sum(schedule.bytes_sent(rank, 4 * elements, 4) for rank in range(4))
    messages = sum(map(schedule.messages, range(4)))
    # headers and acknowledgements of each packet; of small messages, and of 8 with which the ranks meet
    assert row.bytes_sent < row.wire_bytes < 1.06 * row.bytes_sent + 300 * (messages + 8) + 1000


def test_links_have_their_rate_in_both_directions(lab4: lab.Lab) -> None:
    # rank 0 is the bottleneck of the naive algorithm: first of what it receives, then of what it sends
    naive = allreduce.naive(4)
    table = lab4.measure({"naive": naive, "native": None}, sizes_bytes=[2**19], repeats=2)
    times = table[table.contender == "naive"]
    assert (times.time_s > 0.95 * times.theory_s).all()


def test_mpi_takes_the_network_too(lab4: lab.Lab) -> None:
    table = lab4.measure({"native": None}, sizes_bytes=[2**18], repeats=2)
    least = 2 * 3 * 2**18  # bytes by all ranks together: no allreduce can do with less
    assert (table.wire_bytes > least).all() and (table.time_s > 0.9 * least / 4 * 8 / 200e6).all()


def test_a_wrong_sum_is_an_error_and_the_lab_lives_on(lab4: lab.Lab) -> None:
    ring = allreduce.ring(4)
    broken = Schedule("ring without its last step", 4, ring.chunks, ring.steps[:-1])
    with pytest.raises(allreduce.ScheduleError):
        lab4.measure({"broken": broken}, sizes_bytes=[64])
    vars(broken)["_checked"] = True  # as if the proof were wrong
    with pytest.raises(LabError, match="ArithmeticError: broken gave a wrong sum in 4 of 16 elements"):
        lab4.measure({"broken": broken}, sizes_bytes=[64])
    assert len(lab4.run(here)) == 4


# -- failures -------------------------------------------------------------------------------------------------------


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


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [0, 1, -2, 33, 2.0, True, "2", None])
def test_impossible_numbers_of_ranks_are_refused(ranks: object) -> None:
    with pytest.raises(ValueError, match="a lab has 2 to 32 ranks, not"):
        lab.start(ranks)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, "fast", None])
def test_impossible_rates_are_refused(rate: object) -> None:
    with pytest.raises(ValueError, match="rate_mbit must be a number from 1 to 10,000"):
        lab.start(2, rate)


@pytest.mark.parametrize(
    "contenders, sizes, repeats, words",
    [
        ({}, [4], 1, "contenders are a dictionary"),
        ({"native": None}, [], 1, "sizes_bytes must be a list of lengths"),
        ({"ring": allreduce.ring(3)}, [4], 1, "'ring' is for 3 ranks, and there are 4"),
        ({"ring": allreduce.ring}, [4], 1, "must be a schedule, or None for MPI's own"),
        ({"native": None}, [4, 6], 1, "multiples of 4 bytes, the length of a float32, not 6"),
        ({"native": None}, [0], 1, "from 1 up, not 0"),
        ({"native": None}, [4], 0, "repeats must be a whole number from 1 up, not 0"),
    ],
)
def test_impossible_measurements_are_refused(lab4: lab.Lab, contenders, sizes, repeats, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lab4.measure(contenders, sizes, repeats)


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
    with pytest.raises(LabError, match=r"needs the command 'tc': install iproute2.*network\.recorded\(\)"):
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
    assert "lab.recorded()" in message and "\n" not in message


# -- leaving nothing ------------------------------------------------------------------------------------------------

SCRIPT = "import os, signal, time\nfrom nurion_utils import allreduce\n"
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
    script = run_script(
        machine, "network.measure({'ring': allreduce.ring(2)}, [1000])\nprint(network.run(os.getuid))", by
    )
    assert script.communicate(timeout=30) == ("[0, 0]\n", "")


# -- what was recorded ----------------------------------------------------------------------------------------------


def test_the_recorded_table_is_complete_and_near_theory() -> None:
    table = lab.recorded()
    assert list(table) == [*COLUMNS, "source"] and table.source.str.startswith("recorded with MPICH").all()
    names = {*(make.__name__ for make in ALGORITHMS), "native"}
    observations = table.groupby(["contender", "ranks", "size_bytes"]).size()
    sizes = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20, 4 * 10**6, 16 * 10**6]
    assert {*observations.index} == {(name, ranks, size) for name in names for ranks in (2, 4, 8) for size in sizes}
    assert (observations == 3).all() and (table.time_s > 0).all()
    large = table[table.size_bytes == 16 * 10**6]
    rings = large[large.contender == "ring"]
    assert (rings.time_s / rings.theory_s).between(0.95, 1.25).all()
    counted = large[large.contender != "native"]
    assert (counted.wire_bytes / counted.bytes_sent).between(1, 1.08).all()


def test_the_recorded_table_agrees_with_todays_schedules() -> None:
    for row in lab.recorded().query("contender != 'native'").itertuples():
        schedule = getattr(allreduce, row.contender)(row.ranks)
        assert row.theory_s == pytest.approx(schedule.time(row.size_bytes, allreduce.Link(0, 8e-6 / row.rate_mbit)))
        assert row.bytes_sent == sum(schedule.bytes_sent(rank, row.size_bytes, 4) for rank in range(row.ranks))


def test_bandwidth_bound_algorithms_win_large_arrays_and_few_steps_win_small_ones() -> None:
    table = lab.recorded()
    eight = table[table.ranks == 8].groupby(["size_bytes", "contender"]).time_s.median().unstack()
    assert eight.loc[16 * 10**6].drop("native").idxmin() in ("ring", "rabenseifner")
    assert eight.loc[2**10, "ring"] > eight.loc[2**10, "recursive_doubling"]
    assert np.argmax(eight.ring < eight.recursive_doubling) > 0
