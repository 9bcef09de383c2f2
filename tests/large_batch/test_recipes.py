"""A recipe is one formula: its table, its schedule, and what resumes."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils.large_batch import Recipe, RecipeSchedule
from nurion_utils.large_batch.optimizers import LARS, CorrectedSGD, Lamb, make_optimizer
from nurion_utils.large_batch.recipes import DECAYS, OPTIMIZERS, RULES, WARMUPS, RecipeError

some = settings(max_examples=100, deadline=None)
WARM = Recipe(256, warmup="gradual", warmup_epochs=2, epochs=10)  # 8 times the base batch: from 0.05 up to 0.4


@st.composite
def recipes(draw) -> Recipe:
    epochs, warmup = draw(st.floats(1, 12)), draw(st.sampled_from(WARMUPS))
    return Recipe(
        batch=draw(st.integers(1, 100)),
        base_batch=draw(st.integers(1, 64)),
        base_rate=draw(st.floats(1e-3, 1)),
        rule=draw(st.sampled_from(list(RULES))),
        epochs=epochs,
        warmup=warmup,
        warmup_epochs=0 if warmup == "none" else draw(st.floats(0.1, 1)) * epochs,
        warmup_from=draw(st.sampled_from([None, 0.0, 0.01])),
        decay=draw(st.sampled_from(DECAYS)),
        milestones=tuple(sorted(draw(st.lists(st.floats(0.1, 1), max_size=3)))),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        momentum=draw(st.floats(0, 0.99)),
    )


samples = st.integers(100, 1000)


def test_a_batch_k_times_as_large_has_a_rate_k_or_square_root_k_times_as_high_or_the_same():
    peaks = {rule: Recipe(512, base_batch=32, base_rate=0.1, rule=rule).peak_rate for rule in RULES}
    assert peaks == {"fixed": 0.1, "square root": 0.4, "linear": 1.6}


@some
@given(recipes())
def test_at_the_base_batch_all_rules_agree(recipe):
    tables = [recipe.changed(batch=recipe.base_batch, rule=rule).rates(200) for rule in RULES]
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[0], tables[2])


@some
@given(recipes())
def test_a_warm_up_starts_where_it_should_and_ends_exactly_at_the_peak(recipe):
    recipe = recipe.changed(warmup="gradual", warmup_epochs=recipe.epochs / 20, milestones=())
    start = recipe.base_rate if recipe.warmup_from is None else recipe.warmup_from
    assert recipe.rate(0.0) == start
    assert recipe.rate(recipe.warmup_epochs) == recipe.peak_rate
    assert recipe.rate(recipe.warmup_epochs / 2) == pytest.approx((start + recipe.peak_rate) / 2)


def test_a_constant_warm_up_jumps_at_its_end():
    recipe = Recipe(256, warmup="constant", warmup_epochs=2, epochs=10)
    rates = recipe.rates(2560).reshape(10, 10)  # ten steps in each of ten epochs
    assert set(rates[:2].flat) == {np.float32(0.05)} and rates[2, 0] == np.float32(0.4)


def test_milestones_fall_on_the_step_that_begins_at_them():
    recipe = Recipe(32, epochs=9, decay="steps", milestones=(1 / 3, 2 / 3, 8 / 9))
    rates = recipe.rates(32 * 7).reshape(9, 7) / recipe.base_rate
    np.testing.assert_allclose(rates, np.repeat([1, 0.1, 0.01, 0.001], [3, 3, 2, 1])[:, None] * np.ones(7), rtol=1e-6)


@some
@given(recipes(), samples)
def test_the_table_is_the_formula_at_the_epoch_in_which_each_step_begins(recipe, samples):
    rates, per_epoch = recipe.rates(samples), -(-samples // recipe.batch)
    assert len(rates) == recipe.steps(samples) == round(recipe.epochs * per_epoch)
    np.testing.assert_array_equal(rates, [np.float32(recipe.rate(i / per_epoch)) for i in range(len(rates))])
    ceiling = max(recipe.peak_rate, recipe.base_rate, recipe.warmup_from or 0)
    assert np.isfinite(rates).all() and (rates >= 0).all() and (rates <= np.float32(ceiling)).all()


@some
@given(recipes())
def test_a_recipe_comes_back_from_json_as_it_was(recipe):
    assert Recipe(**json.loads(json.dumps(recipe.as_dict()))) == recipe


@some
@given(recipes(), samples, st.data())
def test_a_schedule_reads_the_recipes_table_and_stays_at_its_last_rate(recipe, samples, data):
    schedule, rates = RecipeSchedule(recipe, samples), recipe.rates(samples)
    for step in (0, data.draw(st.integers(0, len(rates) - 1)), len(rates) - 1, len(rates), 10 * len(rates)):
        assert schedule(step).numpy() == rates[min(step, len(rates) - 1)]


@pytest.mark.tensorflow
def test_a_step_may_be_a_number_a_tensor_or_a_variable_and_compiled():
    schedule = RecipeSchedule(WARM, 2560)
    compiled = [tf.function(schedule, jit_compile=jit) for jit in (False, True)]
    for step in (0, 7, 20, 99):
        kinds = [step, np.int64(step), tf.constant(step), keras.Variable(step, dtype="int64")]
        found = {float(schedule(kind)) for kind in kinds} | {float(f(tf.constant(step))) for f in compiled}
        assert found == {float(np.float32(WARM.rate(step / 10)))}


@some
@given(recipes(), samples)
def test_a_schedule_comes_back_equal(recipe, samples):
    schedule = RecipeSchedule(recipe, samples)
    saved = json.loads(json.dumps(keras.optimizers.schedules.serialize(schedule)))
    back = keras.optimizers.schedules.deserialize(saved)
    assert type(back) is RecipeSchedule and back.recipe == recipe
    np.testing.assert_array_equal(back.rates, schedule.rates)


def model(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)])
    network.compile(optimizer, "mse", jit_compile=False)
    return network


def batches(sizes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, 4)).astype("float32"), rng.normal(size=(n, 2)).astype("float32")) for n in sizes]


@pytest.mark.tensorflow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_saved_in_the_middle_of_the_warm_up_goes_on_as_if_it_never_stopped(optimizer, tmp_path):
    recipe = WARM.changed(optimizer=optimizer, base_rate=0.01)
    whole, stopped = (model(make_optimizer(recipe, 2560)) for _ in range(2))
    for x, y in batches([8] * 20):
        whole.train_on_batch(x, y)
    for x, y in batches([8] * 20)[:7]:
        stopped.train_on_batch(x, y)
    stopped.save(tmp_path / "run.keras")
    resumed = keras.saving.load_model(tmp_path / "run.keras")
    assert float(resumed.optimizer.learning_rate) == float(np.float32(recipe.rate(0.7)))
    for x, y in batches([8] * 20)[7:]:
        resumed.train_on_batch(x, y)
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_recipe_makes_the_optimizer_that_it_names_with_its_settings():
    made = {
        name: make_optimizer(WARM.changed(optimizer=name, momentum=0, trust_coefficient=0.02), 2560)
        for name in OPTIMIZERS
    }
    assert [type(made[name]) for name in ("sgd", "lars", "lamb")] == [CorrectedSGD, LARS, Lamb]
    assert made["lars"].trust_coefficient == 0.02 and made["sgd"].momentum == made["lars"].momentum == 0
    assert all(optimizer.weight_decay == 1e-4 for optimizer in made.values())


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Recipe(-1), "batch must be a whole number from 1 up, not -1"),
        (lambda: Recipe(2.5), "batch must be a whole number"),
        (lambda: Recipe(32, base_rate=float("nan")), "base_rate must be a number above 0"),
        (lambda: Recipe(32, warmup_from=-1), "warmup_from must be a number from 0"),
        (lambda: Recipe(32, weight_decay="much"), "weight_decay must be a number from 0"),
        (lambda: Recipe(32, rule="cubic"), "rule must be one of 'fixed', 'square root', 'linear', not 'cubic'"),
        (lambda: Recipe(32, warmup="gradual"), "a warm-up needs both its kind and its length"),
        (lambda: Recipe(32, warmup_epochs=1), "a warm-up needs both its kind and its length"),
        (lambda: Recipe(32, warmup="gradual", warmup_epochs=11), "a warm-up of 11 epochs is longer than the training"),
        (lambda: Recipe(32, momentum=1), "momentum must be below 1"),
        (lambda: Recipe(32, milestones=(0.5, 0.2)), "milestones are parts of the training, in order"),
        (lambda: Recipe(2000).rates(1000), "a batch of 2,000 is larger than the data, 1,000 samples"),
        (lambda: Recipe(32, epochs=0.001).rates(100), "0.001 epochs of 100 samples are less than a step of 32"),
        (lambda: RecipeSchedule({"batch": 32}, 100), "a schedule is made from a recipe"),
        (lambda: RecipeSchedule(Recipe(32), 0), "samples must be a whole number"),
        (lambda: RecipeSchedule(Recipe(2000), 1000), "larger than the data"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(RecipeError) as caught:
        make()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
