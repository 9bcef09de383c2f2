"""Predictions of the whole machine: all sizes by closed forms, and one size simulated link by link."""

import time
from collections.abc import Callable

import pandas as pd
from blocks import alternate

from nurion_utils import allreduce, scaling, sites

NODES = 8192


def measure(pairs: int = 10) -> pd.DataFrame:
    """Time both; see `blocks.alternate` for the table."""
    workload, nurion = scaling.PUBLISHED["CosmoFlow"], sites.load("nurion")
    known, fabric = scaling.calibrate(None, nurion, workload), allreduce.FatTree.of(nurion)

    def timed(work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def predict() -> object:
        return scaling.predict(nurion, workload, range(1, nurion.node.count + 1), known)

    def simulate() -> object:
        return allreduce.simulate(allreduce.rabenseifner(NODES), workload.gradient_bytes, fabric)

    return alternate({"predict": lambda: timed(predict), "simulate": lambda: timed(simulate)}, pairs)
