"""Training with many small gradients: what packing, Horovod's clock, compression and tracing do to a step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import positive, whole_number
from nurion_utils.backends.horovod import init, named, shutdown
from nurion_utils.training import models

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from nurion_utils.ranks import World

DEFAULTS = {"fusion_bytes": 128 << 20, "cycle_ms": 1.0, "compression": "none", "timeline": False}
BLOCK_S = 0.15  # steps are repeated until a block of them can be timed

# How long Horovod's search takes: points to throw away, steps of a sample (a point is the median of five), points to
# try. Its own defaults, 3, 10 and 20, come to about 1200 steps. They are read when Horovod is loaded.
SHORT_SEARCH = {
    "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1",
    "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "2",
    "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES": "15",
}


def sweep(
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

    whole_number(repeats, "repeats")
    batch, (carrier,) = whole_number(batch, "batch"), named([backend]).values()
    if not isinstance(settings, Sequence) or not len(settings):
        raise ValueError(f"settings must be a list such as [{{}}, {{'cycle_ms': 5.0}}], not {settings!r}")
    complete = []
    for setting in settings:
        if not isinstance(setting, Mapping) or set(setting) - set(DEFAULTS):
            raise ValueError(f"a setting is a dictionary with some of {', '.join(DEFAULTS)}, not {setting!r}")
        complete.append({**DEFAULTS, **setting})
        positive(complete[-1]["cycle_ms"], "cycle_ms")
        whole_number(complete[-1]["fusion_bytes"], "fusion_bytes", 0)
        if complete[-1]["compression"] not in ("none", "fp16"):
            raise ValueError(f"compression must be 'none' or 'fp16', not {setting['compression']!r}")
        if complete[-1]["compression"] == "fp16" and carrier.operations == "CCL":
            raise ValueError("Horovod cannot reduce float16 over oneCCL; use MPI or Gloo, or compression='none'")
    turns = [((turn + repeat) % len(complete), repeat) for repeat in range(repeats) for turn in range(len(complete))]
    in_turn = [complete[number] for number, _ in turns]
    times = world.run(_swept, model, batch, backend, in_turn, timeout_s=timeout_s)[0]
    rows = [
        {"setting": number, **complete[number], "repeat": repeat, **observed}
        for (number, repeat), observed in zip(turns, times, strict=True)
    ]
    return pd.DataFrame(rows).sort_values(["setting", "repeat"], ignore_index=True)


def autotune(
    world: World,
    model: Callable[[], keras.Model] = models.mobilenet,
    batch: int = 4,
    backend: str = "MPI",
    steps: int = 200,
    timeout_s: float | None = 600.0,
) -> pd.DataFrame:
    """Have Horovod search its fusion threshold and cycle time in a training, whose steps are those of `sweep`.

    Parameters
    ----------
    world
        Fresh ranks, which are of no other use afterwards: Horovod searches only for what was never set in a process,
        and goes on searching. Start them with ``env=SHORT_SEARCH`` for a search of about 200 steps.
    model, batch, backend, timeout_s
        As for `sweep`.
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

    steps, batch = whole_number(steps, "steps"), whole_number(batch, "batch")
    named([backend])
    table = world.run(_searched, model, batch, backend, steps, timeout_s=timeout_s)[0]
    table = pd.DataFrame(table, columns=["cycle_ms", "fusion_mb", "score"])
    return table.rename_axis("point").reset_index()[["point", "fusion_mb", "cycle_ms", "score"]]


def _swept(
    model: Callable[[], keras.Model], batch: int, backend: str, settings: list[dict[str, Any]]
) -> list[dict[str, float]]:
    """On every rank: an observation per setting, in their order; times are those of the slowest rank."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    step_with = lru_cache(_steps(model, batch, comm.rank))

    def block(step: Callable, calls: int) -> float:
        comm.Barrier()
        begin_s = time.perf_counter()
        for _ in range(calls):
            step()
        return comm.allreduce((time.perf_counter() - begin_s) / calls, op=MPI.MAX)

    def timed(step: Callable) -> float:
        block(step, 2)
        return block(step, int(np.clip(BLOCK_S / block(step, 1), 1, 100)))

    observed = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "timeline.json") if setting["timeline"] else None
            compute_s = timed(step_with(None))
            init(backend, cycle_ms=setting["cycle_ms"], fusion_bytes=setting["fusion_bytes"], timeline=file)
            step = step_with(setting["compression"])
            step_s = timed(step)
            own, averages = step()
            shutdown()
        _require_average(comm, own[-1].numpy(), averages[-1].numpy())
        gradient_bytes = sum(gradient.shape.num_elements() * gradient.dtype.size for gradient in own)
        observed.append({"step_s": step_s, "compute_s": compute_s, "gradient_bytes": gradient_bytes})
    return observed


def _require_average(comm: Any, own: np.ndarray, average: np.ndarray) -> None:
    """ArithmeticError unless Horovod's average is that of MPI, within what float16 can tell apart."""
    expected = comm.allreduce(own.astype(float)) / comm.size
    if not np.allclose(average, expected, rtol=1e-2, atol=1e-2 * abs(expected).max()):
        raise ArithmeticError(f"Horovod's average of a gradient is off by {abs(average - expected).max():.2g}")


def _searched(model: Callable[[], keras.Model], batch: int, backend: str, steps: int) -> list[tuple]:
    """On every rank: the rows of the log that rank 0 wrote."""
    import pandas as pd
    from mpi4py import MPI

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "autotune.csv")
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
