"""Training goes on when a rank is lost, and stops, loudly, when one has a mistake."""

import os
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from nurion_utils.ranks import RankError
from nurion_utils.training.elastic import elastic_launch

pytestmark = pytest.mark.ranks

EPOCHS, BATCH, KILLED_AT = 6, 8, (2, 10)


def classifier(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])


def compile_for(model: keras.Model, optimizer) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, weighted_metrics=["accuracy"])


def train_undisturbed(seeds: range) -> list[float]:
    """Test accuracies of four ranks' training, which one rank does with four times the batch."""
    from mpi4py.MPI import COMM_WORLD as world

    from nurion_utils.datasets import Shard, digits

    x, y, x_test, y_test = digits.load()
    accuracies = []
    for seed in seeds[world.rank :: world.size]:
        model, shard = classifier(seed), Shard(len(x), 1, 0, 4 * BATCH, seed)
        compile_for(model, keras.optimizers.SGD(0.1, momentum=0.9))
        model.fit(shard.dataset(x, y), steps_per_epoch=shard.steps, epochs=EPOCHS, verbose=0)
        accuracies.append(model.evaluate(x_test, y_test, verbose=0)[1])
    return accuracies


def train_with_a_kill(seed: int) -> tuple[float, list[tuple[int, int, int]]]:
    import horovod.tensorflow as hvd

    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import DistributedOptimizer, ElasticState, elastic_run

    x, y, x_test, y_test = digits.load()
    model = classifier(seed)
    compile_for(model, DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)))
    starts = []

    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if (state.epoch, batch) == KILLED_AT and hvd.size() == 4 and hvd.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    @elastic_run
    def train(state):
        starts.append((hvd.rank(), hvd.size(), state.epoch))
        shard = Shard(len(x), hvd.size(), hvd.rank(), BATCH, seed)
        while state.epoch < EPOCHS:
            samples = shard.dataset(x, y, start_epoch=state.epoch)
            model.fit(samples, steps_per_epoch=shard.steps, verbose=0, callbacks=[Kill()])
            state.epoch += 1
            state.commit()

    state = ElasticState(model, epoch=0)
    train(state)
    return model.evaluate(x_test, y_test, verbose=0)[1], starts


def test_when_one_of_four_ranks_is_killed_three_finish_as_well_as_four_would_have(world4):
    undisturbed = [accuracy for part in world4.run(train_undisturbed, range(12), timeout_s=120) for accuracy in part]
    accuracies, starts = zip(*elastic_launch(train_with_a_kill, 0, ranks=4, min_ranks=3, timeout_s=180), strict=True)
    assert list(starts) == [[(0, 4, 0), (0, 3, 2)], [(2, 4, 0), (1, 3, 2)], [(3, 4, 0), (2, 3, 2)]]
    assert len(set(accuracies)) == 1  # the survivors agree
    assert min(undisturbed) <= accuracies[0] <= max(undisturbed)
    assert min(undisturbed) > 0.9


def test_a_mistake_on_one_rank_ends_the_launch_with_its_traceback():
    def mistaken():
        import horovod.tensorflow as hvd

        from nurion_utils.training import ElasticState, elastic_run

        model = classifier(0)
        model.compile("sgd", "mse")

        @elastic_run
        def train(state):
            if hvd.rank() == 1:
                raise ValueError("the learning rate is a banana")
            for _ in range(1000):
                hvd.allreduce(tf.ones(1))
                time.sleep(0.1)

        return train(ElasticState(model))

    with pytest.raises(RankError) as caught:
        elastic_launch(mistaken, ranks=2, timeout_s=120)
    assert "rank 1 of 2 failed" in str(caught.value)
    assert "in train" in str(caught.value)
    assert "ValueError: the learning rate is a banana" in str(caught.value)


def test_fewer_ranks_than_asked_for_end_the_launch():
    def die():
        import horovod.tensorflow as hvd

        print("last words of rank", hvd.rank(), flush=True)
        if hvd.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)

    with pytest.raises(RankError) as caught:
        elastic_launch(die, ranks=2, min_ranks=2, timeout_s=120)
    message = str(caught.value)
    assert message.startswith("1 of 2 ranks are left, fewer than min_ranks=2\nrank 0 of 2 was ended by SIGKILL\n")
    assert message.endswith("last words of rank 0")


