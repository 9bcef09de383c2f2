"""Many trainings at once end as Keras' own fit does; sweeps and searches do what is asked, once, and survive kills."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from sweeps import fit

from nurion_utils import recordings
from nurion_utils.large_batch import (
    DigitsTask,
    Recipe,
    draw,
    experiment,
    replicas,
    search,
    shared_folder,
    sweep,
    sweeping,
)
from nurion_utils.large_batch.recipes import RecipeError
from nurion_utils.ranks import RankError
from nurion_utils.ranks.environment import note_progress

pytestmark = pytest.mark.tensorflow

TASK = DigitsTask(samples=1024)
BY_OPTIMIZER = {
    "sgd": {"warmup": "gradual", "warmup_epochs": 1},
    "lars": {"base_rate": 1.0, "rule": "fixed"},
    "lamb": {"base_rate": 0.02, "rule": "fixed", "weight_decay": 0.01},
}


@dataclasses.dataclass(frozen=True)
class Idle:
    """Digits, and a network with a layer that leads nowhere."""

    def load(self):
        return TASK.load()

    def build(self):
        import keras

        class Beside(keras.layers.Layer):
            def build(self, shape):
                self.unused = self.add_weight(shape=(3, 3), name="unused")

            def call(self, x):
                return x

        return keras.Sequential([keras.Input((144,)), Beside(), keras.layers.Dense(10)])


def recipe(optimizer: str = "sgd", **settings) -> Recipe:
    return Recipe(**{"batch": 128, "epochs": 3, "optimizer": optimizer, **BY_OPTIMIZER[optimizer], **settings})


@pytest.mark.parametrize("optimizer", BY_OPTIMIZER)
def test_a_replica_ends_with_the_same_result_as_fit_with_the_same_seed(optimizer):
    runs = [(recipe(optimizer), 3), (recipe(optimizer), 4)]
    for (run, seed), of_replica in zip(runs, replicas.train(TASK, runs), strict=True):
        alone = fit(TASK, run, seed)
        # rounding may turn a few of 2,000 and 4,000 answers
        assert of_replica["validation_error"] == pytest.approx(alone["validation_error"], abs=0.5)
        assert of_replica["test_error"] == pytest.approx(alone["test_error"], abs=0.5)
        assert of_replica["steps"] == alone["steps"] == 24


def test_replicas_may_differ_in_rate_momentum_and_weight_decay_and_do_not_touch_each_other():
    runs = [(recipe(), 0), (recipe(base_rate=0.001), 0), (recipe(weight_decay=0.1), 0), (recipe(momentum=0.0), 0)]
    together = replicas.train(TASK, runs)
    alone = [replicas.train(TASK, [run])[0] for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["test_error"] == pytest.approx(other["test_error"], abs=0.5)
    assert len({round(one["test_error"], 1) for one in together}) == 4


def test_a_training_that_diverges_leaves_its_neighbours_alone():
    wild, tame = replicas.train(TASK, [(recipe(base_rate=1e9), 0), (recipe(), 0)])
    assert wild["diverged"] and not tame["diverged"]
    assert tame["test_error"] == pytest.approx(replicas.train(TASK, [(recipe(), 0)])[0]["test_error"], abs=0.5)


def test_batches_that_do_not_divide_the_data_train_on_all_of_it():
    odd = recipe(batch=96)
    of_replica = replicas.train(TASK, [(odd, 0)])[0]
    assert of_replica["steps"] == 3 * 11
    of_fit = fit(TASK, odd, 0)
    assert of_replica["test_error"] == pytest.approx(of_fit["test_error"], abs=0.5)


def test_recipes_of_unlike_shape_do_not_go_side_by_side():
    with pytest.raises(RecipeError, match="same batch, epochs and optimizer"):
        replicas.train(TASK, [(recipe(), 0), (recipe(batch=256), 0)])


def test_no_held_out_image_is_made_from_an_original_that_is_trained_on():
    from nurion_utils.datasets import digits

    x, _, x_held, _ = digits.load(seed=0)
    assert not {image.tobytes() for image in x} & {image.tobytes() for image in x_held}
    data = TASK.load()
    assert (len(data.x), len(data.x_validation), len(data.x_test)) == (1024, 2000, 4000)
    again, other = dataclasses.replace(TASK).load(), DigitsTask(samples=1024, split=1).load()
    assert np.array_equal(data.x, again.x) and not np.array_equal(data.x, other.x)


def test_every_training_is_done_by_exactly_one_rank_and_the_table_is_that_of_one_process(world2, tmp_path):
    recipes = {"a": recipe(), "b": recipe(base_rate=0.2)}
    table = sweep(recipes, range(3), world2, TASK, tmp_path)
    assert list(zip(table["name"], table["seed"], strict=True)) == [(name, seed) for name in "ab" for seed in range(3)]
    lines = [line for file in tmp_path.glob("runs-*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 6
    alone = sweep(recipes, range(3), None, TASK)
    assert table["test_error"].to_numpy() == pytest.approx(alone["test_error"].to_numpy(), abs=0.5)
    assert not list(tmp_path.glob("claims-*"))


def test_what_fails_is_a_row_with_the_reason_and_the_rest_goes_on():
    table = sweep({"too large": recipe(batch=4096), "good": recipe()}, [0], None, TASK).set_index("name")
    assert "larger than the data" in table.loc["too large", "error"] and np.isnan(table.loc["too large", "test_error"])
    assert pd.isna(table.loc["good", "error"]) and table.loc["good", "test_error"] < 85


KILLED = """
import sys
from nurion_utils.large_batch import DigitsTask, Recipe, sweep
recipes = [Recipe(128, base_rate=0.01 * (i + 1), epochs=3, warmup="gradual", warmup_epochs=1) for i in range(8)]
sweep(recipes, range(8), None, DigitsTask(samples=1024), sys.argv[1])
"""


def test_a_sweep_that_is_killed_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-P", "-c", KILLED, str(tmp_path)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while len(sweeping.finished(tmp_path)) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = sweeping.finished(tmp_path)
    assert 8 <= len(done) < 64
    table = sweep([recipe(base_rate=0.01 * (i + 1)) for i in range(8)], range(8), None, TASK, tmp_path)
    assert len(table) == 64 and table["test_error"].notna().all()
    lines = [line for file in tmp_path.glob("runs-*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == 64  # nothing was done twice


def test_a_sweep_is_progress_of_a_job_if_it_is_kept_and_new(tmp_path, monkeypatch):
    progress = tmp_path / "progress"
    monkeypatch.setenv("NURION_PROGRESS", str(progress))
    monkeypatch.setattr(shared_folder, "note_progress", note_progress.__wrapped__)  # in each process but once
    sweep([recipe(epochs=1)], [0], None, TASK)
    assert not progress.exists()
    for _ in range(2):
        sweep([recipe(epochs=1)], [0], None, TASK, tmp_path / "kept")
    assert len(progress.read_text().splitlines()) == 1


def test_a_lost_rank_is_an_error_and_what_was_done_is_kept(world2, tmp_path):
    many = [recipe(base_rate=0.001 * (i + 1)) for i in range(400)]
    pid = world2.run(os.getpid)[1]
    killer = f"while [ $(cat {tmp_path}/runs-*-1.jsonl 2>/dev/null | wc -l) -lt 8 ]; do sleep 0.05; done; kill -9 {pid}"
    with subprocess.Popen(["sh", "-c", killer]):
        with pytest.raises(RankError, match="rank 1"):
            sweep(many, range(2), world2, TASK, tmp_path)
    world2.restart()
    assert 8 <= len(sweeping.finished(tmp_path)) < 800


@pytest.mark.parametrize(
    ("recipes", "seeds", "sentence"),
    [([], [0], "a sweep needs recipes"), ([recipe()], [], "give seeds"), ([recipe()], [-1], "a seed must be a whole")],
)
def test_a_sweep_of_nothing_is_refused(recipes, seeds, sentence):
    with pytest.raises(RecipeError, match=sentence):
        sweep(recipes, seeds, None, TASK)


def test_jobs_hold_all_runs_once_and_are_of_few_sizes():
    runs = [(recipe(batch=b), seed) for b in (64, 512) for seed in range(19)]
    jobs = sweeping.divide(runs, n_ranks=2)
    assert sorted(run[1] for job in jobs for run in job if run[0].batch == 64) == list(range(19))
    assert all(len(job) <= sweeping.SIDE_BY_SIDE and len({run[0].batch for run in job}) == 1 for job in jobs)
    assert jobs[0][0][0].batch == 64  # the longest first


SPACE = {"base_rate": (0.001, 1.0), "warmup_epochs": (0.0, 2.0), "weight_decay": (1e-5, 1e-2), "momentum": [0.5, 0.9]}
PLAIN = Recipe(128, base_batch=128, epochs=4)


def test_ranks_search_one_study_and_a_second_call_goes_on(world2, tmp_path):
    first = search(PLAIN, SPACE, world2, trials=6, task=TASK, path=tmp_path)
    assert len(first) == 6 and set(first["rank"]) == {0, 1}
    second = search(PLAIN, SPACE, world2, trials=8, task=TASK, path=tmp_path)
    assert len(second) == 8 and set(first["trial"]) < set(second["trial"])
    best = second.iloc[0]
    assert (
        best["state"] == "complete"
        and best["validation_error"] == second.query("state == 'complete'")["validation_error"].min()
    )
    assert len(search(PLAIN, SPACE, None, trials=8, task=TASK, path=tmp_path)) == 8  # nothing left to do


@pytest.mark.parametrize("trials", [1, 3])
def test_two_ranks_do_exactly_as_many_trials_as_asked_for_and_count_those_that_fail(world2, trials):
    # warm-ups of 3 epochs are longer than the training
    space = {"base_rate": (0.05, 2.0), "warmup": ["gradual"], "warmup_epochs": [1.0, 3.0]}
    table = search(PLAIN.changed(epochs=2), space, world2, trials, seeds=[0], task=TASK)
    assert len(table) == trials and (table["failure"] != "").eq(table["warmup_epochs"] == 3).all()


def test_a_trial_that_was_cut_off_with_its_rank_is_made_up_for(world2, tmp_path):
    killer = f"while ! ls {tmp_path}/claims-*/2 2>/dev/null; do sleep 0.01; done; kill -9 {world2.run(os.getpid)[1]}"
    long = PLAIN.changed(epochs=60)
    with subprocess.Popen(["sh", "-c", killer], stdout=subprocess.DEVNULL):
        with pytest.raises(RankError, match="rank 1"):
            search(long, {"base_rate": (0.01, 1.0)}, world2, 4, seeds=[0], task=TASK, path=tmp_path)
    world2.restart()
    table = search(long, {"base_rate": (0.01, 1.0)}, world2, 4, seeds=[0], task=TASK, path=tmp_path)
    assert len(table) == 4 and set(table["state"]) <= {"complete", "pruned"}
    assert table["trial"].max() >= 4  # the one that was cut off was begun, and is not among them


def test_a_training_that_breaks_in_a_trial_is_a_row_with_the_reason(monkeypatch):
    def train(task, runs, on_epoch):
        raise MemoryError("too large")

    monkeypatch.setattr(replicas, "train", train)
    table = search(PLAIN, {"base_rate": (0.01, 1.0)}, None, trials=2, task=TASK)
    assert table["state"].tolist() == ["failed"] * 2 and set(table["failure"]) == {"MemoryError: too large"}


def test_two_at_once_do_not_share_a_folder(tmp_path):
    with shared_folder.shared_folder(tmp_path):
        for again in (
            lambda: sweep([recipe()], [0], None, TASK, tmp_path),
            lambda: search(PLAIN, SPACE, path=tmp_path),
        ):
            with pytest.raises(RecipeError, match="another sweep or search is using"):
                again()


def test_a_seed_that_is_named_twice_is_trained_once(tmp_path, monkeypatch):
    trained = []

    def train(task, runs, on_epoch=None):
        trained.extend(seed for _, seed in runs)
        return [{"validation_error": [50.0], "test_error": 50.0} for _ in runs]

    monkeypatch.setattr(replicas, "train", train)
    table = sweep({"a": recipe(), "b": recipe()}, [3, 3], None, TASK)  # one training that has two names
    assert trained == [3] and table["name"].tolist() == ["a", "b"]
    search(PLAIN, {"base_rate": (0.01, 1.0)}, None, trials=1, seeds=(3, 3), task=TASK)
    assert trained == [3, 3]


def test_a_training_takes_the_epochs_that_its_recipe_says_also_if_they_are_not_whole():
    (result,) = replicas.train(TASK, [(recipe(epochs=2.5), 0)])
    assert result["steps"] == 20 and len(result["validation_error"]) == 3


def test_weights_on_which_the_loss_does_not_depend_are_left_alone_as_by_fit():
    task = Idle()
    (result,) = replicas.train(task, [(recipe(), 0)])
    assert result["test_error"] == pytest.approx(fit(task, recipe(), 0)["test_error"], abs=0.5)


def test_bad_trials_are_pruned(tmp_path):
    table = search(PLAIN, {"base_rate": (1e-6, 1.0)}, None, trials=16, task=TASK, path=tmp_path)
    pruned = table[table["state"] == "pruned"]
    assert len(pruned) and (pruned["epochs"] < PLAIN.epochs).any()
    assert pruned["validation_error"].min() > table.iloc[0]["validation_error"]


def test_one_rank_tries_the_same_settings_in_each_search_and_others_when_it_goes_on(tmp_path):
    def rates(trials, folder):
        table = search(
            PLAIN, {"base_rate": (0.01, 1.0)}, None, trials=trials, seeds=[0], task=TASK, path=tmp_path / folder
        )
        return table.sort_values("trial")["base_rate"].tolist()

    assert rates(2, "first") == rates(2, "second")
    assert len(set(rates(4, "first"))) == 4
    with pytest.raises(RecipeError, match="holds a search with another space and seeds"):
        search(PLAIN, {"base_rate": (0.1, 1.0)}, None, trials=2, seeds=[1], task=TASK, path=tmp_path / "first")


def test_a_trial_trains_the_settings_that_the_table_names_or_says_why_it_cannot(tmp_path, monkeypatch):
    trained = []

    def train(task, runs, on_epoch):
        trained.extend((recipe.warmup, recipe.warmup_epochs) for recipe, _ in runs)
        return [{"validation_error": [50.0]} for _ in runs]

    monkeypatch.setattr(replicas, "train", train)
    space = {"warmup": ["none", "constant", "gradual"], "warmup_epochs": [0.0, 1.0]}
    table = search(PLAIN, space, None, trials=12, seeds=[0], task=TASK, path=tmp_path).sort_values("trial")
    ended = table[table["state"] == "complete"]
    assert list(zip(ended["warmup"], ended["warmup_epochs"], strict=True)) == trained and len(trained) > 1
    assert (table["state"] == "failed").eq(table["failure"].str.contains("a warm-up needs both")).all()
    assert (table["state"] == "failed").any()


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({}, "the space is empty"),
        ({"rate": (1, 2)}, "a recipe has no setting 'rate'"),
        ({"batch": [64]}, "batch is what the search is for"),
        ({"base_rate": (2.0, 1.0)}, "base_rate needs"),
        ({"momentum": []}, "momentum needs"),
        ({"base_rate": (0.1, float("inf"))}, "base_rate needs two numbers"),
        ({"optimizer": ("lars", "sgd")}, "optimizer needs two numbers .* or a list"),
        ({"rule": [1, 2]}, "rule must be one of"),
    ],
)
def test_a_space_that_is_not_valid_is_refused(space, sentence):
    with pytest.raises(RecipeError, match=sentence):
        search(PLAIN, space, None, trials=1, task=TASK)


def test_the_recorded_rates_lie_inside_their_grids_and_are_those_with_the_smallest_validation_error():
    table = recordings.load("large_batch_digits")
    rates = experiment.best_rates(table)
    assert set(rates) == {(method, batch) for method in experiment.GRIDS for batch in experiment.BATCHES}
    for (method, batch), rate in rates.items():
        rows = table[(table["part"] == "tuning") & (table["method"] == method) & (table["batch"] == batch)]
        means = rows.groupby("rate")["validation_error"].mean()
        assert means[rate] == means.min()
        assert means.index.min() < rate < means.index.max()  # at an end it would be no optimum


def test_one_recorded_training_comes_out_the_same_again():
    recorded = recordings.load("large_batch_digits")
    row = recorded.query("part == 'report' and method == 'square root' and batch == 2048 and seed == 0").iloc[0]
    again = replicas.train(DigitsTask(experiment.SAMPLES), [(experiment.by_rule(2048)["square root"], 0)])[0]
    assert again["test_error"] == pytest.approx(row["test_error"], abs=1.5)  # rounding grows in 640 steps


def test_steps_to_an_error_are_those_of_the_rate_that_comes_there_first():
    rows = [("constant", 32, 0.1, "50 20"), ("constant", 32, 0.2, "30 20"), ("constant", 64, 0.1, "80 70")]
    table = pd.DataFrame(rows, columns=["part", "batch", "rate", "validation_errors"])
    found = experiment.steps_to(table, error=40, samples=320)
    assert found["batch"].tolist() == [32] and found["rate"].tolist() == [0.2]
    assert found["steps"].item() == pytest.approx(10 * 50 / 60)  # of the way from 90 to 30 in the first epoch


def test_pictures_say_what_their_axes_are_and_refuse_tables_that_lack_columns():
    import matplotlib.pyplot as plt

    table = recordings.load("large_batch_digits")
    report = table[table["part"] == "report"]
    points = experiment.steps_to(table, error=20)
    figures = {
        "batch of all ranks|test error, %": draw.errors(report, base_error=12.0),
        "epoch|validation error, %": draw.courses(report, 2048),
        "batch of all ranks|steps to the target error": draw.tradeoff(points, points, 4800.0),
    }
    for labels, figure in figures.items():
        axis = figure.axes[0]
        assert f"{axis.get_xlabel()}|{axis.get_ylabel()}" == labels
        plt.close(figure)
    for drawn in (draw.errors, lambda bare: draw.courses(bare, 1), lambda bare: draw.tradeoff(bare, bare, 1.0)):
        with pytest.raises(ValueError, match="the table needs the columns"):
            drawn(pd.DataFrame({"batch": [1]}))
