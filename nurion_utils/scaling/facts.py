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


class Fact(NamedTuple):
    """A published figure, ours, and how far ours may be from it."""

    quantity: str
    unit: str
    published: float
    ours: float
    tolerance_percent: float
    status: str
    source: str
    low: float = np.nan  # ends of 95 %
    high: float = np.nan
    reason: str = ""  # of a miss


_EXACT, _ROUNDED, _MODEL = 0.01, 1.0, 15.0  # tolerances in per cent: arithmetic, rounded figures, predictions
# One Pascal GPU's rate at a batch of 64, the weights, and the tensors; all remembered.
_NETWORKS = {"Inception V3": (142, 23.8e6, 190), "ResNet-101": (130, 44.5e6, 314), "VGG-16": (154, 138.4e6, 32)}


def facts(cori: list[Calibration]) -> pd.DataFrame:
    """A row per fact, with the columns of `fidelity`; `cori` are calibrations of other programs on Cori."""
    import pandas as pd

    table = pd.DataFrame([*_machine(), *_allreduce(), *_storage(), *_cosmoflow(cori), *_horovod()])
    table["error_percent"] = 100 * (table["ours"] / table["published"] - 1)
    table["passes"] = table["error_percent"].abs() <= table["tolerance_percent"]
    table["reason"] = (
        table["reason"].where(~table["passes"], "").mask(~table["passes"] & table["reason"].eq(""), "not known")
    )
    return table.assign(id="fact", use="fact")


def _machine() -> list[Fact]:
    nurion = sites.load("nurion")
    quoted, rmax = nurion.performance.rpeak_quoted_pflops, nurion.performance.rmax_pflops
    return [
        Fact("Nurion's peak", "Pflop/s", quoted, nurion.rpeak_pflops, _ROUNDED, "read", "Nurion paper"),
        Fact(
            "HPL's share of Nurion's peak",
            "1",
            13.9 / 25.7,
            rmax / nurion.rpeak_pflops,
            _ROUNDED,
            "read",
            "Nurion paper",
        ),
    ]


def _allreduce() -> list[Fact]:
    """The ring's messages and bytes by its schedule, and two algorithms' times by the closed forms of the model."""
    schedule, size, link, ranks = ring(16), 1_600_000, Link(2e-6, 1 / 8e9), np.array([8192.0])

    def time_ms(algorithm: str) -> float:
        messages, arrays = ALGORITHMS[algorithm](ranks)
        return 1e3 * float((messages * link.alpha_s + arrays * 28.15e6 * link.beta_s_per_byte)[0])

    paper, derived = (
        "Nurion paper: 2(P-1) messages and 2N(P-1)/P bytes",
        "28.15 MB, P = 8192, 2 us, 8 GB/s (Thakur et al. 2005)",
    )
    return [
        Fact("messages of a rank in a ring of 16", "1", 2 * 15, schedule.messages(0), _EXACT, "read", paper),
        Fact(
            "bytes of a rank in a ring of 16",
            "B",
            2 * size * 15 / 16,
            schedule.bytes_sent(0, size),
            _EXACT,
            "read",
            paper,
        ),
        Fact("allreduce by a ring, 8192 ranks", "ms", 39.8, time_ms("ring"), _ROUNDED, "derived", derived),
        Fact("allreduce by Rabenseifner, 8192 ranks", "ms", 7.1, time_ms("rabenseifner"), _ROUNDED, "derived", derived),
    ]


