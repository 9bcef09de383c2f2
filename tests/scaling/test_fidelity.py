"""Predictions beside what others measured: what is fitted, what is judged, and what the score may not fall below."""

import json

import pandas as pd
import pytest

from nurion_utils import recordings, scaling
from nurion_utils.scaling import comparing
from nurion_utils.scaling.published import COLUMNS


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return recordings.load("published_scaling")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return scaling.fidelity()


def test_the_score_is_no_worse_than_the_recorded_one(table):
    reached = scaling.score(table)
    recorded = json.loads((recordings.DIRECTORY / "fidelity_score.json").read_text())
    assert reached["median_error_percent"] <= recorded["median_error_percent"] <= 10
    assert reached["within_tolerance"] >= recorded["within_tolerance"] >= 0.8
    assert reached["rows"] == recorded["rows"]


def test_nothing_but_calibrate_rows_is_fitted(published):
    test = published["use"] == "test"
    changed = published.assign(value=published["value"].where(~test, 10 * published["value"]))
    before, after = comparing.compare(published), comparing.compare(changed)
    for column in ("ours", "low", "high"):
        assert (before[column] == after[column]).all()
    without = comparing.compare(published[~test])
    assert without["ours"].tolist() == before["ours"][before["use"] == "calibrate"].tolist()


def test_a_calibrate_row_does_count(published):
    first = published.index == published.index[published["use"] == "calibrate"][0]
    changed = published.assign(value=published["value"].where(~first, 2 * published["value"]))
    assert (comparing.compare(published)["ours"] != comparing.compare(changed)["ours"]).any()


def test_input_is_not_what_cosmoflow_benchmark_lost_on_cori(table):
    rows = table[table["id"].isin(["K1", "K2"])]
    assert len(rows) == 14 and (rows["input_share"] == 0).all() and (rows["limits"] != "input").all()


def test_the_recorded_score_needs_the_waiting_for_the_slowest(published):
    without = comparing.score(comparing.compare(published, "waiting"))
    assert without["within_tolerance"] < comparing.score(comparing.compare(published))["within_tolerance"]


def test_a_miss_has_a_reason_and_a_hit_none(table):
    assert (table["reason"].eq("") == table["passes"].astype(bool)).all()


def test_vgg_is_predicted_to_scale_worse_than_resnet_on_the_same_network(table):
    ours = table.set_index("quantity")["ours"]
    for gpus in (128, 512):
        assert ours[f"efficiency of VGG-16 on {gpus} GPUs"] < ours[f"efficiency of ResNet-101 on {gpus} GPUs"] - 10


@pytest.mark.parametrize("name", ["CosmoFlow's efficiency on 8192 nodes of Cori", "Nurion's peak"])
def test_single_facts_come_out(table, name):
    assert table.set_index("quantity").loc[name, "passes"]


def further(published, tmp_path, *rows: dict):
    row = published[published["id"] == "K1"].iloc[0].to_dict()
    path = tmp_path / "extra.csv"
    pd.DataFrame([row | each for each in rows]).to_csv(path, index=False)
    return path


def test_further_rows_are_judged_with_the_others_of_their_series_or_by_themselves(published, tmp_path):
    mine = {"id": "M1", "system": "my machine", "site": None, "workload": "my network", "samples_per_epoch": None}
    whole = mine | {"id": "M3", "system": "a third", "quantity": "time to train"}
    rate = {"quantity": "rate", "unit": "samples/s", "batch_per_rank": None}
    path = further(
        published, tmp_path, {"nodes": 512, "use": "test"},
        *(mine | rate | {"nodes": n, "value": 10 * n, "use": "calibrate"} for n in (1, 2, 4)),
        mine | rate | {"nodes": 64, "value": 600, "use": "test"},
        mine | {"id": "M2", "system": "another", "nodes": 4, "use": "test"},
        whole | {"nodes": 4, "unit": "min", "use": "calibrate"},
        whole | {"nodes": 8, "unit": "h", "use": "test"},
    )  # fmt: skip
    table = scaling.fidelity(path).set_index(["id", "nodes"])
    assert 19.4 < table.loc[("K1", 512), "ours"] < 22
    assert 400 < table.loc[("M1", 64), "ours"] < 640
    assert not table.loc[("M2", 4), "passes"]
    assert table.loc[("M2", 4), "reason"] == "cannot be predicted: no calibrate row"
    assert 0.5 < table.loc[("M3", 8), "ours"] * 60 / table.loc[("M3", 4), "ours"] < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "fortnights"}, "unit of a time must be one of 's', 'ms', 'min', 'h', not 'fortnights'"),
        ({"quantity": "joy"}, "beginning of a quantity must be one of 'epoch time', .* not 'joy'"),
        ({"use": "both"}, "use must be one of 'calibrate', 'test', not 'both'"),
        ({"nodes": 0}, "nodes of K1 must be a whole number from 1 up, not 0"),
        ({"value": -1.0}, "the value of K1 on 1 nodes must be a number above 0, not -1.0"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_in_one_sentence(published, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        scaling.fidelity(further(published, tmp_path, changes))


def test_a_table_without_a_column_is_refused(published, tmp_path):
    path = tmp_path / "extra.csv"
    published[[name for name in COLUMNS if name != "unit"]].to_csv(path, index=False)
    with pytest.raises(ValueError, match="it lacks unit"):
        scaling.fidelity(path)


def test_figures_show_what_the_tables_hold(table):
    figure = scaling.draw_fidelity(table)
    assert len(figure.axes[0].get_yticks()) == (table["use"] == "test").sum()
    shares = scaling.draw_shares(scaling.predict("nurion", scaling.PUBLISHED["CosmoFlow"], [1, 2, 4, 8192]))
    assert len(shares.axes[0].collections) == 5
