"""The input pipeline: TFRecord volumes read by tf.data on real ranks, and how long training waits for them.

>>> sources = {"Lustre": Source(slow, store.client()), "burst buffer": Source(fast)}  # doctest: +SKIP
>>> settings = {"plain": {}, "4 files at once, 2 batches ahead": {"cycle_length": 4, "prefetch": 2}}
>>> table = measure_pipeline(world, sources, settings, steps=12, compute_s=0.05)  # doctest: +SKIP
>>> accelerator_utilisation(table)  # doctest: +SKIP
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nurion_utils._checks import number, require_columns, whole_number
from nurion_utils.datasets import volumes
from nurion_utils.datasets.page_cache import drop_cache, resident
from nurion_utils.timing import turns

if TYPE_CHECKING:
    import pandas as pd
    import tensorflow as tf
    from mpi4py import MPI

    from nurion_utils.ranks import World

# The least accelerator utilisation with which a storage system passes (MLPerf Storage's rules).
MINIMUM_UTILISATION = {"U-Net3D": 0.9, "ResNet-50": 0.9, "CosmoFlow": 0.7}
CACHES = ("cold", "warm")
_SETTINGS = {"cycle_length": 1, "prefetch": 0, "cache": 0, "batch_size": 1}  # and the least of each


@dataclass(frozen=True)
class Source:
    """Volumes that `volumes.write` wrote in a directory, and how they are reached.

    Without a client they are read as they are; with that of a shared file system over them, such as `storage` emulates,
    its targets are waited for.
    """

    directory: str | os.PathLike[str]
    client: Any = None

    def files(self) -> list[str]:
        """The TFRecord files, in the order of their names; ValueError if there are none."""
        if not (found := sorted(map(str, Path(self.directory).resolve().glob("*.tfrecord")))):
            raise ValueError(f"{str(self.directory)!r} has no *.tfrecord files: write some with volumes.write")
        if self.client is not None:
            for file in found:
                self.client.path(file)  # refuses those that are not below the store's directory
        return found


def dataset(
    files: Sequence[str | os.PathLike[str]],
    client: Any = None,
    *,
    cycle_length: int = 1,
    prefetch: int = 0,
    cache: bool = False,
    batch_size: int = 1,
    epochs: int | None = 1,
) -> tf.data.Dataset:
    """Batches of volumes from TFRecord files, in an order that does not depend on timing.

    They are pairs of float32 tensors: network inputs (n, size, size, size, 1) and targets (n, 3), as `volumes.Volumes`
    reads them. n is `batch_size`; of the last volumes of an epoch those that fill no batch are left out.

    ValueError if there are no files, or a number is out of its range. Later, as TensorFlow's error with the file's
    path, if a file is missing, truncated or damaged.

    With a `client`, each file is opened when its shared file system has delivered all of it, and then read natively; a
    request that timed out there ends the iteration with the message it came with. `cycle_length` files are read at the
    same time, one record from each in turn: from 2 up threads do it in the background, and run a few files ahead; 1 is
    one file after the other, on demand. `prefetch` batches are made ready while training computes. With `cache` what
    was read stays in memory, decoded, and an epoch after the first reads no files. `epochs` of None is for ever.
    """
    import tensorflow as tf

    _require_settings({"cycle_length": cycle_length, "prefetch": prefetch, "cache": cache, "batch_size": batch_size})
    if epochs is not None:
        whole_number(epochs, "epochs")
    if not (names := [os.fspath(file) for file in files]):
        raise ValueError("files is an empty list: name the files to read")

    def open_whole(name: bytes) -> bytes:
        path = os.fsdecode(name)
        if client is not None:
            client.wait(path)
            path = os.fspath(client.path(path))
        volumes.require_whole(path)
        return os.fsencode(path)

    def opened(name: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(open_whole, [name], tf.string), [])

    # Waiting inside interleave's function would be in vain: tf.data calls that for one file after the other.
    many = {"num_parallel_calls": cycle_length, "deterministic": True} if cycle_length > 1 else {}
    data = tf.data.Dataset.from_tensor_slices(names).map(opened, **many)
    named = lambda name: tf.data.TFRecordDataset(name).map(lambda record: (name, record))  # noqa: E731
    data = data.interleave(named, cycle_length, **many).map(_parse, **many)
    if cache:
        data = data.cache()
    data = data.batch(batch_size, drop_remainder=True).repeat(epochs)
    options = tf.data.Options()
    # Or tf.data would read ahead and in parallel on its own, and all settings be much the same.
    options.autotune.enabled = options.experimental_optimization.apply_default_optimizations = False
    options.threading.private_threadpool_size = 2 * cycle_length + 2  # by default as many as cores, and most only wait
    return (data.prefetch(prefetch) if prefetch else data).with_options(options)


def _parse(name: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    import tensorflow as tf

    x, y = tf.numpy_function(volumes.decode, [record, name], (tf.float32, tf.float32))
    return tf.ensure_shape(x, [None, None, None, 1]), tf.ensure_shape(y, [3])


def measure_pipeline(
    world: World,
    sources: Mapping[str, Source],
    settings: Mapping[str, Mapping[str, Any]],
    steps: int,
    compute_s: float,
    repeats: int = 3,
    caches: Sequence[str] = CACHES,
) -> pd.DataFrame:
    """Train without a network on the ranks of `world`: read a batch, sleep for `compute_s`, meet the other ranks.

    Computing is emulated as MLPerf Storage does; ranks meet after every step because an allreduce makes them. Every
    rank reads a share of the files of its own, over and over if `steps` need more. Contenders, each source with
    each setting, take turns.

    Returns a row per rank and step: source, setting, cache, repeat, rank, step, wait_s (blocked on the input),
    compute_s (as slept), sync_s (waiting for other ranks), samples, samples_per_s, and resident: which part of the
    rank's files was in the page cache when it began, for not every file system forgets when asked. ValueError, before
    anything starts, if that cannot be measured; `RankError` if a rank could not read.

    `settings` are keyword arguments of `dataset` by name: any of cycle_length, prefetch, cache and batch_size. Of the
    `caches`, ``"cold"`` means that the operating system is asked to forget the files first, ``"warm"`` that they are
    read once first. With a `compute_s` of 0 it shows how fast the pipeline can be.
    """
    import pandas as pd

    if not isinstance(sources, Mapping) or not all(isinstance(source, Source) for source in sources.values()):
        raise ValueError('sources are a dictionary such as {"burst buffer": Source(directory)}')
    if not isinstance(settings, Mapping) or not sources or not settings:
        raise ValueError('settings are a dictionary such as {"plain": {}, "ahead": {"prefetch": 2}}, and not empty')
    for chosen in settings.values():
        _require_settings(chosen)
    whole_number(steps, "steps")
    whole_number(repeats, "repeats")
    number(compute_s, "compute_s", least=0)
    if not caches or set(caches) - set(CACHES):
        raise ValueError(f"caches are some of {', '.join(map(repr, CACHES))}, not {caches!r}")
    files = {name: source.files() for name, source in sources.items()}
    for name, found in files.items():
        if len(found) < world.n:
            raise ValueError(f"source {name!r} has {len(found)} files for {world.n} ranks; write volumes to more files")
    contenders = [
        ({"source": name, "setting": setting, "cache": cache}, files[name], source.client, dict(chosen))
        for name, source in sources.items()
        for setting, chosen in settings.items()
        for cache in caches
    ]
    rows = world.run(_measure_on_rank, contenders, steps, compute_s, repeats)
    return pd.DataFrame([row for of_rank in rows for row in of_rank])


def _measure_on_rank(contenders: Sequence[tuple], steps: int, compute_s: float, repeats: int) -> list[dict]:
    from mpi4py.MPI import COMM_WORLD as comm

    for _ in dataset(contenders[0][1][:1]).take(1):
        pass  # what TensorFlow does but once is not the first contender's
    rows = []
    for repeat, (key, files, client, chosen) in turns(contenders, repeats):
        mine = files[comm.rank :: comm.size]
        data = iter(dataset(mine, client, **chosen, epochs=None))
        if key["cache"] == "cold":
            drop_cache(mine)
        else:
            for file in mine:
                Path(file).read_bytes()
        key = {**key, "repeat": repeat, "rank": comm.rank, "resident": resident(mine)}
        comm.Barrier()
        if client is not None:
            client.wait_until_idle()  # what the contender before read ahead is not this one's
        comm.Barrier()
        for step in range(steps):
            if (found := _step(comm, data, compute_s)) is None:
                return rows  # the rank that could not read says why
            rows.append({**key, "step": step, **found})
        del data  # or its threads read on while the next contender is timed
    return rows


def _step(comm: MPI.Comm, data: Iterator, compute_s: float) -> dict[str, float] | None:
    from mpi4py import MPI

    failure, begin_s = None, time.perf_counter()
    try:
        if not (samples := len(next(data, [()])[0])):
            failure = ValueError(f"the files of rank {comm.rank} have no whole batch")
    except Exception as error:
        failure = error
    ready_s = time.perf_counter()
    time.sleep(0 if failure else compute_s)
    done_s = time.perf_counter()
    # Also tells the others, who would wait for this rank for ever.
    if comm.allreduce(failure is not None, op=MPI.LOR):
        if failure is not None:
            raise failure
        return None
    end_s = time.perf_counter()
    times = {"wait_s": ready_s - begin_s, "compute_s": done_s - ready_s, "sync_s": end_s - done_s}
    return {**times, "samples": samples, "samples_per_s": samples / (end_s - begin_s)}


def accelerator_utilisation(table: pd.DataFrame) -> pd.DataFrame:
    """How much of the time was spent computing, the measure of MLPerf Storage, per run of `measure_pipeline`'s table.

    A row per source, setting, cache and repeat: accelerator_utilisation, computing time over total time, the sums of
    all ranks; samples_per_s, of all ranks together.
    """
    import pandas as pd

    key, parts = ["source", "setting", "cache", "repeat"], ["wait_s", "compute_s", "sync_s"]
    require_columns(table, [*key, *parts, "rank", "samples"])
    groups = table.groupby(key, sort=False)
    sums, ranks = groups[[*parts, "samples"]].sum(), groups["rank"].nunique()
    total_s = sums[parts].sum(axis=1)
    used, samples_per_s = sums["compute_s"] / total_s, sums["samples"] * ranks / total_s
    return pd.DataFrame({"accelerator_utilisation": used, "samples_per_s": samples_per_s}).reset_index()


def _require_settings(chosen: Mapping[str, Any]) -> None:
    if unknown := set(chosen) - set(_SETTINGS):
        raise ValueError(f"a setting has {', '.join(_SETTINGS)}, and no {min(unknown)!r}")
    for name, value in chosen.items():
        if name != "cache":
            whole_number(value, name, least=_SETTINGS[name])
        elif not isinstance(value, bool):
            raise ValueError(f"cache must be True or False, not {value!r}")
