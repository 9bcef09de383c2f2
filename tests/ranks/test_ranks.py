"""Ranks keep their promises to a program: results, errors that name the rank, nothing that hangs."""

import contextlib
import json
import os
import pty
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import PATIENCE_S
from helpers.kernel import child_environment
from hypothesis import given
from hypothesis import strategies as st

from nurion_utils import ranks
from nurion_utils.ranks import RankError, engine

pytestmark = pytest.mark.ranks


# -- results -----------------------------------------------------------------------------------------------------


def test_results_come_in_rank_order_and_the_rank_is_the_engine_id(world4: ranks.World) -> None:
    def rank_and_engine(factor: int) -> tuple[int, int]:
        import ipyparallel
        from mpi4py import MPI

        return MPI.COMM_WORLD.rank * factor, ipyparallel.engine.app.IPEngine.instance().id

    assert world4.run(rank_and_engine, 10) == [(0, 0), (10, 1), (20, 2), (30, 3)]


def test_ranks_are_one_mpi_world(world4: ranks.World) -> None:
    assert world4.run(allreduce, 1) == [4] * 4


def test_no_port_that_ranks_connect_to_is_left_for_others_to_take(world2: ranks.World) -> None:
    for name in ("client", "engine"):
        file = world2._processes.directory / "profile" / "security" / f"ipcontroller-{name}.json"
        ports = [port for value in json.loads(file.read_text()).values() for port in np.ravel(value)]
        ports = [int(port) for port in ports if isinstance(port, np.integer)]
        assert len(ports) > 6
        for port in ports:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()  # somebody listens


def test_lambdas_closures_and_functions_that_call_others_travel(world2: ranks.World) -> None:
    captured = {"a": 1}
    assert world2.run(lambda x: captured["a"] + x, 2) == [3, 3]
    assert world2.run(lambda: allreduce(5)) == [10, 10]


def test_a_module_beside_the_notebook_is_found_and_this_packages_rooms_are_not_in_its_way(
    world2: ranks.World, tmp_path: Path
) -> None:
    (tmp_path / "sites.py").write_text("answer = 42\n")

    def answer() -> int:
        sys.path.append(str(tmp_path))  # behind everything that the ranks were started with
        import sites

        sys.path.remove(str(tmp_path))
        return sites.answer

    assert world2.run(answer) == [42, 42]


@pytest.mark.parametrize("dtype", ["float32", "int8", "complex128", "datetime64[s]", "U3", "bool", object])
def test_arrays_come_back_equal_and_writable(world2: ranks.World, dtype: Any) -> None:
    expected = np.arange(6).astype("int64").astype(dtype).reshape(2, 3)
    for result in world2.run(lambda array: {"array": array, "part": array[:, 1]}, expected):
        assert result["array"].dtype == expected.dtype
        np.testing.assert_array_equal(result["array"], expected)
        np.testing.assert_array_equal(result["part"], expected[:, 1])
        result["array"][0, 0] = result["array"][1, 1]


