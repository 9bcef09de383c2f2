"""Hundreds of small trainings, spread over the ranks: each rank takes the next when it has done one.

>>> recipes = [Recipe(batch, rule=rule) for batch in (512, 2048) for rule in ("fixed", "linear")]
>>> table = sweep(recipes, seeds=range(5), world=world, path="study")  # doctest: +SKIP

What is done is appended to a file of each rank's own before the next begins, so a sweep that was killed goes on
where it stopped when it is called again with the same `path`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurion_utils.large_batch.recipes import Recipe, RecipeError
from nurion_utils.large_batch.shared_folder import claim, distinct_seeds, reason, shared_folder
from nurion_utils.large_batch.tasks import DigitsTask
from nurion_utils.ranks import identity, meter

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

SIDE_BY_SIDE = 8  # trainings in one compiled step; with more the last ones finish later, and little is gained
Run = tuple[Recipe, int]


def sweep(
    recipes: Sequence[Recipe] | Mapping[str, Recipe],
    seeds: Sequence[int],
    world: World | None = None,
    task: DigitsTask | None = None,
    path: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Train every recipe with every seed, each pair once, even if it is named twice.

    A seed is that of the initial weights and of the order of the samples. The trainings are spread over the ranks of
    `world`; None is this process alone. `path` is the folder of what is done; None keeps nothing.

    Returns one row per training, in the order of recipes and seeds: name (or number), the recipe's settings, seed,
    test_error and validation_error (in %, after the last epoch), validation_errors (of each epoch), loss, diverged,
    steps, time_s, and error: why a training failed, missing otherwise.

    `RecipeError`, before anything starts, if there is nothing to train, a seed is not a whole number, or another sweep
    or search is using `path`; `RankError` if a rank was lost: what was done is kept in `path`.
    """
    import pandas as pd

    named = dict(recipes if isinstance(recipes, Mapping) else enumerate(recipes))
    if not named or not all(isinstance(recipe, Recipe) for recipe in named.values()):
        raise RecipeError("a sweep needs recipes, such as [Recipe(batch=512)]")
    task = DigitsTask() if task is None else task
    seeds = distinct_seeds(seeds)
    keys = {(name, seed): key_of(recipe, seed, task) for name, recipe in named.items() for seed in seeds}
    with shared_folder(path) as (folder, claims):
        done = finished(folder)
        todo = {key: (named[name], seed) for (name, seed), key in keys.items() if key not in done}
        jobs = divide(list(todo.values()), world.n if world else 1)
        if world is None:
            train_jobs(task, jobs, claims)
        elif jobs:
            world.run(train_jobs, task, jobs, claims)
        done = finished(folder)
    return pd.DataFrame(
        [{"name": name, **named[name].as_dict(), "seed": seed, **done[key]} for (name, seed), key in keys.items()]
    )


def key_of(recipe: Recipe, seed: int, task: Any) -> str:
    """What tells a training from all others."""
    text = json.dumps([recipe.as_dict(), seed, repr(task)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def divide(runs: Sequence[Run], n_ranks: int) -> list[list[Run]]:
    """Jobs of trainings that go side by side, the longest first, so that the ranks end at about the same time."""
    groups: dict[tuple, list[Run]] = {}
    for recipe, seed in runs:
        groups.setdefault((recipe.batch, recipe.epochs, recipe.optimizer), []).append((recipe, seed))
    jobs = []
    for group in groups.values():
        parts = max(-(-len(group) // SIDE_BY_SIDE), min(n_ranks, len(group) // 2))
        size = -(-len(group) // parts)  # all of one size: a size is compiled once
        jobs += [group[i : i + size] for i in range(0, len(group), size)]
    # small batches take more steps, and each has a cost of its own
    return sorted(jobs, key=lambda job: -len(job) * job[0][0].epochs * (1 + 100 / job[0][0].batch))


def train_jobs(task: DigitsTask, jobs: Sequence[Sequence[Run]], claims: Path) -> None:
    """What each rank does: claim the next job that nobody has, carry it out, write down what came of it."""
    rank = identity().rank
    tell = meter(sum(map(len, jobs)) if rank == 0 else 0, "training")
    with open(claims.parent / f"runs-{claims.name}-{rank}.jsonl", "a") as journal:
        for number in claim(claims, len(jobs)):
            for row in _carry_out(task, jobs[number]):
                journal.write(json.dumps(row) + "\n")
            journal.flush()
            tell(len(jobs[number]))


def _carry_out(task: DigitsTask, job: Sequence[Run]) -> list[dict[str, Any]]:
    from nurion_utils.large_batch import replicas

    try:
        results = replicas.train(task, job)
    except Exception as error:  # of one training or of what they share: not a reason to lose all others
        results = [{"error": reason(error)} for _ in job]
    rows = []
    for (recipe, seed), result in zip(job, results, strict=True):
        if errors := result.pop("validation_error", None):
            last = {"test_error": result.pop("test_error"), "validation_error": errors[-1]}
            result = {**last, **result, "validation_errors": errors}
        rows.append({"key": key_of(recipe, seed, task), "error": None, **result})
    return rows


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """What was done, by `key_of`."""
    rows = {}
    for file in sorted(folder.glob("runs-*.jsonl")):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed rank did not finish
                row = json.loads(line)
                rows[row.pop("key")] = row
    return rows
