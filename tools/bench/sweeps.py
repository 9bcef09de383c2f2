"""How many small trainings a minute: a sweep on two ranks, on one, and a plain loop of Keras' fit on one."""

import time
from typing import Any

import numpy as np
import pandas as pd
from blocks import alternate

from nurion_utils import ranks
from nurion_utils.large_batch import DigitsTask, Recipe, make_optimizer, sweep

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
            "fit": lambda: one.run(_fits, task, recipe)[0],
        }
        for warm_up in contenders.values():
            warm_up()
        return alternate(contenders, pairs)


def _fits(task: DigitsTask, recipe: Recipe) -> float:
    begin = time.perf_counter()
    for seed in range(FITS):
        fit(task, recipe, seed)
    return (time.perf_counter() - begin) / FITS


def fit(task: DigitsTask, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a sweep does for one training, by Keras' own ``compile`` and ``fit``."""
    import keras

    from nurion_utils.datasets import Shard

    data = task.load()
    samples = len(data.x)
    shard = Shard(samples, 1, 0, recipe.batch, seed)
    keras.utils.set_random_seed(seed)
    model = task.build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(make_optimizer(recipe, samples), loss, metrics=["accuracy"], jit_compile=False)
    history = model.fit(
        shard.dataset(data.x, data.y),
        steps_per_epoch=shard.steps,
        epochs=round(recipe.epochs),
        validation_data=(data.x_validation, data.y_validation),
        validation_batch_size=2000,
        shuffle=False,  # the shard does
        verbose=0,
    )
    test = model.evaluate(data.x_test, data.y_test, batch_size=2000, verbose=0, return_dict=True)
    accuracy = np.array(history.history["val_accuracy"])
    return {
        "validation_error": (100 * (1 - accuracy)).tolist(),
        "test_error": 100 * (1 - test["accuracy"]),
        "steps": recipe.steps(samples),
    }
