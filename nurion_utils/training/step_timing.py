"""Where the time of a training step goes, measured on real ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nurion_utils._checks import one_of
from nurion_utils.timing import turns

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

STAGES = ("forward", "gradient", "update", "allreduce")  # each does what the one before does, and one thing more


def step_times(
    build: Callable[[], keras.Model],
    batches: Callable[[], Iterator[tuple[Any, Any]]],
    *,
    stages: tuple[str, ...] = STAGES,
    rounds: int = 8,
    block_s: float = 0.5,
) -> pd.DataFrame:
    """Time training steps on this rank together with all others; call it on every rank.

    Blocks of steps, each of about `block_s` seconds, alternate between the stages, `rounds` for each, so that a
    disturbance of the machine hits all of them alike. A block lasts as long as its slowest rank. `build` makes the
    model, whose loss is the mean squared error; `batches` makes something endless of ``(x, y)`` batches, such as
    ``shard.dataset(...)``. The stages are "forward" (the forward pass alone), "gradient" (and the backward pass),
    "update" (and an SGD update, every rank by itself) and "allreduce" (with gradients averaged over ranks).

    Returns one row per round and stage, equal on all ranks: ``round``, ``stage``, ``ranks``, ``batch_per_rank``,
    ``step_s``, ``input_s`` (of it, waiting for input), ``samples_per_s`` (all ranks together).
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    iterator = iter(batches())
    batch_size = len(next(iterator)[0])
    steps = {stage: _stage(stage, build()) for stage in stages}

    def block(stage: str, count: int) -> tuple[float, float]:
        input_s = 0.0
        comm.Barrier()
        begin = time.perf_counter()
        for _ in range(count):
            asked = time.perf_counter()
            x, y, *_ = next(iterator)
            input_s += time.perf_counter() - asked
            result = steps[stage](x, y)
        float(result)  # wait for the last step
        return comm.allreduce(((time.perf_counter() - begin) / count, input_s / count), op=MPI.MAX)

    for stage in stages:
        block(stage, 3)  # traces and warms up
    longest = max(block(stage, 3)[0] for stage in stages)
    count = max(1, math.ceil(block_s / longest))
    rows = []
    for turn, stage in turns(stages, rounds):
        step_s, input_s = block(stage, count)
        rows.append((turn, stage, comm.size, batch_size, step_s, input_s, comm.size * batch_size / step_s))
    columns = ["round", "stage", "ranks", "batch_per_rank", "step_s", "input_s", "samples_per_s"]
    return pd.DataFrame(rows, columns=columns)


def parts(times: pd.DataFrame) -> pd.DataFrame:
    """Split a step into what each stage adds, from what `step_times` returned for all of `STAGES`.

    One row per part: ``part``, ``time_s`` (median over rounds), ``low_s`` and ``high_s`` (quartiles). A part is a
    difference of two measurements, so noise can make a small one negative.
    """
    by_stage = times.pivot(index="round", columns="stage", values=["step_s", "input_s"])
    waited = by_stage["input_s"]
    wide = by_stage["step_s"] - waited
    columns = {
        "waiting for input": waited["allreduce"],
        "forward pass": wide["forward"],
        "backward pass": wide["gradient"] - wide["forward"],
        "update": wide["update"] - wide["gradient"],
        "allreduce": wide["allreduce"] - wide["update"],
    }
    rows = [(part, *np.quantile(values, [0.5, 0.25, 0.75])) for part, values in columns.items()]
    return pd.DataFrame(rows, columns=["part", "time_s", "low_s", "high_s"])


def _stage(stage: str, model: keras.Model) -> Callable[[Any, Any], tf.Tensor]:
    one_of(stage, "stage", STAGES)
    import keras
    import tensorflow as tf

    from nurion_utils.training.optimizer import DistributedOptimizer

    optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
    if stage == "allreduce":
        optimizer = DistributedOptimizer(optimizer)
    variables = model.trainable_variables
    optimizer.build(variables)

    def loss(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.square(model(x, training=True) - tf.cast(y, model.compute_dtype)))

    @tf.function(reduce_retracing=True)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        if stage == "forward":
            return loss(x, y)
        with tf.GradientTape() as tape:
            value = loss(x, y)
        gradients = tape.gradient(value, variables)
        if stage == "gradient":  # their sum is asked for, or TensorFlow would leave the backward pass out
            return value + 0 * tf.add_n([tf.reduce_sum(gradient) for gradient in gradients])
        optimizer.apply(gradients, variables)
        return value

    return step
