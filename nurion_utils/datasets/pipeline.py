"""The input pipeline: TFRecord volumes read by tf.data on real ranks, and how long training waits for them.

>>> sources = {"Lustre": Source(slow, store.client()), "burst buffer": Source(fast)}  # doctest: +SKIP
>>> settings = {"plain": {}, "4 files at once, 2 batches ahead": {"cycle_length": 4, "prefetch": 2}}
>>> table = measure(world, sources, settings, steps=12, compute_s=0.05)  # doctest: +SKIP
>>> accelerator_utilisation(table)  # doctest: +SKIP
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import positive, whole_number

if TYPE_CHECKING:
    import pandas as pd
    import tensorflow as tf
    from mpi4py import MPI

    from nurion_utils.ranks import World
    from nurion_utils.storage import FileSystemClient

# The least accelerator utilisation with which a storage system passes (MLPerf Storage's rules).
MINIMUM_UTILISATION = {"U-Net3D": 0.9, "ResNet-50": 0.9, "CosmoFlow": 0.7}
CACHES = ("cold", "warm")
_SETTINGS = {"cycle_length": 1, "prefetch": 0, "cache": 0, "batch_size": 1}  # and the least of each


@dataclass(frozen=True)
class Source:
    """Volumes that `training.volumes.write` wrote, and how they are reached.

    Attributes
    ----------
    directory
        Where the files are.
    client
        None to read them as they are; the client of an `EmulatedFileSystem` over them to wait for its targets first.
    """

    directory: str | os.PathLike[str]
    client: FileSystemClient | None = None

    def files(self) -> list[str]:
        """The TFRecord files, in the order of their names; ValueError if there are none."""
        if not (found := sorted(map(str, Path(self.directory).resolve().glob("*.tfrecord")))):
            raise ValueError(f"{str(self.directory)!r} has no *.tfrecord files: write some with volumes.write.")
        if self.client is not None:
            for file in found:
                self.client.path(file)  # refuses those that are not below the store's directory
        return found


def dataset(
    files: Sequence[str | os.PathLike[str]],
    client: FileSystemClient | None = None,
    *,
    cycle_length: int = 1,
    prefetch: int = 0,
    cache: bool = False,
    batch_size: int = 1,
    epochs: int | None = 1,
) -> tf.data.Dataset:
    """Batches of volumes from TFRecord files, in an order that does not depend on timing.

    Parameters
    ----------
    client
        Each file is opened when this client's shared store has delivered all of it, and then read natively; a
        request that timed out there ends the iteration with the store's message.
    cycle_length
        How many files are read at the same time, one record from each in turn.  From 2 up threads do it in the
        background, and run a few files ahead; 1 is one file after the other, on demand.
    prefetch
        Batches that are made ready while training computes.
    cache
        Keep what was read, decoded, in memory: an epoch after the first reads no files.
    epochs
        How often to go through the files; None for ever.

    Returns
    -------
    tf.data.Dataset
        Pairs of float32 tensors: network inputs (n, size, size, size, 1) and targets (n, 3), as `volumes.Volumes`
        reads them.  n is `batch_size`; of the last volumes of an epoch those that fill no batch are left out.

    Raises
    ------
    ValueError
        There are no files, or a number is out of its range.
    """
    import tensorflow as tf

    from nurion_utils.datasets import volumes

    given = {"cycle_length": cycle_length, "prefetch": prefetch, "cache": cache, "batch_size": batch_size}
    _require_settings(given)
    if epochs is not None:
        whole_number(epochs, "epochs")
    names = [os.fspath(file) for file in files]
    if not names:
        raise ValueError("files is an empty list: name the files to read.")

    def wait(name: bytes) -> bytes:
        path = os.fsdecode(name)
        client.wait(path)
        return os.fsencode(client.path(path))

    def delivered(name: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(wait, [name], tf.string), [])

    def decode(volume: bytes, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        density = np.frombuffer(volume, "<f4")
        density = density.reshape((round(len(density) ** (1 / 3)),) * 3)
        return volumes.network_input(density)[..., None], volumes.targets_of(parameters)

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        features = {
            "volume": tf.io.FixedLenFeature([], tf.string),
            "parameters": tf.io.FixedLenFeature([3], tf.float32),
        }
        found = tf.io.parse_single_example(record, features)
        x, y = tf.numpy_function(decode, [found["volume"], found["parameters"]], (tf.float32, tf.float32))
        return tf.ensure_shape(x, [None, None, None, 1]), tf.ensure_shape(y, [3])

    # Waiting inside interleave's function would be in vain: tf.data calls that for one file after the other.
    many = {"num_parallel_calls": cycle_length, "deterministic": True} if cycle_length > 1 else {}
    data = tf.data.Dataset.from_tensor_slices(names)
    if client is not None:
        data = data.map(delivered, **many)
    data = data.interleave(tf.data.TFRecordDataset, cycle_length, **many).map(parse, **many)
    if cache:
        data = data.cache()
    data = data.batch(batch_size, drop_remainder=True).repeat(epochs)
    options = tf.data.Options()
    # Or tf.data would read ahead and in parallel on its own, and all settings be much the same.
    options.autotune.enabled = options.experimental_optimization.apply_default_optimizations = False
    options.threading.private_threadpool_size = 2 * cycle_length + 2  # by default as many as cores, and most only wait
    return (data.prefetch(prefetch) if prefetch else data).with_options(options)


def measure(
    world: World,
    sources: Mapping[str, Source],
    settings: Mapping[str, Mapping[str, Any]],
    steps: int,
    compute_s: float,
    repeats: int = 3,
    caches: Sequence[str] = CACHES,
) -> pd.DataFrame:
    """Train without a network on the ranks of `world`: read a batch, sleep for `compute_s`, meet the other ranks.

    Computing is emulated as MLPerf Storage does; ranks meet after every step because an allreduce makes them.  Every
    rank reads a share of the files of its own, over and over if `steps` need more.  Contenders, each source with
    each setting, take turns within a repeat.

    Parameters
    ----------
    settings
        Keyword arguments of `dataset` by name: any of cycle_length, prefetch, cache and batch_size.
    compute_s
        Seconds of a step's computing; 0 to see how fast the pipeline can be.
    caches
        ``"cold"``: the operating system is asked to forget the files first; ``"warm"``: they are read once first.

    Returns
    -------
    pandas.DataFrame
        A row per rank and step: source, setting, cache, repeat, rank, step, wait_s (blocked on the input), compute_s
        (as slept), sync_s (waiting for other ranks), samples, samples_per_s, and resident: which part of the rank's
        files was in the page cache when it began.  Look at it: not every file system forgets when asked.

    Raises
    ------
    ValueError
        What was asked for cannot be measured; nothing was started.
    RankError
        A rank could not read, as when the shared store let a request time out.
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
    if compute_s != 0:
        positive(compute_s, "compute_s")
    if not caches or set(caches) - set(CACHES):
        raise ValueError(f"caches are some of {', '.join(map(repr, CACHES))}, not {caches!r}")
    files = {name: source.files() for name, source in sources.items()}
    for name, found in files.items():
        if len(found) < world.n:
            raise ValueError(f"source {name!r} has {len(found)} files for {world.n} ranks; write volumes to more files")
    contenders = [
        (source, setting, cache, files[source], sources[source].client, dict(chosen))
        for source in sources
        for setting, chosen in settings.items()
        for cache in caches
    ]

    def on_rank(*arguments: Any) -> list[dict]:
        from mpi4py import MPI

        return observe(MPI.COMM_WORLD, *arguments)

    rows = world.run(on_rank, contenders, steps, compute_s, repeats)
    return pd.DataFrame([row for of_rank in rows for row in of_rank])


