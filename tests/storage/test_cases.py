"""The published cases, and the pictures of them and of shared file systems."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils import recordings, sites
from nurion_utils.storage import EmulatedFileSystem, ParallelFileSystem, Workload, cases, draw, simulate, summarise

MEASURED = "Lustre, 64 targets as measured"


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return recordings.load("published_io")


def test_bandwidth_alone_would_let_nurion_feed_4838_nodes_from_lustre_and_12903_from_its_burst_buffer():
    nurion = sites.load("nurion")
    assert cases.node_limit(nurion.file_systems["scratch"].bandwidth_gb_per_s, 62) == 4838
    assert cases.node_limit(nurion.burst_buffer.bandwidth_gb_per_s, 62) == 12903


def test_the_hottest_target_ends_cori_within_a_factor_of_two_of_the_1024_nodes_that_were_reached(published):
    lustre = published[(published["storage"] == "Lustre") & (published["quantity"] == "largest job")]
    reached = lustre["value"].item()
    cori = cases.cori()
    for name in ("Lustre, 64 targets", MEASURED):
        for limit in (cases.hottest_target_limit(cori[name]), cases.simulated_limit(cori[name])):
            assert reached / 2 <= limit <= reached * 2
    assert cases.node_limit(cori["Lustre, 248 targets"].bandwidth_gb_per_s) > 10 * reached  # the mean does not


@pytest.mark.parametrize("targets", [32, 64, pytest.param(248, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target_mb_per_s", [1400, 2820])
def test_the_formula_and_the_simulation_find_the_same_limit(targets, target_mb_per_s):
    storage = ParallelFileSystem(targets, target_mb_per_s, metadata_ops_per_s=1e9)
    assert cases.hottest_target_limit(storage) == pytest.approx(cases.simulated_limit(storage), rel=0.15)


def test_the_formula_solves_its_own_equation():
    storage = ParallelFileSystem(64, 1400, 1e9)
    x = cases.hottest_target_limit(storage) / 64
    hottest = x + math.sqrt(2 * x * math.log(64))
    assert hottest * cases.SAMPLE_BYTES / 1.4e9 == pytest.approx(cases.COMPUTE_S, rel=0.01)


def test_the_burst_buffer_of_cori_feeds_8192_nodes_with_a_third_of_its_bandwidth():
    cori = cases.cori()
    table = cases.scaling(cori, [1, 1024, 8192]).set_index(["storage", "nodes"])
    buffer = table.loc["burst buffer", 8192]
    assert buffer["efficiency"] > 0.99 and buffer["demand_over_peak"] == pytest.approx(0.3, abs=0.01)
    assert table.loc[(MEASURED, 8192), "efficiency"] < 0.25
    assert table.loc[(MEASURED, 8192), "step_s"] > 4 * table.loc[(MEASURED, 1024), "step_s"]
    assert table["efficiency"].xs(1, level="nodes").to_numpy() == pytest.approx(1)
    assert table["step_s"].notna().all()


def test_limits_are_for_whole_files():
    with pytest.raises(ValueError, match="8000000 bytes are on several; use stripe_count=1"):
        cases.hottest_target_limit(replace(ParallelFileSystem.of_site("cori"), stripe_count=4))


def outcomes(table: pd.DataFrame) -> dict[str, list[str]]:
    return {name: rows["outcome"].tolist() for name, rows in table.groupby("storage")}


def test_by_its_figures_nurion_would_have_run_every_batch_that_fits_the_memory():
    table = cases.batch_sweep(cases.nurion())
    found = outcomes(table)
    assert found["Lustre"] == found["burst buffer"] == ["runs"] * 6 + ["out of memory"]
    assert (table["demand_over_peak"] < 0.01).all()  # so the mean bandwidth does not tell the two apart


def test_with_few_opens_a_second_the_sweep_ends_where_it_did(published):
    real = published[published["case"] == "ImageNet-11k"].replace({"outcome": {"dies": "read timed out"}})
    ours = cases.batch_sweep(cases.nurion(metadata_ops_per_s=1000))
    found, known = outcomes(ours), outcomes(real)
    assert found["Lustre, 1000 opens/s"][:6] == known["Lustre"][:6]  # at 1024 either would have ended it
    assert found["burst buffer"] == known["burst buffer"]
    burst_files = ours.set_index(["storage", "batch_per_node"])["burst_files"]
    assert burst_files["Lustre, 1000 opens/s", 256] == 131_072


@settings(max_examples=25)
@given(st.floats(80.1, 160))
def test_memory_ends_at_512_for_all_activations_that_are_possible(activations_mb):
    table = cases.batch_sweep(
        {"fast": ParallelFileSystem(1, 1e6, 1e9)}, (512, 1024), nodes=1, activations_mb=activations_mb
    )
    assert table["outcome"].tolist() == ["runs", "out of memory"]


def test_the_band_is_the_one_that_the_simulator_finds():
    band = cases.timeout_map((1, 3), (10.0, 40.0, 90.0, 200.0), (0.5, 2.0), runs_at=4, fails_at=8, nodes=9)
    assert set(band["outcome"]) == {"both run", "the larger fails", "both fail"}
    for row in band.itertuples():
        storage = ParallelFileSystem(8, 1e6, row.metadata_ops_per_s, timeout_s=row.timeout_s)
        failed = [
            simulate(storage, Workload(9, 1, row.burst_depth * batch, 92_000, 0.0))["failed"].any() for batch in (4, 8)
        ]
        assert failed == {"both run": [0, 0], "the larger fails": [0, 1], "both fail": [1, 1]}[row.outcome]


def test_the_band_is_one_doubling_wide():
    """Whatever the depth and the timeout: the larger batch opens twice as many files."""
    band = cases.timeout_map(metadata_ops_per_s=tuple(range(200, 20_000, 20)))
    rates = band[band["outcome"] == "the larger fails"].groupby(["burst_depth", "timeout_s"])["metadata_ops_per_s"]
    inside = rates.agg(["min", "max"]).query("min > 400 and max < 19000")
    assert len(inside) > 5 and (inside["max"] / inside["min"]).to_numpy() == pytest.approx(2, rel=0.1)


@given(st.floats(0, 1e4), st.floats(0.1, 1e4), st.floats(0.1, 1e4))
def test_at_break_even_both_ways_have_taken_as_long(stage_s, slow_s, fast_s):
    epochs = cases.break_even_epochs(stage_s, slow_s, fast_s)
    if fast_s >= slow_s or math.isclose(fast_s, slow_s):
        assert epochs == math.inf
    else:
        assert stage_s + epochs * fast_s == pytest.approx(epochs * slow_s)


def test_staging_pays_sooner_the_more_nodes_read_and_not_where_the_shared_system_keeps_up():
    cori = cases.cori()
    table = cases.break_even(cori[MEASURED], cori["burst buffer"], [256, 1024, 2048, 8192], [1, 10])
    epochs = table.groupby("nodes")["epochs"].first()
    assert epochs[256] == math.inf and epochs[8192] < epochs[2048] < epochs[1024]
    assert table.groupby("nodes")["epochs"].agg(lambda found: found.round(6).nunique()).max() == 1  # whatever the size
    assert table["stage_s"].max() == pytest.approx(10 * table["stage_s"].min())


def words(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text")))


@pytest.mark.slow
def test_every_figure_labels_its_axes_with_units(tmp_path: Path, published: pd.DataFrame):
    storage, workload = ParallelFileSystem(2, 50, 500, timeout_s=0.02), Workload(1, 1, 20, 100_000, 0.0)
    with EmulatedFileSystem(tmp_path, storage) as running:
        running.run(workload)
        log = running.log()
    rows = [
        {"readers": n, "kind": kind, **summarise(simulate(storage, replace(workload, readers=n)), workload)}
        for n in (1, 2)
        for kind in ("measured", "simulated")
    ]
    cori = cases.cori()
    figures = {
        "time, s|metadata|target 0|times out": draw.queues(log),
        "readers|throughput, MB/s|2 targets of 50 MB/s|measured": draw.throughput(pd.DataFrame(rows), storage),
        "nodes|epoch of 262,144 samples, s|published|go past 1024": draw.epochs(
            cases.scaling(cori, [512, 1024]), published
        ),
        "images per node and step|burst buffer, published|out of memory": draw.batches(
            cases.batch_sweep(cases.nurion(), (128, 256)), published
        ),
        "batches opened at once|opens per second|timeout 100 s|the larger fails": draw.timeouts(cases.timeout_map()),
        "epochs|time for 2 TB, min|512 nodes: does not pay|staged first": draw.break_even(
            cases.break_even(cori[MEASURED], cori["burst buffer"], [512, 4096], [1, 2])
        ),
    }
    for expected, figure in figures.items():
        found = words(figure)
        assert [part for part in expected.split("|") if part not in found] == []
        figure.savefig(tmp_path / "figure.png", dpi=50)


def test_a_table_that_lacks_a_column_is_refused():
    with pytest.raises(ValueError, match="needs the columns target, queued_s, .*; it lacks queued_s, start_s"):
        draw.queues(pd.DataFrame({"target": [1], "end_s": [1.0], "failed": [False]}))


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda: cases.node_limit(0), "bandwidth_gb_per_s must be a number above 0, not 0"),
        (lambda: cases.break_even_epochs(-1, 1, 1), "stage_s must be a number from 0, not -1"),
        (lambda: cases.timeout_map(runs_at=256, fails_at=128), "runs_at must be the smaller of the two batches"),
        (lambda: cases.batch_sweep(cases.nurion(), activations_mb=0), "activations_mb must be a number above 0, not 0"),
        (lambda: cases.batch_sweep(cases.nurion(), (0,)), "files_per_step must be a whole number from 1 up, not 0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(attempt, sentence):
    with pytest.raises(ValueError, match=sentence):
        attempt()
