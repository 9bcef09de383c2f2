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
from nurion_utils.backends.measuring import random_training, written_by_rank_0
from nurion_utils.backends.process import init, shutdown
from nurion_utils.training import models
from nurion_utils.training.memory import FUSION_BUFFER_BYTES

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from nurion_utils.ranks import World

DEFAULTS = {"fusion_bytes": FUSION_BUFFER_BYTES, "cycle_ms": 1.0, "compression": "none", "timeline": False}
BATCH = 4  # samples per rank
TIMEOUT_S = 600.0
BLOCK_S = 0.15  # steps are repeated until a block of them can be timed


def measure_fusion(
    world: World,
    settings: Sequence[Mapping[str, Any]],
    model: Callable[[], keras.Model] = models.mobilenet,
    repeats: int = 5,
) -> pd.DataFrame:
    """Time the steps of a training over MPI under several settings of Horovod in turn.

    A step computes the gradients of the mean square of a model's outputs for random inputs, 4 samples per rank, and
    averages them over the ranks, each gradient submitted by itself as soon as it is there. The weights are not updated.

    Parameters
    ----------
    world
        Ranks to run on.
    settings
        Each a dictionary with some of ``fusion_bytes``, ``cycle_ms`` (see `backends.init`), ``compression`` ("none" or
        "fp16") and ``timeline`` (whether Horovod writes one); what is left out has Horovod's default.
    model
        Builds the model on every rank; it has one input and one output.
    repeats
        Turns of each setting.

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
        A rank raised, such as for a wrong average, or the ranks took too long.
    """
    import pandas as pd

    turns = list(timing.turns(list(enumerate(_complete(settings))), whole_number(repeats, "repeats")))
    times = world.run(_measured, model, [setting for _, (_, setting) in turns], timeout_s=TIMEOUT_S)[0]
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

    _, gradients = random_training(model, BATCH)

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
