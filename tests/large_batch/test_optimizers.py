"""LARS and momentum SGD do in each step what their papers say: saved, distributed, in half precision, side by side."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras.optimizers import SGD, LossScaleOptimizer, MultiOptimizer, OptimizerMap

from nurion_utils.large_batch.optimizers import LARS, CorrectedSGD, Lamb
from nurion_utils.training import DistributedOptimizer

pytestmark = pytest.mark.tensorflow

STEPS, BATCH = 20, 4
few = settings(max_examples=25, deadline=None)
rates = st.floats(2.0**-10, 1.0, width=32)  # Keras holds a rate in float32,
momenta = st.floats(0.0, 0.96875, width=32)  # and its SGD rounds the momentum to it
decays = st.sampled_from([0.0, 1e-4, 0.1])
shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=4, max_side=4), min_size=1, max_size=3)


def lars(w, gradients, rates, momentum, weight_decay, trust, adapt=True):
    """You, Gitman and Ginsburg 2017, algorithm 1, in plain NumPy; the weights after each step."""
    v, path = np.zeros_like(w), []
    for g, rate in zip(gradients, rates, strict=True):
        local = 1.0
        if adapt:
            size, slope = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
            if size > 0 and slope > 0:
                local = trust * size / (slope + weight_decay * size)
            g = g + weight_decay * w
        v = momentum * v + rate * local * g
        w = w - v
        path.append(w)
    return path


def sgd(w, gradients, rates, momentum, weight_decay, nesterov=False):
    """Goyal et al. 2017, equation 9: the momentum without the rate."""
    u, path = np.zeros_like(w), []
    for g, rate in zip(gradients, rates, strict=True):
        g = g + weight_decay * w
        u = momentum * u + g
        w = w - rate * (g + momentum * u if nesterov else u)
        path.append(w)
    return path


def sgd_with_corrected_momentum(w, gradients, rates, momentum):
    """The same as Goyal et al. state it, equation 10: v holds the rate and is multiplied by rate_new / rate_old."""
    v, path, before = np.zeros_like(w), [], rates[0]
    for g, rate in zip(gradients, rates, strict=True):
        v = momentum * (rate / before) * v + rate * g
        w, before = w - v, rate
        path.append(w)
    return path


def steps_of(optimizer, weights, gradients, rates):
    """The weights after each step that a Keras optimizer takes in float64: an array for each variable."""
    variables = [keras.Variable(w, dtype="float64") for w in weights]
    paths = [[] for _ in weights]
    for now, rate in zip(zip(*gradients, strict=True), rates, strict=True):
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant(g) for g in now], variables)
        for path, variable in zip(paths, variables, strict=True):
            path.append(variable.numpy())
    return paths


@st.composite
def trainings(draw):
    """Weights and gradients of some variables, here and there zero as a whole, and a rate for each step."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = [rng.normal(size=shape) * draw(st.sampled_from([0.0, 1e-3, 1.0])) for shape in draw(shapes)]
    zero = draw(st.sets(st.integers(0, STEPS - 1), max_size=STEPS))
    gradients = [
        [rng.normal(size=w.shape) * (step not in zero) * 10.0 ** rng.integers(-3, 2) for step in range(STEPS)]
        for w in weights
    ]
    return weights, gradients, [draw(rates) for _ in range(4)] * (STEPS // 4)


@few
@given(trainings(), momenta, decays, st.floats(1e-3, 1.0))
def test_lars_takes_the_steps_of_the_paper(training, momentum, decay, trust):
    weights, gradients, rates = training
    optimizer = LARS(rates[0], momentum, decay, trust)
    for w, g, path in zip(weights, gradients, steps_of(optimizer, *training), strict=True):
        expected = lars(w, g, rates, momentum, decay, trust, adapt=w.ndim > 1)
        np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-12)


