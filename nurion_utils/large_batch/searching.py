"""The search beyond the rules: Optuna, with the ranks as workers on one stored study.

>>> space = {"base_rate": (0.05, 5.0), "warmup_epochs": (0.0, 3.0), "optimizer": ["sgd", "lars"]}
>>> table = search(Recipe(4096, rule="fixed"), space, world, trials=40, path="study")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.large_batch.recipes import Recipe, RecipeError
from nurion_utils.ranks import identity, meter

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from nurion_utils.large_batch.tasks import Task
    from nurion_utils.ranks import World

NAME = "search"
Space = Mapping[str, tuple[float, float] | Sequence[Any]]


def search(
    recipe: Recipe,
    space: Space,
    world: World | None = None,
    trials: int = 40,
    seeds: Sequence[int] = (0, 1),
    task: Task | None = None,
    path: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Look for the settings of a recipe with which it errs least on the validation images.

    Each rank takes trials until there are `trials` in the study; a trial trains `seeds` side by side, and is pruned
    at an epoch, from the third on, at which it is worse than the median of the others.  One rank tries the same
    settings in each search of its own; which rank of several takes the next trial is a matter of time.

    Parameters
    ----------
    space
        Settings of `Recipe` to choose: a tuple (low, high) of numbers, of which positive ones that span a factor of
        10 or more are drawn on a logarithmic scale, or a list of values.
    path
        Folder of the study; the same search, called again, goes on where it stopped.  None: nothing is kept.

    Returns
    -------
    pandas.DataFrame
        One row per trial, the best first: trial, state ("complete", "pruned", "failed"), validation_error (mean of
        the seeds, in %, at the last epoch that was trained), epochs, rank, failure (why, if it failed), and the
        settings.

    Raises
    ------
    RecipeError
        A setting does not exist or its range is none, or `path` holds another search; nothing was started.
    """
    from nurion_utils.large_batch.tasks import DigitsTask

    require_space(recipe, space)
    try:
        trials, seeds = whole_number(trials, "trials"), [whole_number(seed, "a seed", least=0) for seed in seeds]
    except (TypeError, ValueError) as error:
        raise RecipeError(str(error)) from None
    if not seeds:
        raise RecipeError("a search needs seeds to train each trial with, such as (0, 1)")
    task = DigitsTask() if task is None else task
    with contextlib.ExitStack() as stack:
        folder = Path(path) if path is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.resolve()  # for the ranks, which may stand elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        study = _study(folder, 0)  # there before the ranks ask for it
        begun = len(study.get_trials(deepcopy=False))
        asked = {"recipe": recipe.as_dict(), "space": {name: repr(values) for name, values in space.items()}}
        asked = json.loads(json.dumps({**asked, "seeds": seeds, "task": repr(task)}, default=str))
        if (known := study.user_attrs.get("asked", asked)) != asked:
            other = " and ".join(name for name in asked if asked[name] != known[name])
            raise RecipeError(f"{folder} holds a search with another {other}; give this one another path")
        study.set_user_attr("asked", asked)
        arguments = (recipe, dict(space), trials, tuple(seeds), task, folder, begun)
        if world is None:
            work(*arguments)
        else:
            world.run(work, *arguments)
        return read(folder)


def require_space(recipe: Recipe, space: Space) -> None:
    if not space:
        raise RecipeError("the space is empty; name settings to choose, as {'base_rate': (0.1, 2.0)}")
    for name, values in space.items():
        if name not in recipe.as_dict():
            raise RecipeError(f"a recipe has no setting {name!r}; it has {', '.join(recipe.as_dict())}")
        if name in ("batch", "epochs"):
            raise RecipeError(f"{name} is what the search is for, not what it chooses; set it in the recipe")
        numbers = isinstance(values, tuple) and len(values) == 2
        numbers = numbers and all(isinstance(end, int | float) and math.isfinite(end) for end in values)
        if not (numbers and values[0] < values[1] or isinstance(values, list) and values):
            raise RecipeError(f"{name} needs two numbers (low, high) or a list of values, not {values!r}")
        if name not in ("warmup", "warmup_epochs"):  # these depend on each other
            for value in values:
                recipe.changed(**{name: value})  # RecipeError if it is impossible


def _study(folder: Path, seed: int) -> optuna.Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name=NAME,
        load_if_exists=True,
        # several workers: a trial that is under way counts as a bad one, so that not all try the same
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=8),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=6, n_warmup_steps=3),
    )


def work(recipe: Recipe, space: Space, trials: int, seeds: Sequence[int], task: Any, folder: Path, begun: int) -> None:
    """What each rank does, in a study in which `begun` trials were begun before."""
    import optuna

    from nurion_utils.large_batch import replicas

    rank = identity().rank
    study = _study(folder, seed=1000 * rank + begun)  # a search that goes on must not draw the same settings again
    tell = meter(trials if rank == 0 else 0, "searching")

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("rank", rank)
        settings = {name: _suggest(trial, name, values) for name, values in space.items()}
        if "warmup_epochs" in settings and "warmup" not in space and recipe.warmup == "none":
            settings["warmup"] = "gradual" if settings["warmup_epochs"] else "none"
        pruned = False

        def on_epoch(epoch: int, errors: np.ndarray) -> bool:
            nonlocal pruned
            trial.report(float(errors.mean()), epoch)
            pruned = trial.should_prune()
            return pruned

        try:
            chosen = recipe.changed(**settings)
        except RecipeError as error:
            trial.set_user_attr("failure", str(error))
            raise
        results = replicas.train(task, [(chosen, seed) for seed in seeds], on_epoch)
        if pruned:
            raise optuna.TrialPruned
        return float(np.mean([result["validation_error"][-1] for result in results]))

    def ended() -> int:
        return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))

    def stop_when_full(study: optuna.Study, trial: Any) -> None:
        tell(1)
        if ended() >= trials:
            study.stop()

    if ended() < trials:
        study.optimize(objective, n_trials=trials, callbacks=[stop_when_full], catch=(ArithmeticError, RecipeError))


def _suggest(trial: optuna.Trial, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = map(float, values)
    return trial.suggest_float(name, low, high, log=low > 0 and high >= 10 * low)


def read(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The table of a stored study, as `search` returns it."""
    import pandas as pd

    rows = []
    for trial in _study(Path(folder), 0).get_trials(deepcopy=False):
        if trial.state.is_finished():
            errors = trial.intermediate_values
            rows.append(
                {
                    **{"trial": trial.number, "state": trial.state.name.lower().replace("fail", "failed")},
                    "validation_error": errors[max(errors)] if errors else np.nan,
                    **{"epochs": len(errors), "rank": trial.user_attrs.get("rank")},
                    "failure": trial.user_attrs.get("failure", ""),
                    **trial.params,
                }
            )
    table = pd.DataFrame(rows)
    return table.sort_values(["state", "validation_error"], ignore_index=True) if rows else table
