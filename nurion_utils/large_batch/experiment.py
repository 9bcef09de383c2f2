"""The experiment of notebook 05: test error against batch for seven ways to set the learning rate.

    python -m nurion_utils.recordings large_batch_digits      makes its table again

Where a method's rate is free (LARS, LAMB, SGD without a rule) it is chosen on validation images, from a grid, for
each batch; all are reported on test images that nothing was chosen on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import ranks
from nurion_utils._checks import require_columns
from nurion_utils.large_batch.recipes import RULES, Recipe
from nurion_utils.large_batch.sweeping import sweep
from nurion_utils.large_batch.tasks import DigitsTask

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = 131_072
BATCHES = (512, 2048, 4096, 8192, 16_384)
SEEDS = range(12)
TUNING_SEEDS = range(100, 102)
WARMUP = {"warmup": "gradual", "warmup_epochs": 2}
# Rates that were tried for each method without a rule; a best one at an end of its grid would be no optimum.
GRIDS = {
    "SGD, tuned": (0.4, 0.8, 1.6, 2.4, 3.2, 4.8),
    "LARS": (0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6),
    "LAMB": (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24),
}
COLUMNS = ["part", "method", "batch", "seed", "rate", "test_error", "validation_error", "steps", "diverged"]


def by_rule(batch: int) -> dict[str, Recipe]:
    """The recipes whose rate follows from the one that is good at a batch of 32."""
    return {rule: Recipe(batch, rule=rule) for rule in RULES} | {"linear, warm-up": Recipe(batch, **WARMUP)}


def at_rate(method: str, batch: int, rate: float) -> Recipe:
    """The recipe of a method whose rate is free."""
    own = {"LARS": {"optimizer": "lars"}, "LAMB": {"optimizer": "lamb", "weight_decay": 0.01}}.get(method, {})
    return Recipe(batch, base_batch=batch, base_rate=rate, warmup_from=0.0, **WARMUP, **own)


def constant(batch: int) -> list[Recipe]:
    """Recipes whose rate does not fall, from below the square-root rule's to the linear rule's: how fast can it go?"""
    k = batch / 32
    rates = np.geomspace(0.025 * k**0.5, 0.05 * max(k, 2), 6)
    settings = {"warmup": "gradual", "warmup_epochs": 1, "warmup_from": 0.0, "decay": "none"}
    return [Recipe(batch, base_batch=batch, base_rate=rate, **settings) for rate in rates]


def best_rates(table: pd.DataFrame) -> dict[tuple[str, int], float]:
    """By method and batch, the rate with the smallest mean validation error among the rows of part "tuning"."""
    rows = table[table["part"] == "tuning"]
    means = rows.groupby(["method", "batch", "rate"])["validation_error"].mean()
    return {key: float(of_key.idxmin()[2]) for key, of_key in means.groupby(["method", "batch"])}


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Per method and batch: count, mean and std of the test error, and half_interval, half of the mean's 95 % interval.

    All in per cent; the interval is Student's, over seeds.
    """
    import scipy.stats

    require_columns(table, ["method", "batch", "test_error"])
    result = table.groupby(["method", "batch"], sort=False)["test_error"].agg(["count", "mean", "std"])
    factor = scipy.stats.t.ppf(0.975, (result["count"] - 1).clip(lower=1)) / result["count"] ** 0.5
    result["half_interval"] = result["std"] * factor
    return result.reset_index()


def record() -> pd.DataFrame:
    """What ``data/large_batch_digits.csv`` holds, but for its source: 2 ranks tune, report, and train without decay."""
    import pandas as pd

    def part(name: str, recipes: dict[tuple, Recipe], seeds: range) -> pd.DataFrame:
        table = sweep(recipes, seeds, world, DigitsTask(SAMPLES))
        rates = [recipes[key].peak_rate for key in table["name"]]
        return table.assign(part=name, method=[key[0] for key in table["name"]], rate=rates)

    tried = {(m, b, rate): at_rate(m, b, rate) for b in BATCHES for m, rates in GRIDS.items() for rate in rates}
    steady = {("constant", b, i): recipe for b in (32, *BATCHES) for i, recipe in enumerate(constant(b))}
    reported = {(m, b): recipe for b in BATCHES for m, recipe in by_rule(b).items()}
    with ranks.start(2) as world:
        tuning = part("tuning", tried, TUNING_SEEDS)
        reported |= {(m, b): at_rate(m, b, rate) for (m, b), rate in best_rates(tuning).items()}
        reported |= {("base", 32): Recipe(32)}
        parts = [tuning, part("report", reported, SEEDS), part("constant", steady, TUNING_SEEDS)]
    table = pd.concat(parts, ignore_index=True)
    courses = [" ".join(f"{error:.2f}" for error in errors) for errors in table["validation_errors"]]
    return table[COLUMNS].assign(validation_errors=courses)


def steps_to(table: pd.DataFrame, error: float, samples: int = SAMPLES) -> pd.DataFrame:
    """What it takes to come to a validation error, in %, at each batch, with the rate that comes there first.

    Between two epochs of so many samples the error is taken to fall in a straight line, and of the seeds the mean
    counts. Of the recorded table the rows of part "constant" are read. Columns batch, rate, steps and samples; without
    the batches that never come there.
    """
    import pandas as pd

    rows = []
    for (batch, rate), of_rate in table[table["part"] == "constant"].groupby(["batch", "rate"]):
        courses = np.array([[float(e) for e in course.split()] for course in of_rate["validation_errors"]])
        course = np.concatenate([[90.0], courses.mean(axis=0)])  # untrained, one in ten is right
        below = np.flatnonzero(course <= error)
        if below.size:
            last = below[0]
            epoch = last - 1 + (course[last - 1] - error) / (course[last - 1] - course[last])
            rows.append((batch, rate, epoch * -(-samples // batch), epoch * samples))
    found = pd.DataFrame(rows, columns=["batch", "rate", "steps", "samples"])
    return found.loc[found.groupby("batch")["steps"].idxmin()].reset_index(drop=True)
