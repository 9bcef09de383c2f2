"""One epoch of ResNet-50 with dummy data over each backend: the experiment of the founding paper, small.

>>> table = measure_epochs(["MPI", "oneCCL ring"], image=64)  # doctest: +SKIP
>>> timing.ratios(table, "MPI", "backend", by=["image"], value="epoch_s")  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

import nurion_utils.ranks
from nurion_utils._checks import positive, whole_number
from nurion_utils.backends.choosing import Backend, named
from nurion_utils.backends.measuring import TIMEOUT_S, BackendWorlds, random_training
from nurion_utils.backends.process import init, shutdown
from nurion_utils.ranks.launchers import lab
from nurion_utils.training import models

if TYPE_CHECKING:
    import pandas as pd

GRADIENT_BYTES = 4 * 25_583_592


def measure_epochs(
    backends: Sequence[str] | Mapping[str, Backend] = ("MPI", "oneCCL ring"),
    ranks: int = 2,
    *,
    image: int = 64,
    batch: int = 4,
    steps: int = 4,
    repeats: int = 5,
    rate_mbit: float | None = None,
) -> pd.DataFrame:
    """Train ResNet-50 for epochs of a few steps on random images, the backends in turn, and say where the time went.

    A step computes the gradients, averages all 161 of them in one group as `DistributedOptimizer` does, and updates the
    weights by SGD with momentum. The three parts are timed one by one. Nothing is hidden by that: a group is
    reduced when its last gradient is there, so here communication and computing do not overlap anyway.

    Parameters
    ----------
    backends, ranks
        As for `measure_backends`.
    image
        Pixels along an edge, from 32 up. It changes the time of computing, and leaves the gradients at 102 MB.
    batch, steps, repeats
        Images per rank and step, steps of an epoch, and epochs per backend.
    rate_mbit
        If given, the ranks sit in a network lab with links of that rate, in Mbit/s.

    Returns
    -------
    pandas.DataFrame
        One row per epoch: ``backend, ranks, image, batch_per_rank, repeat``; ``epoch_s`` (of the slowest rank);
        ``communication_s``, the part of it in the averaging, in which a rank also waits for a slower one;
        ``communication_share``; ``images_per_s`` of all ranks; ``absent``: why a backend could not be measured.

    Raises
    ------
    ValueError, RankError
        As of `measure_backends`.
    LabError
        There can be no lab here.
    """
    import pandas as pd

    chosen = named(backends)
    ranks, image = whole_number(ranks, "ranks", 2), whole_number(image, "image", 32)
    batch, steps, repeats = whole_number(batch, "batch"), whole_number(steps, "steps"), whole_number(repeats, "repeats")
    start, timeout_s = partial(nurion_utils.ranks.start, ranks), TIMEOUT_S
    if rate_mbit is not None:
        start = partial(lab.start, ranks, positive(rate_mbit, "rate_mbit"))
        timeout_s += 8e-6 * 4 * GRADIENT_BYTES * (steps + 1) * ranks / rate_mbit  # so much goes through each link
    with BackendWorlds(chosen, start, timeout_s) as worlds:
        observed = worlds.observe(repeats, _epoch, image, batch, steps)
    rows = [(name, ranks, image, batch, turn, *(times or (np.nan,) * 2), why) for name, turn, times, why in observed]
    columns = ["backend", "ranks", "image", "batch_per_rank", "repeat", "epoch_s", "communication_s", "absent"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(7, "communication_share", table["communication_s"] / table["epoch_s"])
    table.insert(8, "images_per_s", ranks * batch * steps / table["epoch_s"])
    return table


def _epoch(backend: Backend, image: int, batch: int, steps: int) -> tuple[float, float]:
    """On every rank: seconds of an epoch and of its communication, on the slowest rank."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    gradients, reduce, update = _trainer(image, batch)
    init(backend)
    update(reduce(gradients()))  # warms up
    comm.Barrier()
    communication_s, begin_s = 0.0, time.perf_counter()
    for _ in range(steps):
        own = gradients()
        computed_s = time.perf_counter()
        averages = reduce(own)
        communication_s += time.perf_counter() - computed_s
        update(averages)
    epoch_s = time.perf_counter() - begin_s
    shutdown()
    return comm.allreduce((epoch_s, communication_s), op=MPI.MAX)


@lru_cache(maxsize=1)
def _trainer(image: int, batch: int) -> tuple[Callable, Callable, Callable]:
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    network, gradients = random_training(partial(models.resnet50, image), batch)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(network.trainable_variables)
    reduce = tf.function(lambda own: hvd.grouped_allreduce(own, op=hvd.Average, name="gradients"))
    update = tf.function(lambda averages: optimizer.apply(averages, network.trainable_variables))
    return tf.function(gradients), reduce, update
