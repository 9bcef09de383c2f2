"""Where Horovod cannot be built, mpi4py averages gradients, and the callbacks talk over it too."""

import os
from collections.abc import Iterator

import keras
import numpy as np
import pytest
from helpers.training import average, outcome, perceptron, rank
from keras.optimizers import SGD, Adam

from nurion_utils import ranks

STEPS, BATCH, RANKS = 10, 4, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ranks.World]:
    """Ranks on which `import horovod` fails as if it had never been installed."""
    first = tmp_path_factory.mktemp("first_on_the_path")
    (first / "horovod").mkdir()
    (first / "horovod" / "__init__.py").write_text("raise ImportError('there is no Horovod here')")
    path = os.pathsep.join([str(first), ranks.rank_environment(1)["PYTHONPATH"]])
    with ranks.start(RANKS, env={"PYTHONPATH": path}) as world:
        yield world


def samples(of_ranks: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """What these ranks learn from, in the order of steps."""
    rng = np.random.default_rng(7)
    x, y = (rng.normal(size=(STEPS, RANKS, BATCH, width)).astype("float32") for width in (6, 3))
    return x[:, of_ranks].reshape(-1, 6), y[:, of_ranks].reshape(-1, 3)


def train(model: keras.Model, optimizer, data, *callbacks, **settings) -> list[np.ndarray]:
    model.compile(optimizer, "mse")
    model.fit(*data, batch_size=len(data[0]) // STEPS, shuffle=False, verbose=0, callbacks=list(callbacks), **settings)
    return model.get_weights()


def mine() -> tuple[np.ndarray, np.ndarray]:
    return samples(slice(rank(), rank() + 1))


def test_horovod_really_cannot_be_imported(world):
    def attempt():
        import horovod.tensorflow  # noqa: F401

    assert world.run(outcome, attempt) == ["ImportError: there is no Horovod here"] * RANKS


@pytest.mark.parametrize("make", [lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.01, global_clipnorm=0.1)])
def test_ranks_that_average_with_mpi_train_as_one_rank_with_the_batches_of_all(world, make):
    def compare():
        from nurion_utils.training import DistributedOptimizer

        together = train(perceptron(), DistributedOptimizer(make(), reducer=average), mine())
        return together, train(perceptron(), make(), samples()), perceptron().get_weights()

    (on0, alone, start), (on1, *_) = world.run(compare, timeout_s=240)
    for mine0, mine1, single, begun in zip(on0, on1, alone, start, strict=True):
        np.testing.assert_array_equal(mine0, mine1)
        np.testing.assert_allclose(mine0, single, rtol=0, atol=1e-6)
        assert np.abs(single - begun).max() > 5e-3  # it did train


def test_all_callbacks_work_over_mpi(world):
    def fit():
        from nurion_utils.training import (
            BroadcastCallback,
            DistributedOptimizer,
            MetricAverageCallback,
            SyncCheckCallback,
        )

        losses = {"own": [], "averaged": []}

        class Note(keras.callbacks.Callback):
            def __init__(self, where):
                super().__init__()
                self.where = where

            def on_epoch_end(self, epoch, logs=None):
                losses[self.where].append(logs["loss"])

        callbacks = [
            BroadcastCallback(),
            SyncCheckCallback(),
            Note("own"),
            MetricAverageCallback(),
            Note("averaged"),
        ]
        optimizer = DistributedOptimizer(SGD(0.1 * (1 + rank())), reducer=average)
        weights = train(perceptron(rank()), optimizer, mine(), *callbacks, epochs=2)
        return weights, float(optimizer.learning_rate), losses

    (weights0, rate0, losses0), (weights1, rate1, losses1) = world.run(fit, timeout_s=240)
    alone = train(perceptron(0), SGD(0.1), samples(), epochs=2)
    for on0, on1, single in zip(weights0, weights1, alone, strict=True):
        np.testing.assert_array_equal(on0, on1)
        np.testing.assert_allclose(on0, single, rtol=0, atol=1e-6)
    assert rate0 == rate1 == np.float32(0.1)
    assert losses0["own"] != losses1["own"]
    mean = np.mean([losses0["own"], losses1["own"]], axis=0)
    assert losses0["averaged"] == losses1["averaged"] == pytest.approx(mean.tolist())


def test_bfloat16_weights_are_broadcast_too(world):
    def start():
        from nurion_utils.training.callbacks import broadcast_model

        keras.config.set_dtype_policy("bfloat16")
        model = perceptron(rank())
        keras.config.set_dtype_policy("float32")
        model.compile("sgd")
        before = np.float32(model.get_weights()[0])
        broadcast_model(model)
        return before, np.float32(model.get_weights()[0])

    (before0, after0), (before1, after1) = world.run(start)
    assert (before0 != before1).any()
    np.testing.assert_array_equal(after0, before0)
    np.testing.assert_array_equal(after1, before0)


def test_a_rank_that_drifts_is_named(world):
    def attempt():
        from nurion_utils.training import SyncCheckCallback

        train(perceptron(), SGD(0.1), mine(), SyncCheckCallback())

    for drift in world.run(outcome, attempt, timeout_s=240):
        assert drift.startswith("RuntimeError: ranks no longer agree after epoch 1: ")
        assert "on rank 1 differs from rank 0's by up to" in drift


def test_without_a_reducer_the_error_names_it_as_the_remedy(world):
    def distribute():
        from nurion_utils.training import DistributedOptimizer

        DistributedOptimizer(SGD(0.1))

    for message in world.run(outcome, distribute):
        assert message == (
            "ImportError: Horovod cannot be imported here: pass reducer=, a function that averages an array over the "
            "ranks in place, such as one that calls mpi4py's MPI.COMM_WORLD.Allreduce"
        )


def test_where_horovod_is_installed_a_reducer_does_not_start_it_through_the_callbacks(world2):
    def fit():
        import horovod.tensorflow as hvd

        from nurion_utils.training import BroadcastCallback, DistributedOptimizer, MetricAverageCallback

        optimizer = DistributedOptimizer(SGD(0.1), reducer=average)
        weights = train(perceptron(rank()), optimizer, mine(), BroadcastCallback(), MetricAverageCallback())
        return weights, hvd.is_initialized()

    (weights0, started0), (weights1, started1) = world2.run(fit, timeout_s=240)
    for on0, on1 in zip(weights0, weights1, strict=True):
        np.testing.assert_array_equal(on0, on1)
    assert not started0 and not started1
