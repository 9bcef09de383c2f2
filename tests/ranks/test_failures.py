"""A rank that fails in the middle of a collective ends the world with its name; and worlds end in good order."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import PATIENCE_S

from nurion_utils import ranks
from nurion_utils.ranks import RankError

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def mortals() -> Iterator[ranks.World]:
    with ranks.start(3, env={"OMP_NUM_THREADS": "7", "NEW_VARIABLE": "new"}) as world:
        yield world


@pytest.fixture
def mortal(mortals: ranks.World) -> ranks.World:
    """A world of three that the test may break."""
    return mortals if "running" in repr(mortals) else mortals.restart()


def allreduce(value: int) -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(value)


def test_the_users_environment_comes_last(mortal: ranks.World) -> None:
    names = ["OMP_NUM_THREADS", "NEW_VARIABLE", "KERAS_BACKEND"]
    assert mortal.run(lambda: [os.environ[name] for name in names]) == [["7", "new", "tensorflow"]] * 3


# -- failures in the middle of a collective -------------------------------------------------------------------------


def raise_error() -> None:
    raise ValueError("no data")


def kill(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def read_nowhere() -> None:
    ctypes.string_at(0)


ENDINGS: dict[str, tuple[Callable[..., None], Any, str]] = {
    "raises": (raise_error, None, "rank 1 of 3 raised ValueError: no data\n--- traceback of rank 1 ---"),
    "leaves with sys.exit": (sys.exit, 5, "rank 1 of 3 raised SystemExit: 5"),
    "leaves with exit code 0": (os._exit, 0, "rank 1 left its process with exit code 0"),
    "leaves with exit code 3": (os._exit, 3, "rank 1 left its process with exit code 3"),
    "is killed": (kill, signal.SIGKILL, "rank 1 was ended by SIGKILL"),
    "is terminated": (kill, signal.SIGTERM, "rank 1 was ended by SIGTERM"),
    "crashes": (read_nowhere, None, "rank 1 was ended by SIGSEGV\n--- last output of rank 1 ---\nFatal Python error"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_collective_that_loses_a_rank_ends_with_its_name(mortal: ranks.World, ending: str) -> None:
    end, argument, story = ENDINGS[ending]

    def collective() -> int:
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 1:
            time.sleep(0.5)  # the others are in the collective by then
            end() if argument is None else end(argument)
        return allreduce(1)

    began = time.monotonic()
    with pytest.raises(RankError) as failure:
        mortal.run(collective)
    assert time.monotonic() - began < PATIENCE_S
    message = str(failure.value)
    assert message.startswith(story)
    for rank in (0, 2):
        where = message.split(f"--- where rank {rank} was ---")[1].splitlines()
        assert where[1].endswith("in allreduce") and where[2].endswith("in collective")
    if ending in ("raises", "crashes"):
        assert end.__name__ in message  # the line that did it
    assert "nurion_utils" not in message and "ipyparallel" not in message and "traitlets" not in message
    with pytest.raises(RankError, match=r"^this world has ended because rank 1 .*; call world.restart\(\)$"):
        mortal.run(allreduce, 1)
    assert mortal.restart().run(allreduce, 1) == [3, 3, 3]


def test_a_horovod_allreduce_that_loses_a_rank_ends_with_its_name(mortal: ranks.World) -> None:
    def train(step: int) -> float:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        if step and hvd.rank() == 2:
            os._exit(1)
        return float(hvd.allreduce(tf.ones(3), op=hvd.Sum)[0])

    assert mortal.run(train, 0) == [3.0, 3.0, 3.0]
    began = time.monotonic()
    with pytest.raises(RankError, match="^rank 2 left its process with exit code 1") as failure:
        mortal.run(train, 1)
    assert time.monotonic() - began < PATIENCE_S
    assert "where rank 0 was" in str(failure.value) and "in train" in str(failure.value)


def test_ranks_that_are_late_are_ended_and_it_is_told_where_they_were(mortal: ranks.World) -> None:
    def wait_for_ever() -> None:
        time.sleep(1000)

    began = time.monotonic()
    with pytest.raises(RankError, match="^ranks 0, 1, 2 did not finish within 0.5 s") as failure:
        mortal.run(wait_for_ever, timeout_s=0.5)
    assert time.monotonic() - began < PATIENCE_S
    assert str(failure.value).count("in wait_for_ever") == 3


def test_a_rank_that_was_stopped_gives_no_answer(mortal: ranks.World) -> None:
    def stop_one() -> None:
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    began = time.monotonic()
    with pytest.raises(RankError, match="(?s)^rank 0 did not finish within 1 s.*rank 0 was.*no answer: it is stopped"):
        mortal.run(stop_one, timeout_s=1)
    assert time.monotonic() - began < PATIENCE_S


def test_of_a_rank_that_no_signal_reaches_another_thread_tells_where_it_is(mortal: ranks.World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never_written")

    def start_one(program: str, reading: str) -> None:
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 0:
            # Linux holds a process until its child has become another program; this one first opens a file, in vain.
            os.posix_spawn(program, [program], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, reading, os.O_RDONLY, 0)])

    with pytest.raises(RankError) as failure:
        mortal.run(start_one, sys.executable, str(tmp_path / "never_written"), timeout_s=1)
    answer, *stack = str(failure.value).split("--- where rank 0 was ---\n")[1].splitlines()
    assert answer.startswith("  it gave no answer: it is in a wait that no signal interrupts")
    assert stack[0].endswith("in start_one")


def test_ranks_that_die_between_two_calls_are_noticed(mortal: ranks.World) -> None:
    os.kill(mortal.run(os.getpid)[2], signal.SIGKILL)
    time.sleep(1)
    with pytest.raises(RankError, match="because rank 2 was ended by SIGKILL; call world.restart"):
        mortal.run(allreduce, 1)


def test_without_its_controller_a_world_ends(mortal: ranks.World) -> None:
    controller = json.loads((mortal._processes.directory / "controller.process").read_text())["pid"]
    threading.Timer(0.3, os.kill, [controller, signal.SIGKILL]).start()
    began = time.monotonic()
    with pytest.raises(RankError, match="^the controller died"):
        mortal.run(time.sleep, 1000)
    assert time.monotonic() - began < PATIENCE_S


# -- stopping -------------------------------------------------------------------------------------------------------


def test_stopping_ends_a_run_of_another_thread(mortal: ranks.World) -> None:
    threading.Timer(0.5, mortal.stop).start()
    with pytest.raises(RankError, match="this world was stopped while its ranks were at work"):
        mortal.run(time.sleep, 1000)
    mortal.stop()
    mortal.stop()
    with pytest.raises(RankError, match=r"this world has been stopped; call world.restart\(\)"):
        mortal.run(allreduce, 1)
    assert "stopped" in repr(mortal)


def test_restarts_leave_neither_threads_nor_files_open(mortal: ranks.World) -> None:
    process = psutil.Process()

    def held() -> tuple[int, int]:
        return threading.active_count(), process.num_fds()

    mortal.restart()
    before = held()
    for _ in range(3):
        mortal.restart()
    assert held() <= before
    mortal.stop()
    assert held() < before


def test_two_worlds_live_side_by_side(mortal: ranks.World, world2: ranks.World) -> None:
    assert (mortal.run(allreduce, 1), world2.run(allreduce, 1)) == ([3, 3, 3], [2, 2])
    mortal.stop()
    assert world2.run(allreduce, 1) == [2, 2]
