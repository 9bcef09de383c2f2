"""Ranks start equal, decide alike, and notice when they drift apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.training import outcome, perceptron, rank
from keras import layers
from keras.optimizers import SGD, Adam


def data(seed: int, steps: int = 4) -> tf.data.Dataset:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(steps, 8, 6)).astype("float32"), rng.normal(size=(steps, 8, 3)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, y))


def test_broadcast_makes_weights_and_optimizer_equal_and_leaves_random_states_alone(world2):
    def start():
        from nurion_utils.training import BroadcastCallback, DistributedOptimizer

        class Look(keras.callbacks.Callback):
            def on_train_begin(self, logs=None):
                self.weights = self.model.get_weights()
                self.slots = [np.array(v) for v in self.model.optimizer.variables]

        model = perceptron(rank(), layers.Dropout(0.5, seed=rank()), layers.BatchNormalization())
        generator = next(v for v in model.variables if "seed" in v.path)
        model.compile(DistributedOptimizer(Adam(0.1 * (1 + rank()), amsgrad=True)), "mse")
        before, look = model.get_weights(), Look()
        model.fit(data(rank()), verbose=0, callbacks=[BroadcastCallback(), look])
        return before, look.weights, look.slots, np.array(generator)

    (before0, weights0, slots0, random0), (before1, weights1, slots1, random1) = world2.run(start, timeout_s=240)
    assert any((a != b).any() for a, b in zip(before0, before1, strict=True))
    for given, on0, on1 in zip(before0, weights0, weights1, strict=True):
        np.testing.assert_array_equal(on0, given)
        np.testing.assert_array_equal(on1, given)
    assert len(slots0) == 20  # iterations, learning rate, three slots for each of six trained weights
    for on0, on1 in zip(slots0, slots1, strict=True):
        np.testing.assert_array_equal(on0, on1)
    assert (random0 != random1).any()


def test_broadcast_refuses_unbuilt_and_unequal_models(world2):
    def refusals():
        from nurion_utils.training import BroadcastCallback

        def fit(model):
            model.compile("sgd", "mse")
            model.fit(data(0), verbose=0, callbacks=[BroadcastCallback()])

        return [
            outcome(lambda: fit(keras.Sequential([layers.Dense(2)]))),
            outcome(lambda: fit(perceptron(0, *[layers.Dense(8) for _ in range(rank())]))),
            outcome(lambda: fit(perceptron(0, layers.Dense(8 + rank())))),
            outcome(lambda: fit(perceptron(0, *[layers.Dense(8, name=name) for name in ("ab", "ba")[rank()]]))),
        ]

    for unbuilt, deeper, wider, swapped in world2.run(refusals, timeout_s=240):
        assert "keras.Input(shape), or call model.build(shape)" in unbuilt
        assert "all ranks must have the same variables in the same order, but of the 8 of rank 1" in deeper
        assert "number 2 is sequential/dense/kernel of shape (8, 9) and type float32, and of the 8 of rank 0" in wider
        assert "number 2 is sequential/b/kernel of" in swapped and "rank 0 it is sequential/a/kernel of" in swapped


def test_averaged_metrics_are_those_of_all_samples_and_reach_later_callbacks_and_the_history(world2):
    def evaluate():
        from nurion_utils.training import MetricAverageCallback

        class Look(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                self.logs = dict(logs)

        def fit(first, last, *callbacks):
            rng = np.random.default_rng(0)
            x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
            model = perceptron(0)
            model.compile(SGD(0.0), "mse", metrics=["mae"])
            held_out = (x[first // 2 : last // 2], y[first // 2 : last // 2])
            chosen = {"batch_size": 2, "verbose": 0, "validation_data": held_out, "callbacks": list(callbacks)}
            return model.fit(x[first:last], y[first:last], **chosen).history

        look = Look()
        averaged = fit(10 * rank(), 10 * rank() + 10, MetricAverageCallback(), look)
        return fit(0, 20), averaged, look.logs

    for alone, averaged, seen in world2.run(evaluate, timeout_s=240):
        assert set(averaged) == {"loss", "mae", "val_loss", "val_mae"}
        for name, value in averaged.items():
            assert value == [seen[name]] == pytest.approx(alone[name], rel=1e-6)


def test_ranks_stop_early_in_the_same_epoch_when_metrics_are_averaged(world2):
    def stop():
        from nurion_utils.training import BroadcastCallback, DistributedOptimizer, MetricAverageCallback

        model = perceptron(rank())
        model.compile(DistributedOptimizer(SGD(0.5)), "mse")
        stopping = keras.callbacks.EarlyStopping("loss", min_delta=0.05)
        callbacks = [BroadcastCallback(), MetricAverageCallback(), stopping]
        return model.fit(data(rank()), epochs=50, verbose=0, callbacks=callbacks).history["loss"]

    on0, on1 = world2.run(stop, timeout_s=240)
    assert on0 == on1
    assert len(on0) < 50


def test_metrics_that_only_one_rank_has_are_an_error_everywhere(world2):
    def fit():
        from nurion_utils.training import MetricAverageCallback

        model = perceptron(0)
        model.compile("sgd", "mse", metrics=["mae"] if rank() else [])
        return outcome(lambda: model.fit(data(0), verbose=0, callbacks=[MetricAverageCallback()]))

    for unequal in world2.run(fit, timeout_s=240):
        assert "rank 1 reports ['loss', 'mae'] and rank 0 ['loss']" in unequal


def averaged(world, by_rank) -> list:
    """What becomes of a metric with these values on two ranks: in the history, and in an error."""

    def fit():
        from nurion_utils.training import MetricAverageCallback

        model = perceptron()
        model.compile("sgd", "mse", run_eagerly=True)

        class Report(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                logs["told"] = by_rank[rank()]

        callbacks = [Report(), MetricAverageCallback()]
        found = []
        error = outcome(lambda: found.append(model.fit(data(0), verbose=0, callbacks=callbacks).history["told"][0]))
        return found[0] if found else error

    return world.run(fit, timeout_s=240)


def test_a_metric_of_several_numbers_is_averaged_number_by_number(world2):
    for found in averaged(world2, [np.array([0.0, 1.0]), np.array([1.0, 2.0])]):
        np.testing.assert_allclose(found, [0.5, 1.5])
    for found in averaged(world2, [[0.0, 2.0], [1.0, 4.0]]):
        np.testing.assert_allclose(found, [0.5, 3.0])
    assert averaged(world2, [tf.constant(1), 2]) == [1.5] * 2


def test_a_rank_without_a_value_does_not_count(world2):
    assert averaged(world2, [None, 4.0]) == [4.0] * 2
    assert averaged(world2, [None, None]) == [None] * 2
    assert np.isnan(averaged(world2, [float("nan"), 4.0])).all()


@pytest.mark.parametrize("by_rank", [[np.zeros(2), np.zeros(3)], [1.0, [1.0, 2.0]], ["one", "two"], ["one", 2.0]])
def test_what_cannot_be_averaged_is_refused_on_all_ranks_by_name(world2, by_rank):
    for error in averaged(world2, by_rank):
        assert error.startswith("ValueError: the metric 'told' cannot be averaged over the ranks, where it is")


def test_f1_scores_reach_the_history_the_csv_file_and_early_stopping(world2, tmp_path):
    def fit(directory):
        from nurion_utils.training import BroadcastCallback, MetricAverageCallback

        x = np.random.default_rng(rank()).normal(size=(16, 6))
        y = np.eye(3)[np.arange(16) % 3]
        model = perceptron()
        model.compile("sgd", "mse", metrics=[keras.metrics.F1Score(), "mae"])
        file = f"{directory}/{rank()}.csv"
        callbacks = [BroadcastCallback(), MetricAverageCallback(), keras.callbacks.CSVLogger(file)]
        callbacks.append(keras.callbacks.EarlyStopping("mae"))
        history = model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks).history
        with open(file) as written:
            return np.stack(history["f1_score"]), written.read()

    (score, written), (same, also) = world2.run(fit, str(tmp_path), timeout_s=240)
    assert score.shape == (2, 3) and (score == same).all()
    assert written == also and f"{score[0, 0]}" in written


def drifting(world, change=None, optimizer=None, middle=(), every_rank=False) -> list[str]:
    """Train with the check; after the second step rank 2 changes a weight by `change`."""

    def fit():
        from nurion_utils.training import BroadcastCallback, DistributedOptimizer, SyncCheckCallback

        class Drift(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 1 and change is not None and (rank() == 2 or every_rank):
                    bias = self.model.get_layer("last").bias
                    bias.assign(bias + np.float32(change))

        model = perceptron(rank(), *middle)
        model.compile(optimizer or DistributedOptimizer(SGD(0.1, momentum=0.9)), "mse")
        callbacks = [BroadcastCallback(), Drift(), SyncCheckCallback()]
        return outcome(lambda: model.fit(data(rank()), epochs=2, verbose=0, callbacks=callbacks))

    return world.run(fit, timeout_s=240)


def test_ranks_in_step_pass_the_check_whatever_their_batch_statistics(world4):
    assert drifting(world4, middle=[layers.BatchNormalization()]) == ["no error"] * 4


def test_a_rank_that_drifts_is_named_on_all_ranks_with_its_first_variable_and_how_far_it_is(world4):
    for message in drifting(world4, change=0.25):
        assert message.startswith("RuntimeError: ranks no longer agree after epoch 1: ")
        assert "last/bias' on rank 2 differs from rank 0's by up to 0.25;" in message


def test_a_change_on_every_rank_is_no_drift(world4):
    assert drifting(world4, change=0.25, every_rank=True) == ["no error"] * 4


def test_a_weight_that_is_not_a_number_is_a_difference(world4):
    assert "on rank 2 differs from rank 0's by up to nan" in drifting(world4, change=np.nan)[0]


def test_an_optimizer_that_was_not_distributed_is_found_out(world4):
    for message in drifting(world4, optimizer="sgd"):
        assert "on rank 1, 2, 3 differs from rank 0's" in message
        assert "look for an optimizer that was not made with DistributedOptimizer" in message


def test_the_check_sees_through_wrappers_to_what_horovods_own_optimizer_keeps(world2):
    def fit():
        import horovod.keras

        from nurion_utils.training import SyncCheckCallback

        horovod.keras.init()
        model = perceptron()
        model.compile(keras.optimizers.LossScaleOptimizer(horovod.keras.DistributedOptimizer(SGD(0.1))), "mse")
        return outcome(lambda: model.fit(data(rank()), verbose=0, callbacks=[SyncCheckCallback()]))

    for message in world2.run(fit, timeout_s=240):
        assert message.startswith("RuntimeError: ranks no longer agree after epoch 1: ")


def test_ranks_that_train_other_variables_are_told_so(world2):
    def fit():
        from nurion_utils.training import SyncCheckCallback

        model = perceptron(0, *[layers.Dense(8) for _ in range(rank())])
        model.compile("sgd", "mse")
        return outcome(lambda: model.fit(data(0), verbose=0, callbacks=[SyncCheckCallback()]))

    for message in world2.run(fit, timeout_s=240):
        assert message.startswith("ValueError: all ranks must have the same variables in the same order")


@pytest.mark.parametrize("over_mpi", [False, True])
def test_what_is_longer_than_one_message_is_broadcast_in_pieces(world2, over_mpi):
    """Set to 5 bytes here; 1 GiB in earnest, because MPI and Horovod count to 2 GiB."""

    def broadcast():
        from unittest import mock

        import horovod.tensorflow as hvd

        from nurion_utils.training import communicator

        hvd.shutdown() if over_mpi else hvd.init()
        ranks = communicator.communicator(over_mpi)
        with mock.patch.object(communicator, "PIECE_BYTES", 5):
            array = np.arange(13.0).reshape(13, 1) * (1 + rank())
            ranks.Bcast(array, 1)
            return array.ravel().tolist(), hvd.is_initialized()

    expected = ([2.0 * i for i in range(13)], not over_mpi)
    assert world2.run(broadcast, timeout_s=240) == [expected] * 2
