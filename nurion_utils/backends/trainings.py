"""Trainings measured: what fusion, clock, compression and tracing do to a step, and backends to an epoch of ResNet-50.

>>> table = measure_epochs(["MPI", "oneCCL ring"], image=64)  # doctest: +SKIP
>>> timing.ratios(table, "MPI", "backend", by=["image"], value="epoch_s")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nurion_utils.ranks
from nurion_utils import models, timing
from nurion_utils._checks import one_of, positive, whole_number
from nurion_utils.backends import choosing
from nurion_utils.backends.choosing import Backend, named
from nurion_utils.backends.measuring import TIMEOUT_S, BackendWorlds, written_by_rank_0
from nurion_utils.backends.process import init, shutdown
from nurion_utils.ranks import World
from nurion_utils.training.memory import FUSION_BUFFER_BYTES

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

DEFAULTS = {"fusion_bytes": FUSION_BUFFER_BYTES, "cycle_ms": 1.0, "compression": "none", "timeline": False}
BATCH = 4  # samples per rank of measure_fusion
BLOCK_S = 0.15  # steps are repeated until a block of them can be timed
GRADIENT_BYTES = 4 * 25_583_592  # of ResNet-50


def measure_fusion(
    world: World,
    settings: Sequence[Mapping[str, Any]],
    model: Callable[[], keras.Model] = models.mobilenet,
    repeats: int = 5,
) -> pd.DataFrame:
    """Time the steps of a training over MPI under several settings of Horovod in turn.

    A step computes the gradients of the mean square of a model's outputs for random inputs, 4 samples per rank, and
    averages them over the ranks, each gradient submitted by itself as soon as it is there. The weights are not updated.
    ValueError, before anything runs, for a setting that is not possible; RankError if a rank raises, such as for a
    wrong average, or the ranks take too long.

    Parameters
    ----------
    settings
        Each a dictionary with some of ``fusion_bytes``, ``cycle_ms`` (see `backends.settings`), ``compression`` ("none"
        or "fp16") and ``timeline`` (whether Horovod writes one); what is left out has Horovod's default.
    model
        Builds the model, of one input and one output, on every rank.

    Returns
    -------
    pandas.DataFrame
        One row per observation: ``setting`` (its number), ``fusion_bytes, cycle_ms, compression, timeline, repeat``;
        ``step_s``, of the slowest rank; ``compute_s``, the same without Horovod, measured just before;
        ``gradient_bytes`` of a step.
    """
    turns = list(timing.turns(list(enumerate(_complete(settings))), whole_number(repeats, "repeats")))
    times = world.run(_measured, model, [setting for _, (_, setting) in turns], timeout_s=2 * TIMEOUT_S)[0]
    rows = [
        {"setting": number, **setting, "repeat": repeat, **observed}
        for (repeat, (number, setting)), observed in zip(turns, times, strict=True)
    ]
    return pd.DataFrame(rows).sort_values(["setting", "repeat"], ignore_index=True)


def _complete(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings with Horovod's defaults for what they leave out; ValueError for what is not possible."""
    if not isinstance(settings, Sequence) or isinstance(settings, str) or not len(settings):
        raise ValueError(f"settings must be a list such as [{{}}, {{'cycle_ms': 5.0}}], not {settings!r}")
    complete = []
    for setting in settings:
        if not isinstance(setting, Mapping) or set(setting) - set(DEFAULTS):
            raise ValueError(f"a setting is a dictionary with some of {', '.join(DEFAULTS)}, not {setting!r}")
        full = {**DEFAULTS, **setting}
        if None in full.values():
            raise ValueError(f"a setting has values; leave out what shall have its default in {setting!r}")
        choosing.settings(cycle_ms=full["cycle_ms"], fusion_bytes=full["fusion_bytes"])
        one_of(full["compression"], "compression", ("none", "fp16"))
        one_of(full["timeline"], "timeline", (False, True))
        complete.append(full)
    return complete


