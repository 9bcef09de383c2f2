"""The noise scale must come out as it is known to be, and measuring it must leave the training as it was."""

from unittest import mock

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras.optimizers import SGD, Adam, LossScaleOptimizer, MultiOptimizer, OptimizerMap

from nurion_utils.large_batch.critical import critical_batch, tradeoff
from nurion_utils.large_batch.noise_scale import NoiseScale, estimate, noise_table

# Where the loss is the mean of w . x, a sample's gradient is x itself: G is the mean of x and S the trace of its
# covariance. Here every step is such a draw, and a rate of 0 would change nothing.
MEAN, DEVIATION = np.linspace(-0.5, 0.5, 10), np.linspace(1.0, 3.0, 10)
GRADIENT_SQ, NOISE = float(MEAN @ MEAN), float(DEVIATION @ DEVIATION)
BATCH = 16


def draws(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (MEAN + DEVIATION * rng.normal(size=(*shape, 10))).astype("float32")


def linear(dtype: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(1, use_bias=False, dtype=dtype)])


def output(_, prediction):
    return prediction


def measure(steps: int, dtype: str | None = None, **settings) -> pd.DataFrame:
    """The table of a `fit` of the linear model on this rank's draws."""
    from mpi4py.MPI import COMM_WORLD as world

    from nurion_utils.training import DistributedOptimizer

    noise = NoiseScale(BATCH)
    x = draws(np.random.default_rng(world.rank), steps, BATCH)
    optimizer = SGD(0.0, **settings)
    if dtype == "mixed_float16":
        optimizer = LossScaleOptimizer(optimizer)
    model = linear(dtype)
    model.compile(DistributedOptimizer(optimizer, observer=noise), output)
    model.fit(tf.data.Dataset.from_tensor_slices((x, np.zeros((steps, BATCH, 1), "float32"))), verbose=0)
    return noise.table()


def check_known_answer(tables: list[pd.DataFrame]) -> None:
    for table in tables:
        assert table.equals(tables[0])  # to the last bit, on all ranks
    row = tables[0].iloc[0]
    assert row["gradient_sq"] == pytest.approx(GRADIENT_SQ, rel=0.15)
    assert row["noise"] == pytest.approx(NOISE, rel=0.15)
    assert row["noise_scale"] == pytest.approx(NOISE / GRADIENT_SQ, rel=0.15)
    assert abs(row["noise_scale"] - NOISE / GRADIENT_SQ) < 4 * row["noise_scale_se"]


def test_two_ranks_measure_a_noise_scale_that_is_known(world2):
    check_known_answer(world2.run(measure, 2000, timeout_s=480))


def test_four_ranks_measure_a_noise_scale_that_is_known(world4):
    check_known_answer(world4.run(measure, 1000, timeout_s=480))


def test_accumulated_batches_count_as_one_larger_batch(world2):
    def accumulated():
        return measure(4000, gradient_accumulation_steps=2)

    tables = world2.run(accumulated, timeout_s=480)
    assert tables[0]["step"].item() == 2000
    check_known_answer(tables)


def test_the_loss_scale_of_mixed_precision_is_divided_out(world2):
    def mixed():
        return measure(2000, "mixed_float16")

    check_known_answer(world2.run(mixed, timeout_s=480))


def digits(rank: int, world_size: int, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (steps, batch, 64) and labels (steps, batch) of this rank."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    steps = len(x) // (world_size * batch)
    x, y = (data[: steps * world_size * batch].reshape(steps, world_size, batch, -1) for data in (x / 16, y))
    return x[:, rank].astype("float32"), y[:, rank, :, 0]


def train(optimizer: keras.optimizers.Optimizer, eager: bool = False) -> keras.Model:
    from mpi4py.MPI import COMM_WORLD as world

    from nurion_utils.models import mlp

    keras.utils.set_random_seed(1)
    model = mlp()
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=eager)
    model.fit(tf.data.Dataset.from_tensor_slices(digits(world.rank, world.size)), epochs=2, verbose=0)
    return model


def of_parts(gradients: np.ndarray, batch: int) -> tuple[float, float]:
    """|G|^2 and S from the gradients of the parts of one batch, shape (parts, weights), of `batch` samples each."""
    mean = gradients.mean(axis=0)
    return estimate((gradients**2).sum(axis=1).mean(), mean @ mean, batch, batch * len(gradients))


