"""Single published figures beside what the code of all rooms makes of them; none of them is fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nurion_utils import recordings, sites
from nurion_utils.allreduce import Link, ring
from nurion_utils.scaling.calibrating import Calibration, calibrate
from nurion_utils.scaling.predicting import predict
from nurion_utils.scaling.terms import ALGORITHMS
from nurion_utils.scaling.workloads import PUBLISHED, Workload
from nurion_utils.storage import cases

if TYPE_CHECKING:
    import pandas as pd


_EXACT, _ROUNDED, _MODEL = 0.01, 1.0, 15.0  # tolerances in per cent: arithmetic, rounded figures, predictions
_PAPER = "Nurion paper"
# Images a second of one Pascal GPU at a batch of 64, weights, and the tensors they lie in; all remembered.
_NETWORKS = {"Inception V3": (142, 23.8e6, 190), "ResNet-101": (130, 44.5e6, 314), "VGG-16": (154, 138.4e6, 32)}


class Fact(NamedTuple):
    """A published figure, ours, and how far ours may be from it."""

    quantity: str
    unit: str
    published: float
    ours: float
    source: str = _PAPER
    tolerance_percent: float = _EXACT
    status: str = "read"
    low: float = np.nan  # ends of 95 %
    high: float = np.nan
    reason: str = "not known"  # of a miss


def single_facts(cori: list[Calibration]) -> pd.DataFrame:
    """A row per fact, with the columns of `fidelity`; `cori` are calibrations of other programs on Cori."""
    import pandas as pd

    table = pd.DataFrame([*_machine(), *_allreduce(), *_storage(), *_cosmoflow(cori), *_horovod(), _mlsl()])
    table["error_percent"] = 100 * (table["ours"] / table["published"] - 1)
    table["passes"] = table["error_percent"].abs() <= table["tolerance_percent"]
    return table.assign(id="fact", use="fact", reason=table["reason"].mask(table["passes"], ""))


def _machine() -> list[Fact]:
    nurion = sites.load("nurion")
    peak, share = nurion.rpeak_pflops, nurion.performance.rmax_pflops / nurion.rpeak_pflops
    return [
        Fact("Nurion's peak", "Pflop/s", nurion.performance.rpeak_quoted_pflops, peak, _PAPER, _ROUNDED),
        Fact("HPL's share of Nurion's peak", "1", 13.9 / 25.7, share, _PAPER, _ROUNDED),
    ]


def _allreduce() -> list[Fact]:
    """The ring's messages and bytes by its schedule, and two algorithms' times by the closed forms of the model."""
    schedule, size, link, ranks = ring(16), 1_600_000, Link(2e-6, 1 / 8e9), np.array([8192.0])

    def time_ms(algorithm: str) -> float:
        messages, arrays = ALGORITHMS[algorithm](ranks)
        return 1e3 * float((messages * link.alpha_s + arrays * 28.15e6 * link.beta_s_per_byte)[0])

    source = "28.15 MB, 8192 ranks, 2 us, 8 GB/s (Thakur et al. 2005)"
    return [
        Fact("messages of a rank in a ring of 16", "1", 2 * 15, schedule.messages(0)),
        Fact("bytes of a rank in a ring of 16", "B", 2 * size * 15 / 16, schedule.bytes_sent(0, size)),
        Fact("allreduce by a ring", "ms", 39.8, time_ms("ring"), source, _ROUNDED, "derived"),
        Fact("allreduce by Rabenseifner", "ms", 7.1, time_ms("rabenseifner"), source, _ROUNDED, "derived"),
    ]


def _storage() -> list[Fact]:
    nurion, rate = sites.load("nurion"), cases.SAMPLE_BYTES / cases.COMPUTE_S / 1e6
    lustre, buffer = nurion.file_systems["scratch"].bandwidth_gb_per_s, nurion.burst_buffer.bandwidth_gb_per_s
    outcomes = cases.batch_sweep(cases.nurion()).set_index(["storage", "batch_per_node"])["outcome"]
    runs = outcomes == "runs"
    published = recordings.load("published_io").query("case == 'ImageNet-11k'")
    published = published.set_index(["storage", "batch_per_node"])["outcome"] == "runs"
    same = (published == runs[published.index]).groupby("storage").mean()
    largest = runs["burst buffer"].loc[lambda ran: ran].index.max()
    cause = "why batches of 256 and more die is not published; by Nurion's figures they would run"
    return [
        Fact("rate at which a node takes CosmoFlow's samples", "MB/s", 62, rate, _PAPER, _ROUNDED),
        Fact("nodes that Lustre's bandwidth feeds", "nodes", 4838, cases.node_limit(lustre), status="derived"),
        Fact("nodes that the burst buffer's feeds", "nodes", 12_903, cases.node_limit(buffer), status="derived"),
        Fact("largest batch that a node of Nurion holds", "samples", 512, int(largest)),
        Fact("batches that end as published on the burst buffer", "1", 1, same["burst buffer"]),
        Fact("batches that end as published on Lustre", "1", 1, same["Lustre"], reason=cause),
    ]


def _cosmoflow(cori: list[Calibration]) -> list[Fact]:
    """From the time on one node, and from what other programs have shown on Cori."""
    import pandas as pd

    workload, nodes = replace(PUBLISHED["CosmoFlow"], samples=None), 8192
    one = pd.DataFrame({"nodes": [1], "step_s": [cases.COMPUTE_S]})
    row = predict("cori", workload, nodes, calibrate(one, "cori", workload, cori)).iloc[0]
    facts, source = [], "Mathuriya et al., CosmoFlow, arXiv 1808.04728 (abstract)"
    speed = {end: nodes * workload.operations / 1e15 / row[f"step{end}_s"] for end in ("", "_high", "_low")}
    for words, unit, published, ends in (
        ("efficiency", "1", 0.77, [row[f"efficiency{end}"] for end in ("", "_low", "_high")]),
        ("speed", "Pflop/s", 3.5, speed.values()),
    ):
        ours, low, high = ends
        name = f"CosmoFlow's {words} on {nodes} nodes of Cori"
        facts.append(Fact(name, unit, published, ours, source, _MODEL, low=low, high=high))
    return facts


def _horovod() -> list[Fact]:
    """Three networks on Pascal GPUs, from their sizes and the rate of one GPU; four share a server's link, and pass
    each byte over it once, so that GPUs count as nodes."""
    import pandas as pd

    facts, link = [], Link(5e-6, 1 / 3.1e9)
    for gpus, efficiencies in {128: (90, 90, 79), 512: (90, 90, 68)}.items():
        for (name, (rate, weights, tensors)), published in zip(_NETWORKS.items(), efficiencies, strict=True):
            one = Workload(name, 4 * weights, batch=64, tensors=tensors)
            known = calibrate(pd.DataFrame({"nodes": [1], "samples_per_s": [rate]}), link, one)
            row = predict(link, one, gpus, known).iloc[0]
            ours, low, high = (100 * row[f"efficiency{end}"] for end in ("", "_low", "_high"))
            words = f"efficiency of {name} on {gpus} GPUs"
            facts.append(Fact(words, "%", published, ours, "Horovod's documentation", _MODEL, low=low, high=high))
    return facts


def _mlsl() -> Fact:
    study = recordings.load("published_backends").query("study == 'Intel and Amazon'").iloc[0]
    reason = "cannot be predicted: what a library needs beyond the link's time is fitted to its own runs"
    return Fact(
        "MLSL's speed by Open MPI's",
        "x",
        study["speedup_low"],
        np.nan,
        study["source"],
        _MODEL,
        "derived",
        reason=reason,
    )
