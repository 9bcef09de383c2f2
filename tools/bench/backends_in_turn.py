"""Horovod's allreduce of one tensor over two backends in turn."""

from functools import partial

import pandas as pd
from blocks import alternate

from nurion_utils import backends, ranks

KNOWN = {**backends.BACKENDS, "Gloo as shipped": backends.GLOO_AS_SHIPPED}


def measure(names: tuple[str, str], size_bytes: int, keep_memory: bool = False, pairs: int = 9) -> pd.DataFrame:
    """Time one allreduce of float32 on two ranks over each backend; with a cycle of 0.1 ms, which hides less."""
    chosen = {name: KNOWN[name] for name in names}
    start = partial(ranks.start, 2, env=backends.KEEP_MEMORY if keep_memory else {})
    with backends.BackendWorlds(chosen, start) as worlds:
        if worlds.absent:
            raise SystemExit(f"cannot be measured here: {worlds.absent}")
        contenders = {name: partial(_block, worlds, name, size_bytes) for name in chosen}
        for block in contenders.values():
            block()
        return alternate(contenders, pairs)


def _block(worlds: backends.BackendWorlds, name: str, size_bytes: int) -> float:
    return worlds.run(name, backends.timed, KNOWN[name], [size_bytes], [0.1])[0][0.1, size_bytes]
