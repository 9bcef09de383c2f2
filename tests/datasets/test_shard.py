"""The plan of an epoch: every sample once, the same steps on all ranks, and P x B equal to one PB."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils.datasets import Shard

plans = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 400),
        "world_size": st.integers(1, 9),
        "batch_size": st.integers(1, 40),
        "seed": st.integers(0, 2**32),
    }
)
epochs = st.integers(0, 50)


def all_ranks(plan, epoch):
    """Indices and weights of all ranks, shape (world_size, steps, batch_size)."""
    parts = [Shard(rank=rank, **plan).epoch(epoch) for rank in range(plan["world_size"])]
    return np.stack([indices for indices, _ in parts]), np.stack([weights for _, weights in parts])


def used_in(indices, weights, step):
    """The samples of a step, each as often as it is there."""
    return indices[:, step][weights[:, step] > 0]


@given(plan=plans, epoch=epochs)
def test_every_sample_is_trained_on_in_exactly_one_step_of_an_epoch_and_counts_as_much_as_the_others(plan, epoch):
    indices, weights = all_ranks(plan, epoch)
    seen = []
    for step in range(indices.shape[1]):
        samples, times = np.unique(used_in(indices, weights, step), return_counts=True)
        assert len(set(times)) == 1 and len(set(weights[:, step][weights[:, step] > 0])) == 1
        seen += samples.tolist()
    assert sorted(seen) == list(range(plan["samples"]))


@given(plan=plans, epoch=epochs)
def test_every_rank_takes_the_same_number_of_steps_and_has_a_sample_in_each(plan, epoch):
    indices, weights = all_ranks(plan, epoch)
    steps = -(-plan["samples"] // (plan["world_size"] * plan["batch_size"]))
    width = plan["batch_size"] + (indices.shape[2] == 2 > plan["batch_size"])  # see `epoch`
    assert indices.shape == weights.shape == (plan["world_size"], steps, width)
    assert {Shard(rank=rank, **plan).steps for rank in range(plan["world_size"])} == {steps}
    assert ((0 <= indices) & (indices < plan["samples"])).all()
    assert (weights > 0).any(axis=2).all()


@given(plan=plans, epoch=epochs)
def test_no_rank_is_shown_a_sample_that_does_not_belong_to_its_part_of_the_step(plan, epoch):
    indices, weights = all_ranks(plan, epoch)
    for of_rank, used in zip(indices[:, -1], weights[:, -1] > 0, strict=True):
        assert set(of_rank) == set(of_rank[used]) or (used.sum() == plan["batch_size"] < len(used))


@given(plan=plans, epoch=epochs)
def test_the_mean_over_ranks_of_the_weighted_losses_is_the_plain_mean_over_the_step(plan, epoch):
    loss = np.random.default_rng(0).normal(size=plan["samples"])
    indices, weights = all_ranks(plan, epoch)
    local = (weights * loss[indices]).sum(axis=2) / plan["batch_size"]  # what Keras computes on each rank
    for step in range(indices.shape[1]):
        real = np.unique(used_in(indices, weights, step))
        assert local[:, step].mean() == pytest.approx(loss[real].mean(), rel=1e-5, abs=1e-6)


@given(plan=plans, epoch=epochs)
def test_p_ranks_of_batch_b_take_the_same_steps_as_one_rank_of_batch_pb(plan, epoch):
    indices, weights = all_ranks(plan, epoch)
    one = plan | {"world_size": 1, "batch_size": plan["world_size"] * plan["batch_size"]}
    one_indices, one_weights = all_ranks(one, epoch)
    for step in range(indices.shape[1]):
        assert set(used_in(indices, weights, step)) == set(used_in(one_indices, one_weights, step))


@given(plan=plans, epoch=epochs)
def test_the_uneven_tail_is_dealt_out_evenly(plan, epoch):
    _, weights = all_ranks(plan, epoch)
    shares = (weights[:, -1] > 0).sum(axis=1)
    assert shares.max() - shares.min() <= 1


@given(plan=plans, epoch=epochs)
def test_the_plan_of_an_epoch_is_reproducible(plan, epoch):
    for first, second in zip(all_ranks(plan, epoch), all_ranks(plan, epoch), strict=True):
        np.testing.assert_array_equal(first, second)


@given(plan=plans.filter(lambda plan: plan["samples"] >= 20), epoch=epochs)
def test_another_epoch_or_seed_has_another_order(plan, epoch):
    indices, _ = all_ranks(plan, epoch)
    assert (indices != all_ranks(plan, epoch + 1)[0]).any()
    assert (indices != all_ranks(plan | {"seed": plan["seed"] + 1}, epoch)[0]).any()


@given(plan=plans, epoch=epochs, data=st.data())
def test_what_is_left_of_an_epoch_is_the_rest_of_its_plan(plan, epoch, data):
    shard = Shard(rank=plan["world_size"] - 1, **plan)
    done = data.draw(st.integers(0, shard.steps - 1), "steps done")
    rest, whole = shard.epoch(epoch, done * plan["world_size"] * plan["batch_size"]), shard.epoch(epoch)
    np.testing.assert_array_equal(rest[1], whole[1][done:])
    np.testing.assert_array_equal(rest[0][rest[1] > 0], whole[0][done:][rest[1] > 0])  # what fills up differs


@given(plan=plans, epoch=epochs, data=st.data())
def test_whatever_number_of_ranks_goes_on_with_an_epoch_each_sample_is_in_exactly_one_step(plan, epoch, data):
    trained, seen = [], 0
    while seen < plan["samples"]:
        chosen = {name: data.draw(st.integers(1, 9), name) for name in ("world_size", "batch_size")}
        shards = [Shard(rank=rank, **(plan | chosen)) for rank in range(chosen["world_size"])]
        parts = [shard.epoch(epoch, seen) for shard in shards]
        left = shards[0].steps_after(seen)
        assert {indices.shape[0] for indices, _ in parts} == {left}
        done = data.draw(st.integers(1, left), "steps until it is stopped")
        for step in range(done):
            trained += set().union(*(set(indices[step][weights[step] > 0]) for indices, weights in parts))
        seen += done * chosen["world_size"] * chosen["batch_size"]
    assert sorted(trained) == list(range(plan["samples"]))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"samples": 0}, "samples must be a whole number from 1 up, not 0"),
        ({"world_size": 0}, "world_size must be"),
        ({"batch_size": 2.5}, "batch_size must be .* not 2.5"),
        ({"rank": 2}, "rank must be a whole number from 0 to 1, not 2"),
        ({"rank": -1}, "rank must be .* from 0 up, not -1"),
        ({"seed": None}, "seed must be"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(wrong, says):
    with pytest.raises(ValueError, match=says):
        Shard(**({"samples": 10, "world_size": 2, "rank": 0, "batch_size": 2} | wrong))


@pytest.mark.parametrize("seen", [-1, 10, 2.0])
def test_an_epoch_cannot_begin_outside_of_itself(seen):
    with pytest.raises(ValueError, match=f"seen must be a whole number from 0 to 9, not {seen}"):
        Shard(samples=10, world_size=2, rank=0, batch_size=2).epoch(0, seen)


def test_data_of_another_length_are_refused():
    shard = Shard(samples=10, world_size=2, rank=0, batch_size=2)
    with pytest.raises(ValueError, match="must hold the shard's 10 samples, not 9"):
        shard.dataset(np.zeros(10), np.zeros(9))
    with pytest.raises(ValueError, match="two arrays, or one reader"):
        shard.dataset(np.zeros(10))


def batches(shard, dataset, epochs):
    return [tuple(part.numpy() for part in batch) for batch in dataset.take(epochs * shard.steps)]


@pytest.mark.tensorflow
@settings(max_examples=10, deadline=None)
@given(plan=plans, start=st.integers(0, 3))
def test_the_dataset_goes_through_the_epochs_of_the_plan_from_where_it_is_told_without_empty_slots(plan, start):
    shard = Shard(rank=plan["world_size"] - 1, **plan)
    numbers = np.arange(plan["samples"])
    planned = [step for epoch in (start, start + 1) for step in zip(*shard.epoch(epoch), strict=True)]
    found = batches(shard, shard.dataset(numbers, numbers * 10, start_epoch=start), epochs=2)
    for (x, y, weight), (indices, weights) in zip(found, planned, strict=True):
        np.testing.assert_array_equal(x, indices[weights > 0])
        np.testing.assert_array_equal(y, x * 10)
        # Keras divides by the size of this batch, the plan by batch_size.
        np.testing.assert_allclose(weight / len(x), weights[weights > 0] / plan["batch_size"], rtol=1e-6)


class Position:
    """Stands for a ResumeCallback."""

    def follow(self, shard):
        return lambda: self.at


@pytest.mark.tensorflow
@settings(max_examples=10, deadline=None)
@given(plan=plans, data=st.data())
def test_the_dataset_begins_where_training_resumes_each_time_that_it_is_begun(plan, data):
    shard, resume = Shard(rank=plan["world_size"] - 1, **plan), Position()
    numbers = np.arange(plan["samples"])
    dataset = shard.dataset(numbers, numbers, resume=resume)
    for epoch in (2, 0):
        resume.at = epoch, data.draw(st.integers(0, plan["samples"] - 1), "samples seen")
        plans_of_two = shard.epoch(*resume.at), shard.epoch(epoch + 1)
        planned = [step for plan_of_one in plans_of_two for step in zip(*plan_of_one, strict=True)]
        found = [x.numpy() for x, _, _ in dataset.take(len(planned))]
        for x, (indices, weights) in zip(found, planned, strict=True):
            np.testing.assert_array_equal(x, indices[weights > 0])


@pytest.mark.tensorflow
@settings(max_examples=10, deadline=None)
@given(plan=plans)
def test_batches_of_equal_size_have_weights_of_one(plan):
    shard = Shard(rank=0, **(plan | {"world_size": 1}))
    numbers = np.arange(plan["samples"])
    for _, _, weight in batches(shard, shard.dataset(numbers, numbers), epochs=1):
        np.testing.assert_allclose(weight, 1, rtol=1e-6)


class Squares:
    """Stands for a reader of files: gives what it is asked for, and nothing else is in memory."""

    def __len__(self):
        return 11

    def read(self, indices):
        return indices[:, None].astype(np.float32), (indices**2).astype(np.float32)


@pytest.mark.tensorflow
def test_the_dataset_reads_by_index_from_a_reader():
    shard = Shard(samples=11, world_size=2, rank=1, batch_size=3)
    dataset = shard.dataset(Squares())
    assert [tuple(spec.shape) for spec in dataset.element_spec] == [(None, 1), (None,), (None,)]
    for (x, y, _), indices, weights in zip(batches(shard, dataset, epochs=1), *shard.epoch(0), strict=True):
        np.testing.assert_array_equal(x[..., 0], indices[weights > 0])
        np.testing.assert_array_equal(y, x[..., 0] ** 2)


@pytest.mark.tensorflow
def test_where_all_steps_are_full_the_size_of_a_batch_is_known_to_tensorflow():
    numbers = np.arange(12)
    dataset = Shard(samples=12, world_size=2, rank=1, batch_size=3).dataset(numbers, numbers)
    assert [tuple(spec.shape) for spec in dataset.element_spec] == [(3,)] * 3


@pytest.mark.tensorflow
def test_keras_fit_sees_every_sample_once_per_epoch_and_the_tail_trains_like_the_plain_mean():
    import keras

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(11, 3)).astype("float32"), rng.normal(size=(11, 1)).astype("float32")

    def fitted(data, **arguments):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse", weighted_metrics=["mae"])
        model.fit(data, verbose=0, shuffle=False, **arguments)
        return np.concatenate([weights.ravel() for weights in model.get_weights()])

    shard = Shard(samples=11, world_size=1, rank=0, batch_size=4)
    plan = [shard.epoch(epoch) for epoch in range(2)]
    order = np.concatenate([indices[weights > 0] for indices, weights in plan])
    seen = fitted(shard.dataset(x, y), steps_per_epoch=shard.steps, epochs=2)

    import tensorflow as tf

    # The reference has short last batches of 3 and no weights at all.
    plain = tf.data.Dataset.from_tensor_slices((x[order], y[order]))
    reference = plain.take(11).batch(4).concatenate(plain.skip(11).batch(4))
    np.testing.assert_allclose(seen, fitted(reference, epochs=1), rtol=0, atol=1e-6)