def test_results_of_100_megabytes_arrive_whole(world2: ranks.World) -> None:
    def large() -> np.ndarray:
        from mpi4py import MPI

        return np.full(100_000_000 // 8, MPI.COMM_WORLD.rank, dtype="int64")

    for rank, result in enumerate(world2.run(large)):
        assert result.nbytes == 100_000_000 and (result == rank).all()


def test_an_exception_that_is_returned_is_a_result(world2: ranks.World) -> None:
    assert [type(result) for result in world2.run(ValueError, "a value")] == [ValueError, ValueError]


def test_many_runs_keep_neither_results_nor_files(world2: ranks.World) -> None:
    process = psutil.Process()

    def run(times: int) -> None:
        for _ in range(times):
            world2.run(lambda: bytes(10_000_000))

    run(5)
    memory, files = process.memory_info().rss, process.num_fds()
    run(100)
    assert process.memory_info().rss - memory < 100e6  # 2000 MB passed through
    assert process.num_fds() <= files


# -- a fair share of the machine ------------------------------------------------------------------------------------


@given(n=st.integers(1, 40), cores=st.lists(st.integers(0, 300), min_size=1, max_size=64, unique=True).map(sorted))
def test_cores_are_dealt_out_evenly(n: int, cores: list[int]) -> None:
    shares = engine.cores_by_rank(n, cores)
    dealt = [core for share in shares for core in share]
    assert len(shares) == n and set(dealt) <= set(cores)
    assert {len(share) for share in shares} == {max(1, len(cores) // n)}
    uses = [dealt.count(core) for core in set(dealt)]
    assert max(uses) == 1 if n <= len(cores) else max(uses) - min(uses) <= 1


def test_each_rank_is_pinned_to_its_share_and_starts_as_many_threads(world2: ranks.World) -> None:
    def share() -> tuple[list[int], set[int], str, str]:
        pinned = {len(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}
        return sorted(os.sched_getaffinity(0)), pinned, *(os.environ[name] for name in THREAD_VARIABLES)

    shares = engine.cores_by_rank(2, sorted(os.sched_getaffinity(0)))
    threads = str(len(shares[0]))
    assert world2.run(share) == [(share, {len(share)}, threads, threads) for share in shares]


THREAD_VARIABLES = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        *[({"n": n}, "whole number from 1 up") for n in (0, -1, True, 2.5, "4", None)],
        ({"n": 10**6}, "more than the"),
        ({"n": 2, "env": {"OMP_NUM_THREADS": 1}}, "strings"),
        *[({"n": 1, "cores_per_rank": cores}, "cores each here") for cores in (0, 10**6, "1")],
    ],
)
def test_an_impossible_start_is_refused_in_a_sentence_and_starts_nothing(
    arguments: dict[str, Any], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(ValueError, match=remedy) as refusal:
        ranks.start(**arguments)
    assert "\n" not in str(refusal.value)


def test_a_start_that_fails_shows_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(RankError, match="(?s)^the ranks did not start: rank . left its process.*no usable transports"):
        ranks.start(2, env={"UCX_TLS": "no such transport"})
    assert time.monotonic() - began < PATIENCE_S
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_sent_is_refused_in_a_sentence_before_anything_runs(world2: ranks.World, tmp_path: Path) -> None:
    lock = threading.Lock()
    for function, arguments in [(lambda: lock, []), (tmp_path.joinpath("ran").write_text, [lock])]:
        with pytest.raises(TypeError, match="cannot be sent to the ranks.*lock.*inside the function") as refusal:
            world2.run(function, *arguments)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError, match="run needs a function"):
        world2.run(allreduce(1))
    for wrong in (0, -1, "soon"):
        with pytest.raises(ValueError, match="timeout_s must be a positive number of seconds"):
            world2.run(allreduce, 1, timeout_s=wrong)


# -- failures that leave the world usable ---------------------------------------------------------------------------


def test_an_error_names_the_rank_and_shows_its_traceback(world2: ranks.World) -> None:
    def fail() -> None:
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 1:
            raise FileNotFoundError("no data here")

    with pytest.raises(RankError) as failure:
        world2.run(fail)
    message = str(failure.value)
    assert message.startswith("rank 1 of 2 raised FileNotFoundError: no data here\n--- traceback of rank 1 ---")
    assert f'File "{__file__}"' in message and 'raise FileNotFoundError("no data here")' in message
    assert "nurion_utils" not in message and "ipyparallel" not in message
    assert world2.run(allreduce, 1) == [2, 2]


def test_when_all_ranks_raise_the_error_is_told_once(world4: ranks.World) -> None:
    with pytest.raises(RankError) as failure:
        world4.run(lambda: 1 // 0)
    message = str(failure.value)
    assert message.startswith("rank 0 of 4 raised ZeroDivisionError") and "(and so did ranks 1, 2, 3)" in message
    assert message.count("traceback of rank") == 1
    assert world4.run(allreduce, 1) == [4] * 4


class Stubborn(Exception):
    """Cannot be pickled, and not even be read."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __reduce__(self) -> Any:
        raise TypeError("I stay where I am")

    def __str__(self) -> str:
        raise TypeError("I have nothing to say")


def test_errors_and_results_that_do_not_pickle_still_name_the_rank(world2: ranks.World) -> None:
    def raise_stubborn() -> None:
        raise Stubborn(threading.Lock())

    with pytest.raises(RankError, match="rank 0 of 2 raised .*Stubborn"):
        world2.run(raise_stubborn)
    with pytest.raises(RankError, match="rank 0 of 2 raised TypeError: the result cannot be sent back.*lock"):
        world2.run(threading.Lock)
    with pytest.raises(RankError, match="rank 0 of 2 raised SystemExit: 4"):
        world2.run(sys.exit, 4)
    assert world2.run(allreduce, 1) == [2, 2]


# -- nobody else gets in --------------------------------------------------------------------------------------------


def processes_of(world: ranks.World) -> list[psutil.Process]:
    guardian = psutil.Process(world._processes._guarded.process.pid)
    return [guardian, *guardian.children(recursive=True)]


def test_a_world_listens_on_the_loopback_only(world2: ranks.World) -> None:
    sockets = [socket for process in processes_of(world2) for socket in process.net_connections("inet")]
    assert {socket.laddr.ip for socket in sockets if socket.status == "LISTEN"} == {"127.0.0.1"}
    assert {socket.raddr.ip for socket in sockets if socket.raddr} == {"127.0.0.1"}


def test_the_files_of_a_run_are_private(world2: ranks.World) -> None:
    assert stat.S_IMODE(world2._processes.directory.stat().st_mode) == 0o700
    connection_files = list(world2._processes.directory.rglob("*.json"))
    keys = [file for file in connection_files if "key" in file.read_text()]
    assert keys and {stat.S_IMODE(file.stat().st_mode) for file in keys} == {0o600}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_read_the_connection_file(world2: ranks.World) -> None:
    file = next(world2._processes.directory.rglob("ipcontroller-client.json"))
    cat = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(file)]
    refusal = subprocess.run(cat, capture_output=True, text=True)
    assert refusal.returncode != 0 and "Permission denied" in refusal.stderr


def test_a_client_with_a_wrong_key_gets_no_answer(world2: ranks.World, tmp_path: Path) -> None:
    import ipyparallel

    file = next(world2._processes.directory.rglob("ipcontroller-client.json"))
    forged = tmp_path / "ipcontroller-client.json"
    forged.write_text(file.read_text().replace(world2.client.session.key.decode(), "f" * 32))
    assert forged.read_text() != file.read_text()
    with pytest.raises(TimeoutError):
        ipyparallel.Client(str(forged), timeout=2)
    assert world2.run(allreduce, 1) == [2, 2]


# -- progress -------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_one_progress_bar_for_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    subprocess.run([sys.executable, str(script)], stderr=follower, env=child_environment(), check=True, timeout=60)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(leader, 65536):
            shown += part
    os.close(leader)
    lines = [line for line in shown.decode().replace("\n", "\r").split("\r") if line.strip()]
    assert all(line.startswith("folding: ") for line in lines)  # nothing else was written
    assert "60/60" in lines[-1] and "100%" in lines[-1]
    assert len([line for line in lines if "/60" in line]) > 2


def test_a_log_file_gets_no_progress_bar(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, env=child_environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


WORK = """
import time
from nurion_utils import ranks

def work():
    for _ in ranks.progress(range(20), description="folding"):
        time.sleep(0.05)

with ranks.start(3) as world:
    world.run(work)
"""


def test_progress_outside_a_rank_only_iterates(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(ranks.progress(range(3))) == [0, 1, 2]
    assert list(ranks.progress(iter("ab"), description="letters")) == ["a", "b"]
    assert capfd.readouterr() == ("", "")


def allreduce(value: int) -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(value)
