"""The search beyond the rules: Optuna, with the ranks as workers on one stored study.

>>> space = {"base_rate": (0.05, 5.0), "warmup_epochs": (0.0, 3.0), "optimizer": ["sgd", "lars"]}
>>> table = search(Recipe(4096, rule="fixed"), space, world, trials=40, path="study")  # doctest: +SKIP
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.large_batch.recipes import Recipe, RecipeError
from nurion_utils.large_batch.shared_folder import claim, distinct_seeds, reason, shared_folder
from nurion_utils.large_batch.tasks import DigitsTask
from nurion_utils.ranks import identity, meter

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from nurion_utils.ranks import World

Space = Mapping[str, tuple[float, float] | Sequence[Any]]


def search(
    recipe: Recipe,
    space: Space,
    world: World | None = None,
    trials: int = 40,
    seeds: Sequence[int] = (0, 1),
    task: DigitsTask | None = None,
    path: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Look for the settings of a recipe with the smallest error on the validation images.

    A trial trains `seeds` side by side, and is pruned at an epoch, from the third on, at which it is worse than the
    median of the others. One rank tries the same settings in each search of its own; which rank of several takes the
    next trial is a matter of time.

    Returns one row per trial, the best first: trial, state ("complete", "pruned", "failed"), validation_error (mean of
    the seeds, in %, at the last epoch that was trained), epochs, rank, failure (why, if it failed), and the settings.

    `RecipeError`, before anything starts, if a setting does not exist or its range is not valid, or `path` holds
    another search or is in use; `RankError` if a rank was lost: what was done is kept in `path`.

    The `space` has settings of `Recipe` to choose: a tuple (low, high) of numbers, of which positive ones that span a
    factor of 10 or more are drawn on a logarithmic scale, or a list of values. `trials` is how many the study is to
    have in the end, those that failed included. `path` is its folder: the same search, called again, goes on where it
    stopped. Trials that were cut off, by an interrupt or with their rank, are not counted and made up for. With None
    nothing is kept.
    """
    from optuna.trial import TrialState

    _require_space(recipe, space)
    trials, seeds = whole_number(trials, "trials", error=RecipeError), distinct_seeds(seeds)
    task = DigitsTask() if task is None else task
    asked = {"recipe": recipe.as_dict(), "space": {name: repr(values) for name, values in space.items()}}
    asked = json.loads(json.dumps({**asked, "seeds": seeds, "task": repr(task)}, default=str))
    with shared_folder(path) as (folder, claims):
        study = _study(folder, 0)  # there before the ranks ask for it
        if (known := study.user_attrs.get("asked", asked)) != asked:
            other = " and ".join(name for name in asked if asked[name] != known[name])
            raise RecipeError(f"{folder} holds a search with another {other}; give this one another path")
        study.set_user_attr("asked", asked)
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            study.tell(trial.number, state=TrialState.FAIL)  # it was cut off, and would count as bad for ever
        begun, left = len(study.get_trials(deepcopy=False)), trials - len(_counted(study))
        arguments = (recipe, dict(space), seeds, task, claims, left, begun)
        if world is None:
            run_trials(*arguments)
        elif left > 0:
            world.run(run_trials, *arguments)
        return _table(_study(folder, 0))


def _require_space(recipe: Recipe, space: Space) -> None:
    if not space:
        raise RecipeError("the space is empty; name settings to choose, as {'base_rate': (0.1, 2.0)}")
    for name, values in space.items():
        if name not in recipe.as_dict():
            raise RecipeError(f"a recipe has no setting {name!r}; it has {', '.join(recipe.as_dict())}")
        if name in ("batch", "epochs"):
            raise RecipeError(f"{name} is what the search is for, not what it chooses; set it in the recipe")
        pair = isinstance(values, tuple) and len(values) == 2
        pair = pair and all(isinstance(end, int | float) and math.isfinite(end) for end in values)
        if not (pair and values[0] < values[1] or isinstance(values, list) and values):
            raise RecipeError(f"{name} needs two numbers (low, high) or a list of values, not {values!r}")
        if name not in ("warmup", "warmup_epochs"):  # these depend on each other
            for value in (*values, (values[0] + values[1]) / 2) if pair else values:
                recipe.changed(**{name: value})  # RecipeError if it is impossible


def _study(folder: Path, seed: int) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name="search",
        load_if_exists=True,
        # several workers: a trial that is under way counts as a bad one, so that not all try the same
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=8),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=6, n_warmup_steps=3),
    )


def _counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that ended by themselves: those that were cut off have failed, but not said why."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    return [trial for trial in ended if trial.state.name != "FAIL" or "failure" in trial.user_attrs]


def run_trials(
    recipe: Recipe, space: Space, seeds: Sequence[int], task: DigitsTask, claims: Path, left: int, begun: int
) -> None:
    """What each rank does: claim the next of the trials that are left, and carry it out."""
    rank = identity().rank
    study = _study(claims.parent, seed=1000 * rank + begun)  # one that goes on must not draw the same settings again
    tell = meter(left if rank == 0 else 0, "searching")
    for _ in claim(claims, left):
        study.optimize(lambda trial: _objective(trial, rank, recipe, space, seeds, task), n_trials=1, catch=Exception)
        tell(1)


def _objective(
    trial: optuna.Trial, rank: int, recipe: Recipe, space: Space, seeds: Sequence[int], task: DigitsTask
) -> float:
    import optuna

    from nurion_utils.large_batch import replicas

    trial.set_user_attr("rank", rank)
    settings = {}
    for name, values in space.items():
        if isinstance(values, list):
            settings[name] = trial.suggest_categorical(name, values)
        else:
            low, high = map(float, values)
            settings[name] = trial.suggest_float(name, low, high, log=low > 0 and high >= 10 * low)
    if "warmup_epochs" in settings and "warmup" not in space and recipe.warmup == "none":
        settings["warmup"] = "gradual" if settings["warmup_epochs"] else "none"

    def on_epoch(epoch: int, errors: np.ndarray) -> None:
        trial.report(float(errors.mean()), epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        chosen = recipe.changed(**settings)
        results = replicas.train(task, [(chosen, seed) for seed in seeds], on_epoch)
    except Exception as error:
        if not isinstance(error, optuna.TrialPruned):
            trial.set_user_attr("failure", reason(error))
        raise
    return float(np.mean([result["validation_error"][-1] for result in results]))


def _table(study: optuna.Study) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for trial in _counted(study):
        errors = trial.intermediate_values
        row = {"trial": trial.number, "state": trial.state.name.lower().replace("fail", "failed")}
        row["validation_error"] = errors[max(errors)] if errors else np.nan
        row |= {"epochs": len(errors), "rank": trial.user_attrs.get("rank")}
        rows.append({**row, "failure": trial.user_attrs.get("failure", ""), **trial.params})
    return pd.DataFrame(rows).sort_values(["state", "validation_error"], ignore_index=True)
