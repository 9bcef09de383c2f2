"""A collective that not all ranks call is noticed, long computing is not taken for it, and calls are never mixed up."""

import concurrent.futures
import os
import time
from collections.abc import Iterator

import pytest

from nurion_utils import ranks
from nurion_utils.ranks import RankError, stalls, watching

pytestmark = pytest.mark.ranks

COMPUTES_S = float(os.environ.get("COMPUTES_S", 5))  # two minutes take two minutes; the rule knows no other limit


@pytest.fixture
def world(world4: ranks.World) -> Iterator[ranks.World]:
    """Ranks that are started again after an error, for whoever comes next."""
    yield world4
    if "running" not in repr(world4):
        world4.restart()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is the same, but it is applied after 3 seconds instead of 10."""
    for name, seconds in {"ASK_AFTER_S": 1.0, "ASK_EVERY_S": 0.4, "NOTICE_S": 3.0}.items():
        monkeypatch.setattr(stalls, name, seconds)


def mpi_on_rank_0() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.rank == 0:
        comm.allreduce(1)


def mpi_buffers_on_ranks_0_and_2() -> None:
    import numpy as np
    from mpi4py.MPI import COMM_WORLD as comm

    if comm.rank % 2 == 0:
        comm.Allreduce(np.ones(5), np.zeros(5))


def receive_on_rank_1() -> None:
    from mpi4py.MPI import COMM_WORLD as comm

    if comm.rank == 1:
        comm.recv(source=3)


def horovod_on_rank_1() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    if hvd.rank() == 1:
        hvd.allreduce(tf.ones(3), name="alone")


def horovod_in_a_graph_on_rank_1() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    if hvd.rank() == 1:
        tf.function(lambda: hvd.allreduce(tf.ones(3), name="alone_in_a_graph"))()


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (mpi_on_rank_0, "ranks 1, 2, 3 have finished, and rank 0 waits in allreduce"),
        (mpi_buffers_on_ranks_0_and_2, "ranks 1, 3 have finished, and ranks 0, 2 wait in Allreduce"),
        (receive_on_rank_1, "ranks 0, 2, 3 have finished, and rank 1 waits in recv"),
    ],
)
def test_a_collective_that_not_all_ranks_call_is_an_error_where_nobody_watches(world, soon, mistake, says: str) -> None:
    with pytest.raises(RankError, match=f"^{says}: every rank must call the same collectives") as caught:
        world.run(mistake)
    assert f"in {mistake.__name__}" in str(caught.value) and "--- where rank" in str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "call"),
    [(horovod_on_rank_1, "allreduce"), (horovod_in_a_graph_on_rank_1, "a collective of Horovod")],
)
def test_so_is_one_of_horovod(world2, soon, mistake, call: str) -> None:
    with pytest.raises(RankError, match=f"^rank 0 has finished, and rank 1 waits in {call}: every rank") as caught:
        world2.run(mistake)
    world2.restart()
    assert f"in {mistake.__name__}" in str(caught.value) and "--- where rank" in str(caught.value)


def test_somebody_who_watches_is_told_first(world, soon, monkeypatch, capsys) -> None:
    monkeypatch.setattr(watching.notebook, "somebody_watches", lambda: True)
    monkeypatch.setattr(watching, "STALL_LIMIT_S", stalls.NOTICE_S + 2)
    with pytest.raises(RankError, match="rank 0 waits in allreduce"):
        world.run(mpi_on_rank_0)
    told = capsys.readouterr().out
    assert told.count("ranks 1, 2, 3 have finished, and rank 0 waits in allreduce") == 1 and "line" in told


def sleep(s: float) -> None:
    time.sleep(s)


def loop(s: float) -> None:
    end = time.monotonic() + s
    while time.monotonic() < end:
        pass


def one_call_of_numpy(s: float) -> None:
    import numpy as np

    a = np.random.default_rng(0).random((600, 600))
    end = time.monotonic() + s
    while time.monotonic() < end:
        np.linalg.svd(a)


def sort(s: float) -> None:
    end = time.monotonic() + s
    while time.monotonic() < end:
        sorted(range(3_000_000), key=lambda x: -x)


def fit(s: float) -> None:
    import keras
    import numpy as np

    model = keras.Sequential([keras.Input((50,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    end = time.monotonic() + s
    while time.monotonic() < end:
        model.fit(np.ones((1000, 50)), np.ones(1000), verbose=0)


def talk(s: float) -> None:
    """With itself, all the time, in calls that end."""
    from mpi4py.MPI import COMM_WORLD as comm

    end = time.monotonic() + s
    while time.monotonic() < end:
        comm.sendrecv(1, 0, source=0)


@pytest.mark.parametrize("work", [sleep, loop, one_call_of_numpy, sort, fit, talk])
def test_a_rank_that_works_on_while_the_others_have_returned_is_left_alone(world, soon, work) -> None:
    def on_rank_0(work, s):
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 0:
            work(s)
        return MPI.COMM_WORLD.rank

    assert world.run(on_rank_0, work, COMPUTES_S) == [0, 1, 2, 3]


def collective(i: int) -> int:
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(i)


def test_threads_take_turns_and_no_two_calls_are_mixed_up(world2) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: world2.run(collective, i), range(100)))
    assert results == [[2 * i, 2 * i] for i in range(100)]


def test_the_time_that_other_threads_take_counts_for_no_timeout(world2) -> None:
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(world2.run, sleep, 1.5, timeout_s=10) for _ in range(3)]
        assert [wait.result() for wait in waits] == [[None, None]] * 3


def test_an_error_in_one_thread_is_not_one_of_another(world2) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        wrong = pool.submit(world2.run, divmod, 1, 0)
        right = pool.submit(world2.run, collective, 3)
        assert right.result() == [6, 6]
        with pytest.raises(RankError, match="ZeroDivisionError"):
            wrong.result()
