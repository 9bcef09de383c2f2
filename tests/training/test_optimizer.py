"""P ranks with a batch of B must take the very steps that one rank takes with a batch of P x B."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.training import distance, perceptron
from keras.optimizers import SGD, Adam, AdamW, LossScaleOptimizer, MultiOptimizer, OptimizerMap

STEPS, BATCH, SEED = 10, 4, 7
ACCUMULATE = {"gradient_accumulation_steps": 2}


def float64_head() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3, dtype="float64")])


def embedding() -> keras.Model:
    """Its gradient is sparse, and tokens occur many times in a batch."""
    layers = [keras.layers.Embedding(5, 4), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


class DenseWithUnusedWeight(keras.layers.Dense):
    def build(self, input_shape):
        self.unused = self.add_weight(shape=(2,), name="unused")
        super().build(input_shape)


def unused_weight() -> keras.Model:
    """Keras has no gradient for the unused weight: None."""
    return keras.Sequential([keras.Input((6,)), DenseWithUnusedWeight(8, "tanh"), keras.layers.Dense(3)])


@dataclass(frozen=True)
class Case:
    optimizer: Callable[[], keras.optimizers.Optimizer]
    model: Callable[[], keras.Model] = partial(perceptron, SEED)
    policy: str = "float32"
    steps_per_execution: int = 1
    bound: float = 1e-6


EVERY_OPTIMIZER = {
    "SGD": lambda: SGD(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "Adam": lambda: Adam(0.01),
    "AdamW": lambda: AdamW(0.01),
    "Adamax": lambda: keras.optimizers.Adamax(0.01),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.05),
    "Lamb": lambda: keras.optimizers.Lamb(0.01),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "LossScaleOptimizer": lambda: LossScaleOptimizer(Adam(0.01), initial_scale=2.0**10, dynamic_growth_steps=3),
    "MultiOptimizer": lambda: MultiOptimizer(OptimizerMap(Adam(0.01), {".*bias": SGD(0.1)})),
    "Muon": lambda: keras.optimizers.Muon(0.01),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
}
CASES = {name: Case(make) for name, make in EVERY_OPTIMIZER.items()} | {
    "momentum": Case(lambda: SGD(0.05, momentum=0.9)),
    "Nesterov": Case(lambda: SGD(0.05, momentum=0.9, nesterov=True)),
    "clipnorm": Case(lambda: SGD(0.1, clipnorm=0.1)),
    "global_clipnorm": Case(lambda: Adam(0.01, global_clipnorm=0.1)),
    "clipvalue": Case(lambda: SGD(0.1, clipvalue=0.01)),
    "weight decay": Case(lambda: SGD(0.1, weight_decay=0.1)),
    "EMA": Case(lambda: SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)),
    "accumulation": Case(lambda: Adam(0.01, **ACCUMULATE)),
    "accumulation with clipnorm": Case(lambda: SGD(0.1, clipnorm=0.1, **ACCUMULATE)),
    "accumulation with loss scaling": Case(lambda: LossScaleOptimizer(SGD(0.1, momentum=0.9, **ACCUMULATE))),
    "accumulation in a MultiOptimizer": Case(lambda: MultiOptimizer(OptimizerMap(SGD(0.1, **ACCUMULATE)))),
    "optimizers chosen by a function": Case(lambda: MultiOptimizer(two_optimizers())),
    "loss scaling of a MultiOptimizer": Case(lambda: LossScaleOptimizer(MultiOptimizer(OptimizerMap(SGD(0.1))))),
    "static loss scale": Case(lambda: SGD(0.1, loss_scale_factor=64.0)),
    "schedule": Case(lambda: SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5, staircase=True))),
    "learning rate as a function": Case(lambda: SGD(lambda: 0.05)),
    "steps_per_execution": Case(lambda: Adam(0.01), steps_per_execution=5),
    "steps_per_execution with accumulation": Case(lambda: Adam(0.01, **ACCUMULATE), steps_per_execution=5),
    "gradients that are None": Case(lambda: Adam(0.01), unused_weight),
    "sparse gradients": Case(lambda: SGD(0.1, momentum=0.9), embedding),
    "sparse gradients with clipnorm": Case(lambda: SGD(0.1, clipnorm=0.1), embedding),
    "sparse gradients with Adam": Case(lambda: Adam(0.01), embedding),
    "sparse gradients with accumulation": Case(lambda: SGD(0.1, clipnorm=0.1, **ACCUMULATE), embedding),
    "gradients of two types": Case(lambda: SGD(0.1), float64_head),
    "float64": Case(lambda: Adam(0.01), policy="float64", bound=1e-14),
    # Half precision makes equality impossible: each rank's gradient is rounded by itself, to 11 bits or to 8.
    "mixed_float16": Case(lambda: SGD(0.1), policy="mixed_float16", bound=2.0**-11),
    "mixed_bfloat16": Case(lambda: SGD(0.1), policy="mixed_bfloat16", bound=2.0**-8),
    "bfloat16": Case(lambda: SGD(0.1), policy="bfloat16", bound=2.0**-7),  # so are weights of about 1
}


def two_optimizers() -> Callable:
    biases, others = SGD(0.1), Adam(0.01)
    return lambda variable: biases if "bias" in variable.path else others


def samples(ranks: slice, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (steps, samples, 6) and targets (steps, samples, 3) for these ranks of a world."""
    rng = np.random.default_rng(SEED)
    x = rng.integers(0, 5, (STEPS, world_size, BATCH, 6)).astype("float32")
    y = rng.normal(size=(STEPS, world_size, BATCH, 3)).astype("float32")
    return x[:, ranks].reshape(STEPS, -1, 6), y[:, ranks].reshape(STEPS, -1, 3)


