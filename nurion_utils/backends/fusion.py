"""Training with many small gradients: what packing, Horovod's clock, compression and tracing do to a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils import timing
from nurion_utils._checks import one_of, whole_number
from nurion_utils.backends import choosing
from nurion_utils.backends.choosing import named
from nurion_utils.backends.horovod import init, shutdown
from nurion_utils.backends.measuring import written_by_rank_0
from nurion_utils.training import models
from nurion_utils.training.memory import FUSION_BUFFER_BYTES

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from nurion_utils.ranks import World

DEFAULTS = {"fusion_bytes": FUSION_BUFFER_BYTES, "cycle_ms": 1.0, "compression": "none", "timeline": False}
BLOCK_S = 0.15  # steps are repeated until a block of them can be timed

# How long Horovod's search takes: points to throw away, steps of a sample (a point is the median of five), points to
# try. Its own defaults, 3, 10 and 20, come to about 1200 steps. They are read when Horovod is loaded.
SHORT_SEARCH = {
    "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1",
    "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "2",
    "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES": "15",
}


def measure_fusion(
    world: World,
    settings: Sequence[Mapping[str, Any]],
    model: Callable[[], keras.Model] = models.mobilenet,
    batch: int = 4,
    backend: str = "MPI",
    repeats: int = 5,
    timeout_s: float | None = 600.0,
) -> pd.DataFrame:
    """Time the steps of a training under several settings of Horovod in turn.

    A step computes the gradients of the mean square of a model's outputs for random inputs, and averages them over
    the ranks, each gradient submitted by itself as soon as it is there. The weights are not updated.

    Parameters
    ----------
    world
        Ranks to run on.
    settings
        Each a dictionary with some of ``fusion_bytes``, ``cycle_ms`` (see `backends.init`), ``compression`` ("none" or
        "fp16") and ``timeline`` (whether Horovod writes one); what is left out has Horovod's default.
    model
        Builds the model on every rank; it has one input and one output.
    batch
        Samples per rank and step.
    backend
        Name in `backends.BACKENDS`.
    repeats
        Turns of each setting.
    timeout_s
        After this time the ranks are ended; None waits without limit.

    Returns
    -------
    pandas.DataFrame
        One row per observation: ``setting`` (its number), ``fusion_bytes, cycle_ms, compression, timeline, repeat``;
        ``step_s``, of the slowest rank; ``compute_s``, the same without Horovod, measured just before;
        ``gradient_bytes`` of a step.

    Raises
    ------
    ValueError
        A setting is not possible; nothing ran.
    RankError
        A rank raised, such as for a wrong average.
    """
    import pandas as pd

    batch, repeats = whole_number(batch, "batch"), whole_number(repeats, "repeats")
    complete = _complete(settings, named([backend])[backend].operations)
    turns = list(timing.turns(range(len(complete)), repeats))
    in_turn = [complete[number] for _, number in turns]
    times = world.run(_measured, model, batch, backend, in_turn, timeout_s=timeout_s)[0]
    rows = [
        {"setting": number, **complete[number], "repeat": repeat, **observed}
        for (repeat, number), observed in zip(turns, times, strict=True)
    ]
    return pd.DataFrame(rows).sort_values(["setting", "repeat"], ignore_index=True)


def _complete(settings: Sequence[Mapping[str, Any]], operations: str) -> list[dict[str, Any]]:
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
        if full["compression"] == "fp16" and operations == "CCL":
            raise ValueError("Horovod cannot reduce float16 over oneCCL; use MPI or Gloo, or compression='none'")
        complete.append(full)
    return complete


def autotune(
    world: World,
    model: Callable[[], keras.Model] = models.mobilenet,
    batch: int = 4,
    backend: str = "MPI",
    steps: int = 200,
    timeout_s: float | None = 600.0,
) -> pd.DataFrame:
    """Have Horovod search its fusion threshold and cycle time in a training, whose steps are those of `measure_fusion`.

    Parameters
    ----------
    world
        Fresh ranks, which are of no other use afterwards: Horovod searches only for what was never set in a process,
        and goes on searching. Start them with ``env=SHORT_SEARCH`` for a search of about 200 steps.
    model, batch, backend, timeout_s
        As for `measure_fusion`.
    steps
        How many steps to train.

    Returns
    -------
    pandas.DataFrame
        One row per point in the order of the search: ``point, fusion_mb`` (2^20 bytes), ``cycle_ms, score`` (bytes of
        gradients per microsecond of training, as Horovod reckons it). Once the search has ended, a last row repeats
        its best.
    """
    import pandas as pd

    steps, batch, _ = whole_number(steps, "steps"), whole_number(batch, "batch"), named([backend])
    table = world.run(_searched, model, batch, backend, steps, timeout_s=timeout_s)[0]
    table = pd.DataFrame(table, columns=["cycle_ms", "fusion_mb", "score"])
    return table.rename_axis("point").reset_index()[["point", "fusion_mb", "cycle_ms", "score"]]


def _measured(
    model: Callable[[], keras.Model], batch: int, backend: str, settings: list[dict[str, Any]]
) -> list[dict[str, float]]:
    """On every rank: an observation per setting, in their order; times are those of the slowest rank."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    step_with = lru_cache(_steps(model, batch, comm.rank))

    def step_s(step: Callable) -> float:
        timing.block(comm, step, 2)
        return timing.block(comm, step, timing.calls_in(comm, step, BLOCK_S, 100))

    observed = []
    for setting in settings:
        compute_s = step_s(step_with(None))
        how = {"cycle_ms": setting["cycle_ms"], "fusion_bytes": setting["fusion_bytes"]}
        with written_by_rank_0("timeline.json") if setting["timeline"] else contextlib.nullcontext() as file:
            init(backend, timeline=file, **how)
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


def _searched(model: Callable[[], keras.Model], batch: int, backend: str, steps: int) -> list[tuple]:
    """On every rank: the rows of the log that rank 0 wrote."""
    import pandas as pd
    from mpi4py import MPI

    with written_by_rank_0("autotune.csv") as file:
        init(backend, cycle_ms=None, fusion_bytes=None, autotune_log=file)
        step = _steps(model, batch, MPI.COMM_WORLD.rank)("none")
        for _ in range(steps):
            step()
        shutdown()
        rows = []
        if MPI.COMM_WORLD.rank == 0:
            log = pd.read_csv(file)
            rows = list(log[["cycle_time_ms", "tensor_fusion_threshold", "score"]].itertuples(index=False, name=None))
    return MPI.COMM_WORLD.bcast(rows)


def _steps(model: Callable[[], keras.Model], batch: int, rank: int) -> Callable[[str | None], Callable]:
    """What makes a step, given a compression: the gradients of this rank's batch, and averages unless it is None."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)  # equal weights on all ranks, other samples on each
    network = model()
    random = np.random.default_rng(rank)
    x = tf.constant(random.random((batch, *network.input_shape[1:])), tf.float32)

    def step_with(compression: str | None) -> Callable:
        @tf.function
        def step() -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(network(x, training=True)))
            own = tape.gradient(loss, network.trainable_variables)
            if compression is None:
                return own, []
            how = {"op": hvd.Average, "compression": getattr(hvd.Compression, compression)}
            return own, [hvd.allreduce(gradient, name=f"gradient_{i}", **how) for i, gradient in enumerate(own)]

        return step

    return step_with
