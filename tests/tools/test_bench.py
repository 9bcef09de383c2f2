"""The benches: fair contenders, honest arithmetic. How fast anything is, is not tested here."""

import importlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nurion_utils import timing
from nurion_utils.models import cosmoflow_small

ROOT = Path(__file__).resolve().parents[2]

import blocks  # noqa: E402
import calls  # noqa: E402
import collective  # noqa: E402
import groups  # noqa: E402
import imports  # noqa: E402
import staging  # noqa: E402
import staging_nodes  # noqa: E402
from run import ROWS, Row, summarise, table  # noqa: E402

TINY = {"network": 8, "batch": 1, "block_s": 0.02}


def row(figure: str, bar: float | None) -> Row:
    return Row("name", "title", "module", "ours", "peer", figure, bar)


def pairs(ours: list[float], peer: list[float], disturbed: list[bool] | None = None) -> pd.DataFrame:
    columns = {"pair": range(len(ours)), "ours": ours, "peer": peer, "disturbed": disturbed or [False] * len(ours)}
    return pd.DataFrame(columns).melt(["pair", "disturbed"], var_name="contender", value_name="time_s")


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_the_figure_is_the_median_of_the_ratios_of_pairs(times: list[float], factor: float):
    blocks = pairs(times, [factor * time for time in times])
    assert summarise(row("speed", 1), blocks)["median"] == pytest.approx(factor)
    assert summarise(row("time", 1), blocks)["median"] == pytest.approx(1 / factor)
    assert summarise(row("own time", 1), blocks)["median"] == pytest.approx(np.median(times))


@pytest.mark.parametrize(
    ("figure", "bar", "met"),
    [("speed", 2, True), ("speed", 2.1, False), ("time", 0.5, True), ("time", 0.4, False)]
    + [("extra time", -900, True), ("extra time", -1100, False), ("own time", 1.1, True), ("own time", 1, False)],
)
def test_a_bar_is_met_or_missed(figure: str, bar: float, met: bool):
    assert summarise(row(figure, bar), pairs([1.0, 1.0], [2.0, 2.0]))["met"] is met


def test_disturbed_pairs_are_dropped_and_counted():
    result = summarise(row("speed", 1.5), pairs([1.0, 1.0, 9.0], [2.0, 2.0, 1.0], [False, False, True]))
    assert (result["median"], result["pairs"], result["dropped"], result["met"]) == (2, 2, 1, True)