@few
@given(trainings(), momenta, decays, st.booleans())
def test_corrected_sgd_keeps_the_rate_out_of_its_momentum(training, momentum, decay, nesterov):
    weights, gradients, rates = training
    optimizer = CorrectedSGD(rates[0], momentum, nesterov, decay)
    for w, g, path in zip(weights, gradients, steps_of(optimizer, *training), strict=True):
        expected = sgd(w, g, rates, momentum, decay * (w.ndim > 1), nesterov)
        np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-12)


@few
@given(trainings(), momenta)
def test_that_equals_correcting_the_momentum_by_the_ratio_of_the_rates(training, momentum):
    weights, gradients, rates = training
    for w, g, path in zip(weights, gradients, steps_of(CorrectedSGD(1.0, momentum), *training), strict=True):
        expected = sgd_with_corrected_momentum(w, g, rates, momentum)
        np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-9)


@few
@given(trainings(), rates, momenta, st.booleans())
def test_at_a_constant_rate_corrected_sgd_is_keras_own(training, rate, momentum, nesterov):
    weights, gradients, _ = training
    corrected, plain = (
        steps_of(cls(rate, momentum, nesterov), weights, gradients, [rate] * STEPS) for cls in (CorrectedSGD, SGD)
    )
    for ours, keras_own in zip(corrected, plain, strict=True):
        np.testing.assert_allclose(ours, keras_own, rtol=1e-9, atol=1e-12)


def test_when_the_rate_falls_keras_own_sgd_still_steps_by_the_old_one():
    after = {}
    for cls in (CorrectedSGD, SGD):
        first, second = steps_of(cls(1.0, 0.9), [np.zeros(1)], [[np.ones(1), np.zeros(1)]], [1.0, 0.1])[0]
        after[cls] = (first - second)[0]
    assert after[SGD] == pytest.approx(0.9) and after[CorrectedSGD] == pytest.approx(0.09)


def test_a_rate_of_zero_leaves_no_nan_behind():
    path = steps_of(CorrectedSGD(1.0, 0.9), [np.ones(1)], [[np.ones(1)] * 3], [0.0, 1.0, 0.0])[0]
    np.testing.assert_allclose(np.ravel(path), [1.0, 1.0 - 1.9, 1.0 - 1.9])


def test_gradients_too_large_or_too_small_to_square_leave_no_nan_behind():
    for value in (1e-30, 1e30):
        w = keras.Variable(tf.ones([2, 2]))
        LARS(0.1).apply([tf.fill([2, 2], value)], [w])
        assert np.isfinite(w.numpy()).all()


def normalised() -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def decayed(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> list[bool]:
    """Of each variable, whether a step without gradient makes it smaller."""
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    return [bool((v.numpy() < 1).all()) for v in model.trainable_variables]


KERNELS = [True, False, False, False, True, False]  # of `normalised`: kernel, bias, gamma, beta, kernel, bias


OURS = [CorrectedSGD, LARS, Lamb]


@pytest.mark.parametrize("cls", OURS)
def test_only_kernels_decay(cls):
    assert decayed(normalised(), cls(0.1, weight_decay=0.1)) == KERNELS


@pytest.mark.parametrize("cls", OURS)
def test_exclusions_of_keras_own_hold_beside_ours(cls):
    model, optimizer = normalised(), cls(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[model.layers[-1].kernel])
    assert decayed(model, optimizer) == [True, *[False] * 5]


@pytest.mark.parametrize("cls", OURS)
def test_wrapped_they_decay_as_they_do_bare(cls):
    scaled = LossScaleOptimizer(cls(0.1, weight_decay=0.1), initial_scale=1.0)
    assert decayed(normalised(), scaled) == KERNELS
    several = MultiOptimizer(OptimizerMap(cls(0.1, weight_decay=0.1), {".*beta": SGD(0.1)}))
    assert decayed(normalised(), several) == KERNELS


@pytest.mark.parametrize("cls", OURS)
def test_a_variable_without_gradient_stays_and_the_others_keep_their_own_momentum(cls):
    model, alone = normalised(), normalised()
    some, every = cls(0.1, weight_decay=0.1), cls(0.1, weight_decay=0.1)
    variables, others = model.trainable_variables, alone.trainable_variables
    before = variables[0].numpy()
    some.build(variables)
    every.build(others[1:])
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradients = [tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables]
        some.apply([None, *gradients[1:]], variables)
        every.apply(gradients[:0:-1], others[:0:-1])  # in another order
    np.testing.assert_array_equal(variables[0], before)
    for ours, theirs in zip(variables[1:], others[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"trust_coefficient": 0}, "trust_coefficient"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"clip": 1.0}, "clip"),
    ],
)
def test_lars_refuses_what_is_not_valid(arguments, word):
    with pytest.raises(ValueError, match=word):
        LARS(**{"learning_rate": 0.1} | arguments)


