"""What a call on all ranks costs by itself, and what looking after it adds to one through ipyparallel."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from blocks import alternate

from nurion_utils import ranks, sites


def measure(n_ranks: int, pairs: int = 9, block_s: float = 1.0) -> pd.DataFrame:
    """Time a call that does nothing, on the same engines; see `blocks.alternate` for the table."""
    with allowed(n_ranks), ranks.start(n_ranks) as world:
        memory_mib = world.run(proportional_mib)
        print(
            f"{n_ranks} ranks take {sum(memory_mib) / n_ranks:.0f} MiB each, what they share counted once", flush=True
        )
        view = world.client[:]

        def contender(call: Callable[[Callable], object]) -> Callable[[], float]:
            count = max(1, round(block_s / _per_call(call, 3)))
            return lambda: _per_call(call, count)

        return alternate({"run": contender(world.run), "apply_sync": contender(view.apply_sync)}, pairs)


@contextlib.contextmanager
def allowed(n_ranks: int) -> Iterator[None]:
    """This machine may have so many ranks meanwhile."""
    before = os.environ.get("XDG_CONFIG_HOME")
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "nurion", "sites", "local.toml")
        own.parent.mkdir(parents=True)
        usual = Path(sites.__file__).with_name("local.toml").read_text()
        own.write_text(re.sub(r"(max_ranks = \{ value = )\d+", rf"\g<1>{n_ranks}", usual))
        os.environ["XDG_CONFIG_HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CONFIG_HOME")
            if before is not None:
                os.environ["XDG_CONFIG_HOME"] = before


def _per_call(call: Callable[[Callable], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call(nothing)
    return (time.perf_counter() - begin) / count


def nothing() -> None:
    """What is called."""


def proportional_mib() -> float:
    """Memory of this process; of what several share each has its part."""
    return int(re.search(r"^Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[1]) / 1024
