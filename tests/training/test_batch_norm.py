"""Batch normalisation over all ranks is that of one rank with the whole batch; over groups, that of ranks apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.training import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from keras.layers import Activation, BatchNormalization, Concatenate, Conv2D, Dense

from nurion_utils.training.batch_norm import GroupedBatchNormalization, SyncBatchNormalization

pytestmark = pytest.mark.tensorflow

few = settings(max_examples=25, deadline=None)
STEPS = 5


def network(norm: type[keras.Layer], dtype: str = "float64", **settings) -> keras.Model:
    """Two normalisations one after the other and one beside."""
    keras.utils.set_random_seed(1)
    x = keras.Input((4,), dtype=dtype)
    first, second, beside = (norm(**{"momentum": 0.9, "dtype": dtype} | settings) for _ in range(3))
    h = Activation("tanh", dtype=dtype)(first(Dense(6, dtype=dtype)(x)))
    h = [second(Dense(5, dtype=dtype)(h)), beside(Dense(5, dtype=dtype)(x))]
    y = Dense(2, dtype=dtype)(Concatenate(dtype=dtype)(h))
    return keras.Model(x, y)


def train(model: keras.Model, optimizer: keras.optimizers.Optimizer, batches: list, total: int, ranks: int = 1) -> list:
    """Steps in which a rank's loss weighs as its share of the samples does; weights and last outputs."""
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(inputs, y):
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.reduce_sum(tf.square(outputs - tf.cast(y, outputs.dtype))) * (ranks / total)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return outputs

    for x, y in batches:
        outputs = step(x, y)
    return [*model.get_weights(), outputs.numpy()]


def data(share: slice, total: int) -> list:
    rng = np.random.default_rng(3)
    x, y = (rng.normal(2.0, 3.0, (STEPS, total, n)) for n in (4, 2))
    return [[tf.constant(part[i, share]) for part in (x, y)] for i in range(STEPS)]


def train_apart(shares: list[int], dtype: str, norm: type[keras.Layer]) -> list:
    import horovod.tensorflow as hvd

    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    rank = hvd.rank()
    for _ in range(rank):  # what one rank has made more of must not part the names of its layers from those of others
        network(norm)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.05, 0.9))
    mine = data(slice(sum(shares[:rank]), sum(shares[: rank + 1])), sum(shares))
    return train(network(norm, dtype), optimizer, mine, sum(shares), hvd.size())


