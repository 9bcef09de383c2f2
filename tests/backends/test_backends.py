"""Horovod over each of its libraries gives the same sums, and what is reported about them is what really ran."""

import dataclasses
import itertools
import os
import re
import sys
import types
from functools import partial

import numpy as np
import pandas as pd
import pytest

from nurion_utils import backends, models, ranks, recordings, timing
from nurion_utils.backends import Backend, BackendError, measuring, process
from nurion_utils.ranks import watching

DTYPES = ["float32", "float64", "int32", "int64"]
LENGTHS = [1, 2, 3, 7, 1000, 65_537]  # odd ones too: three ranks cannot cut them into equal parts


@pytest.fixture(scope="module")
def three():
    with ranks.start(3) as world:
        yield world


@pytest.fixture(scope="module")
def three_of_gloo():
    with ranks.start(3) as world:
        yield world


@pytest.fixture
def world3(three):
    """Three ranks; a test that fails leaves no Horovod that takes the cores from the next, and no broken world."""
    yield three if "running" in repr(three) else three.restart()
    if "running" in repr(three):
        three.run(backends.shutdown)


class Lent:
    """Ranks that others use as well: who leaves them ends Horovod, and not the ranks."""

    def __init__(self, world: ranks.World) -> None:
        self.run, self.world = world.run, world

    def __exit__(self, *exception: object) -> None:
        if "running" in repr(self.world):
            self.run(backends.shutdown)


@pytest.fixture
def lend(monkeypatch):
    """Has the next that start ranks get these worlds, in this order; None stands for fresh ranks, two of them."""

    def lending(*worlds: ranks.World | None) -> None:
        start, waiting = ranks.start, list(worlds)
        monkeypatch.setattr(ranks, "start", lambda n, env=None: Lent(w) if (w := waiting.pop(0)) else start(2, env))

    return lending


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Where all ranks refuse, minutes of a busy machine may lie between the first and the last that says so."""
    monkeypatch.setattr(watching, "GRACE_S", 120.0)


def reduced(backend: str, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """On every rank: what Horovod makes of random tensors of each type and length, and the sums that numpy makes."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    random = np.random.default_rng([seed, comm.rank])
    backends.init(backend)
    pairs = []
    for dtype, length in itertools.product(DTYPES, LENGTHS):
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


def assert_sums(world: ranks.World, backend: str, seed: int = 0) -> None:
    by_rank = world.run(reduced, backend, seed, timeout_s=240)
    for results in zip(*by_rank, strict=True):
        for got, total in results:
            assert got.dtype == total.dtype and got.shape == total.shape
            tolerance = 0 if got.dtype.kind == "i" else 8 * np.finfo(got.dtype).eps
            scale = np.abs(total).max() + 1000
            assert np.abs(got - total).max() <= tolerance * scale, f"{backend}, {got.dtype}, {len(total)} elements"
        assert len({got.tobytes() for got, _ in results}) == 1, f"ranks differ, {backend}, {results[0][0].dtype}"


def test_mpi_and_oneccl_in_turn_in_the_same_processes_give_numpys_sums(world3):
    for seed, backend in enumerate(("MPI", "oneCCL ring", "MPI", "oneCCL ring")):
        assert_sums(world3, backend, seed)


@pytest.mark.ranks
def test_gloo_gives_numpys_sums_again_and_again(three_of_gloo):
    assert_sums(three_of_gloo, "Gloo")
    assert_sums(three_of_gloo, "Gloo", seed=1)
    with pytest.raises(ranks.RankError, match="Gloo reads its settings once"):
        three_of_gloo.run(backends.init, backends.GLOO_AS_SHIPPED)


def cpu_s() -> float:
    import time

    begin_s = time.process_time()
    time.sleep(2)
    return time.process_time() - begin_s


def test_ranks_in_which_horovod_idles_leave_the_cores_to_others(world3):
    world3.run(backends.init, "MPI")
    assert sum(world3.run(cpu_s)) < 0.7  # as shipped, two of the three poll for the one that sleeps: 2.7 s and more


def test_a_process_that_ran_over_mpi_refuses_gloo_in_one_sentence(world3):
    world3.run(started_and_ended, "MPI")
    with pytest.raises(ranks.RankError, match="give Gloo ranks of its own"):
        world3.run(backends.init, "Gloo")


def test_a_process_that_ran_oneccl_refuses_other_settings_of_it(world3):
    world3.run(started_and_ended, "oneCCL ring")
    with pytest.raises(ranks.RankError, match="oneCCL reads its settings once"):
        world3.run(backends.init, "oneCCL")


