"""Horovod's allreduce of one tensor over two backends in turn."""

from functools import partial

import pandas as pd
from blocks import alternate

from nurion_utils import backends
from nurion_utils.backends import comparing

KNOWN = {**backends.BACKENDS, "Gloo as shipped": backends.GLOO_AS_SHIPPED}


def measure(names: tuple[str, str], size_bytes: int, keep_memory: bool = False, pairs: int = 9) -> pd.DataFrame:
    """Time one allreduce of float32 on two ranks over each backend; with a cycle of 0.1 ms, which hides less."""
    chosen = {name: KNOWN[name] for name in names}
    with comparing.Groups(chosen, 2, backends.KEEP_MEMORY if keep_memory else {}) as groups:
        if groups.absent:
            raise SystemExit(f"cannot be measured here: {groups.absent}")
        contenders = {name: partial(_block, groups, name, size_bytes) for name in chosen}
        for block in contenders.values():
            block()
        return alternate(contenders, pairs)


def _block(groups: comparing.Groups, name: str, size_bytes: int) -> float:
    times = groups.run(name, comparing.timed, KNOWN[name], [size_bytes], 0.1)
    if not times:
        raise SystemExit(f"cannot be measured here: {groups.absent}")
    return times[0][0]