def distance_from_the_whole_batch(world, shares, dtype="float64", norm=SyncBatchNormalization) -> float:
    """How far ranks get from plain batch normalisation of all samples: weights, moving statistics, outputs."""
    optimizer = keras.optimizers.SGD(0.05, 0.9)
    whole = network(BatchNormalization, dtype)
    *expected, outputs = train(whole, optimizer, data(slice(None), sum(shares)), sum(shares))
    apart = world.run(train_apart, shares, dtype, norm)
    pairs = [(np.concatenate([found[-1] for found in apart]), outputs)]
    pairs += [pair for found in apart for pair in zip(found, expected, strict=False)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize("shares", [[6, 6], [9, 3], [12, 0]])
def test_two_ranks_normalise_as_one_with_the_whole_batch(world2, shares):
    assert distance_from_the_whole_batch(world2, shares) < 1e-13


def test_a_mask_is_refused_on_all_ranks(world2):
    def masked():
        import horovod.tensorflow as hvd

        hvd.init()
        return outcome(lambda: SyncBatchNormalization()(np.ones((2, 3, 1)), training=True, mask=np.ones((2, 3), bool)))

    assert all("takes no mask in training on several ranks" in found for found in world2.run(masked))


def test_in_single_precision_they_agree_to_its_rounding(world2):
    assert distance_from_the_whole_batch(world2, [9, 3], dtype="float32") < 1e-5


def test_ranks_that_do_not_synchronise_come_to_something_else(world2):
    assert distance_from_the_whole_batch(world2, [6, 6], norm=BatchNormalization) > 1e-2


def test_four_ranks_with_unequal_shares_do_too(world4):
    assert distance_from_the_whole_batch(world4, [7, 1, 3, 5]) < 1e-13


def test_fit_and_a_saved_model_do_as_well(world2, tmp_path):
    def fit_apart(path):
        import horovod.tensorflow as hvd

        from nurion_utils.training import DistributedOptimizer

        hvd.init()

        def fit(norm, optimizer, share):
            model = network(norm)
            model.compile(optimizer, "mse")
            x, y = (np.concatenate([batch[i].numpy() for batch in data(share, 12)]) for i in (0, 1))
            model.fit(x, y, batch_size=len(x) // STEPS, shuffle=False, verbose=0)
            return model

        mine = slice(6 * hvd.rank(), 6 * hvd.rank() + 6)
        apart = fit(SyncBatchNormalization, DistributedOptimizer(keras.optimizers.SGD(0.05)), mine)
        alone = fit(BatchNormalization, keras.optimizers.SGD(0.05), slice(None))
        if hvd.rank() == 0:
            apart.save(path)
        return max(float(np.abs(a - b).max()) for a, b in zip(apart.weights, alone.weights, strict=True))

    assert max(world2.run(fit_apart, str(tmp_path / "model.keras"))) < 1e-13
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert sum(isinstance(layer, SyncBatchNormalization) for layer in loaded.layers) == 3
    assert np.isfinite(loaded.predict(np.ones((2, 4)), verbose=0)).all()


def test_a_small_spread_about_a_large_mean_is_not_lost(world2):
    """E[x^2] - E[x]^2 in float32 gives variances from -0.06 to 0.12 here, instead of 0.01."""

    def moments(shift):
        import horovod.tensorflow as hvd

        hvd.init()
        x = np.random.default_rng(0).normal(shift, 0.1, (2, 500, 3)).astype("float32")
        layer = SyncBatchNormalization(momentum=0.0)
        layer(tf.constant(x[hvd.rank()]), training=True)
        return np.abs(layer.moving_variance.numpy() / x.reshape(-1, 3).astype(float).var(0) - 1).max()

    assert max(world2.run(moments, 1000.0)) < 1e-3


def test_on_one_rank_it_is_plain_batch_normalisation():
    x = np.random.default_rng(0).normal(size=(8, 5, 5, 3)).astype("float32")
    layers = [SyncBatchNormalization(), BatchNormalization()]
    for training in (True, True, False):
        outputs = [layer(x, training=training).numpy() for layer in layers]
        np.testing.assert_array_equal(*outputs)
    for ours, theirs in zip(*(layer.get_weights() for layer in layers), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_horovods_own_layer_cannot_be_made_with_keras_3_which_is_why_ours_exists():
    import horovod.tensorflow as hvd

    with pytest.raises(ValueError, match="fused"):
        hvd.SyncBatchNormalization()


@few
@given(
    groups=st.integers(1, 4),
    group=st.integers(1, 5),
    inner=st.sampled_from([(3,), (2, 3, 4), (1, 1, 2)]),
    axis=st.sampled_from([-1, 1]),
    seed=st.integers(0, 99),
)
def test_each_group_is_normalised_by_itself_and_the_statistics_are_as_old_in_groups(groups, group, inner, axis, seed):
    """The moving statistics take in the average over the groups, with the weight of as many steps as groups."""
    rng = np.random.default_rng(seed)
    x = rng.normal(1.0, 2.0, (groups * group, *inner)).astype("float32")
    layer = GroupedBatchNormalization(group, axis=axis, momentum=0.9)
    layer.build(x.shape)
    gamma, beta = (rng.normal(size=x.shape[axis]).astype("float32") for _ in range(2))
    moving = rng.normal(size=x.shape[axis]).astype("float32"), rng.random(x.shape[axis]).astype("float32")
    layer.set_weights([gamma, beta, *moving])
    outputs, parts = layer(x, training=True).numpy(), []
    for part in np.split(x, groups):
        plain = BatchNormalization(axis=axis, momentum=0.9**groups)
        plain.build(part.shape)
        plain.set_weights([gamma, beta, *moving])
        parts.append((plain(part, training=True).numpy(), *plain.get_weights()[2:]))
    expected, *statistics = zip(*parts, strict=True)
    np.testing.assert_allclose(outputs, np.concatenate(expected), rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(layer.get_weights()[2:], statistics, strict=True):
        np.testing.assert_allclose(ours, np.mean(theirs, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_what_remains_of_a_batch_is_a_smaller_group(known):
    x = np.random.default_rng(0).normal(1.0, 2.0, (10, 2, 3)).astype("float32")
    layer = GroupedBatchNormalization(4, momentum=0.9)
    shape = x.shape if known else (None, 2, 3)
    step = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec(shape)])
    outputs, means = step(x).numpy(), []
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        plain = BatchNormalization(momentum=0.0)
        np.testing.assert_allclose(outputs[part], plain(x[part], training=True).numpy(), rtol=1e-4, atol=2e-5)
        means.append(plain.moving_mean.numpy())
    np.testing.assert_allclose(layer.moving_mean.numpy(), np.mean(means, 0) * (1 - 0.9**3), rtol=1e-5)


@pytest.mark.parametrize("samples", [10, 9])
def test_the_uneven_last_step_of_a_shard_is_normalised_as_on_one_rank(world2, samples):
    """Of 10 samples one is left for each of 2 ranks with a batch of 4; of 9, one for both together."""

    def compare():
        import horovod.tensorflow as hvd

        from nurion_utils.datasets import Shard
        from nurion_utils.training import BroadcastCallback, DistributedOptimizer

        hvd.init()
        x = np.random.default_rng(0).normal(size=(samples, 4)) + np.arange(samples)[:, None]
        y = np.random.default_rng(1).normal(size=(samples, 2))
        together, alone = network(SyncBatchNormalization), network(BatchNormalization)
        shard = Shard(samples, hvd.size(), hvd.rank(), 4, seed=0)
        together.compile(DistributedOptimizer(keras.optimizers.SGD(0.05)), "mse", jit_compile=False)
        chosen = {"steps_per_epoch": shard.steps, "verbose": 0, "callbacks": [BroadcastCallback()]}
        together.fit(shard.dataset(x, y), **chosen)
        alone.compile(keras.optimizers.SGD(0.05), "mse")
        order = np.random.default_rng([0, 0]).permutation(samples)
        for part in (order[:8], order[8:]):
            alone.train_on_batch(x[part], y[part])
        return max(float(np.abs(a - b).max()) for a, b in zip(together.weights, alone.weights, strict=True))

    assert max(world2.run(compare, timeout_s=240)) < 1e-12


def test_inference_uses_the_moving_statistics_on_any_number_of_samples():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    layer, plain = GroupedBatchNormalization(4), BatchNormalization()
    np.testing.assert_allclose(layer(x).numpy(), plain(x).numpy(), rtol=1e-6)
    layer.trainable = False
    np.testing.assert_allclose(layer(x, training=True).numpy(), plain(x).numpy(), rtol=1e-6)


def test_one_rank_with_groups_equals_ranks_that_do_not_synchronise(world2):
    apart = [found[:-1] for found in world2.run(train_apart, [6, 6], "float64", BatchNormalization)]
    model = network(GroupedBatchNormalization, group=6, momentum=0.9**0.5)  # two groups a step
    alone = train(model, keras.optimizers.SGD(0.05, 0.9), data(slice(None), 12), 12)[:-1]
    for ours, *theirs in zip(alone, *apart, strict=True):
        np.testing.assert_allclose(ours, np.mean(theirs, 0), rtol=1e-12, atol=1e-13)


def test_many_networks_side_by_side_in_one_compiled_step_normalise_as_one_at_a_time():
    model = keras.Sequential([keras.Input((4, 4, 3)), Conv2D(5, 3), GroupedBatchNormalization(2)])
    rng = np.random.default_rng(0)
    replicas = [
        [rng.normal(size=(3, *v.shape)).astype("float32") for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    x = rng.normal(size=(3, 6, 4, 4, 3)).astype("float32")

    def one(elements):
        outputs, others = model.stateless_call(*elements, training=True)
        return [tf.convert_to_tensor(value) for value in (outputs, *others)]

    found = tf.function(lambda *elements: tf.vectorized_map(one, elements), jit_compile=True)(*replicas, x)
    for replica in range(3):
        expected = one([*([v[replica] for v in part] for part in replicas), x[replica]])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[replica].numpy(), theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_every_precision_gives_its_own_type_and_statistics_that_are_finite(policy):
    x = np.full((4, 3), 300.0)  # its square is past half precision
    layer = GroupedBatchNormalization(2, dtype=policy)
    outputs = layer(x, training=True)
    assert outputs.dtype == layer.compute_dtype and np.isfinite(keras.ops.cast(outputs, "float64")).all()
    assert np.isfinite(layer.get_weights()[2]).all()


@pytest.mark.parametrize("norm", [lambda: GroupedBatchNormalization(2, momentum=0.5), SyncBatchNormalization])
def test_layers_save_and_load_in_a_model(norm, tmp_path):
    model = keras.Sequential([keras.Input((3,)), Dense(4), norm()])
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).normal(size=(2, 8, 4)).astype("float32")
    model.fit(x[:, :3], y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].get_config() == model.layers[-1].get_config()
    np.testing.assert_array_equal(loaded.predict(x[:, :3], verbose=0), model.predict(x[:, :3], verbose=0))


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: GroupedBatchNormalization(0), "group must be a whole number"),
        (lambda: GroupedBatchNormalization(2, renorm=True), "no renorm"),
        (
            lambda: GroupedBatchNormalization(2)(np.ones((2, 3, 1)), training=True, mask=np.ones((2, 3), bool)),
            "takes no mask",
        ),
    ],
)
def test_what_cannot_be_grouped_is_refused_in_one_sentence(make, word):
    with pytest.raises(ValueError, match=word):
        make()
