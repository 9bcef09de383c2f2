"""The input pipeline: the same volumes whatever the setting, and how long real ranks wait for them."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nurion_utils.datasets import volumes
from nurion_utils.datasets.page_cache import drop_cache, resident
from nurion_utils.datasets.pipeline import (
    MINIMUM_UTILISATION,
    Source,
    accelerator_utilisation,
    dataset,
    measure_pipeline,
)
from nurion_utils.ranks import RankError
from nurion_utils.storage import EmulatedFileSystem, ParallelFileSystem

pytestmark = pytest.mark.tensorflow

SIZE, SAMPLES = 8, 24
FAST = ParallelFileSystem(targets=4, target_mb_per_s=1000, metadata_ops_per_s=10_000, timeout_s=20)
# 20 ms for an open, which two ranks with a file each step make 40 ms a step: enough to be seen on any machine.
SLOW = ParallelFileSystem(targets=4, target_mb_per_s=1000, metadata_ops_per_s=50, timeout_s=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 volumes: in 24 files, and in 4."""
    path = tmp_path_factory.mktemp("volumes")
    volumes.write(path / "many", SAMPLES, SIZE, volumes_per_file=1)
    volumes.write(path / "few", SAMPLES, SIZE, volumes_per_file=6)
    return path


def read(data) -> tuple[np.ndarray, np.ndarray]:
    x, y = zip(*data.as_numpy_iterator(), strict=True)
    return np.concatenate(x), np.concatenate(y)


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["many", "few"])
def test_the_pipeline_reads_what_the_volumes_reader_reads(folder, layout):
    x, y = read(dataset(Source(folder / layout).files(), batch_size=6))
    expected_x, expected_y = volumes.Volumes(folder / layout).read(range(SAMPLES))
    np.testing.assert_allclose(x, expected_x, rtol=1e-6)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5)
    assert x.shape == (SAMPLES, SIZE, SIZE, SIZE, 1) and (x.dtype, y.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize("setting", [{}, {"cycle_length": 3}, {"prefetch": 2}, {"cache": True}])
def test_no_setting_loses_or_repeats_a_volume_and_timing_changes_no_order(folder, setting):
    files = Source(folder / "few").files()
    with EmulatedFileSystem(folder, FAST) as store:
        first, again = (read(dataset(files, store.client(), batch_size=4, **setting))[1] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    _, expected = volumes.Volumes(folder / "few").read(range(SAMPLES))
    np.testing.assert_allclose(np.sort(first, axis=0), np.sort(expected, axis=0), rtol=1e-5)


def test_volumes_that_fill_no_batch_are_left_out_of_each_epoch(folder):
    batches = list(dataset(Source(folder / "few").files(), batch_size=7, epochs=2).as_numpy_iterator())
    assert [len(x) for x, _ in batches] == [7] * 6


def test_each_file_is_waited_for_once_an_epoch_and_a_cache_waits_in_the_first_only(folder):
    files = Source(folder / "few").files()
    for cache, opens in [(False, 3 * len(files)), (True, len(files))]:
        with EmulatedFileSystem(folder, FAST) as store:
            read(dataset(files, store.client(), cache=cache, epochs=3))
            log = store.log()
        assert (log["target"] == -1).sum() == opens


def test_a_request_that_timed_out_ends_the_iteration_with_the_stores_message(folder):
    impatient = ParallelFileSystem(targets=1, target_mb_per_s=1, metadata_ops_per_s=20, timeout_s=0.01)
    with EmulatedFileSystem(folder, impatient) as store, pytest.raises(Exception, match="did not answer within 0.01 s"):
        # Sixteen opens at once, of which the second is to wait for 50 ms.
        read(dataset(Source(folder / "many").files(), store.client(), cycle_length=16))


# -- the page cache ---------------------------------------------------------------------------------------------------


def test_a_file_just_read_is_in_the_page_cache_and_dropping_it_changes_no_byte(tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "empty").touch()
    paths = [tmp_path / "file", tmp_path / "empty"]
    assert resident(paths) == 1.0
    kept = drop_cache(paths)
    assert kept == pytest.approx(resident(paths))
    assert (tmp_path / "file").read_bytes() == data
    if kept == 1.0:
        pytest.skip("the file system of the test's directory cannot forget")
    assert kept < 0.1


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no tmpfs to write to")
def test_that_a_tmpfs_cannot_forget_is_reported():
    path = Path(f"/dev/shm/nurion-test-{os.getpid()}")
    try:
        path.write_bytes(bytes(1 << 16))
        assert drop_cache([path]) == 1.0
    finally:
        path.unlink()


# -- on ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_wait_for_the_slow_source_and_not_for_the_fast_one(world2, folder):
    with EmulatedFileSystem(folder, SLOW) as store:
        sources = {"Lustre": Source(folder / "many", store.client()), "burst buffer": Source(folder / "many")}
        table = measure_pipeline(world2, sources, {"plain": {}}, steps=10, compute_s=0.02, repeats=2, caches=["warm"])
        log = store.log()
    assert len(table) == 2 * 2 * 10 * 2
    opened = log[log["target"] == -1]["path"].value_counts()
    assert len(opened) == 20 and (opened == 2).all()  # ten files of each rank, no more, in each of two repeats
    wait_s = table.groupby("source")["wait_s"].median()
    # Opens take 20 ms each; that the slower rank's wait is not shorter holds however busy the machine is.
    assert wait_s["Lustre"] > 0.015 and wait_s["Lustre"] > 2 * wait_s["burst buffer"]
    used = accelerator_utilisation(table).groupby("source")["accelerator_utilisation"].median()
    assert used["Lustre"] < 0.6 and used["Lustre"] < used["burst buffer"] <= 1


def test_reading_ahead_hides_reading_that_is_shorter_than_computing(world2, folder):
    with EmulatedFileSystem(folder, SLOW) as store:
        settings = {"on demand": {}, "ahead": {"prefetch": 2}}
        sources = {"Lustre": Source(folder / "many", store.client())}
        table = measure_pipeline(world2, sources, settings, steps=8, compute_s=0.1, repeats=2, caches=["warm"])
    later = table[table["step"] > 1].groupby("setting")["wait_s"].median()
    assert later["ahead"] < 0.5 * later["on demand"]


def test_many_small_files_wait_for_opens_that_few_large_ones_do_not_make(world2, folder):
    with EmulatedFileSystem(folder, SLOW) as store:
        sources = {name: Source(folder / name, store.client()) for name in ("many", "few")}
        table = measure_pipeline(world2, sources, {"plain": {"batch_size": 3}}, 4, 0.0, repeats=2, caches=["warm"])
    wait_s = table.groupby("source")["wait_s"].sum()
    assert wait_s["many"] > 2 * wait_s["few"]  # 24 opens of 20 ms against 4


def test_cold_and_warm_runs_are_kept_apart_and_say_what_was_in_the_page_cache(world2, folder):
    can_forget = drop_cache(Source(folder / "few").files()) < 1
    table = measure_pipeline(world2, {"here": Source(folder / "few")}, {"plain": {}}, 2, 0.0, repeats=1)
    found = table.groupby("cache")["resident"].mean()
    assert found["warm"] == 1.0
    assert found["cold"] < 0.1 if can_forget else found["cold"] == 1.0


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("damage", ["cut", "cut in a header", "emptied", "changed", "something else", "removed"])
def test_a_damaged_file_is_named(folder, tmp_path, damage, many):
    import tensorflow as tf

    good = Path(Source(folder / "few").files()[1]).read_bytes()
    path = tmp_path / "part.tfrecord"
    if damage == "something else":
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(b"not a volume")
    elif damage != "removed":
        changed = good[:500] + bytes([good[500] ^ 1]) + good[501:]
        path.write_bytes({"cut": good[:-1], "cut in a header": good[:5], "emptied": b"", "changed": changed}[damage])
    with pytest.raises(tf.errors.OpError, match=str(path)):
        read(dataset([Source(folder / "few").files()[0], path], cycle_length=many))


def test_a_rank_that_cannot_read_ends_the_measurement_of_all_with_the_reason(world2, folder, tmp_path):
    volumes.write(tmp_path / "broken", 2, SIZE, volumes_per_file=1)
    path = Source(tmp_path / "broken").files()[1]
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(RankError, match="(?s)rank 1.*volumes-00001.tfrecord is damaged"):
        measure_pipeline(
            world2, {"broken": Source(tmp_path / "broken")}, {"plain": {}}, 3, 0.0, repeats=1, caches=["warm"]
        )
    assert world2.run(lambda: 1) == [1, 1]


def test_utilisation_is_computing_over_everything_summed_over_ranks():
    key = {"source": "s", "setting": "p", "cache": "warm", "repeat": 0, "samples": 4}
    rows = [
        {**key, "rank": 0, "wait_s": 1.0, "compute_s": 3.0, "sync_s": 0.0},
        {**key, "rank": 1, "wait_s": 0.0, "compute_s": 3.0, "sync_s": 1.0},
    ]
    (row,) = accelerator_utilisation(pd.DataFrame(rows)).to_dict("records")
    assert (row["accelerator_utilisation"], row["samples_per_s"]) == (0.75, 2.0)
    with pytest.raises(ValueError, match="it lacks .*cache"):
        accelerator_utilisation(pd.DataFrame({"source": ["s"]}))


def test_the_minima_are_those_of_mlperf_storage():
    assert MINIMUM_UTILISATION == {"U-Net3D": 0.9, "ResNet-50": 0.9, "CosmoFlow": 0.7}


class World:
    """Two ranks that nobody may ask for anything."""

    n = 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sources": {}}, "settings are a dictionary .* not empty"),
        ({"sources": {"a": "/tmp"}}, "Source"),
        ({"settings": {}}, "not empty"),
        ({"settings": {"a": {"threads": 4}}}, "cycle_length, .* no 'threads'"),
        ({"settings": {"a": {"prefetch": -1}}}, "prefetch must be a whole number from 0 up"),
        ({"settings": {"a": {"cycle_length": 0}}}, "cycle_length must be"),
        ({"settings": {"a": {"cache": 1}}}, "cache must be True or False"),
        ({"steps": 0}, "steps must be"),
        ({"repeats": 1.5}, "repeats must be"),
        ({"compute_s": -1}, "compute_s must be a number from 0"),
        ({"caches": ["hot"]}, "'cold', 'warm'"),
        ({"caches": []}, "'cold', 'warm'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_rank_is_asked(folder, changes, says):
    usual = {"sources": {"s": Source(folder / "few")}, "settings": {"plain": {}}, "steps": 2, "compute_s": 0.0}
    with pytest.raises(ValueError, match=says):
        measure_pipeline(World(), **{**usual, **changes})


def test_files_that_are_too_few_or_out_of_the_stores_reach_are_refused(folder, tmp_path):
    volumes.write(tmp_path / "one", 2, SIZE)
    with pytest.raises(ValueError, match="1 files for 2 ranks; write volumes to more files"):
        measure_pipeline(World(), {"s": Source(tmp_path / "one")}, {"plain": {}}, 1, 0.0)
    with pytest.raises(ValueError, match="has no .*tfrecord files"):
        Source(tmp_path).files()
    with EmulatedFileSystem(folder, FAST) as store, pytest.raises(ValueError, match="leads out of the file system"):
        Source(tmp_path / "one", store.client()).files()
    with pytest.raises(ValueError, match="empty list"):
        dataset([])