EVERY = {"clipnorm": 0.5, "use_ema": True, "ema_momentum": 0.9, "gradient_accumulation_steps": 2}


def falling() -> keras.optimizers.schedules.LearningRateSchedule:
    return keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)


CASES = {
    "LARS": lambda: LARS(0.5, trust_coefficient=0.1, weight_decay=1e-2),
    "LARS with clipping, EMA and accumulation": lambda: LARS(0.5, trust_coefficient=0.1, **EVERY),
    "CorrectedSGD": lambda: CorrectedSGD(falling(), 0.9, weight_decay=0.1),
    "CorrectedSGD with clipping, EMA and accumulation": lambda: CorrectedSGD(0.1, 0.9, True, 0.1, **EVERY),
    "Lamb": lambda: Lamb(0.05, weight_decay=0.1),
}


def perceptron() -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh", name="body"), keras.layers.Dense(3)])


def batches(first: int = 0, last: int = STEPS, rank: int = 0, ranks: int = 1) -> tf.data.Dataset:
    """A rank's share of the steps from `first` on; two ranks' worth of samples in all."""
    rng = np.random.default_rng(5)
    x = rng.integers(0, 5, (STEPS, 2 * BATCH, 6)).astype("float32")
    y = rng.normal(size=(STEPS, 2 * BATCH, 3)).astype("float32")
    mine = slice(rank * 2 * BATCH // ranks, (rank + 1) * 2 * BATCH // ranks)
    return tf.data.Dataset.from_tensor_slices((x[first:last, mine], y[first:last, mine]))


def train(optimizer: keras.optimizers.Optimizer, *which: int) -> list[np.ndarray]:
    model = perceptron()
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(batches(*which), verbose=0)
    return model.get_weights()


def distance(these: list[np.ndarray], those: list[np.ndarray]) -> float:
    return max(float(np.abs(a.astype("float64") - b).max()) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_and_loaded_run_goes_on_exactly(name, tmp_path):
    whole = perceptron()
    whole.compile(CASES[name](), "mse", jit_compile=False)
    whole.fit(batches(0, 9), verbose=0)  # with accumulation, in the middle of an update
    whole.save(tmp_path / "run.keras")
    resumed = keras.saving.load_model(tmp_path / "run.keras")
    for model in (whole, resumed):
        model.fit(batches(9), verbose=0)
    assert resumed.optimizer.get_config() == whole.optimizer.get_config()
    assert type(resumed.optimizer) is type(whole.optimizer)
    assert distance(resumed.get_weights(), whole.get_weights()) == 0
    for ours, theirs in zip(resumed.optimizer.variables, whole.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_new_process_loads_a_lamb_that_still_spares_vectors(tmp_path):
    model = normalised()
    model.compile(DistributedOptimizer(Lamb(0.1, weight_decay=0.1)), "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    model.save(tmp_path / "lamb.keras")
    script = (
        "import sys, keras, nurion_utils.large_batch.optimizers as o\n"
        "optimizer = keras.saving.load_model(sys.argv[1]).optimizer\n"
        "assert type(optimizer) is o.Lamb and int(optimizer.iterations) == 1"
    )
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "lamb.keras"], check=True, env=environment)


@pytest.mark.parametrize("name", ["LARS", "CorrectedSGD", "Lamb"])
def test_mixed_precision_trains_as_single_precision_does_to_half_rounding(name):
    full = train(CASES[name]())
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = perceptron()
        model.compile(CASES[name](), "mse", jit_compile=False)
        model.fit(batches(), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, LossScaleOptimizer)
    assert distance(full, perceptron().get_weights()) > 0.05  # it did train
    assert distance(model.get_weights(), full) < 0.05


def test_the_sparse_gradient_of_an_embedding_counts_every_row_once():
    """Token 1 occurs twice; the length of the gradient is that of the sum."""
    gradient = tf.IndexedSlices(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([1, 1]), tf.constant([3, 2]))
    for make in (lambda: LARS(0.1), lambda: CorrectedSGD(0.1, 0.9, weight_decay=0.1)):
        tables = [keras.Variable(np.arange(6.0).reshape(3, 2)) for _ in range(2)]
        for table, g in zip(tables, (gradient, tf.convert_to_tensor(gradient)), strict=True):
            make().apply([g], [table])
        np.testing.assert_array_equal(*(table.numpy() for table in tables))


@pytest.mark.parametrize("name", ["LARS", "CorrectedSGD", "Lamb"])
def test_trainings_side_by_side_in_one_compiled_step_are_those_of_one_at_a_time(name):
    model, optimizer = perceptron(), CASES[name]()
    variables = model.trainable_variables
    optimizer.build(variables)
    place = {id(v): i for i, v in enumerate(variables)}
    instead = {
        "assign": lambda variable, value: variable.assign(value),
        "assign_add": lambda variable, value: variable.assign(variable + value),
        "assign_sub": lambda variable, value: variable.assign(variable - value),
        "_get_variable_index": lambda variable: place[id(variable)],
    }
    for method, function in instead.items():
        object.__setattr__(optimizer, method, function)
    state = [*variables, *optimizer.variables]
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(3, 2, *v.shape)).astype("float32") for v in variables]  # 3 steps, 2 replicas

    def one_step(elements):
        before, now = elements
        with keras.StatelessScope(list(zip(state, before, strict=True))) as scope:
            optimizer._apply_weight_decay(variables)
            for gradient, variable in zip(now, variables, strict=True):
                optimizer.update_step(gradient, variable, optimizer.learning_rate)
            optimizer.iterations.assign(optimizer.iterations + 1)
        after = [scope.get_current_value(v) for v in state]
        return [tf.convert_to_tensor(old if new is None else new) for old, new in zip(before, after, strict=True)]

    step = tf.function(lambda *elements: tf.vectorized_map(one_step, elements), jit_compile=True)
    replicas = [tf.stack([v.numpy()] * 2) for v in state]
    for i in range(3):
        replicas = step(replicas, [tf.constant(g[i]) for g in gradients])
    for replica in range(2):
        alone, plain = perceptron(), CASES[name]()
        for i in range(3):
            plain.apply([tf.constant(g[i, replica]) for g in gradients], alone.trainable_variables)
        assert distance([v[replica].numpy() for v in replicas[: len(variables)]], alone.get_weights()) < 1e-6


def train_on_ranks(cases: dict) -> dict[str, list[np.ndarray]]:
    import horovod.tensorflow as hvd

    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    share = (0, STEPS, hvd.rank(), hvd.size())
    return {name: train(DistributedOptimizer(make()), *share) for name, make in cases.items()}


def test_two_ranks_equal_one_with_twice_the_batch(world2):
    apart = world2.run(train_on_ranks, CASES, timeout_s=480)
    for name, make in CASES.items():
        alone = train(make())
        assert max(distance(found[name], alone) for found in apart) <= 2e-6
