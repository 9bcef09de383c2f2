"""How many small trainings a minute: a sweep on two ranks, on one, and a plain loop of Keras' fit on one."""

import time

import pandas as pd
from blocks import alternate

from nurion_utils import ranks
from nurion_utils.large_batch import DigitsTask, Recipe, sweep

FITS = 3  # of the loop in a block; it takes as long for each


def measure(batch: int, seeds: int = 32, epochs: int = 5, pairs: int = 5) -> pd.DataFrame:
    """Time a training, the sum of all by their number; see `blocks.alternate` for the table."""
    task, recipe = DigitsTask(), Recipe(batch, epochs=epochs, warmup="gradual", warmup_epochs=1)
    with ranks.start(2) as two, ranks.start(1, cores_per_rank=1) as one:

        def sweeping(world: ranks.World) -> float:
            begin = time.perf_counter()
            table = sweep([recipe], range(seeds), world, task)
            assert table["error"].isna().all()
            return (time.perf_counter() - begin) / seeds

        contenders = {
            "two ranks": lambda: sweeping(two),
            "one rank": lambda: sweeping(one),
            "fit": lambda: one.run(_fit, task, recipe)[0],
        }
        for warm_up in contenders.values():
            warm_up()
        return alternate(contenders, pairs)


def _fit(task: DigitsTask, recipe: Recipe) -> float:
    from nurion_utils.large_batch import replicas

    begin = time.perf_counter()
    for seed in range(FITS):
        replicas.fit(task, recipe, seed)
    return (time.perf_counter() - begin) / FITS
