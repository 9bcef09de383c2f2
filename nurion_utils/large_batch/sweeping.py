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
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurion_utils._checks import whole_number
from nurion_utils.large_batch.recipes import Recipe, RecipeError
from nurion_utils.ranks import identity, meter, somebody_watches

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from nurion_utils.large_batch.tasks import Task
    from nurion_utils.ranks import World

LANES = 8  # trainings side by side; more gain little, and make the last ones to end longer
Run = tuple[Recipe, int]


def sweep(
    recipes: Sequence[Recipe] | Mapping[str, Recipe],
    seeds: Sequence[int],
    world: World | None = None,
    task: Task | None = None,
    path: str | os.PathLike[str] | None = None,
    show: Callable[[pd.DataFrame], Figure] | None = None,
) -> pd.DataFrame:
    """Train every recipe with every seed.

    Parameters
    ----------
    recipes
        Recipes, or recipes by name; a name becomes the column ``name``.
    seeds
        Each is that of the initial weights and of the order of the samples.
    world
        Ranks to spread the trainings over; None for this process alone.
    task
        What to learn; `tasks.DigitsTask` unless given.
    path
        Folder of what is done.  None: a temporary one, and nothing is kept.
    show
        Draws the table so far; a notebook then shows a figure that fills in as trainings end.  Where nobody watches
        it is not called.

    Returns
    -------
    pandas.DataFrame
        One row per training, in the order of recipes and seeds: name, the recipe's settings, seed, test_error and
        validation_error (in %, after the last epoch), validation_errors (of each epoch), loss, diverged, steps,
        time_s, and error: why a training failed, missing otherwise.

    Raises
    ------
    RecipeError
        There is nothing to train, or a seed is no whole number; nothing was started.
    RankError
        A rank was lost; what was done is kept in `path`.
    """
    import pandas as pd

    from nurion_utils.large_batch.tasks import DigitsTask

    named = dict(recipes) if isinstance(recipes, Mapping) else {i: recipe for i, recipe in enumerate(recipes)}
    try:
        seeds = [whole_number(seed, "a seed", least=0) for seed in seeds]
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if not named or not seeds or not all(isinstance(recipe, Recipe) for recipe in named.values()):
        raise RecipeError("a sweep needs recipes, as [Recipe(batch=512)], and seeds, as range(5)")
    task = DigitsTask() if task is None else task
    wanted = {key_of(recipe, seed, task): (recipe, seed) for recipe in named.values() for seed in seeds}
    with contextlib.ExitStack() as stack:
        folder = Path(path) if path is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        todo = [run for key, run in wanted.items() if key not in read(folder)]
        jobs = divide(todo, world.n if world else 1)
        claims = folder / f"claims-{uuid.uuid4().hex[:8]}"
        claims.mkdir()
        stack.callback(shutil.rmtree, claims, ignore_errors=True)

        def table() -> pd.DataFrame:
            done, rows = read(folder), []
            for name, recipe in named.items():
                for seed in seeds:
                    if (row := done.get(key_of(recipe, seed, task))) is not None:
                        rows.append({"name": name, **recipe.as_dict(), "seed": seed, **row})
            return pd.DataFrame(rows)

        with _live(table, show):
            if world is None:
                work(task, jobs, folder, claims)
            elif jobs:
                world.run(work, task, jobs, folder, claims)
        return table()


def key_of(recipe: Recipe, seed: int, task: Any) -> str:
    text = json.dumps([recipe.as_dict(), seed, repr(task)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def divide(runs: Sequence[Run], ranks: int) -> list[list[Run]]:
    """Jobs of trainings that go side by side, the longest first, so that the ranks end at about the same time."""
    groups: dict[tuple, list[Run]] = {}
    for recipe, seed in runs:
        groups.setdefault((recipe.batch, recipe.epochs, recipe.optimizer), []).append((recipe, seed))
    jobs = []
    for group in groups.values():
        parts = max(-(-len(group) // LANES), min(ranks, len(group) // 2))  # all of one size: a size is compiled once
        size = -(-len(group) // parts) if parts else len(group)
        jobs += [group[i : i + size] for i in range(0, len(group), size)]
    # small batches take more steps, and each costs something of its own
    return sorted(jobs, key=lambda job: -len(job) * job[0][0].epochs * (1 + 100 / job[0][0].batch))


def work(task: Any, jobs: Sequence[Sequence[Run]], folder: Path, claims: Path) -> None:
    """What each rank does: claim the next job that nobody has, carry it out, write down what came of it."""
    from nurion_utils.large_batch import replicas

    rank = identity().rank
    tell = meter(sum(map(len, jobs)) if rank == 0 else 0, "training")
    with open(folder / f"runs-{claims.name}-{rank}.jsonl", "a") as journal:
        for number, job in enumerate(jobs):
            try:
                (claims / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            for row in _carry_out(replicas, task, job):
                journal.write(json.dumps(row) + "\n")
            journal.flush()
            tell(len(job))


def _carry_out(replicas: Any, task: Any, job: Sequence[Run]) -> list[dict[str, Any]]:
    try:
        results = replicas.train(task, job)
    except Exception as error:  # of one training or of what they share: no reason to lose all others
        results = [{"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}] * len(job)
    rows = []
    for (recipe, seed), result in zip(job, results, strict=True):
        errors = result.pop("validation_error", None)
        if errors:
            result = {"test_error": result.pop("test_error"), "validation_error": errors[-1], **result}
            result["validation_errors"] = errors
        rows.append({"key": key_of(recipe, seed, task), "error": None, **result})
    return rows


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What was done, by `key_of`."""
    rows = {}
    for file in sorted(folder.glob("runs-*.jsonl")):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed rank did not finish
                row = json.loads(line)
                rows[row.pop("key")] = row
    return rows


@contextlib.contextmanager
def _live(table: Callable[[], pd.DataFrame], show: Callable[[pd.DataFrame], Figure] | None) -> Iterator[None]:
    """A figure that is drawn anew every few seconds, by a thread, while this one waits for the ranks."""
    if show is None or not somebody_watches():
        yield
        return
    import matplotlib.pyplot as plt
    from IPython.display import display

    handle, over = display("the figure begins with the first results", display_id=True), threading.Event()

    def draw() -> None:
        seen, last = 0, False
        while not last:
            last = over.wait(2.0)
            if len(rows := table()) > seen:
                seen, figure = len(rows), show(rows)
                handle.update(figure)
                plt.close(figure)  # or the notebook would show it once more at the end

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