def test_while_a_perceptron_trains_the_estimate_is_that_of_its_saved_gradients(world2):
    def save_and_measure():
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        saved, noise = [], NoiseScale(batch_per_rank=32)

        def observer(gradients, average, batches):
            saved.append(world.allgather([gradient.numpy() for gradient in gradients]))
            return noise(gradients, average, batches)

        train(DistributedOptimizer(SGD(0.1), observer=observer), eager=True)
        in_graph = NoiseScale(batch_per_rank=32)
        train(DistributedOptimizer(SGD(0.1), observer=in_graph))
        return saved, noise.table(window=14), in_graph.table(window=14)

    saved, table, in_graph = world2.run(save_and_measure, timeout_s=480)[0]
    flat = [np.array([np.concatenate([np.ravel(g) for g in part]) for part in parts], float) for parts in saved]
    steps = [of_parts(gradients, 32) for gradients in flat]
    assert table["step"].tolist() == [14, 28, 42, 56]
    for k, row in table.iterrows():
        gradient_sq, noise = np.mean(steps[14 * k : 14 * k + 14], axis=0)
        assert row["gradient_sq"] == pytest.approx(gradient_sq, rel=1e-4)
        assert row["noise"] == pytest.approx(noise, rel=1e-4)
        assert row["noise_scale"] == pytest.approx(noise / gradient_sq, rel=1e-4)
    np.testing.assert_allclose(in_graph, table, rtol=1e-3)  # training itself amplifies other roundings


def with_and_without() -> list[bool]:
    from nurion_utils.training import DistributedOptimizer

    equal = []
    for make in (lambda: SGD(0.1, momentum=0.9), lambda: Adam(0.01, global_clipnorm=0.5)):
        plain = train(DistributedOptimizer(make())).get_weights()
        observed = train(DistributedOptimizer(make(), observer=NoiseScale(32))).get_weights()
        equal.append(all(np.array_equal(a, b) for a, b in zip(plain, observed, strict=True)))
    return equal


def test_on_two_ranks_training_ends_at_the_same_bits_with_the_observer_as_without(world2):
    assert world2.run(with_and_without, timeout_s=480) == [[True, True]] * 2


def test_on_four_ranks_training_ends_at_the_same_bits_with_the_observer_as_without(world4):
    assert world4.run(with_and_without, timeout_s=480) == [[True, True]] * 4


def test_the_squared_length_travels_in_the_message_of_the_gradients(world2):
    def count():
        import horovod.tensorflow as hvd

        from nurion_utils.training import DistributedOptimizer

        with mock.patch.object(hvd, "grouped_allreduce", wraps=hvd.grouped_allreduce) as allreduce:
            model = train(DistributedOptimizer(SGD(0.1), observer=NoiseScale(32)))
        return [len(call.args[0]) for call in allreduce.call_args_list], len(model.trainable_variables)

    sizes, variables = world2.run(count, timeout_s=240)[0]
    assert sizes == [variables + 1]


def test_a_gradient_that_is_none_on_one_rank_counts_as_zero_there(world2):
    def branch():
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        heads, noise = [keras.Variable(np.zeros(3, "float32"), name=name) for name in "ab"], NoiseScale(4)
        optimizer = DistributedOptimizer(SGD(0.0), observer=noise)
        gradients = [tf.constant([3.0, 0.0, 4.0]), None][:: 1 - 2 * world.rank]  # of head a on rank 0, of b on rank 1
        for _ in range(3):
            optimizer.apply(gradients, heads)
        return noise.table(window=1)

    for table in world2.run(branch, timeout_s=240):
        # each rank's |g|^2 is 25; the average, half of both, has 2 x 25 / 4: so |G|^2 is 0, all is noise
        gradient_sq, noise = estimate(25.0, 12.5, 4, 8)
        assert table["step"].tolist() == [1, 2, 3]
        np.testing.assert_allclose(table[["gradient_sq", "noise"]], [[gradient_sq, noise]] * 3, rtol=1e-6)


def test_a_model_is_saved_without_what_was_measured(world2, tmp_path):
    def save(path):
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        model = train(DistributedOptimizer(SGD(0.1, momentum=0.9), observer=NoiseScale(32)))
        if world.rank == 0:
            model.save(path)
        return len(model.optimizer.variables)

    count = world2.run(save, str(tmp_path / "model.keras"), timeout_s=240)[0]
    optimizer = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert type(optimizer) is SGD
    assert len(optimizer.variables) == count == 2 + 6  # step, rate, and the momentum of each weight