def observe(comm: MPI.Comm, contenders: Sequence[tuple], steps: int, compute_s: float, repeats: int) -> list[dict]:
    """The part of `measure` that every rank of `comm` runs; each returns its own rows."""
    from mpi4py import MPI

    rows = []
    for _ in dataset(contenders[0][3][:1]).take(1):
        pass  # what TensorFlow does but once is not the first contender's
    for repeat in range(repeats):
        for source, setting, cache, files, client, chosen in contenders:
            mine = files[comm.rank :: comm.size]
            data = iter(dataset(mine, client, **chosen, epochs=None))
            if cache == "cold":
                drop_cache(mine)
            else:
                for file in mine:
                    Path(file).read_bytes()
            key = {"source": source, "setting": setting, "cache": cache, "repeat": repeat, "rank": comm.rank}
            key["resident"] = resident(mine)
            comm.Barrier()
            if client is not None:
                client.wait_until_idle()  # what the contender before read ahead is not this one's
            comm.Barrier()
            for step in range(steps):
                failure, begin_s = None, time.perf_counter()
                try:
                    samples = len(next(data)[0])
                except StopIteration:
                    failure = ValueError(f"the files of rank {comm.rank} of {source!r} have no whole batch")
                except Exception as error:
                    failure = error
                ready_s = time.perf_counter()
                time.sleep(0 if failure else compute_s)
                done_s = time.perf_counter()
                # Also tells the others, who would wait for this rank for ever.
                if comm.allreduce(failure is not None, op=MPI.LOR):
                    if failure is not None:
                        raise failure
                    return rows
                end_s = time.perf_counter()
                times = {"wait_s": ready_s - begin_s, "compute_s": done_s - ready_s, "sync_s": end_s - done_s}
                rate = {"samples": samples, "samples_per_s": samples / (end_s - begin_s)}
                rows.append({**key, "step": step, **times, **rate})
            del data  # or its threads read on while the next contender is timed
    return rows