def _storage() -> list[Fact]:
    nurion, paper = sites.load("nurion"), "Nurion paper"
    lustre, buffer = nurion.file_systems["scratch"].bandwidth_gb_per_s, nurion.burst_buffer.bandwidth_gb_per_s
    rate = cases.SAMPLE_BYTES / cases.COMPUTE_S / 1e6
    published = recordings.load("published_io").query("case == 'ImageNet-11k'")
    found = cases.batch_sweep(cases.nurion()).set_index(["storage", "batch_per_node"])["outcome"]
    works = published.assign(
        same=[
            (row.outcome == "runs") == (found[row.storage, row.batch_per_node] == "runs")
            for row in published.itertuples()
        ]
    )
    same = works.groupby("storage")["same"].mean()
    largest = int(found["burst buffer"].loc[lambda outcome: outcome == "runs"].index.max())
    return [
        Fact("rate at which a node takes CosmoFlow's samples", "MB/s", 62, rate, _ROUNDED, "read", paper),
        Fact("nodes that Lustre feeds, by its mean", "nodes", 4838, cases.node_limit(lustre), _EXACT, "derived", paper),
        Fact("nodes that the burst buffer feeds, by its mean", "nodes", 12_903, cases.node_limit(buffer), _EXACT, "derived", paper),
        Fact("largest batch on a node of Nurion", "samples", 512, largest, _EXACT, "read", paper),
        Fact("batches that run or not on the burst buffer as published", "1", 1, same["burst buffer"], _EXACT, "read", paper),
        Fact(
            "batches that run or not on Lustre as published", "1", 1, same["Lustre"], _EXACT, "read", paper,
            reason="why 256 and more die is not published; with few opens a second they would",
        ),
    ]  # fmt: skip


def _cosmoflow(cori: list[Calibration]) -> list[Fact]:
    """From the time on one node, and from what other programs have shown on Cori."""
    import pandas as pd

    workload, nodes = PUBLISHED["CosmoFlow"], 8192
    one = pd.DataFrame({"nodes": [1], "step_s": [cases.COMPUTE_S]})
    known = calibrate(one, "cori", workload, cori)
    row = predict("cori", replace(workload, samples=None), nodes, known).iloc[0]
    speed = nodes * workload.operations / 1e15
    source = "Mathuriya et al., CosmoFlow, arXiv 1808.04728"
    ends = [cases.COMPUTE_S / row["step_high_s"], cases.COMPUTE_S / row["step_low_s"]]
    rates = [speed / row["step_high_s"], speed / row["step_low_s"]]
    return [
        Fact(
            "CosmoFlow's efficiency on 8192 nodes of Cori",
            "1",
            0.77,
            cases.COMPUTE_S / row["step_s"],
            _MODEL,
            "read",
            source,
            *ends,
        ),
        Fact(
            "CosmoFlow's speed on 8192 nodes of Cori",
            "Pflop/s",
            3.5,
            speed / row["step_s"],
            _MODEL,
            "read",
            source,
            *rates,
        ),
    ]


def _horovod() -> list[Fact]:
    """Three networks on one cluster of 4 Pascal GPUs a server, from their sizes and the rate of one GPU."""
    import pandas as pd

    published = {128: (90, 90, 79), 512: (90, 90, 68)}
    facts = []
    for gpus, efficiencies in published.items():
        for (name, (rate, weights, tensors)), efficiency in zip(_NETWORKS.items(), efficiencies, strict=True):
            workload = Workload(name, 4 * weights, batch=64, tensors=tensors, ranks_per_node=4)
            one = replace(workload, ranks_per_node=1)
            known = calibrate(pd.DataFrame({"nodes": [1], "samples_per_s": [rate]}), Link(5e-6, 1 / 3.1e9), one)
            row = predict(None, workload, gpus // 4, known).iloc[0]
            alone_s = predict(None, one, 1, known)["step_s"].item()
            ours = [100 * alone_s / row[column] for column in ("step_s", "step_high_s", "step_low_s")]
            source = "Horovod's documentation, 25 GbE RoCE"
            facts.append(
                Fact(
                    f"efficiency of {name} on {gpus} GPUs", "%", efficiency, ours[0], _MODEL, "read", source, *ours[1:]
                )
            )
    reason = "not predicted: what a library needs beyond the link's time is fitted, not known beforehand"
    speedup = recordings.load("published_backends").query("study == 'Intel and Amazon'")["speedup_low"].item()
    facts.append(
        Fact(
            "MLSL against Open MPI, MXNet, 25 GbE",
            "x",
            speedup,
            np.nan,
            _MODEL,
            "derived",
            "Intel and Amazon",
            reason=reason,
        )
    )
    return facts
