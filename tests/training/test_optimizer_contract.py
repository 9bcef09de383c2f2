"""What `DistributedOptimizer` promises beside equality: refusals, reductions, saved models."""

import subprocess
import sys
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.training import average, distance, outcome, perceptron, rank
from keras.optimizers import SGD, Adam, LossScaleOptimizer, MultiOptimizer, OptimizerMap

STEPS, GLOBAL_BATCH = 10, 8


def embedding() -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Embedding(5, 4), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((6,)), *layers])


def batches(first: int = 0, alone: bool = False) -> tf.data.Dataset:
    """This rank's part of the steps from `first` on, or all of them."""
    rng = np.random.default_rng(5)
    x = rng.integers(0, 5, (STEPS, GLOBAL_BATCH, 6)).astype("float32")
    y = rng.normal(size=(STEPS, GLOBAL_BATCH, 3)).astype("float32")
    if not alone:
        from mpi4py.MPI import COMM_WORLD as world

        x, y = (np.split(data, world.size, axis=1)[world.rank] for data in (x, y))
    return tf.data.Dataset.from_tensor_slices((x[first:], y[first:]))


def train(optimizer: keras.optimizers.Optimizer, alone=False, make=perceptron, eager=False) -> list[np.ndarray]:
    model = make()
    model.compile(optimizer, "mse", run_eagerly=eager)
    model.fit(batches(alone=alone), verbose=0)
    return model.get_weights()


class ReplacesApply(SGD):
    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_sub(0.1 * gradient)


def refusals() -> dict[str, str]:
    import horovod.keras

    from nurion_utils.training import DistributedOptimizer

    def compile_mixed():
        keras.config.set_dtype_policy("mixed_float16")
        model = perceptron()
        keras.config.set_dtype_policy("float32")
        model.compile(DistributedOptimizer(SGD()), "mse")

    def train_float8():
        model = perceptron()
        model.quantize("float8")
        model.compile(DistributedOptimizer(SGD()), "mse")
        model.fit(batches(), verbose=0)

    def train_with_xla():
        model = perceptron()
        model.compile(DistributedOptimizer(SGD()), "mse", jit_compile=True)
        model.fit(batches(), verbose=0)

    horovod.keras.init()
    attempts = {
        "a name": lambda: DistributedOptimizer("adam"),
        "twice": lambda: DistributedOptimizer(DistributedOptimizer(SGD())),
        "Horovod's": lambda: DistributedOptimizer(horovod.keras.DistributedOptimizer(SGD())),
        "Horovod's, wrapped": lambda: DistributedOptimizer(
            LossScaleOptimizer(horovod.keras.DistributedOptimizer(SGD()))
        ),
        "wrapped": lambda: LossScaleOptimizer(DistributedOptimizer(SGD())),
        "divided": lambda: MultiOptimizer(OptimizerMap(DistributedOptimizer(SGD()))),
        "compile of a mixed model": compile_mixed,
        "reducer": lambda: DistributedOptimizer(SGD(), reducer=0.5),
        "no bucket": lambda: DistributedOptimizer(SGD(), bucket_mb=0),
        "a name of compression": lambda: DistributedOptimizer(SGD(), compression="fp16"),
        "compression for a reducer": lambda: DistributedOptimizer(
            SGD(), reducer=average, compression=horovod.keras.Compression.fp16
        ),
        "reducer that returns": lambda: train(DistributedOptimizer(SGD(), reducer=lambda gradients: gradients / 2)),
        "XLA": train_with_xla,
        "float8": train_float8,
        "own apply": lambda: train(DistributedOptimizer(ReplacesApply(0.1))),
    }
    return {name: outcome(attempt) for name, attempt in attempts.items()}


