"""Horovod over each of its libraries gives the same sums, and what is reported about them is what really ran."""

import dataclasses
import os
from functools import partial

import numpy as np
import pandas as pd
import pytest

from nurion_utils import backends, ranks
from nurion_utils.backends import Backend, BackendError, comparing, epochs, fusion
from nurion_utils.training import models

DTYPES = ["float32", "float64", "int32", "int64"]
LENGTHS = [1, 2, 3, 7, 1000, 65_537]  # odd ones too: three ranks cannot cut them into equal parts


@pytest.fixture(scope="module")
def world3():
    with ranks.start(3) as world:
        yield world


def reduced(backend: str, dtype: str, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """On every rank: what Horovod makes of a random tensor of each length, and the sum that numpy makes."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    random = np.random.default_rng([seed, comm.rank])
    backends.init(backend)
    pairs = []
    for length in LENGTHS:
        mine = (random.normal(size=length) * 1000).astype(dtype)
        # gathered with MPI's pickles: the reference must not come from a reduction
        total = np.sum(comm.allgather(mine), axis=0, dtype=dtype)
        pairs.append((hvd.allreduce(tf.constant(mine), op=hvd.Sum, name=f"{dtype}_{length}").numpy(), total))
    backends.shutdown()
    return pairs


def started_and_ended(backend: str, **settings) -> set[str]:
    """On every rank: what the environment is different in afterwards."""
    import os

    before = dict(os.environ)
    backends.init(backend, **settings)
    backends.shutdown()
    return {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}


def assert_sums(world: ranks.World, backend: str) -> None:
    for seed, dtype in enumerate(DTYPES):
        by_rank = world.run(reduced, backend, dtype, seed, timeout_s=120)
        for results in zip(*by_rank, strict=True):
            for got, total in results:
                assert got.dtype == total.dtype and got.shape == total.shape
                tolerance = 0 if dtype.startswith("int") else 8 * np.finfo(dtype).eps
                scale = np.abs(total).max() + 1000
                assert np.abs(got - total).max() <= tolerance * scale, f"{backend}, {dtype}, {len(total)} elements"
            assert len({got.tobytes() for got, _ in results}) == 1, f"ranks differ, {backend}, {dtype}"


# -- the same sums ------------------------------------------------------------------------------------------------


def test_mpi_and_oneccl_in_turn_in_the_same_processes_give_numpys_sums(world3):
    for backend in ("MPI", "oneCCL ring", "MPI", "oneCCL ring"):
        assert_sums(world3, backend)


def test_gloo_gives_numpys_sums_again_and_again():
    with ranks.start(3) as world:
        assert_sums(world, "Gloo")
        assert_sums(world, "Gloo")
        with pytest.raises(ranks.RankError, match="Gloo reads its settings once"):
            world.run(backends.init, backends.GLOO_AS_SHIPPED)


# -- which one runs -----------------------------------------------------------------------------------------------


def test_a_process_that_ran_over_mpi_refuses_gloo_in_one_sentence(world3):
    world3.run(started_and_ended, "MPI")
    with pytest.raises(ranks.RankError, match="use ranks of their own for Gloo"):
        world3.run(backends.init, "Gloo")


def test_a_process_that_ran_oneccl_refuses_other_settings_of_it(world3):
    world3.run(started_and_ended, "oneCCL ring")
    with pytest.raises(ranks.RankError, match="oneCCL reads its settings once"):
        world3.run(backends.init, "oneCCL")


def test_a_search_on_ranks_that_were_used_is_refused_for_that_reason(world3, tmp_path):
    search = partial(backends.init, cycle_ms=None, fusion_bytes=None, autotune_log=tmp_path / "log.csv")
    world3.run(backends.init, "MPI")  # its settings are in the environment while it runs
    with pytest.raises(ranks.RankError, match="Horovod's search needs ranks that nothing else has used"):
        world3.run(search, "MPI")
    world3.run(backends.shutdown)


def test_the_environment_is_afterwards_what_it_was(world3, tmp_path):
    assert world3.run(partial(started_and_ended, timeline=tmp_path / "t.json"), "MPI") == [set()] * 3
    assert world3.run(started_and_ended, "oneCCL ring") == [set()] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cycle_ms": 0}, "cycle_ms must be a number above 0"),
        ({"fusion_bytes": -1}, "fusion_bytes must be a whole number from 0"),
        ({"timeline": "/no/such/place/t.json"}, "there is no directory /no/such/place"),
        ({"timeline": True}, "are names of files, not True"),
        ({"autotune_log": "a.csv"}, "there is nothing to search"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_horovod_is_touched(settings, words):
    with pytest.raises(ValueError, match=words):
        backends.init("Gloo", **settings)


def test_gloo_without_its_interface_says_which_there_are():
    table = backends.compare_backends([1024], backends=["Gloo"], repeats=1, env={"HOROVOD_GLOO_IFACE": "ib7"})
    assert table["absent"].str.contains("must name an interface that has an IPv4 address; there are lo").all()


def test_backends_with_settings_of_their_own_get_ranks_of_their_own():
    settings = {"HOROVOD_CACHE_CAPACITY": "0"}
    with comparing.Groups({"no cache": Backend("MPI", settings), "MPI": Backend("MPI")}, 2) as groups:
        pids = {name: groups.run(name, os.getpid) for name in ("no cache", "MPI")}
    assert not set(pids["no cache"]) & set(pids["MPI"])


def test_every_backend_is_verified_by_the_timeline_and_all_give_exact_sums():
    table = backends.compare_backends([4, 2**16, 2**20], ranks=2, backends=list(backends.BACKENDS), repeats=2)
    assert set(table["backend"]) == set(backends.BACKENDS)
    assert (table["absent"] == "").all() and (table["time_s"] > 0).all()
    assert len(table) == 4 * 3 * 2
    np.testing.assert_allclose(table["bus_bandwidth_gb_per_s"], table["size_bytes"] / table["time_s"] * 1e-9)  # P = 2

    compared = comparing.ratios(table)
    assert set(compared["backend"]) == set(backends.BACKENDS) - {"MPI"}
    assert (compared["turns"] == 2).all()
    assert (compared["least"] <= compared["speedup"]).all() and (compared["speedup"] <= compared["most"]).all()


def test_a_backend_that_is_not_what_runs_is_an_error():
    @dataclasses.dataclass(frozen=True)
    class Pretender(Backend):
        @property
        def activity(self) -> str:
            return "CCL_ALLREDUCE"

    with pytest.raises(BackendError, match="carried the tensor with MPI_ALLREDUCE, not with CCL_ALLREDUCE"):
        backends.compare_backends([1024], backends={"pretender": Pretender("MPI")}, repeats=1)


def test_a_backend_that_cannot_start_is_reported_absent_with_the_reason_and_the_others_are_measured():
    broken = Backend("CCL", {"CCL_ATL_TRANSPORT": "no such transport"})
    table = backends.compare_backends([1024, 4096], backends={"MPI": Backend("MPI"), "broken": broken}, repeats=2)
    absent = table[table["backend"] == "broken"]
    assert len(absent) == 2 and absent["time_s"].isna().all()
    assert absent["absent"].str.contains("was ended by|left its process|raised").all()
    assert table[table["backend"] == "MPI"]["time_s"].notna().sum() == 4
    assert set(comparing.ratios(table)["backend"]) == set()


def test_ranks_that_die_in_the_middle_are_replaced_and_the_table_is_complete(tmp_path, monkeypatch):
    measured = comparing.timed

    def killed_once(backend: Backend, sizes_bytes: list[int], cycle_ms: float) -> list[float]:
        import os
        import signal

        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(backend, sizes_bytes, cycle_ms)

    monkeypatch.setattr(comparing, "timed", killed_once)
    table = backends.compare_backends([1024], backends=["MPI"], repeats=2)
    assert (tmp_path / "killed").exists()
    assert len(table) == 2 and (table["time_s"] > 0).all()


def test_the_build_is_asked_whether_it_has_a_backend(monkeypatch):
    import sys
    import types

    bare = types.SimpleNamespace(mpi_built=lambda: True, gloo_built=lambda: True, ccl_built=lambda: 0)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", bare)
    backends.require_built("MPI")
    with pytest.raises(BackendError, match="built without CCL"):
        backends.require_built("oneCCL")
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    with pytest.raises(BackendError, match="Horovod cannot be imported here"):
        backends.require_built("MPI")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sizes_bytes": [6]}, "multiples of 4 bytes"),
        ({"sizes_bytes": []}, "a list of lengths"),
        ({"sizes_bytes": "big"}, "a list of lengths"),
        ({"backends": ["NCCL"]}, "there is no backend 'NCCL'"),
        ({"backends": "MPI"}, "a list of names"),
        ({"backends": {"mine": "CCL"}}, "there is no backend 'CCL'"),
        ({"ranks": 1}, "ranks must be a whole number from 2"),
        ({"repeats": 0}, "repeats must be"),
        ({"cycles_ms": [0]}, "a cycle time in ms must be a number above 0"),
        ({"cycles_ms": 1.0}, "cycles_ms must be a list"),
        ({"backends": {"mine": Backend("CCL", {"CCL_WORKER_COUNT": 1})}}, "environment variables are strings"),
        ({"env": backends.KEEP_MEMORY, "rate_mbit": 100}, "leave out env or rate_mbit"),
        ({"env": "abc"}, "env must be a dictionary"),
        ({"rate_mbit": 0}, "rate_mbit must be a number above 0"),
        ({"sizes_bytes": [4, 4]}, "given twice"),
        ({"backends": [Backend("MPI")]}, "backends of your own need names"),
        ({"backends": {"mine": Backend("NCCL")}}, "the operations of a backend are 'MPI', 'GLOO' or 'CCL'"),
        ({"backends": {"mine": Backend("MPI", {"HOROVOD_CYCLE_TIME": "5"})}}, "is set by an argument of init"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(arguments, words):
    with pytest.raises(ValueError, match=words):
        backends.compare_backends(**{"sizes_bytes": [1024], **arguments})


def test_speedups_are_taken_turn_by_turn():
    times = {"MPI": [4.0, 40.0, 6.0], "other": [2.0, 10.0, 2.0]}
    rows = [(name, repeat, time_s) for name, each in times.items() for repeat, time_s in enumerate(each)]
    table = pd.DataFrame(rows, columns=["backend", "repeat", "time_s"]).assign(ranks=2, cycle_ms=1.0, size_bytes=4)
    (row,) = comparing.ratios(table).itertuples()
    assert (row.backend, row.speedup, row.least, row.most, row.turns) == ("other", 3.0, 2.0, 4.0, 3)
    with pytest.raises(ValueError, match="no time of 'Gloo', only of MPI, other"):
        comparing.ratios(table, of="Gloo")


def test_across_a_slow_network_every_backend_takes_the_time_that_the_wire_needs(permitted):
    table = backends.compare_backends([2_000_000], 2, ["MPI", "Gloo", "oneCCL ring"], repeats=2, rate_mbit=200)
    assert (table["absent"] == "").all() and len(table) == 6
    wire_s = 8 * 2_000_000 / 200e6
    assert table["time_s"].between(0.9 * wire_s, 3 * wire_s).all()


# -- an epoch of ResNet-50 ----------------------------------------------------------------------------------------


def test_an_epoch_of_resnet50_says_what_share_of_it_was_communication():
    table = epochs.measure(["MPI", "oneCCL ring"], image=32, batch=1, steps=1, repeats=2)
    assert len(table) == 4 and (table["absent"] == "").all()
    assert table["communication_share"].between(0.01, 0.99).all()
    np.testing.assert_allclose(table["images_per_s"], 2 / table["epoch_s"])
    (row,) = epochs.speedups(table).itertuples()
    assert row.backend == "oneCCL ring" and row.low <= row.speedup <= row.high


def test_the_speedup_of_an_epoch_comes_with_the_share_and_the_speedup_of_its_communication():
    rows = [("MPI", 0, 10.0, 4.0), ("MPI", 1, 10.0, 4.0), ("fast", 0, 8.0, 2.0), ("fast", 1, 8.0, 2.0)]
    table = pd.DataFrame(rows, columns=["backend", "repeat", "epoch_s", "communication_s"]).assign(image=32)
    (row,) = epochs.speedups(table).itertuples()
    assert (row.speedup, row.communication_share, row.communication_speedup) == (1.25, 0.4, 2.0)


def test_the_published_speedups_come_with_their_sources():
    published = epochs.published()
    assert published["source"].str.len().min() > 20
    nurion = published.set_index("study").loc["Nurion"]
    assert (nurion["speedup_low"], nurion["speedup_high"]) == (1.8, 2.0)


# -- recorded -----------------------------------------------------------------------------------------------------


def test_the_recordings_are_complete_and_as_the_notebook_reads_them():
    table = comparing.recorded()
    turns = table.groupby(["memory", "ranks", "cycle_ms", "size_bytes", "backend"])["repeat"].nunique()
    assert (turns == turns.iloc[0]).all() and turns.iloc[0] >= 7
    assert len(turns) == 2 * 2 * 2 * 7 * 6 and table["absent"].isna().all() and (table["time_s"] > 0).all()
    with pytest.raises(ValueError, match="several times of the same turn"):
        comparing.ratios(table)
    runs = epochs.recorded()
    with pytest.raises(ValueError, match="several times of the same turn"):
        epochs.speedups(runs)
    assert set(runs["backend"]) == {"MPI", "Gloo", "oneCCL ring"} and runs["absent"].isna().all()
    assert set(runs["rate_mbit"].dropna()) == {200, 1000} and set(runs["image"]) == {64, 128}
    assert runs["source"].str.contains("recorded with horovod").all()


# -- many small gradients -----------------------------------------------------------------------------------------


def test_settings_are_swept_in_turn_on_real_ranks(world2):
    settings = [{"fusion_bytes": 0}, {}, {"cycle_ms": 50.0}, {"compression": "fp16"}, {"timeline": True}]
    table = fusion.sweep(world2, settings, models.mlp, repeats=2)
    assert len(table) == 10 and (table["compute_s"] > 0).all()
    by_setting = table.groupby("setting")["step_s"].median()
    assert by_setting[2] > 3 * by_setting[1]  # who looks every 50 ms makes gradients wait
    assert (table["gradient_bytes"] == 4 * (64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)).all()
    assert table.groupby("setting")["repeat"].apply(list).map(sorted).eq([[0, 1]] * 5).all()
    assert table.groupby("setting")[["fusion_bytes", "cycle_ms"]].first().iloc[1].tolist() == [128 << 20, 1.0]


@pytest.mark.parametrize(
    ("settings", "backend", "words"),
    [
        ([{"buffer": 1}], "MPI", "a setting is a dictionary with some of fusion_bytes"),
        ([{"compression": "int8"}], "MPI", "compression must be 'none' or 'fp16'"),
        ([{"compression": "fp16"}], "oneCCL", "cannot reduce float16 over oneCCL"),
        ([{}, {"cycle_ms": 0}], "MPI", "cycle_ms must be a number above 0"),
        ([{"fusion_bytes": -1}], "MPI", "fusion_bytes must be a whole number from 0"),
        ([{}], "NCCL", "there is no backend 'NCCL'"),
        ([], "MPI", "settings must be a list such as"),
        (None, "MPI", "settings must be a list such as"),
        ([{}], Backend("MPI"), "backends of your own need names"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(settings, backend, words):
    with pytest.raises(ValueError, match=words):
        fusion.sweep(None, settings, backend=backend)


def test_horovods_own_search_runs_and_its_log_is_read():
    with ranks.start(2, env=fusion.SHORT_SEARCH) as world:
        log = fusion.autotune(world, models.mlp, steps=100)
        with pytest.raises(ranks.RankError, match="Horovod goes on searching in this process"):
            fusion.autotune(world, models.mlp, steps=1)
    assert list(log) == ["point", "fusion_mb", "cycle_ms", "score"]
    assert len(log) >= 5 and (log["score"] > 0).all()
    assert log["cycle_ms"].between(1, 100).all() and log["fusion_mb"].between(0, 64).all()
    assert log["fusion_mb"].nunique() > 2
