"""What measuring the gradient-noise scale adds to a training step of two ranks."""

import pandas as pd
import rank_side
from blocks import alternate
from groups import training


def measure(model: str, batch: int, pairs: int = 20, block_s: float = 1.5) -> pd.DataFrame:
    """Time a training step with the observer ("observed") and without ("plain"); see `blocks.alternate` for the table.

    Parameters
    ----------
    model : "mlp" or "cosmoflow_small"
        Of `nurion_utils.models`; the latter for volumes of 32^3.
    batch : int
        Samples per rank.
    """
    with training(["observed", "plain"], model, batch, block_s, _prepare) as contenders:
        return alternate(contenders, pairs)


def _prepare(ways: list[str], model: str, batch: int) -> None:
    import horovod.tensorflow as hvd
    import keras

    from nurion_utils import models
    from nurion_utils.large_batch import NoiseScale
    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    for way in ways:
        observer = NoiseScale(batch) if way == "observed" else None
        keras.utils.set_random_seed(0)
        network = models.cosmoflow_small(32) if model == "cosmoflow_small" else models.mlp()
        optimizer = DistributedOptimizer(keras.optimizers.SGD(1e-4, momentum=0.9), observer=observer)
        rank_side.steps[way] = rank_side.step_of(network, optimizer, *rank_side.samples(network, batch, hvd.rank()))
