"""A rank that leaves out a collective of Horovod is named, once Horovod's stall check is switched on."""

import time
from collections.abc import Callable, Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import PATIENCE_S

from nurion_utils import ranks
from nurion_utils.ranks import RankError

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def impatient() -> Iterator[ranks.World]:
    """Three ranks whose Horovod looks every second, and gives up after two."""
    seconds = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
    with ranks.start(3, env=seconds) as world:
        yield world


@pytest.fixture
def world(impatient: ranks.World) -> Iterator[ranks.World]:
    """Horovod, started anew; after the test the same ranks must still be there and work."""
    pids = impatient.run(start)
    yield impatient
    assert impatient.run(start) == pids
    assert impatient.run(allreduce, "after") == [3.0] * 3


def start() -> int:
    import os

    import horovod.tensorflow as hvd

    hvd.shutdown()
    hvd.init()
    return os.getpid()


def rank() -> int:
    """The number of this rank, once all have come here: on busy cores one may be seconds behind."""
    from mpi4py.MPI import COMM_WORLD

    COMM_WORLD.barrier()
    return COMM_WORLD.rank


def allreduce_of(name: str) -> Callable[[], tf.Tensor]:
    """In a graph, where a tensor keeps the name that it is given; eagerly Horovod learns no name.

    It is traced here, before the ranks line up: on busy cores that takes one rank seconds longer than another.
    """
    import horovod.tensorflow as hvd

    return tf.function(lambda: hvd.allreduce(tf.ones(3), op=hvd.Sum, name=name)).get_concrete_function()


def allreduce(name: str) -> float:
    return float(allreduce_of(name)()[0])


def failure(world: ranks.World, function, *args) -> str:
    with pytest.raises(RankError) as caught:
        world.run(function, *args, timeout_s=PATIENCE_S)
    return str(caught.value)


SENTENCE = (
    "{} never submitted tensor {}, for which other ranks waited over 2 s: every rank must call the same collectives "
    "equally often (start Horovod anew with hvd.shutdown() and hvd.init() on all ranks)"
)


@pytest.mark.parametrize("missing", [0, 1])  # rank 0 is the one that finds out
def test_a_rank_that_returns_early_is_named_with_the_tensor_and_the_line_where_another_waited(world, missing):
    def collective(missing):
        average_gradient = allreduce_of("gradient")
        if rank() != missing:
            average_gradient()

    headline, trace, *where = failure(world, collective, missing).splitlines()
    assert headline == SENTENCE.format(f"rank {missing}", "'gradient'")
    assert trace == f"--- traceback of rank {1 - missing} ---"
    assert where[0].endswith("in collective")
    assert "average_gradient()" in where[1]


def test_it_is_named_also_for_a_tensor_that_has_travelled_before_and_is_in_horovods_cache(world):
    def steps():
        import horovod.tensorflow as hvd

        own = rank()
        for step in range(10):
            if step < 8 or own != 2:
                hvd.allreduce(tf.ones(3))

    assert failure(world, steps).startswith(SENTENCE.format("rank 2", "'HorovodAllreduce'"))


def test_training_with_too_few_batches_on_one_rank_is_found_out(world):
    def fit():
        from nurion_utils.training import DistributedOptimizer

        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)  # traced before they line up
        samples = 16 if rank() else 8
        model.fit(np.ones((samples, 4)), np.ones((samples, 3)), batch_size=4, verbose=0)

    assert failure(world, fit).startswith(SENTENCE.format("rank 0", "'gradients_float32_0_1of2' and others"))


def test_ranks_that_call_collectives_in_different_order_are_all_named(world):
    def collective():
        left, right = allreduce_of("left"), allreduce_of("right")
        for average in [left, right] if rank() == 1 else [right, left]:
            average()

    names = "rank 1 never submitted tensor 'right', and ranks 0, 2 never submitted tensor 'left', for which"
    other_way = "ranks 0, 2 never submitted tensor 'left', and rank 1 never submitted tensor 'right', for which"
    assert failure(world, collective).startswith((names, other_way))


def test_a_rank_that_comes_too_late_is_the_one_named_though_it_fails_too(world):
    def collective():
        average = allreduce_of("late")
        if rank() == 1:
            time.sleep(4)
        average()

    assert failure(world, collective).startswith(SENTENCE.format("rank 1", "'late'"))


def test_the_mistake_of_a_rank_counts_more_than_that_others_waited_for_it(world):
    def collective():
        average = allreduce_of("gradient")
        if rank() == 1:
            time.sleep(3)
            raise ValueError("no data")
        average()

    headline, *_ = failure(world, collective).splitlines()
    assert headline == "rank 1 of 3 raised ValueError: no data"


def test_an_earlier_stall_is_not_blamed_for_a_later_end_of_horovod(world):
    def stall():
        average = allreduce_of("first")
        if rank() != 1:
            average()

    def leave():
        import horovod.tensorflow as hvd

        average = allreduce_of("second")
        if rank() == 1:
            hvd.shutdown()
        average()

    assert failure(world, stall).startswith("rank 1 never submitted tensor 'first'")
    world.run(start)
    message = failure(world, leave)
    assert "never submitted" not in message
    assert "Horovod has" in message


CELL = """
import horovod.tensorflow as hvd, tensorflow as tf
from mpi4py.MPI import COMM_WORLD
average = tf.function(lambda: hvd.allreduce(tf.ones(3), op=hvd.Sum, name="of_a_cell")).get_concrete_function()
COMM_WORLD.barrier()
if hvd.rank() != 1:
    average()
"""


def test_a_cell_names_the_rank_too_and_blames_no_earlier_stall(world):
    def run(cell: str) -> str:
        sent = world._view.execute(cell, silent=False, block=False)  # as %%px does
        with pytest.raises(RankError) as caught:
            world._watcher.wait(world._watcher.watch(sent), timeout_s=PATIENCE_S)
        return str(caught.value)

    headline, trace, *_ = run(CELL).splitlines()
    assert headline == SENTENCE.format("rank 1", "'of_a_cell'")
    assert trace == "--- traceback of rank 0 ---"
    world.run(start)
    answer = run(CELL.replace("if hvd.rank() != 1:", "if hvd.rank() == 1: hvd.shutdown()\nelse:"))
    assert "never submitted" not in answer and "Horovod has" in answer
