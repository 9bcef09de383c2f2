"""Predictions beside what others measured: each published series fitted to ``calibrate`` rows alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import recordings
from nurion_utils._checks import one_of, require_columns
from nurion_utils.scaling.calibrating import Calibration, calibrate
from nurion_utils.scaling.facts import single_facts
from nurion_utils.scaling.predicting import predict
from nurion_utils.scaling.published import COLUMNS, Series, quantity
from nurion_utils.scaling.terms import TERMS

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE_PERCENT = 15.0
_KEPT = ("id", "system", "workload", "quantity", "nodes", "unit", "scatter_percent", "use", "status", "source")
_TAKEN = ("limits", "communication_share", "waiting_share", "input_share", "narrows", "narrows_share")


def fidelity(extra: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """Every published figure of `data/published_scaling.csv`, and single ones, beside ours; `score` sums it up.

    `extra` is a CSV file of further rows with the same columns, of these series or others. A row that cannot be
    predicted stays in the table, with the reason. ValueError for columns that are missing, and for unknown quantities,
    units and uses.

    Returns a row per figure: id, system, workload, quantity, nodes, unit, published, ours, low, high (95 % of runs),
    error_percent, scatter_percent (the reference's own, where it is known), tolerance_percent, passes, use, limits,
    communication_share, waiting_share, input_share, narrows, narrows_share (see `predict`), status, source, reason (of
    a miss).
    """
    import pandas as pd

    table = recordings.load("published_scaling")
    if extra is not None:
        further = pd.read_csv(extra)
        require_columns(further, COLUMNS)
        table = pd.concat([table, further[list(COLUMNS)]], ignore_index=True)
    cori = [Series.of(rows) for _, rows in recordings.load("published_scaling").query("site == 'cori'").groupby("id")]
    facts = single_facts([_calibrated(series) for series in cori])
    return pd.concat([compare(table), facts], ignore_index=True)


def without_each_term() -> pd.DataFrame:
    """The score with all terms and without each of them: columns without, and those of `score`."""
    import pandas as pd

    table = recordings.load("published_scaling")
    return pd.DataFrame([{"without": term or "-"} | score(compare(table, term)) for term in (None, *TERMS)])


def compare(table: pd.DataFrame, without: str | None = None) -> pd.DataFrame:
    """What `fidelity` has of rows with the columns of `data/published_scaling.csv`; a term may be left out."""
    import pandas as pd

    for use in table["use"]:
        one_of(use, "use", ("calibrate", "test"))
    groups = [rows for _, rows in table.groupby(["id", table["quantity"].map(quantity)], sort=False)]
    series = [Series.of(rows) for rows in groups]
    alone = [_calibrated(one, (), without) for one in series]
    tables = []
    for one in series:
        # Others count by what they were fitted to; one without such rows is as the first other of the same workload.
        pairs = zip(series, alone, strict=True)
        others = [(o, k) for o, k in pairs if o is not one and o.system == one.system and o.fitted.any()]
        known = _calibrated(one, [k for _, k in others], without)
        if not one.fitted.any():
            known = next((k for o, k in others if o.workload.name == one.workload.name), known)
        tables.append(_beside(one, known))
    return pd.concat(tables, ignore_index=True)


def _calibrated(series: Series, beside: Sequence[Calibration] = (), without: str | None = None) -> Calibration | None:
    """From the rows that may be fitted; None if there are none, and not enough is known without them."""
    runs = series.runs[series.fitted] if series.fitted.any() else None
    try:
        return calibrate(runs, series.place, series.workload, beside, without)
    except ValueError:
        if runs is None:
            return None
        raise


def _beside(series: Series, known: Calibration | None) -> pd.DataFrame:
    """The rows of one series with the predictions beside them."""
    import pandas as pd

    table = series.rows[list(_KEPT)].assign(published=series.rows["value"].astype(float))
    table["tolerance_percent"] = np.fmax(TOLERANCE_PERCENT, 2 * table["scatter_percent"])
    if known is None:
        return table.assign(passes=False, reason="cannot be predicted: no calibrate row")
    batches = zip(series.runs["nodes"], series.runs["batch_per_rank"], strict=True)
    workload = series.workload if series.kind == "epoch_s" else replace(series.workload, samples=None)
    ours = pd.concat(
        predict(None, replace(workload, batch=batch, global_batch=None), int(nodes), known) for nodes, batch in batches
    )
    rate = series.kind == "samples_per_s"
    name = "step" if rate else series.kind.removesuffix("_s")
    widths = [(ours[f"{name}_s"] / ours[f"{name}_{end}_s"]).to_numpy() for end in ("high", "low")]
    middle = ours[series.kind].to_numpy()
    ends = [series.published(middle * width if rate else middle / width) for width in widths]
    table["ours"], table["low"], table["high"] = series.published(middle), np.minimum(*ends), np.maximum(*ends)
    table["error_percent"] = 100 * (table["ours"] / table["published"] - 1)
    table["passes"] = table["error_percent"].abs() <= table["tolerance_percent"]
    for column in _TAKEN:
        table[column] = ours[column].to_numpy()
    return table.assign(reason=np.where(table["passes"], "", "not known"))


def score(table: pd.DataFrame) -> dict[str, float]:
    """What `fidelity` comes to: of rows that were not fitted.

    ``median_error_percent``, ``within_tolerance`` and ``within_interval`` (parts of 1), ``rows``.
    """
    tests = table[table["use"] == "test"]
    inside = tests["published"].between(tests["low"], tests["high"])
    return {
        "median_error_percent": float(tests["error_percent"].abs().median()),
        "within_tolerance": float(tests["passes"].mean()),
        "within_interval": float(inside.mean()),
        "rows": len(tests),
    }
