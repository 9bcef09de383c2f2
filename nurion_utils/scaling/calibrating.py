"""The figures of one machine and one program from a few of its runs, and how uncertain they are.

Bayesian: each figure has a prior in the logarithm (`terms.PRIORS`), and measured times scatter log-normally. Draws from
the posterior give the predictions and their intervals, its maximum the parts of a step (`posterior`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import require_columns
from nurion_utils.allreduce import Link
from nurion_utils.scaling.posterior import fit
from nurion_utils.scaling.terms import NOTHING, PRIORS, SPREADS, TERMS, Prior, Targets, outputs
from nurion_utils.scaling.workloads import Workload
from nurion_utils.storage import ParallelFileSystem

if TYPE_CHECKING:
    import pandas as pd

NAMES = list(PRIORS)
MEASURED = ("step_s", "epoch_s", "samples_per_s")
# Of the logarithm, both chosen: how runs scatter where their source does not say it, and how far a figure of one
# program is from what all on the same machine have in common.
SCATTER, BETWEEN = 0.03, 0.5
# Of a node's peak in double precision, where nothing was measured. CosmoFlow had 535 Gflop/s of a KNL node's 3,046.
_SUSTAINED = Prior(0.2, 0.7, "chosen", "the share of a node's peak that is reached")

Place = sites.Site | str | Link | None


@dataclass(frozen=True)
class Calibration:
    """What is known of the logarithms of the figures in `terms.PRIORS`, in their order."""

    mean: np.ndarray  # (figures,), the most probable ones
    covariance: np.ndarray  # (figures, figures), as of a normal distribution with that maximum
    draws: np.ndarray  # (DRAWS, figures + 1), possible ones; the last is of the scatter
    statuses: dict[str, str]  # where each figure that counts comes from
    prior: np.ndarray  # (2, figures): means and variances before the runs
    targets: Targets | None = None
    site: str | None = None  # by its name, if it has one

    def values(self) -> dict[str, float]:
        """Each figure by its name."""
        return dict(zip(NAMES, np.exp(self.mean).tolist(), strict=True))

    def possible(self) -> dict[str, np.ndarray]:
        """The draws of each figure by its name, shape (DRAWS, 1)."""
        return dict(zip(NAMES, np.exp(self.draws.T[:-1, :, None]), strict=True))

    def noise(self) -> np.ndarray:
        """How far a run is from the model in each of the draws, shape (DRAWS, 1)."""
        return np.random.default_rng(0).standard_normal((len(self.draws), 1)) * np.exp(self.draws[:, -1:])


def calibrate(
    measurements: pd.DataFrame | None,
    site: Place,
    workload: Workload,
    beside: Iterable[Calibration] = (),
    without: str | None = None,
) -> Calibration:
    """Fit the figures that differ between machines to runs of `workload` on a site.

    `measurements` has a row per run: ``nodes``, and one of ``step_s``, ``epoch_s`` and ``samples_per_s``; also
    ``batch_per_rank`` where it is not the workload's, and ``scatter_percent`` where it is known. None is for what is
    known before anything is measured. Where runs repeat a setting give their median: each row counts as independent of
    the others. The site may be a `Link` where nothing else is known, or None. `beside` are calibrations of other
    programs on the same machine, which are taken to be alike. One of `terms.TERMS` may be left out, which shows what
    it is worth. ValueError for columns that are missing, and values that are not above 0.
    """
    place = sites.load(site) if isinstance(site, str) else site
    targets, read = _storage(place, workload)
    priors = PRIORS | _link(place) | read | dict.fromkeys(TERMS[without] if without else (), NOTHING)
    runs = None if measurements is None else Runs.of(measurements, workload)
    if runs is None:
        priors["sample_s"] = _from_peak(place, workload)
    else:
        priors["sample_s"] = PRIORS["sample_s"]._replace(median=runs.guess(workload), status="measured")
    median = np.log([prior.median for prior in priors.values()])
    prior = _beside(median, np.array([prior.spread for prior in priors.values()]) ** 2, beside)

    def errors(figures: np.ndarray) -> np.ndarray:
        if runs is None:
            return np.zeros((len(figures), 0))
        values = dict(zip(NAMES, np.exp(figures.T[:, :, None]), strict=True))
        return np.log(outputs(values, workload, targets, runs.nodes, runs.batch, runs.measured) / runs.values)

    found = fit(errors, prior, SCATTER if runs is None else runs.scatter, 0 if runs is None else len(runs.nodes))
    statuses = {name: prior.status for name, prior in priors.items() if targets or name != "read_s_per_byte"}
    return Calibration(*found, statuses, prior, targets, getattr(place, "name", None))


def _beside(median: np.ndarray, variance: np.ndarray, others: Iterable[Calibration]) -> np.ndarray:
    """Means and variances of the figures, when others on the same machine have been seen.

    Of each other one counts what its runs have added to its own prior. Each is BETWEEN away from what all
    have in common. The time to compute a sample is each one's own.
    """
    precision, pull = 1 / variance, median / variance
    for other in others:
        own, (before, doubt) = np.diag(other.covariance), other.prior
        gain = np.maximum(1 / own - 1 / doubt, 1e-6 / doubt)
        seen = before + (other.mean - before) / (own * gain)
        weight = 1 / (1 / gain + 2 * BETWEEN**2)
        weight[NAMES.index("sample_s")] = 0
        precision, pull = precision + weight, pull + weight * seen
    return np.array([pull / precision, 1 / precision])


def _link(place: sites.Site | Link | None) -> dict[str, Prior]:
    """The figures of a link, where they are known."""
    if isinstance(place, Link):
        given = {"latency_s": (place.alpha_s, "derived"), "link_s_per_byte": (place.beta_s_per_byte, "derived")}
    elif place is not None and place.fabric and place.fabric.latency_us and place.fabric.link_gb_per_s:
        link, figures = Link.of(place), place.fabric.figures
        given = {
            "latency_s": (link.alpha_s, figures["latency_us"].status),
            "link_s_per_byte": (link.beta_s_per_byte, figures["link_gb_per_s"].status),
        }
    else:
        return {}
    return {
        name: Prior(median, SPREADS[status], status, PRIORS[name].words) for name, (median, status) in given.items()
    }


def _storage(place: sites.Site | Link | None, workload: Workload) -> tuple[Targets | None, dict[str, Prior]]:
    if workload.storage is None or not isinstance(place, sites.Site):
        return None, {}
    system = ParallelFileSystem.of_site(place, workload.storage)
    buffer = workload.storage == "burst_buffer"
    part = place.burst_buffer if buffer else place.file_systems[workload.storage]
    servers = part.figures["servers" if buffer else "targets"]
    prior = PRIORS["read_s_per_byte"]._replace(
        median=1e-6 / system.target_mb_per_s, spread=SPREADS[servers.status], status=servers.status
    )
    return Targets(system.targets, system.stripe_count), {"read_s_per_byte": prior}


def _from_peak(place: sites.Site | Link | None, workload: Workload) -> Prior:
    """The time to compute a sample, where nothing was measured."""
    if workload.operations is None or not isinstance(place, sites.Site):
        raise ValueError(
            f"nothing is known of the time to compute a sample of {workload.name!r}: give measurements, or the "
            "workload's operations and a site with a peak"
        )
    median = workload.operations * workload.ranks_per_node / (_SUSTAINED.median * place.node.peak_gflops * 1e9)
    return PRIORS["sample_s"]._replace(median=median, spread=_SUSTAINED.spread)


@dataclass(frozen=True)
class Runs:
    """Measured runs as columns."""

    nodes: np.ndarray
    batch: np.ndarray
    measured: str  # one of MEASURED
    values: np.ndarray
    scatter: float

    @classmethod
    def of(cls, table: pd.DataFrame, workload: Workload) -> Runs:
        """Check and convert a table of measurements."""
        require_columns(table, ["nodes"])
        found = [name for name in MEASURED if name in table]
        if len(found) != 1:
            raise ValueError(f"measurements need one of the columns {', '.join(MEASURED)}, not {len(found)} of them")
        nodes = table["nodes"].to_numpy(float)
        batch = table["batch_per_rank"].to_numpy(float) if "batch_per_rank" in table else workload.batches(nodes)
        values = table[found[0]].to_numpy(float)
        for name, column in {"nodes": nodes, "batch_per_rank": batch, found[0]: values}.items():
            if not len(column) or not (np.isfinite(column) & (column > 0)).all():
                raise ValueError(f"the column {name} must hold numbers above 0, in one row or more")
        known = table["scatter_percent"].dropna() if "scatter_percent" in table else []
        return cls(nodes, batch, found[0], values, known.median() / 100 if len(known) else SCATTER)

    def guess(self, workload: Workload) -> float:
        """The time to compute a sample, if that were all."""
        if self.measured == "samples_per_s":
            return float(np.median(self.nodes * workload.ranks_per_node / self.values))
        steps = workload.steps(self.nodes, self.batch) if self.measured == "epoch_s" else 1
        return float(np.median(self.values / (self.batch * steps)))
