"""Measure this project against its peers, side by side.

    python tools/bench/run.py [NAME ...]      all rows of `ROWS`, or those named

Each row is written to build/bench/NAME.json with all its blocks; build/bench/table.md shows all rows measured so
far. A further bench is a file with a ``measure`` that returns ``pair, contender, time_s``, and a row here.
"""

import importlib
import json
import operator
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "bench"


@dataclass(frozen=True)
class Row:
    """One comparison, and the bar that it must meet."""

    name: str
    title: str
    module: str  # in this folder
    ours: str  # contenders, as `measure` calls them
    peer: str
    figure: str  # what is held to the bar, a key of FIGURES
    bar: float | None  # None: only reported
    settings: dict[str, Any] = field(default_factory=dict)  # what `measure` is called with
    samples: int | None = None  # in a step of both ranks; the contenders are then shown in samples per second
    bound: str = ""  # the contender that shows what is possible


# Per pair of times: ours, peer (and the bound) -> the figure; how it relates to the bar; its unit.
FIGURES = {
    "speed": (lambda ours, peer: peer / ours, ">=", "x"),
    "time": (lambda ours, peer: ours / peer, "<=", "x"),
    "extra time": (lambda ours, peer: (ours - peer) * 1e3, "<", "ms"),
    "own time": (lambda ours, peer: ours, "<", "s"),
    "possible gain": (lambda ours, peer, bound: (peer - ours) / (peer - bound) * 100, ">=", "%"),
}

MEETS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}

VOLUMES_64, VOLUMES_32 = {"network": 64, "batch": 2}, {"network": 32, "batch": 4}
# 50 MB of gradients, whose computing takes about half as long as 1 Gbit/s needs for them.
PERCEPTRON = {"network": [1024] * 12, "batch": 320}
ROWS = [
    Row("allreduce_64", "2 ranks with allreduce against without, 64^3 volumes, batch 2", "allreduce",
        "distributed", "alone", "speed", 0.95, VOLUMES_64, 4),
    Row("allreduce_32", "2 ranks with allreduce against without, 32^3 volumes, batch 4", "allreduce",
        "distributed", "alone", "speed", 0.90, VOLUMES_32, 8),
    Row("torch", "the same training in PyTorch DistributedDataParallel, 64^3, batch 2", "peers",
        "distributed", "torch", "speed", 1.8, VOLUMES_64, 4),
    Row("tensorflow", "the same training in MultiWorkerMirroredStrategy, 64^3, batch 2", "peers",
        "distributed", "tensorflow", "possible gain", None, VOLUMES_64, bound="alone"),
    Row("one_message", "buckets against one message, 2 ranks of one machine, 50 MB of gradients", "peers",
        "distributed", "one message", "time", 1.02, PERCEPTRON),
    Row("wrapper", "DistributedOptimizer against a grouped allreduce by hand, 32^3, batch 4", "wrapper",
        "distributed", "by hand", "extra time", 1.0, VOLUMES_32),
    Row("import", "import nurion_utils; import ipyparallel for scale", "imports",
        "nurion_utils", "ipyparallel", "own time", 0.2),
    Row("start", "start of 4 ranks against a plain ipyparallel.Cluster", "start",
        "nurion_utils", "ipyparallel", "time", 0.6),
    Row("start_slurm", "start of 4 ranks through Slurm on 4 virtual nodes against ipyparallel's engines", "start",
        "nurion_utils", "ipyparallel", "time", 0.6, {"nodes": 4}),
] + [
    Row(f"call_{n}", f"world.run of nothing on {n} ranks against ipyparallel's apply_sync", "calls",
        "run", "apply_sync", "time", None, {"n_ranks": n})
    for n in (2, 16, 64)
]  # fmt: skip
ROWS += [
    Row(f"link_{peer.replace(' ', '_')}_{gbit}", f"training on two virtual nodes, {title}, {gbit} Gbit/s", "peers",
        ours, peer, "time", bar, {**PERCEPTRON, "rate_mbit": 1000 * gbit})
    for gbit in (1, 4)
    for ours, peer, title, bar in (
        ("distributed", "torch", "against PyTorch DistributedDataParallel", 0.95),
        ("distributed", "tensorflow", "against MultiWorkerMirroredStrategy", None),
        ("distributed", "one message", "buckets against one message", None),
        ("half precision", "distributed", "gradients in half against single precision", None),
    )
]  # fmt: skip
# Time of our allreduces by that of MPI's own, by ranks and by size of the array.
SIZES = {"4 KiB": 2**12, "64 KiB": 2**16, "1 MiB": 2**20, "16 MiB": 2**24, "256 MiB": 2**28}
ROWS += [
    Row(f"{ours}_{n}_{size.replace(' ', '')}", f"{title} against native Allreduce, {n} ranks, {size}", "collective",
        ours, "native", "time", bar, {"n_ranks": n, "size_bytes": SIZES[size]})
    for n in (2, 4)
    for ours, title, bars in (
        ("ring", "ring", [2.5, 1.5, 1.0, 1.0, 1.0] if n == 2 else [2.5] * 5),
        ("shared", "ring in shared memory", [None, None, 0.6, 0.6, 0.6]),
    )
    for size, bar in zip(SIZES, bars, strict=True)
    if bar
]  # fmt: skip
# Staging: the cold source is what jobs meet, and has the bars; the warm one shows what the software costs.
LARGE = {"n_files": 1000, "size_bytes": 8 << 20}
SMALL = {"n_files": 50_000, "size_bytes": 20_000}
ROWS += [
    Row(f"stage_{name}_{cache}_{peer}", f"staging {title} against {peer}, {cache} cache", "staging",
        "nurion_utils", peer, "speed", bar if cache == "cold" else None, {**files, "cold": cache == "cold"})
    for name, title, files, bars in (
        ("large", "1,000 files of 8 MiB", LARGE, {"cp": 2.0, "rsync": 4.0, "read": None}),
        ("small", "50,000 files of 20 kB", SMALL, {"fastest": 1.0, "rsync": 1.5, "read": None}),
    )
    for cache in ("cold", "warm")
    for peer, bar in bars.items()
] + [
    Row(f"stage_nodes_{peer}", f"staging 64 files of 1 MiB to 4 nodes from behind one link of 200 Mbit/s, {how}",
        "staging_nodes", "nurion_utils", peer, "speed", 2.0,
        {"n_files": 64, "size_bytes": 1 << 20, "rate_mbit": 200})
    for peer, how in (("everyone", "against cp on each"), ("sbcast", "against sbcast"), ("rsync", "against rsync"))
]  # fmt: skip

