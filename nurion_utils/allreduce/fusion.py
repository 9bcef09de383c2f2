"""Many small tensors: what packing them together, Horovod's clock, compression and tracing do to their time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import positive, whole_number
from nurion_utils.allreduce.backends import init, named, shutdown

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

DEFAULTS = {"fusion_bytes": 128 << 20, "cycle_ms": 1.0, "compression": "none", "timeline": False}
SHAPES = ((64, 64), (64,)) * 100  # weights and biases of a hundred small layers: 200 tensors, 1.66 MB in all
BLOCK_S = 0.1

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
    shapes: Sequence[Sequence[int]] = SHAPES,
    backend: str = "MPI",
    repeats: int = 5,
) -> pd.DataFrame:
    """Time the averaging of many float32 tensors, each submitted by itself, under several settings in turn.

    Parameters
    ----------
    world
        Ranks to run on.
    settings
        Each a dictionary with some of ``fusion_bytes``, ``cycle_ms`` (see `backends.init`), ``compression`` ("none" or
        "fp16") and ``timeline`` (whether Horovod writes one); what is left out has Horovod's default.
    shapes
        Shapes of the tensors.
    backend
        Name in `backends.BACKENDS`.
    repeats
        Turns of each setting.

    Returns
    -------
    pandas.DataFrame
        One row per observation: ``setting`` (its number), ``fusion_bytes, cycle_ms, compression, timeline, repeat``;
        ``time_s``, until the slowest rank has all averages.

    Raises
    ------
    ValueError
        A setting is not possible; nothing ran.
    """
    import pandas as pd

    whole_number(repeats, "repeats")
    shapes, (carrier,) = _as_tuples(shapes), named([backend]).values()
    if not len(settings):
        raise ValueError("at least one setting is needed, such as {} for Horovod's defaults")
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
    rows = []
    for repeat in range(repeats):
        for turn in range(len(complete)):
            number = (turn + repeat) % len(complete)
            time_s = world.run(_timed, backend, complete[number], shapes, timeout_s=120)[0]
            rows.append({"setting": number, **complete[number], "repeat": repeat, "time_s": time_s})
    return pd.DataFrame(rows).sort_values(["setting", "repeat"], ignore_index=True)


def autotune(
    world: World, shapes: Sequence[Sequence[int]] = SHAPES, backend: str = "MPI", steps: int = 200
) -> pd.DataFrame:
    """Have Horovod search its fusion threshold and cycle time while it averages the tensors again and again.

    Parameters
    ----------
    world
        Fresh ranks, which are of no other use afterwards: Horovod searches only for what was never set in a process,
        and goes on searching. Start them with ``env=SHORT_SEARCH`` for a search of about 200 steps.
    shapes
        Shapes of the tensors.
    backend
        Name in `backends.BACKENDS`.
    steps
        How often to average them all.

    Returns
    -------
    pandas.DataFrame
        One row per point in the order of the search: ``point, fusion_mb`` (2^20 bytes), ``cycle_ms, score``
        (bytes per microsecond, as Horovod reckons it). Once the search has ended, a last row repeats its best.
    """
    import pandas as pd

    whole_number(steps, "steps")
    named([backend])
    table = world.run(_searched, backend, _as_tuples(shapes), steps, timeout_s=300)[0]
    table = pd.DataFrame(table, columns=["cycle_ms", "fusion_mb", "score"])
    return table.rename_axis("point").reset_index()[["point", "fusion_mb", "cycle_ms", "score"]]


def _as_tuples(shapes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    if not len(shapes):
        raise ValueError("at least one shape is needed, such as (64, 64)")
    return tuple(tuple(whole_number(length, "a length in a shape") for length in shape) for shape in shapes)


def _timed(backend: str, setting: dict[str, Any], shapes: tuple) -> float:
    """On every rank: seconds until all tensors are averaged, on the slowest rank."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    step, tensors = _step(shapes, setting["compression"])

    def block(calls: int) -> float:
        comm.Barrier()
        begin_s = time.perf_counter()
        for _ in range(calls):
            averages = step(tensors)
        time_s = (time.perf_counter() - begin_s) / calls
        if not np.allclose(averages[0], (comm.size - 1) / 2):
            raise ArithmeticError(f"the average of ranks 0 to {comm.size - 1} is not {averages[0].numpy().ravel()[0]}")
        return comm.allreduce(time_s, op=MPI.MAX)

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "timeline.json") if setting["timeline"] else None
        init(backend, cycle_ms=setting["cycle_ms"], fusion_bytes=setting["fusion_bytes"], timeline=file)
        block(2)
        time_s = block(int(np.clip(BLOCK_S / block(1), 1, 100)))
        shutdown()
    return time_s


def _searched(backend: str, shapes: tuple, steps: int) -> list[tuple[float, float, float]]:
    """On every rank: the rows of the log that rank 0 wrote."""
    import pandas as pd
    from mpi4py import MPI

    step, tensors = _step(shapes, "none")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "autotune.csv")
        init(backend, cycle_ms=None, fusion_bytes=None, autotune_log=file)
        for _ in range(steps):
            step(tensors)
        shutdown()
        rows = []
        if MPI.COMM_WORLD.rank == 0:
            log = pd.read_csv(file)
            rows = list(log[["cycle_time_ms", "tensor_fusion_threshold", "score"]].itertuples(index=False, name=None))
    return MPI.COMM_WORLD.bcast(rows)


@lru_cache(maxsize=8)
def _step(shapes: tuple, compression: str) -> tuple[Callable, list]:
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from mpi4py import MPI

    tensors = [tf.fill(shape, float(MPI.COMM_WORLD.rank)) for shape in shapes]
    how = {"op": hvd.Average, "compression": getattr(hvd.Compression, compression)}

    @tf.function
    def step(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        return [hvd.allreduce(tensor, name=f"tensor_{i}", **how) for i, tensor in enumerate(tensors)]

    return step, tensors