def accelerator_utilisation(table: pd.DataFrame) -> pd.DataFrame:
    """How much of the time was spent computing, the measure of MLPerf Storage, per run of `measure`'s table.

    Returns
    -------
    pandas.DataFrame
        A row per source, setting, cache and repeat: accelerator_utilisation, computing time over total time, the
        sums of all ranks; samples_per_s, of all ranks together.
    """
    key, parts = ["source", "setting", "cache", "repeat"], ["wait_s", "compute_s", "sync_s"]
    if missing := [name for name in [*key, *parts, "rank", "samples"] if name not in table]:
        raise ValueError(f"the table must come from measure; it lacks {', '.join(missing)}")
    groups = table.groupby(key, sort=False)
    sums, ranks = groups[[*parts, "samples"]].sum(), groups["rank"].nunique()
    total_s = sums[parts].sum(axis=1)
    shares = {
        "accelerator_utilisation": sums["compute_s"] / total_s,
        "samples_per_s": sums["samples"] * ranks / total_s,
    }
    return sums.assign(**shares)[list(shares)].reset_index()


def drop_cache(paths: Iterable[str | os.PathLike[str]]) -> float:
    """Ask the operating system to forget the contents of files; returns which part of their pages it kept.

    0.0 means that the next reading is from the disk (or from what caches below the operating system there are),
    1.0 that the file system, such as tmpfs, cannot forget.  No file is changed.
    """
    paths = list(paths)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident(paths)


def resident(paths: Iterable[str | os.PathLike[str]]) -> float:
    """Which part of the files' pages lies in the page cache, by mincore(2); empty files count as nothing.

    Linux tells it only of files that are the caller's or that the caller could write, and says 1.0 of others.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pages = kept = 0
    for path in paths:
        if not os.path.getsize(path):
            continue
        mapped = np.memmap(path, np.uint8, "r")
        flags = np.empty(-(-mapped.size // mmap.PAGESIZE), np.uint8)
        if libc.mincore(
            ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), flags.ctypes.data_as(ctypes.c_void_p)
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
        pages, kept = pages + flags.size, kept + int((flags & 1).sum())
    return kept / pages if pages else 0.0


def _require_settings(chosen: Mapping[str, Any]) -> None:
    if unknown := set(chosen) - set(_SETTINGS):
        raise ValueError(f"a setting has {', '.join(_SETTINGS)}, and no {min(unknown)!r}")
    for name, value in chosen.items():
        if name == "cache":
            if not isinstance(value, bool):
                raise ValueError(f"cache must be True or False, not {value!r}")
        else:
            whole_number(value, name, least=_SETTINGS[name])