REMEDIES = {
    "a name": "TypeError: DistributedOptimizer takes a Keras 3 optimizer such as Adam(), not 'adam'",
    "twice": "ValueError: this optimizer is distributed already",
    "Horovod's": "pass the plain Keras optimizer instead",
    "Horovod's, wrapped": "pass the plain Keras optimizer instead",
    "wrapped": "DistributedOptimizer(LossScaleOptimizer(optimizer))",
    "divided": "a distributed optimizer cannot be wrapped",
    "compile of a mixed model": "DistributedOptimizer(LossScaleOptimizer(optimizer))",
    "reducer": "reducer must be a function that averages an array in place, not 0.5",
    "no bucket": "ValueError: bucket_mb must be a number above 0, not 0",
    "a name of compression": "TypeError: compression must be Horovod's, such as hvd.Compression.fp16, ",
    "compression for a reducer": "and without a reducer, not ",
    "reducer that returns": "it must average the one it gets in place",
    "XLA": "ValueError: XLA cannot compile a training step that communicates: use compile(..., jit_compile=False)",
    "float8": "ValueError: float8 models cannot be trained on several ranks",
    "own apply": "RuntimeError: ReplacesApply of Keras",
}


@pytest.fixture(scope="module")
def refused(world2):
    return world2.run(refusals, timeout_s=120)


@pytest.mark.parametrize("name", REMEDIES)
def test_what_would_train_wrongly_is_refused_with_its_remedy(refused, name):
    assert all(REMEDIES[name] in on_rank[name] for on_rank in refused), refused[0][name]


def test_an_overflow_on_one_rank_makes_all_ranks_skip_the_step(world2):
    def overflow():
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        poison = np.zeros((STEPS, GLOBAL_BATCH, 1), "float32")
        poison[3, -1] = np.inf  # the last rank has it

        def fit(optimizer, alone):
            mine = poison if alone else np.split(poison, world.size, axis=1)[world.rank]
            data = tf.data.Dataset.zip(batches(alone=alone), tf.data.Dataset.from_tensor_slices(mine))
            model = perceptron()
            model.compile(optimizer, "mse")
            model.fit(data.map(lambda sample, bad: (sample[0] + bad, sample[1])), verbose=0)
            return model.get_weights(), int(optimizer.iterations), float(optimizer.dynamic_scale)

        def scaled():
            return LossScaleOptimizer(Adam(0.01), initial_scale=1024.0)

        weights, *state = fit(DistributedOptimizer(scaled()), alone=False)
        alone, *state_alone = fit(scaled(), alone=True)
        return distance(weights, alone), state, state_alone

    for difference, state, state_alone in world2.run(overflow, timeout_s=240):
        assert difference <= 1e-6
        assert state == state_alone == [STEPS - 1, 512.0]


def test_gradients_travel_once_per_update_however_many_batches_it_has(world2):
    def count():
        import horovod.tensorflow as hvd

        from nurion_utils.training import DistributedOptimizer

        sizes = {}
        for name, wrap in {"plain": lambda optimizer: optimizer, "scaled": LossScaleOptimizer}.items():
            seen = sizes[name] = []

            def reduce(gradients, seen=seen):
                seen.append(gradients.size)
                average(gradients)

            optimizer = wrap(SGD(0.1, gradient_accumulation_steps=5))
            weights = train(DistributedOptimizer(optimizer, reducer=reduce))
        with mock.patch.object(hvd, "grouped_allreduce", wraps=hvd.grouped_allreduce) as allreduce:
            train(DistributedOptimizer(SGD(0.1, gradient_accumulation_steps=5)), eager=True)
        return sizes, sum(w.size for w in weights), allreduce.call_count

    sizes, parameters, calls = world2.run(count, timeout_s=240)[0]
    assert calls == 2
    # First of all: who has a gradient for which of the four weights?
    assert sizes["plain"] == [4] + [parameters] * 2
    assert sorted(sizes["scaled"]) == [1] * STEPS + [4] + [parameters] * 2  # and one number: has anyone overflown?


