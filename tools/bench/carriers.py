"""Horovod's allreduce of one tensor over MPI and over oneCCL, in turn in the same processes."""

from functools import partial

import pandas as pd
from blocks import alternate

from nurion_utils.allreduce import backends, comparing


def measure(size_bytes: int, keep_memory: bool, pairs: int = 9) -> pd.DataFrame:
    """Time one allreduce of float32 on two ranks: "MPI", "oneCCL ring"; with a cycle of 0.1 ms, which hides less."""
    env = backends.KEEP_MEMORY if keep_memory else {}
    chosen = backends.named(["MPI", "oneCCL ring"])
    with comparing.Groups(chosen, 2, env) as groups:
        if groups.absent:
            raise SystemExit(f"cannot be measured here: {groups.absent}")
        contenders = {name: partial(_block, groups, name, chosen[name], size_bytes) for name in chosen}
        for block in contenders.values():
            block()
        return alternate(contenders, pairs)


def _block(groups: comparing.Groups, name: str, backend: backends.Backend, size_bytes: int) -> float:
    return groups.run(name, comparing.timed, backend, [size_bytes], 0.1)[0][0]