def test_a_launch_that_takes_too_long_is_stopped():
    with pytest.raises(RankError, match="2 of 2 ranks did not finish within 0.5 s"):
        elastic_launch(time.sleep, 100, ranks=2, timeout_s=0.5)


def test_a_launch_may_take_its_time():
    assert elastic_launch(int, ranks=1, min_ranks=1, timeout_s=None) == [0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ranks": 0}, "min_ranks must be from 1 to ranks=0, not 2"),
        ({"ranks": 2, "min_ranks": 3}, "min_ranks must be from 1 to ranks=2, not 3"),
        ({"timeout_s": 0}, "timeout_s must be a positive number of seconds, or None, not 0"),
    ],
)
def test_impossible_numbers_are_refused_before_a_rank_starts(wrong, message):
    with pytest.raises(ValueError, match=message):
        elastic_launch(print, **wrong)


def test_a_function_that_cannot_be_sent_is_refused_before_a_rank_starts():
    with pytest.raises(TypeError, match="create what cannot be pickled inside the function"):
        elastic_launch(print, threading.Lock())


ORPHANS = """
import os, time
from nurion_utils.ranks.launchers.elastic import elastic_launch

def wait(directory):
    open(f"{directory}/{os.getpid()}", "w").close()
    time.sleep(100)

import sys
elastic_launch(wait, sys.argv[1], ranks=2)
"""


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while len(pids := os.listdir(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(pids) == 2
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_errors_that_are_not_of_the_connection_come_through_where_horovods_own_run_returns_none(world2):
    def run_both():
        import horovod.tensorflow as hvd

        from nurion_utils.training import ElasticState, elastic_run

        hvd.init()
        model = classifier(0)
        model.compile("sgd", "mse")

        def mistaken(state):
            raise tf.errors.UnknownError(None, None, "the file is not there")

        outcomes = [hvd.elastic.run(mistaken)(ElasticState(model))]
        try:
            outcomes.append(elastic_run(mistaken)(ElasticState(model)))
        except tf.errors.UnknownError as error:
            outcomes.append(error.message)
        return outcomes

    assert world2.run(run_both, timeout_s=240) == [[None, "the file is not there"]] * 2


def test_a_state_returns_to_its_last_commit_and_takes_over_that_of_rank_0(world2):
    def walk():
        import horovod.tensorflow as hvd

        from nurion_utils.training import ElasticState

        hvd.init()
        model = classifier(hvd.rank())
        model.compile(keras.optimizers.Adam(0.1), "mse")
        state = ElasticState(model, epoch=10 * hvd.rank(), notes=["begun"])
        started = snapshot(state)
        model.train_on_batch(np.ones((4, 64)), np.ones((4, 10)))
        state.epoch, state.notes = 7, ["changed"]
        changed = snapshot(state)
        state.restore()
        restored = snapshot(state)
        state.epoch += 1
        state.commit()
        state.epoch = 99
        state.restore()
        committed = state.epoch
        state.sync()
        return started, changed, restored, committed, snapshot(state)

    def snapshot(state):
        values = [np.array(v) for v in (*state.model.weights, *state.model.optimizer.variables)]
        return state.epoch, state.notes, np.concatenate([v.ravel() for v in values])

    walks = world2.run(walk, timeout_s=240)
    for rank, (started, changed, restored, committed, _) in enumerate(walks):
        assert (changed[2] != started[2]).any()
        assert restored[:2] == started[:2] == (10 * rank, ["begun"])
        np.testing.assert_array_equal(restored[2], started[2])
        assert committed == 10 * rank + 1
    synced0, synced1 = walks[0][-1], walks[1][-1]
    assert synced0[:2] == synced1[:2] == (1, ["begun"])
    np.testing.assert_array_equal(synced1[2], synced0[2])
    np.testing.assert_array_equal(synced0[2], walks[0][0][2])


def test_a_state_refuses_what_it_could_not_keep():
    from nurion_utils.training import ElasticState

    with pytest.raises(ValueError, match="must be built and compiled"):
        ElasticState(classifier(0))
    model = classifier(0)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has a 'commit' of its own; name the counter differently"):
        ElasticState(model, commit=3)