def test_the_gradients_of_the_last_layers_travel_first_in_buckets_of_the_wanted_size(world2):
    def sent(bucket_mb):
        import horovod.tensorflow as hvd

        from nurion_utils.training import DistributedOptimizer

        model = keras.Sequential(
            [keras.Input((6,)), *[keras.layers.Dense(50) for _ in range(4)], keras.layers.Dense(3)]
        )
        model.compile(DistributedOptimizer(SGD(0.1), bucket_mb=bucket_mb), "mse")
        with mock.patch.object(hvd, "grouped_allreduce", wraps=hvd.grouped_allreduce) as allreduce:
            model.fit(batches(), verbose=0)
        return [[tuple(gradient.shape) for gradient in call.args[0]] for call in allreduce.call_args_list]

    last, middle, first = [(3,), (50, 3)], [(50,), (50, 50)], [(50,), (6, 50)]
    assert world2.run(sent, 0.02)[0] == [[*last, *middle, *middle], [*middle, *first]]
    assert world2.run(sent, 0.0105)[0] == [[*last, *middle], middle, [*middle, *first]]
    assert world2.run(sent, 8)[0] == [[*last, *middle * 3, *first]]


def test_training_ends_at_the_same_bits_whatever_the_buckets(world4):
    def train_with_each():
        from nurion_utils.training import DistributedOptimizer

        return [[w.tobytes() for w in train(DistributedOptimizer(Adam(0.1), bucket_mb=mb))] for mb in (1e-4, 3e-4, 8)]

    found = world4.run(train_with_each, timeout_s=240)
    assert all(weights == found[0][0] for each in found for weights in each)


def test_compressed_gradients_are_averaged_to_the_rounding_of_half_precision(world2):
    def compare():
        import horovod.tensorflow as hvd

        from nurion_utils.training import DistributedOptimizer

        exact = train(DistributedOptimizer(SGD(0.1)))
        return distance(train(DistributedOptimizer(SGD(0.1), compression=hvd.Compression.fp16)), exact)

    assert all(0 < difference <= 2.0**-11 for difference in world2.run(compare))


def test_a_reducer_of_ones_own_trains_as_horovod_does(world2):
    def compare():
        from nurion_utils.training import DistributedOptimizer

        with_horovod = train(DistributedOptimizer(Adam(0.01, global_clipnorm=0.1)))
        own = train(DistributedOptimizer(Adam(0.01, global_clipnorm=0.1), reducer=average))
        return distance(own, with_horovod)

    assert max(world2.run(compare)) <= 1e-7


def test_a_reducer_adds_up_sparse_gradients_before_keras_clips_them_and_differs_by_so_much(world2):
    def compare():
        from nurion_utils.training import DistributedOptimizer

        def clipped(reducer):
            return DistributedOptimizer(SGD(0.1, clipnorm=0.1), reducer=reducer)

        plain = train(SGD(0.1, clipnorm=0.1), alone=True, make=embedding)
        alone = train(clipped(lambda gradients: None), alone=True, make=embedding)
        return distance(train(clipped(average), make=embedding), alone), distance(alone, plain)

    for from_itself_alone, from_plain_keras in world2.run(compare):
        assert from_itself_alone <= 1e-6
        assert 1e-3 < from_plain_keras < 2e-2


def branches(world, of_rank, how="horovod", optimizer=lambda: SGD(0.1), steps=1, eager=True) -> list[dict[str, float]]:
    """Train the heads that `of_rank` names for each rank; by how much the bias of each layer has moved."""

    def step_by_step():
        import horovod.tensorflow as hvd
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        keras.utils.set_random_seed(1)
        x = keras.Input((4,))
        trunk = keras.layers.Dense(5, name="trunk")(x)
        model = keras.Model(x, {name: keras.layers.Dense(3, name=name)(trunk) for name in "abc"})
        table = keras.layers.Embedding(4, 2, name="table")
        table.build()
        variables = [*model.trainable_weights, *table.trainable_weights]
        hvd.init()
        settings = {"reducer": average} if how == "reducer" else {}
        distributed = DistributedOptimizer(optimizer(), **settings)
        distributed.build(variables)
        before = [v.numpy() for v in variables]

        def step(heads):
            with tf.GradientTape() as tape:
                outputs = model(tf.ones((2, 4)))
                loss = sum(tf.reduce_sum(outputs[name]) for name in heads if name in outputs)
                if "table" in heads:
                    loss += tf.reduce_sum(table(tf.constant([1, 1, 2])))
                loss = distributed.scale_loss(loss)
            distributed.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        for at in range(steps):
            heads = of_rank[world.rank][at % len(of_rank[world.rank])]
            step(heads) if eager else tf.function(step)(heads)
        pairs = zip(variables, before, strict=True)  # of each layer the bias comes last
        return {v.path.split("/")[0]: float(np.abs(v.numpy() - old).max()) for v, old in pairs}

    return world.run(step_by_step, timeout_s=240)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("how", ["horovod", "reducer"])
