"""How long a fresh Python takes to import this package; ipyparallel, which it builds on, gives the scale."""

import subprocess
import sys

import pandas as pd
from blocks import alternate

# Timed inside, so that Python's own start is not counted.
PROGRAM = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


def measure(pairs: int = 20) -> pd.DataFrame:
    """Time the imports; see `blocks.alternate` for the table."""

    def importing(module: str) -> float:
        # -P: what counts is the installed package, not a folder that happens to be near
        command = [sys.executable, "-P", "-c", PROGRAM.format(module)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    contenders = {module: lambda module=module: importing(module) for module in ("nurion_utils", "ipyparallel")}
    for warm_up in contenders.values():
        warm_up()
    return alternate(contenders, pairs)