def start(case: Case) -> keras.Model:
    keras.config.set_dtype_policy(case.policy)
    keras.utils.set_random_seed(SEED)
    return case.model()


def fit(case: Case, optimizer: keras.optimizers.Optimizer, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    model = start(case)
    model.compile(optimizer, "mse", steps_per_execution=case.steps_per_execution)
    model.optimizer.build(model.trainable_variables)  # else `fit` sets ScheduleFreeAdamW back in each step
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)), verbose=0)
    return model.get_weights()


def loop(case: Case, optimizer: keras.optimizers.Optimizer, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    model = start(case)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.MeanSquaredError()

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(loss(y, model(x, training=True)))
        optimizer.apply_gradients(
            zip(tape.gradient(scaled, model.trainable_variables), model.trainable_variables, strict=True)
        )

    for batch in zip(x, y, strict=True):
        step(*map(tf.constant, batch))
    optimizer.finalize_variable_values(model.trainable_variables)
    return model.get_weights()


def train_alone(cases: dict[str, Case]) -> dict[str, tuple[list[np.ndarray], float]]:
    """The weights that plain Keras reaches with all samples, and how far it went; each rank does its part."""
    from mpi4py import MPI

    comm, found = MPI.COMM_WORLD, {}
    for name in list(cases)[comm.rank :: comm.size]:
        weights = fit(cases[name], cases[name].optimizer(), *samples(slice(None), comm.size))
        found[name] = weights, distance(weights, start(cases[name]).get_weights())
    return {name: result for part in comm.allgather(found) for name, result in part.items()}


def compare(cases: dict[str, Case]) -> dict[str, tuple[float, float, float]]:
    """How far `fit` and `loop` on several ranks end from training alone, and how far that went."""
    import horovod.tensorflow as hvd

    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    mine, found = samples(slice(hvd.rank(), hvd.rank() + 1), hvd.size()), {}
    for name, (alone, way) in train_alone(cases).items():
        case = cases[name]
        keras.config.set_dtype_policy(case.policy)
        trained = [
            train(case, DistributedOptimizer(case.optimizer(), bucket_mb=bucket_mb), *mine)
            for train, bucket_mb in ((fit, 8), (loop, 1e-4))  # all gradients in one bucket, and in one each
        ]
        found[name] = *(distance(weights, alone) for weights in trained), way
    keras.config.set_dtype_policy("float32")
    return found


@pytest.fixture(scope="module")
def two_against_one(world2):
    return world2.run(compare, CASES, timeout_s=300)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_with_twice_the_batch(two_against_one, name):
    for in_fit, in_loop, way in two_against_one[0][name], two_against_one[1][name]:
        assert max(in_fit, in_loop) <= CASES[name].bound
        assert way > 5e-3  # it did train


def test_four_ranks_equal_one_with_four_times_the_batch(world4):
    names = ["momentum", "accumulation with loss scaling", "sparse gradients with Adam"]
    for found in world4.run(compare, {name: CASES[name] for name in names}, timeout_s=300):
        assert max(max(in_fit, in_loop) for in_fit, in_loop, _ in found.values()) <= 1e-6


def test_every_optimizer_that_keras_ships_is_among_the_cases():
    shipped = {
        name
        for name, thing in vars(keras.optimizers).items()
        if isinstance(thing, type) and issubclass(thing, keras.optimizers.Optimizer)
    }
    assert shipped - {"Optimizer"} == set(EVERY_OPTIMIZER)


def test_without_reduction_the_comparison_fails(world2):
    def unreduced():
        from nurion_utils.training import DistributedOptimizer

        case, comm = CASES["SGD"], __import__("mpi4py.MPI").MPI.COMM_WORLD
        alone = fit(case, SGD(0.1), *samples(slice(None), comm.size))
        mine = samples(slice(comm.rank, comm.rank + 1), comm.size)
        return distance(fit(case, DistributedOptimizer(SGD(0.1), reducer=lambda gradients: None), *mine), alone)

    assert min(world2.run(unreduced)) > 1e-2


def test_horovods_own_binding_lets_ranks_drift_apart_which_is_why_ours_exists(world2):
    def drift():
        import horovod.keras
        from mpi4py import MPI

        horovod.keras.init()
        mine = samples(slice(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.rank + 1), MPI.COMM_WORLD.size)
        weights = fit(CASES["SGD"], horovod.keras.DistributedOptimizer(SGD(0.1)), *mine)
        return distance(weights, MPI.COMM_WORLD.bcast(weights))

    assert world2.run(drift)[1] > 1e-2