def test_a_gradient_that_is_none_on_one_rank_counts_as_zero_there(world2, how, eager):
    on0, on1 = branches(world2, [[("a",)], [("b",)]], how, eager=eager)
    assert on0 == on1
    assert on0["a"] == on0["b"] == pytest.approx(0.1)  # by half of what one rank asked for: 2 samples, rate 0.1
    assert on0["c"] == 0 and on0["trunk"] > 0


def test_ranks_may_change_the_branch_from_step_to_step(world2):
    turns = [[("a",), ("b",), ("c",)], [("b",), ("c",), ("a",)]]
    on0, on1 = branches(world2, turns, steps=3)
    assert on0 == on1 and on0["a"] == on0["b"] == on0["c"] == pytest.approx(0.2)


def test_a_sparse_gradient_that_is_none_on_one_rank_counts_as_no_row_there(world2):
    on0, on1 = branches(world2, [[("a", "table")], [("a",)]])
    assert on0 == on1 and on0["table"] == pytest.approx(0.1)  # row 1 occurs twice, on one rank of two


def test_wrapped_optimizers_match_gradients_by_variable_too(world2):
    def scaled():
        return LossScaleOptimizer(SGD(0.1), initial_scale=8.0)

    def divided():
        return MultiOptimizer(OptimizerMap(SGD(0.1), {"[ab]/.*": SGD(0.1)}))

    for optimizer in (scaled, divided, lambda: LossScaleOptimizer(divided())):
        on0, on1 = branches(world2, [[("a",)], [("b",)]], optimizer=optimizer)
        assert on0 == on1 and on0["a"] == on0["b"] == pytest.approx(0.1)


def test_a_weight_without_a_gradient_on_all_ranks_is_left_alone_as_by_keras(world2):
    def decays():
        return SGD(0.1, weight_decay=0.5)

    on0, on1 = branches(world2, [[("a",)], [("a",)]], optimizer=decays)
    assert on0 == on1 and on0["b"] == on0["c"] == on0["table"] == 0 < on0["a"]


def test_ranks_that_train_different_variables_are_refused_with_the_first_that_differs(world2):
    def attempts():
        from nurion_utils.training import DistributedOptimizer

        def apply(*variables):
            DistributedOptimizer(SGD(0.1)).apply([tf.ones(v.shape, v.dtype) for v in variables], list(variables))

        a, b = (keras.Variable(np.ones(3), name=name) for name in "ab")
        wide, exact = (
            keras.Variable(np.ones(3 + rank()), name="w"),
            keras.Variable(1.0, dtype=f"float{32 + 32 * rank()}"),
        )
        return [outcome(lambda v=v: apply(*v)) for v in ([[a, b], [b, a]][rank()], [a, b][rank() :], [wide], [exact])]

    swapped, fewer, wider, other = world2.run(attempts, timeout_s=240)[0]
    assert "number 0 is b of shape (3,) and type float64, and of the 2 of rank 0 it is a" in swapped
    assert "of the 1 of rank 1 number 0 is b" in fewer
    assert "of shape (4,)" in wider and "of shape (3,)" in wider
    assert "type float64" in other and "type float32" in other


def test_ranks_that_have_made_different_layers_and_optimizers_still_find_each_other(world2):
    def uneven():
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        for _ in range(3 * world.rank):  # shifts Keras' automatic names
            train(SGD(), alone=True)
        return distance(train(DistributedOptimizer(SGD(0.1))), train(SGD(0.1), alone=True))

    assert max(world2.run(uneven, timeout_s=240)) <= 1e-6