ROWS += [
    Row("noise_mlp", "2 ranks that measure the noise scale against 2 that do not, mlp, batch 32", "noise",
        "observed", "plain", "time", 1.05, {"model": "mlp", "batch": 32}),
    Row("noise_volumes", "2 ranks that measure the noise scale against 2 that do not, 32^3, batch 4", "noise",
        "observed", "plain", "time", 1.05, {"model": "cosmoflow_small", "batch": 4}),
    Row("sweep_ranks", "a sweep of small trainings on 2 ranks against 1, batch 512", "sweeps",
        "two ranks", "one rank", "speed", 1.8, {"batch": 512}),
    Row("sweep_fit", "the same against a loop of Keras fit on 1 rank, batch 512", "sweeps",
        "two ranks", "fit", "speed", 3.0, {"batch": 512}),
    Row("sweep_fit_2048", "the same, batch 2048", "sweeps", "two ranks", "fit", "speed", 3.0, {"batch": 2048}),
]  # fmt: skip
ROWS += [
    Row(f"oneccl_{size}_{memory}", f"Horovod over oneCCL's ring against MPI, 2 ranks, {size} MiB, memory {memory}",
        "backends_in_turn", "oneCCL ring", "MPI", "speed", None,
        {"names": ("MPI", "oneCCL ring"), "size_bytes": size << 20, "keep_memory": memory == "kept"})
    for size in (4, 64)
    for memory in ("freed", "kept")
] + [
    Row(f"gloo_{size}", f"Horovod over the Gloo of this build against Gloo as shipped, 2 ranks, {size} KiB",
        "backends_in_turn", "Gloo", "Gloo as shipped", "speed", None,
        {"names": ("Gloo", "Gloo as shipped"), "size_bytes": size << 10})
    for size in (4, 4096)
] + [
    Row("timeline", "reading a Horovod timeline of 1,000,000 events against json.load and pandas", "timeline",
        "nurion_utils", "json + pandas", "speed", 1.5),
]  # fmt: skip
ROWS += [
    Row("predict_all", "a prediction for each of 1 to 8305 nodes of Nurion", "predictions",
        "predict", "simulate", "own time", 2.0),
    Row("simulate_8192", "a step's allreduce on 8192 nodes, simulated link by link; predict for scale", "predictions",
        "simulate", "predict", "own time", None),
]  # fmt: skip