def test_the_environment_is_afterwards_what_it_was(world3, tmp_path):
    assert world3.run(partial(started_and_ended, timeline=tmp_path / "t.json"), "MPI") == [set()] * 3
    assert world3.run(started_and_ended, "oneCCL ring") == [set()] * 3


def test_settings_are_what_a_job_script_exports():
    chosen = backends.settings("oneCCL ring", cycle_ms=0.5, timeline="t.json")
    assert chosen == {
        "CCL_ALLREDUCE": "ring",
        "HOROVOD_CPU_OPERATIONS": "CCL",
        "HOROVOD_CONTROLLER": "mpi",
        "HOROVOD_CYCLE_TIME": "0.5",
        "HOROVOD_FUSION_THRESHOLD": str(128 << 20),
        "HOROVOD_TIMELINE": "t.json",
    }
    assert "HOROVOD_CYCLE_TIME" not in backends.settings(cycle_ms=None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "NCCL"}, "there is no backend 'NCCL'"),
        ({"cycle_ms": 0}, "cycle_ms must be a number above 0"),
        ({"cycle_ms": 1e39}, "cycle_ms must be a number .*up to 10,000"),  # Horovod would sleep for ever
        ({"fusion_bytes": -1}, "fusion_bytes must be a whole number from 0"),
        ({"fusion_bytes": 2**31}, "fusion_bytes must be a whole number from 0 to 2,147,483,647"),
        ({"timeline": True}, "is the name of a file, not True"),
        ({"timeline": b"t.json"}, "is the name of a file, not b't.json'"),
        ({"timeline": ""}, "is the name of a file, not ''"),
        ({"timeline": "t\0.json"}, "is the name of a file"),
        ({"timeline": "DYNAMIC"}, "is the name of a file"),  # to Horovod that means: not yet
    ],
)
def test_settings_that_are_not_possible_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        backends.settings(**settings)


@pytest.mark.parametrize(
    ("operations", "env", "words"),
    [
        ("NCCL", {}, "the operations of a backend must be one of 'MPI', 'GLOO', 'CCL', not 'NCCL'"),
        ("CCL", {"CCL_WORKER_COUNT": 1}, "environment variables, which are strings"),
        ("CCL", None, "environment variables, which are strings, not None"),
        ("MPI", {"HOROVOD_CYCLE_TIME": "5"}, "HOROVOD_CYCLE_TIME is set by an argument of init"),
        ("MPI", {"A=B": "5"}, "'A=B' cannot be set to '5'"),
        ("MPI", {"A": "5\0"}, "'A' cannot be set to"),
    ],
)
def test_a_backend_that_is_not_possible_cannot_be_made(operations, env, words):
    with pytest.raises(ValueError, match=words):
        Backend(operations, env)


def on_rank_0_only(settings: dict, otherwise: dict) -> None:
    """On every rank: Horovod started, by other arguments on rank 0."""
    from mpi4py import MPI

    backends.init("MPI", **(settings if MPI.COMM_WORLD.rank == 0 else otherwise))
    backends.shutdown()


@pytest.fixture
def places(tmp_path):
    """What a timeline cannot be written to, by name."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    return {
        "a directory": tmp_path,
        "a file in no directory": tmp_path / "none" / "t.json",
        "a file in a file": tmp_path / "file" / "t.json",
        "a device": "/dev/full",
        "a pipe": tmp_path / "fifo",
        "a link to itself": tmp_path / "loop",
        "a long name": tmp_path / ("t" * 300),
        "a folder of the kernel": "/proc/t.json",
    }


def test_a_file_that_cannot_be_written_is_refused(places):
    for place in map(str, places.values()):
        with pytest.raises(ValueError, match=f"{re.escape(place)} cannot be written: .*; choose another file"):
            process.require_writable(place)


def test_a_timeline_that_cannot_be_written_is_refused_on_all_ranks_before_horovod_starts(world3, places):
    for name in ("a directory", "a file in a file"):
        with pytest.raises(ranks.RankError, match="ValueError: .* cannot be written: .*and so did ranks 1, 2"):
            world3.run(partial(backends.init, timeline=places[name]), "MPI", timeout_s=240)
    assert not any(world3.run(is_initialized))


def test_where_only_one_rank_sees_the_fault_all_ranks_hear_of_it(world3):
    with pytest.raises(ranks.RankError, match="cycle_ms must be a number"):
        world3.run(on_rank_0_only, {"cycle_ms": -1}, {}, timeout_s=240)
    with pytest.raises(ranks.RankError, match="cycle_ms must be a number"):
        world3.run(on_rank_0_only, {}, {"cycle_ms": -1}, timeout_s=240)
    with pytest.raises(ranks.RankError, match="give all the same"):
        world3.run(on_rank_0_only, {}, {"cycle_ms": 2.0}, timeout_s=240)
    with pytest.raises(ranks.RankError, match="give all the same"):  # rank 0 is the one that writes it
        world3.run(on_rank_0_only, {}, {"timeline": "/tmp/never_written.json"}, timeout_s=240)


def run_in_a_folder_of_its_own(folder: str, timeline: str) -> None:
    """On every rank: Horovod's timeline written from a folder that only rank 0 has."""
    import os

    from mpi4py import MPI

    here = os.getcwd()
    if MPI.COMM_WORLD.rank == 0:
        os.makedirs(os.path.join(folder, "sub"))
        os.chdir(folder)
    try:
        backends.init("MPI", timeline=timeline)
        backends.shutdown()
    finally:
        os.chdir(here)