def test_a_reducer_of_ones_own_is_measured_as_horovod_is(world2):
    def compare():
        from mpi4py import MPI

        from nurion_utils.training import DistributedOptimizer

        def average(gradients):
            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, gradients)
            gradients /= MPI.COMM_WORLD.size

        tables = []
        for how in ({}, {"reducer": average}):
            noise = NoiseScale(32)
            train(DistributedOptimizer(SGD(0.1), observer=noise, **how))
            tables.append(noise.table())
        return tables

    for ours, theirs in world2.run(compare, timeout_s=240):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def refusals() -> dict[str, str]:
    import os

    from nurion_utils.training import DistributedOptimizer

    def train_embedding():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Embedding(5, 2), keras.layers.Flatten()])
        model.compile(DistributedOptimizer(SGD(), observer=NoiseScale(4)), "mse")
        model.fit(np.ones((4, 3)), np.ones((4, 6)), verbose=0)

    def elastic():
        with mock.patch.dict(os.environ, HOROVOD_ELASTIC="1"):
            NoiseScale(32)

    def alone():
        with mock.patch("nurion_utils.training.communicator.communicator", return_value=mock.Mock(size=1)):
            NoiseScale(32)

    def several():
        return MultiOptimizer(OptimizerMap(SGD(), {".*bias": SGD()}))

    noise = NoiseScale(32)
    attempts = {
        "one rank": alone,
        "no batch": lambda: NoiseScale(0),
        "elastic": elastic,
        "not measured": noise.table,
        "observer": lambda: DistributedOptimizer(SGD(), observer=32),
        "several": lambda: DistributedOptimizer(several(), observer=noise),
        "several scaled": lambda: DistributedOptimizer(LossScaleOptimizer(several()), observer=noise),
        "sparse": train_embedding,
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            messages[name] = "accepted"
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


REMEDIES = {
    "one rank": "ValueError: the noise scale compares the gradients of ranks, and there is only one; start 2 or more",
    "no batch": "ValueError: batch_per_rank must be a whole number from 1 up, not 0",
    "elastic": "ValueError: the noise scale needs the same ranks from start to end; measure it without elastic_run",
    "not measured": "ValueError: no step has been measured yet; train first",
    "observer": "TypeError: observer must be callable, such as NoiseScale(batch_per_rank=32), not 32",
    "several": "ValueError: an observer must see all gradients at once, but a MultiOptimizer divides them",
    "several scaled": "ValueError: an observer must see all gradients at once",
    "sparse": "ValueError: the noise scale needs dense gradients",
}


@pytest.fixture(scope="module")
def refused(world2):
    return world2.run(refusals, timeout_s=240)


@pytest.mark.parametrize("name", REMEDIES)
def test_what_cannot_be_measured_is_refused_with_its_remedy(refused, name):
    assert all(REMEDIES[name] in on_rank[name] for on_rank in refused), refused[0][name]


@pytest.mark.tensorflow
def test_only_the_last_steps_are_remembered():
    small_sq, large_sq = np.random.default_rng(0).uniform([[2], [1]], [[3], [2]], (2, 25)).astype("float32")
    with (
        mock.patch("nurion_utils.training.communicator.communicator", return_value=mock.Mock(size=2)),
        mock.patch("nurion_utils.large_batch.noise_scale.HISTORY", 12),
    ):
        noise = NoiseScale(4)
    for small, large in zip(small_sq, large_sq, strict=True):
        noise([tf.constant([0.0])], lambda _, s=small, g=large: [tf.constant([g**0.5]), tf.constant(s)], 1)
    table = noise.table(window=6)
    expected = noise_table(small_sq[13:], large_sq[13:], 4, 8, window=6)
    np.testing.assert_allclose(table, expected.assign(step=[19, 25]), rtol=1e-5)
    with pytest.raises(ValueError, match="a window of 13 steps is longer than the 12 steps measured"):
        noise.table(window=13)


def known_steps(rng: np.random.Generator, steps: int, parts: int = 4) -> tuple[np.ndarray, np.ndarray]:
    gradients = MEAN + DEVIATION * rng.normal(size=(steps, parts, 10)) / BATCH**0.5
    return (gradients**2).sum(axis=2).mean(axis=1), (gradients.mean(axis=1) ** 2).sum(axis=1)


def test_the_standard_error_is_how_far_estimates_scatter():
    rng = np.random.default_rng(0)
    tables = [noise_table(*known_steps(rng, 2000), BATCH, 4 * BATCH) for _ in range(200)]
    found = pd.concat(tables)
    assert found["noise_scale_se"].median() == pytest.approx(found["noise_scale"].std(), rel=0.2)


def test_averages_are_divided_for_the_average_of_quotients_is_far_off():
    gradient_sq, noise = estimate(*known_steps(np.random.default_rng(0), 4000), BATCH, 4 * BATCH)
    known = NOISE / GRADIENT_SQ
    assert noise.mean() / gradient_sq.mean() == pytest.approx(known, rel=0.1)
    assert not np.mean(noise / gradient_sq) == pytest.approx(known, rel=0.3)


def test_without_gradient_there_is_no_noise_scale():
    row = noise_table([2.0, 2.0], [0.5, 0.5], 1, 2).iloc[0]
    assert row["gradient_sq"] < 0 < row["noise"]
    assert np.isnan(row["noise_scale"])


shapes = st.tuples(st.integers(2, 5), st.integers(1, 6))
gradients_of_parts = shapes.flatmap(lambda shape: arrays(float, shape, elements=st.floats(-100, 100, width=32)))


@given(gradients_of_parts, st.integers(1, 64))
def test_noise_is_the_trace_of_the_covariance_of_the_parts_times_their_batch(gradients, batch):
    trace = gradients.var(axis=0, ddof=1).sum()
    assert of_parts(gradients, batch)[1] == pytest.approx(batch * trace, rel=1e-6, abs=1e-6)


@given(gradients_of_parts, st.integers(1, 64))
def test_the_squared_gradient_is_the_mean_product_of_different_parts(gradients, batch):
    products = gradients @ gradients.T
    mean = products[~np.eye(len(products), dtype=bool)].mean()
    assert of_parts(gradients, batch)[0] == pytest.approx(mean, rel=1e-6, abs=1e-6)


@given(st.floats(0, 100), st.floats(0, 100), st.integers(1, 100), st.integers(1, 100))
def test_the_estimate_inverts_what_noise_does_to_the_squared_length(gradient_sq, noise, small, more):
    lengths = [gradient_sq + noise / batch for batch in (small, small + more)]
    assert estimate(*lengths, small, small + more) == pytest.approx((gradient_sq, noise), rel=1e-6, abs=1e-6)


def test_a_window_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match="a window of 4 steps is longer than the 3 steps measured"):
        noise_table([2.0] * 3, [1.0] * 3, 1, 2, window=4)