def _measured(model: Callable[[], keras.Model], settings: list[dict[str, Any]]) -> list[dict[str, float]]:
    """On every rank: an observation per setting, in their order; times are those of the slowest rank."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    step_with = lru_cache(steps_of(model))

    def step_s(step: Callable) -> float:
        timing.block(comm, step, 2)
        return timing.block(comm, step, timing.calls_in(comm, step, BLOCK_S, 100))

    observed = []
    for setting in settings:
        compute_s = step_s(step_with(None))
        with written_by_rank_0("timeline.json") if setting["timeline"] else contextlib.nullcontext() as file:
            init(timeline=file, cycle_ms=setting["cycle_ms"], fusion_bytes=setting["fusion_bytes"])
            step = step_with(setting["compression"])
            row = {"step_s": step_s(step), "compute_s": compute_s}
            own, averages = step()
            shutdown()
        expected, average = comm.allreduce(own[-1].numpy().astype(float)) / comm.size, averages[-1].numpy()
        if not np.allclose(average, expected, rtol=1e-2, atol=1e-2 * abs(expected).max()):  # within what float16 tells
            raise ArithmeticError(f"Horovod's average of a gradient is off by {abs(average - expected).max():.2g}")
        row["gradient_bytes"] = sum(gradient.shape.num_elements() * gradient.dtype.size for gradient in own)
        observed.append(row)
    return observed


def steps_of(model: Callable[[], keras.Model]) -> Callable[[str | None], Callable]:
    """On every rank: what makes a step of `measure_fusion`'s training, given a compression.

    A step returns the gradients of this rank's batch, and their averages unless the compression is None.
    """
    import horovod.tensorflow as hvd
    import tensorflow as tf

    _, gradients = _random_training(model, BATCH)

    def step_with(compression: str | None) -> Callable:
        @tf.function
        def step() -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            own = gradients()
            if compression is None:
                return own, []
            how = {"op": hvd.Average, "compression": getattr(hvd.Compression, compression)}
            return own, [hvd.allreduce(gradient, name=f"gradient_{i}", **how) for i, gradient in enumerate(own)]

        return step

    return step_with


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

    The experiment of the founding paper, small. A step computes the gradients, averages all 161 of them in one group as
    `DistributedOptimizer` does, and updates the weights by SGD with momentum. The three parts are timed one by one,
    which hides nothing: a group is reduced when its last gradient is there, so that communication does not overlap.
    Backends, ranks and errors are as of `measure_backends`; NodesError if there can be no virtual nodes here.

    Parameters
    ----------
    image, batch, steps, repeats
        Pixels along an edge, from 32 up, which leave the gradients at 102 MB; images per rank and step; steps of an
        epoch; epochs per backend.
    rate_mbit
        If given, each rank sits on a virtual node with a link of that rate, in Mbit/s.

    Returns
    -------
    pandas.DataFrame
        One row per epoch: ``backend, ranks, image, batch_per_rank, repeat``; ``epoch_s`` (of the slowest rank);
        ``communication_s``, the part of it in the averaging, in which a rank also waits for a slower one;
        ``communication_share``; ``images_per_s`` of all ranks; ``absent``: why a backend could not be measured.
    """
    chosen = named(backends)
    ranks, image = whole_number(ranks, "ranks", 2), whole_number(image, "image", 32)
    batch, steps, repeats = whole_number(batch, "batch"), whole_number(steps, "steps"), whole_number(repeats, "repeats")
    start, timeout_s = partial(nurion_utils.ranks.start, ranks), TIMEOUT_S
    if rate_mbit is not None:
        start = partial(start, rate_mbit=positive(rate_mbit, "rate_mbit"))
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

    network, gradients = _random_training(partial(models.resnet50, image), batch)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(network.trainable_variables)
    reduce = tf.function(lambda own: hvd.grouped_allreduce(own, op=hvd.Average, name="gradients"))
    update = tf.function(lambda averages: optimizer.apply(averages, network.trainable_variables))
    return tf.function(gradients), reduce, update


def _random_training(model: Callable[[], keras.Model], batch: int) -> tuple[keras.Model, Callable[[], list[tf.Tensor]]]:
    """On every rank: a network, and what computes its gradients of the mean square of its outputs for random inputs."""
    import keras
    import tensorflow as tf
    from mpi4py import MPI

    keras.utils.set_random_seed(1)  # equal weights on all ranks, other samples on each
    network = model()
    random = np.random.default_rng(MPI.COMM_WORLD.rank)
    x = tf.constant(random.random((batch, *network.input_shape[1:])), tf.float32)

    def gradients() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(network(x, training=True)))
        return tape.gradient(loss, network.trainable_variables)

    return network, gradients