def test_only_rank_0_must_have_the_folder_of_a_timeline(world3, tmp_path):
    world3.run(run_in_a_folder_of_its_own, str(tmp_path / "of_rank_0"), "sub/t.json", timeout_s=240)
    assert (tmp_path / "of_rank_0" / "sub" / "t.json").exists()


def is_initialized() -> bool:
    import horovod.tensorflow as hvd

    return hvd.is_initialized()


@pytest.mark.ranks
def test_every_backend_is_verified_by_the_timeline_and_all_give_exact_sums(lend, three, three_of_gloo):
    lend(three, three_of_gloo, None, three)
    table = backends.measure_backends([4, 2**16, 2**20], ranks=3, backends=list(backends.BACKENDS), repeats=2)
    assert list(backends.BACKENDS) == ["MPI", "Gloo", "oneCCL", "oneCCL ring"] == list(table["backend"].unique())
    assert (table["absent"] == "").all() and (table["time_s"] > 0).all()
    assert len(table) == 4 * 3 * 2
    per_s = table["size_bytes"] / table["time_s"]
    np.testing.assert_allclose(table["bus_bandwidth_gb_per_s"], 2 * 2 / 3 * per_s * 1e-9)

    compared = timing.ratios(table, "MPI", "backend", by=["size_bytes"])
    assert set(compared["backend"]) == set(backends.BACKENDS) - {"MPI"}
    assert (compared["turns"] == 2).all()
    assert (compared["least"] <= compared["speedup"]).all() and (compared["speedup"] <= compared["most"]).all()


def test_a_backend_that_is_not_what_runs_is_an_error(lend, world3):
    @dataclasses.dataclass(frozen=True)
    class Pretender(Backend):
        @property
        def activity(self) -> str:
            return "CCL_ALLREDUCE"

    lend(world3)
    with pytest.raises(BackendError, match="carried the tensor with MPI_ALLREDUCE, not CCL_ALLREDUCE"):
        backends.measure_backends([1024], 3, backends={"pretender": Pretender("MPI")}, repeats=1)


def test_a_backend_that_cannot_start_is_reported_absent_with_the_reason_and_the_others_are_measured(lend, world3):
    broken = Backend("CCL", {"CCL_ATL_TRANSPORT": "no such transport"})
    lost = Backend("GLOO", {"HOROVOD_GLOO_IFACE": "ib7"})
    lend(world3, None, None, world3)  # ranks that die are tried twice
    chosen = {"MPI": Backend("MPI"), "broken": broken, "lost": lost}
    table = backends.measure_backends([1024, 4096], 3, backends=chosen, repeats=2)
    absent = table[table["backend"] != "MPI"].set_index("backend")
    assert list(absent.index) == ["broken", "broken", "lost", "lost"] and absent["time_s"].isna().all()
    assert absent.loc["broken", "absent"].str.contains("was ended by|left its process|raised").all()
    assert absent.loc["lost", "absent"].str.contains("an interface that has an IPv4 address; there are lo").all()
    assert table[table["backend"] == "MPI"]["time_s"].notna().sum() == 4