BATCHES = 2.0 ** np.arange(4, 13)


@given(st.floats(10, 1e5), st.floats(40, 1600))
def test_the_fit_finds_the_law_again(steps_min, critical):
    fit = critical_batch(tradeoff(BATCHES, steps_min, steps_min * critical))
    assert (fit.steps_min, fit.samples_min, fit.batch) == pytest.approx(
        (steps_min, steps_min * critical, critical), rel=1e-4
    )


def test_the_fit_of_scattered_runs_errs_by_its_standard_errors():
    rng, law = np.random.default_rng(0), tradeoff(BATCHES, 500, 500 * 300)
    scores = []
    for _ in range(200):
        factors = np.exp(0.1 * rng.normal(size=len(law)))
        runs = law.assign(steps=law["steps"] * factors, samples=law["samples"] * factors)
        fit = critical_batch(runs)
        assert fit.batch == fit.samples_min / fit.steps_min
        scores.append(
            [
                (fit.steps_min - 500) / fit.steps_min_se,
                (fit.samples_min - 150_000) / fit.samples_min_se,
                (fit.batch - 300) / fit.batch_se,
            ]
        )
    spread = np.std(scores, axis=0)
    assert ((0.7 < spread) & (spread < 1.5)).all(), spread


def test_at_the_critical_batch_steps_and_samples_are_twice_the_least():
    assert tradeoff([300], 500, 150_000).iloc[0].tolist() == [300, 1000, 300_000]


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1, 1e5))
def test_every_point_of_the_tradeoff_obeys_the_law(batch, steps_min, samples_min):
    point = tradeoff([batch], steps_min, samples_min).iloc[0]
    assert point["samples"] == pytest.approx(point["steps"] * batch)
    excess = (point["steps"] - steps_min) / steps_min * (point["samples"] - samples_min) / samples_min
    assert excess == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("table", "remedy"),
    [
        (tradeoff([64, 128], 500, 150_000), "measure at least 3 batches, not 2"),
        (tradeoff([1, 2, 4, 8], 500, 150_000), "all batches lie below the critical one, .* measure larger ones too"),
        (tradeoff([1e4, 2e4, 4e4], 500, 150_000), "all batches lie above the critical one, .* smaller ones too"),
        (pd.DataFrame({"batch": [1, 2, 4], "steps": 8, "samples": [8, 16, 32]}), "above the critical one"),
        (pd.DataFrame({"batch": [1, 2, 4], "steps": [8, 4, 2], "samples": 8}), "below the critical one"),
        (tradeoff([64, 256, 512], 500, 150_000).assign(steps=np.nan), "steps must hold numbers above 0"),
        (tradeoff([64, 256, 512], 500, 150_000)[["batch", "steps"]], "lacks samples"),
    ],
)
def test_runs_that_cannot_tell_the_critical_batch_are_refused(table, remedy):
    with pytest.raises(ValueError, match=remedy):
        critical_batch(table)


def test_a_batch_must_be_a_number_above_0():
    with pytest.raises(ValueError, match="batch must be a number above 0, not -1"):
        tradeoff([-1], 500, 150_000)