def test_on_a_busy_machine_no_bar_is_met_or_missed():
    result = summarise(row("speed", 1.5), pairs([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [False, True, True]))
    assert result["met"] is None
    assert "machine busy" in table([result])


def test_a_row_without_a_bar_is_only_reported():
    result = summarise(row("speed", None), pairs([1.0, 1.0], [2.0, 2.0]))
    assert (result["median"], result["bar"], result["met"]) == (2, None, None)
    assert table([result]).splitlines()[-1].endswith("| - | - | 2 (0) |")


def test_contenders_take_turns_until_enough_turns_were_quiet(monkeypatch: pytest.MonkeyPatch):
    others = iter([0, 0, 0, 9, 9, 9, *[9] * 8])  # read before and after each block: the second one is disturbed
    monkeypatch.setattr(timing, "_others_s", lambda: next(others))
    order = []
    contenders = {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}
    measured = blocks.alternate(contenders, pairs=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert measured.groupby("pair")["disturbed"].all().tolist() == [True, False, False]
    assert measured.groupby("contender")["time_s"].unique().to_dict() == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("is_ours", [True, False])
def test_cpu_time_of_descendants_is_not_that_of_others(is_ours: bool, monkeypatch: pytest.MonkeyPatch):
    machine = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine)  # so that only our own part can change
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    disown = "" if is_ours else "import os\nos.setsid()\nif os.fork(): os._exit(0)\n"
    before = timing._others_s()
    with subprocess.Popen([sys.executable, "-c", disown + burn], stdout=subprocess.PIPE) as process:
        process.stdout.read()  # ends when the last process that holds the pipe does
    assert (before - timing._others_s() > 0.4) == is_ours


@pytest.mark.tensorflow
def test_imports_are_timed_in_a_fresh_python():
    result = summarise(next(row for row in ROWS if row.name == "import"), imports.measure(pairs=1))
    assert 0 < result["ours"] < result["peer"]


@pytest.mark.ranks
def test_our_ranks_train_in_every_way_and_sleep_in_between():
    with groups.training(["alone", "distributed", "by hand", "one message", "half precision"], **TINY) as ours:
        assert all(time_step() > 0 for time_step in ours.values())
        deadline = time.monotonic() + 20  # a signal to stop is obeyed when the process next runs, not when it is sent
        while (stopped := _stopped_descendants()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stopped == 2


def _stopped_descendants() -> int:
    states = [process.status() for process in psutil.Process().children(recursive=True)]
    return states.count(psutil.STATUS_STOPPED)


@pytest.mark.ranks
def test_allreduces_are_timed_in_turn_on_real_ranks():
    times = collective.measure(n_ranks=2, size_bytes=4096, pairs=1, block_s=0.01).query("pair == 0")
    assert times["contender"].tolist() == ["native", "ring", "shared"] and (times["time_s"] > 0).all()


@pytest.mark.ranks
def test_calls_are_timed_in_turn_on_the_same_ranks():
    times = calls.measure(n_ranks=2, pairs=1, block_s=0.01).query("pair == 0")
    assert times["contender"].tolist() == ["run", "apply_sync"] and (times["time_s"] > 0).all()


@pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")
@pytest.mark.parametrize("cold", [True, False])
def test_copies_are_timed_in_turn_and_removed(cold: bool, tmp_path: Path):
    times = staging.measure(n_files=60, size_bytes=5000, cold=cold, pairs=1, destination=str(tmp_path))
    times = times.query("pair == 0").set_index("contender")
    assert list(times.index) == ["nurion_utils", "cp", "rsync", "tar", "read", "fastest"]
    assert times.loc["fastest", "time_s"] == times.loc[["cp", "rsync", "tar"], "time_s"].min() > 0
    assert cold or (times["resident"] == 1).all()  # a cold cache is not in every file system's power
    assert not list(tmp_path.iterdir())


@pytest.mark.lab
@pytest.mark.ranks
@pytest.mark.skipif(
    not all(map(shutil.which, [*staging_nodes.PACKAGES, "sbcast"])), reason="sshfs, rsync or Slurm is not installed"
)
def test_four_nodes_get_all_files_in_each_way(permitted: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "MAX_ATTEMPTS", 1)
    times = staging_nodes.measure(n_files=5, size_bytes=5000, rate_mbit=200, pairs=1)
    assert times["contender"].tolist() == ["nurion_utils", "everyone", "sbcast", "rsync"]
    assert (times["time_s"] > 0).all()


@pytest.mark.ranks
@pytest.mark.parametrize("network", [8, [6, 5, 4]])
@pytest.mark.parametrize("name", ["tensorflow", "torch"])
def test_a_peer_trains(name: str, network: int | list[int]):
    if name == "torch":
        pytest.importorskip("torch", reason="PyTorch comes with make bench")
    peer = importlib.import_module(f"peer_{name}")
    with groups.training([name], **{**TINY, "network": network}, prepare=peer.prepare) as times:
        assert times[name]() > 0


@pytest.mark.tensorflow
@pytest.mark.parametrize("size", [8, 32])
def test_the_peer_in_pytorch_is_the_same_network(size: int):
    torch = pytest.importorskip("torch", reason="PyTorch comes with make bench")
    from peer_torch import network

    theirs, model = network(size), cosmoflow_small(size)
    keras.utils.set_random_seed(1)
    weights = [np.random.normal(size=weight.shape, scale=0.1).astype("float32") for weight in model.get_weights()]
    model.set_weights(weights)
    parameters = list(theirs.parameters())
    assert [parameter.numel() for parameter in parameters] == [weight.size for weight in weights]
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            inputs_first = {5: (4, 3, 0, 1, 2), 2: (1, 0), 1: (0,)}[weight.ndim]
            parameter.copy_(torch.from_numpy(weight.transpose(inputs_first).copy()))
        x = np.random.normal(size=(2, size, size, size, 1)).astype("float32")
        output = theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(output, model(x), rtol=1e-4, atol=1e-5)
