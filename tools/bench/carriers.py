"""Horovod's allreduce of one tensor over MPI and over oneCCL, in turn in the same processes."""

import contextlib
from functools import partial

import pandas as pd
from blocks import alternate

from nurion_utils.allreduce import backends


def measure(size_bytes: int, keep_memory: bool, pairs: int = 9) -> pd.DataFrame:
    """Time one allreduce of float32 on two ranks: "MPI", "oneCCL ring"; with Horovod's default cycle of 1 ms."""
    env = backends.KEEP_MEMORY if keep_memory else {}
    chosen = backends.named(["MPI", "oneCCL ring"])
    with contextlib.ExitStack() as stack:
        runs, absent = backends.open_groups(stack, chosen, 2, env, None)
        if absent:
            raise SystemExit(f"cannot be measured here: {absent}")
        contenders = {name: partial(_block, runs[name], chosen[name], size_bytes) for name in chosen}
        for block in contenders.values():
            block()
        return alternate(contenders, pairs)


def _block(run, backend: backends.Backend, size_bytes: int) -> float:
    return run(backends.timed, backend, [size_bytes], 1.0)[0][0]