@pytest.mark.ranks
def test_ranks_that_die_in_the_middle_are_replaced_and_the_table_is_complete(tmp_path, monkeypatch):
    def killed_once(backend: Backend, sizes: list[int], cycles: list[float]) -> dict:
        import os
        import signal

        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        MPI.COMM_WORLD.Barrier()
        return {(cycles[0], sizes[0]): 1.0}

    monkeypatch.setattr(measuring, "timed", killed_once)
    monkeypatch.setattr(measuring, "_what_runs", lambda backend: backend.activity)  # without a Horovod it is quicker
    table = backends.measure_backends([1024], backends=["MPI"], repeats=2)
    assert (tmp_path / "killed").exists()
    assert len(table) == 2 and (table["time_s"] > 0).all()


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (lambda: types.SimpleNamespace(ccl_built=lambda: 0, mpi_enabled=bool, gloo_enabled=bool), "built without CCL"),
        (lambda: None, "Horovod cannot be imported here"),
    ],
)
def test_the_build_is_asked_whether_it_has_a_backend(monkeypatch, built, words):
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", built())
    with pytest.raises(BackendError, match=words):
        process.possible(backends.BACKENDS["oneCCL"], {}, rank=0)


@pytest.mark.parametrize("count", ["two", "0"])
def test_the_environment_is_looked_at_before_horovod_starts(monkeypatch, count):
    every = types.SimpleNamespace(ccl_built=lambda: 1, mpi_enabled=bool, gloo_enabled=bool)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", every)
    monkeypatch.setenv("CCL_WORKER_COUNT", count)
    with pytest.raises(ValueError, match=f"CCL_WORKER_COUNT must be a whole number from 1 up, not '{count}'"):
        process.possible(backends.BACKENDS["oneCCL"], {}, rank=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sizes_bytes": [6]}, "multiples of 4 bytes"),
        ({"sizes_bytes": []}, "sizes_bytes must be a list"),
        ({"sizes_bytes": "big"}, "sizes_bytes must be a list"),
        ({"sizes_bytes": [2**34]}, "a size in bytes must be a whole number from 4 to"),
        ({"backends": ["NCCL"]}, "there is no backend 'NCCL'"),
        ({"backends": "MPI"}, "a list of names"),
        ({"backends": {"mine": "CCL"}}, "there is no backend 'CCL'"),
        ({"ranks": 1}, "ranks must be a whole number from 2"),
        ({"repeats": 0}, "repeats must be"),
        ({"cycles_ms": [0]}, "a cycle time in ms must be a number above 0"),
        ({"cycles_ms": 1.0}, "cycles_ms must be a list"),
        ({"backends": ["MPI", "MPI"]}, "a backend is given twice"),
        ({"cycles_ms": [1.0, 1e9]}, "cycle_ms must be a number"),
        ({"env": "abc"}, "env must be a dictionary"),
        ({"sizes_bytes": [4, 4]}, "given twice"),
        ({"backends": [Backend("MPI")]}, "backends of your own need names"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(arguments, words):
    with pytest.raises(ValueError, match=words):
        backends.measure_backends(**{"sizes_bytes": [1024], **arguments})


@pytest.mark.ranks
def test_across_a_slow_network_every_backend_takes_the_time_that_the_wire_needs(permitted):
    chosen = {name: backends.BACKENDS[name] for name in ("MPI", "Gloo", "oneCCL ring")}
    with ranks.start(2, rate_mbit=200) as of_mpi, ranks.start(2, rate_mbit=200) as of_gloo:
        labs = iter([Lent(of_mpi), Lent(of_gloo), Lent(of_mpi)])
        with backends.BackendWorlds(chosen, lambda: next(labs)) as worlds:
            observed = worlds.observe(2, backends.timed, [2_000_000], [1.0])
    assert not worlds.absent and len(observed) == 6
    wire_s = 8 * 2_000_000 / 200e6
    assert all(0.9 * wire_s <= times[1.0, 2_000_000] <= 3 * wire_s for _, _, times, _ in observed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate_mbit": 0}, "rate_mbit must be a number above 0"),
        ({"image": 31}, "image must be a whole number from 32"),
        ({"backends": ["NCCL"]}, "there is no backend 'NCCL'"),
    ],
)
def test_epochs_that_cannot_be_are_refused_before_anything_starts(arguments, words):
    with pytest.raises(ValueError, match=words):
        backends.measure_epochs(**arguments)


def with_a_smaller_network() -> None:
    """On every rank: epochs of a perceptron, whose 4 MB of gradients need less time than the 102 MB of ResNet-50."""
    from nurion_utils import models

    models.resnet50 = lambda image: models.mlp((image, 1000, 1000, 10))


def test_an_epoch_says_what_share_of_it_was_communication(lend, world3):
    world3.run(with_a_smaller_network)
    lend(world3, world3)
    table = backends.measure_epochs(["MPI", "oneCCL ring"], 3, image=32, batch=1, steps=1, repeats=2)
    assert len(table) == 4 and (table["absent"] == "").all()
    assert table["communication_share"].between(0.01, 0.99).all()
    np.testing.assert_allclose(table["images_per_s"], 3 / table["epoch_s"])
    (row,) = timing.ratios(table, "MPI", "backend", value="epoch_s").itertuples()
    assert row.backend == "oneCCL ring" and row.low <= row.speedup <= row.high


def test_the_published_speedups_come_with_their_sources():
    published = recordings.load("published_backends")
    assert published["source"].str.len().min() > 20
    nurion = published.set_index("study").loc["Nurion"]
    assert (nurion["speedup_low"], nurion["speedup_high"]) == (1.8, 2.0)


def test_the_recordings_are_complete_and_as_the_notebook_reads_them():
    table = recordings.load("backends")
    turns = table.groupby(["memory", "ranks", "cycle_ms", "size_bytes", "backend"])["repeat"].nunique()
    assert (turns == turns.iloc[0]).all() and turns.iloc[0] >= 7
    assert len(turns) == 2 * 2 * 2 * 7 * 6 and table["absent"].isna().all() and (table["time_s"] > 0).all()
    runs = recordings.load("resnet_epochs")
    assert set(runs["backend"]) == {"MPI", "Gloo", "oneCCL ring"} and runs["absent"].isna().all()
    assert set(runs["rate_mbit"].dropna()) == {200, 1000} and set(runs["image"]) == {64, 128}
    assert runs["source"].str.contains("recorded with horovod").all()


def test_settings_are_swept_in_turn_on_real_ranks(world2):
    settings = [{"fusion_bytes": 0}, {}, {"cycle_ms": 250.0}, {"compression": "fp16"}, {"timeline": True}]
    table = backends.measure_fusion(world2, settings, models.mlp, repeats=2)
    assert len(table) == 10 and (table["compute_s"] > 0).all()
    by_setting = table.groupby("setting")["step_s"].median()
    assert by_setting[2] > 3 * by_setting[1]  # who looks every 250 ms makes gradients wait, on a busy machine too
    assert (table["gradient_bytes"] == 4 * (64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10)).all()
    assert table.groupby("setting")["repeat"].apply(list).map(sorted).eq([[0, 1]] * 5).all()
    assert table.groupby("setting")[["fusion_bytes", "cycle_ms"]].first().iloc[1].tolist() == [128 << 20, 1.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([{"buffer": 1}], "a setting is a dictionary with some of fusion_bytes"),
        ([{"compression": "int8"}], "compression must be one of 'none', 'fp16', not 'int8'"),
        ([{"timeline": "t.json"}], "timeline must be one of False, True, not 't.json'"),
        ([{"cycle_ms": None}], "leave out what shall have its default"),
        ([{}, {"cycle_ms": 0}], "cycle_ms must be a number above 0"),
        ([{"fusion_bytes": -1}], "fusion_bytes must be a whole number from 0"),
        ([], "settings must be a list such as"),
        (None, "settings must be a list such as"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(settings, words):
    with pytest.raises(ValueError, match=words):
        backends.measure_fusion(None, settings)


def train(steps: int) -> None:
    """On every rank."""
    backends.init("MPI", cycle_ms=None, fusion_bytes=None)
    step = backends.steps_of(models.mlp)("none")
    for _ in range(steps):
        step()
    backends.shutdown()


SEARCH = {
    "HOROVOD_AUTOTUNE": "1",
    "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1",
    "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "2",
    "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES": "15",
}


@pytest.mark.ranks
def test_horovods_own_search_runs_and_writes_its_points_down(tmp_path):
    with ranks.start(2, env={**SEARCH, "HOROVOD_AUTOTUNE_LOG": str(tmp_path / "log.csv")}) as world:
        world.run(train, 100, timeout_s=600)
    log = pd.read_csv(tmp_path / "log.csv")
    assert len(log) >= 5 and (log["score"] > 0).all()
    assert log["cycle_time_ms"].between(1, 100).all() and log["tensor_fusion_threshold"].between(0, 64).all()
    assert log["tensor_fusion_threshold"].nunique() > 2