def test_two_optimizers_may_share_one_training_step(world2):
    def both():
        from nurion_utils.training import DistributedOptimizer

        models = [perceptron(), perceptron()]
        optimizers = [DistributedOptimizer(SGD(0.1)), DistributedOptimizer(SGD(0.1))]
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.build(model.trainable_variables)

        @tf.function
        def step(x, y):
            for model, optimizer in zip(models, optimizers, strict=True):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(model(x) - y))
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        for batch in batches():
            step(*batch)
        alone = train(SGD(0.1), alone=True)
        return [distance(model.get_weights(), alone) for model in models]

    assert np.max(world2.run(both, timeout_s=240)) <= 1e-6


def test_a_distributed_optimizer_is_saved_as_the_one_it_was(world2):
    def configurations():
        from nurion_utils.training import DistributedOptimizer

        @keras.saving.register_keras_serializable("lab")
        class Own(SGD):
            pass

        pairs = []
        for optimizer in (Adam(0.1, clipnorm=1.0), LossScaleOptimizer(SGD()), Own()):
            before = keras.saving.serialize_keras_object(optimizer)
            pairs.append((before, keras.saving.serialize_keras_object(DistributedOptimizer(optimizer))))
        return pairs

    for before, after in world2.run(configurations)[0]:
        assert before == after


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("horovod", "nurion_utils", "mpi4py"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import keras, numpy as np
saved, data, result = sys.argv[1:]
model = keras.models.load_model(saved)
for x, y in zip(*np.load(data).values()):
    model.train_on_batch(x, y)
np.savez(result, *model.get_weights())
"""


def test_a_saved_model_goes_on_without_this_package_and_on_other_numbers_of_ranks(world2, world4, tmp_path):
    def begin(path):
        from mpi4py.MPI import COMM_WORLD as world

        from nurion_utils.training import DistributedOptimizer

        model = perceptron()
        model.compile(DistributedOptimizer(Adam(0.01, clipnorm=0.5)), "mse")
        model.fit(batches().take(STEPS // 2), verbose=0)
        if world.rank == 0:
            model.save(path)
        model.fit(batches(STEPS // 2), verbose=0)
        return model.get_weights()

    def go_on(path):
        from nurion_utils.training import DistributedOptimizer

        model = keras.models.load_model(path)
        model.compile(DistributedOptimizer(model.optimizer), "mse")
        model.fit(batches(STEPS // 2), verbose=0)
        return model.get_weights()

    saved, data, result = (str(tmp_path / name) for name in ("saved.keras", "data.npz", "result.npz"))
    uninterrupted = world2.run(begin, saved, timeout_s=240)[0]
    x, y = zip(*batches(STEPS // 2, alone=True).as_numpy_iterator(), strict=True)
    np.savez(data, x=x, y=y)
    subprocess.run([sys.executable, "-c", ALONE, saved, data, result], check=True, timeout=120)
    assert distance(list(np.load(result).values()), uninterrupted) <= 1e-6
    for weights in world4.run(go_on, saved, timeout_s=240):
        assert distance(weights, uninterrupted) <= 1e-6


SINGLE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from test_optimizer_contract import *
import horovod.tensorflow as hvd
from nurion_utils.training import DistributedOptimizer

plain = train(Adam(0.01), alone=True)
assert distance(train(DistributedOptimizer(Adam(0.01), reducer=lambda g: None), alone=True), plain) == 0
assert not hvd.is_initialized()
assert distance(train(DistributedOptimizer(Adam(0.01)), alone=True), plain) == 0
assert hvd.size() == 1
"""


@pytest.mark.tensorflow
def test_one_process_without_mpiexec_trains_as_plain_keras_and_a_reducer_needs_no_horovod():
    here = __file__.rpartition("/")[0]
    run = subprocess.run([sys.executable, "-c", SINGLE, here], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