def summarise(row: Row, blocks: pd.DataFrame) -> dict[str, Any]:
    """Hold the figure of the undisturbed pairs to the bar.

    Where most pairs were disturbed, the machine was busy: then all pairs count, and meet or miss no bar.
    """
    disturbed = blocks.get("disturbed", pd.Series(False, blocks.index))
    pairs = blocks["pair"].nunique()
    quiet = blocks[~disturbed]
    dropped = pairs - quiet["pair"].nunique()
    busy = dropped > pairs / 2
    times = (blocks if busy else quiet).pivot(index="pair", columns="contender", values="time_s")
    ours, peer = times[row.ours], times[row.peer]
    names = [row.ours, row.peer, *filter(None, [row.bound])]
    formula, relation, unit = FIGURES[row.figure]
    low, quarter, median, three_quarters, high = np.quantile(
        formula(*(times[name] for name in names)), [0, 0.25, 0.5, 0.75, 1]
    )
    shown = (lambda time_s: row.samples / time_s) if row.samples else (lambda time_s: time_s)
    return {
        "name": row.name,
        "title": row.title,
        "ours": shown(ours.median()),
        "peer": shown(peer.median()),
        "unit": "samples/s" if row.samples else "s",
        "ratio": (peer / ours if row.figure == "speed" else ours / peer).median(),
        "figure": row.figure,
        "figure_unit": unit,
        "median": median,
        "spread": [low, quarter, three_quarters, high],
        "bar": None if row.bar is None else f"{relation} {row.bar:g}",
        "met": None if busy or row.bar is None else bool(MEETS[relation](median, row.bar)),
        "pairs": len(times),
        "dropped": 0 if busy else dropped,
        "command": f".venv/bin/python tools/bench/run.py {row.name}",
    }


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of rows as `summarise` makes them."""
    lines = [
        "| what | ours | peer | figure: median | min, quartiles, max | bar | met | pairs (dropped) |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for r in results:
        met = {True: "yes", False: "no", None: "machine busy" if r["bar"] else "-"}[r["met"]]
        low, quarter, three_quarters, high = (f"{value:.3g}" for value in r["spread"])
        cells = [
            r["title"],
            *(f"{r[who]:.3g} {r['unit']}" for who in ("ours", "peer")),
            f"{r['figure']}: {r['median']:.3g} {r['figure_unit']}",
            f"{low}, {quarter} - {three_quarters}, {high}",
            f"{r['bar']} {r['figure_unit']}" if r["bar"] else "-",
            met,
            f"{r['pairs']} ({r['dropped']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.machine(),
        "cores": psutil.cpu_count(),
        "load_average_before": psutil.getloadavg()[0],
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def main(names: list[str]) -> None:
    known = {row.name: row for row in ROWS}
    if unknown := set(names) - set(known):
        sys.exit(f"There is no bench {', '.join(sorted(unknown))}; choose from {', '.join(known)}.")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    machine = _machine()
    if machine["load_average_before"] > 0.5:
        print(f"The load average is {machine['load_average_before']:.1f}: on a busy machine these figures mean little.")
    measured: dict[str, pd.DataFrame] = {}  # rows with the same blocks share them
    for row in [known[name] for name in names] or ROWS:
        key = json.dumps([row.module, row.settings])
        if key not in measured:
            print(f"Measuring: {row.title} ...", flush=True)
            measured[key] = importlib.import_module(row.module).measure(**row.settings)
        result = summarise(row, measured[key])
        blocks = measured[key].to_dict("records")
        text = json.dumps({**result, "machine": machine, "row": asdict(row), "blocks": blocks}, indent=1)
        (OUTPUT / f"{row.name}.json").write_text(text)
        files = [OUTPUT / f"{row.name}.json" for row in ROWS]
        text = table([json.loads(file.read_text()) for file in files if file.exists()])
        (OUTPUT / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
