"""How large a batch still pays, from finished runs: the critical batch, and what it means in steps and samples.

The law and its names: McCandlish et al. 2018, "An empirical model of large-batch training" (arXiv 1812.06162).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nurion_utils._checks import positive, require_columns

if TYPE_CHECKING:
    import pandas as pd


class CriticalBatch(NamedTuple):
    """A fit of (S / S_min - 1)(E / E_min - 1) = 1; standard errors are from the scatter about the fit."""

    steps_min: float  # steps that not even the largest batch can save
    samples_min: float  # samples that even the smallest batch needs
    batch: float  # samples_min / steps_min: with it both are twice their least
    steps_min_se: float
    samples_min_se: float
    batch_se: float


def critical_batch(table: pd.DataFrame) -> CriticalBatch:
    """Fit the trade-off between steps and samples to runs that reached the same target with different batches.

    `table` has a row per run: ``batch``, ``steps`` and ``samples`` until the target was reached. As E = S x batch, the
    law (S / S_min - 1)(E / E_min - 1) = 1 says S = S_min + E_min / batch. It is fitted by least squares in the
    logarithm of S: runs scatter by factors. ValueError if the runs cannot tell: fewer than 3 batches, or all on one
    side of the critical batch.
    """
    from scipy.optimize import curve_fit, nnls

    require_columns(table, ["batch", "steps", "samples"])
    for name in ("batch", "steps", "samples"):
        if not (np.isfinite(table[name]) & (table[name] > 0)).all():
            raise ValueError(f"the column {name} must hold numbers above 0: leave out runs that missed the target")
    if (batches := table["batch"].nunique()) < 3:
        raise ValueError(f"the law has 2 unknowns: measure at least 3 batches, not {batches}")
    steps, samples = table["steps"].to_numpy(float), table["samples"].to_numpy(float)
    batch = samples / steps  # where an epoch's last batch is small, that is what a step took on average

    def log_steps(batch: np.ndarray, log_steps_min: float, log_samples_min: float) -> np.ndarray:
        return np.logaddexp(log_steps_min, log_samples_min - np.log(batch))

    # A first fit, of relative errors, cannot fail, and says whether both unknowns show in the data at all.
    start, _ = nnls(np.stack([1 / steps, 1 / samples], axis=1), np.ones(len(steps)))
    _require_both_sides(batch, start)
    logarithms, covariance = curve_fit(log_steps, batch, np.log(steps), np.log(start))
    steps_min, samples_min = found = np.exp(logarithms)
    _require_both_sides(batch, found)
    log_errors = np.sqrt([covariance[0, 0], covariance[1, 1], np.array([-1, 1]) @ covariance @ [-1, 1]])
    values = np.array([steps_min, samples_min, samples_min / steps_min])
    return CriticalBatch(*map(float, [*values, *values * log_errors]))


def _require_both_sides(batch: np.ndarray, found: np.ndarray) -> None:
    steps_min, samples_min = found
    if samples_min >= batch.max() * steps_min:
        side, other = "below", "larger"
    elif samples_min <= batch.min() * steps_min:
        side, other = "above", "smaller"
    else:
        return
    raise ValueError(f"all batches lie {side} the critical one, which so remains unknown: measure {other} ones too")


def tradeoff(batch: Sequence[float], steps_min: float, samples_min: float) -> pd.DataFrame:
    """Steps and samples to the target at each batch, by the law that `critical_batch` fits.

    One row per batch: ``batch``, ``steps`` and ``samples``.
    """
    import pandas as pd

    steps_min, samples_min = positive(steps_min, "steps_min"), positive(samples_min, "samples_min")
    batch = np.array([positive(each, "batch") for each in batch])
    steps = steps_min + samples_min / batch
    return pd.DataFrame({"batch": batch, "steps": steps, "samples": steps * batch})
