"""The method of every bench: short blocks of work, contenders in turn, a ratio per pair of neighbours."""

from collections.abc import Callable

import pandas as pd

from nurion_utils.timing import OtherLoad

QUIET_CORES = 0.05  # more CPU than this, in cores, taken by others spoils a block
# The kernel handles the packets of virtual nodes for nobody in particular, which takes up to 0.2 cores at 4 Gbit/s.
QUIET_WITH_LINKS = 0.3
MAX_ATTEMPTS = 3  # times as many pairs as were asked for, before a busy machine's are taken


def alternate(contenders: dict[str, Callable[[], float]], pairs: int, quiet_cores: float = QUIET_CORES) -> pd.DataFrame:
    """Run one block of each contender in turn, until `pairs` such turns were not disturbed.

    Parameters
    ----------
    contenders
        By name, what runs one block and returns its time in seconds (of a step, a start, an import).
    pairs
        Undisturbed turns wanted. After three times as many turns the machine counts as busy.
    quiet_cores
        More CPU than this, in cores, taken by others disturbs.

    Returns
    -------
    pandas.DataFrame
        One row per block: ``pair``, ``contender``, ``time_s``, ``others_cores`` (CPU time that processes other
        than this one and its descendants, and other guests of the host, took meanwhile, per second), ``disturbed``
        (whether a block of this pair had too much of that).
    """
    names = list(contenders)
    rows, quiet = [], 0
    for pair in range(MAX_ATTEMPTS * pairs):
        first = pair % len(names)  # whoever comes first may find the machine in another state
        worst = 0.0
        for name in names[first:] + names[:first]:
            load = OtherLoad()
            time_s = contenders[name]()
            others_cores = load.cores()
            worst = max(worst, others_cores)
            rows.append((pair, name, time_s, others_cores))
        quiet += worst <= quiet_cores
        if quiet == pairs:
            break
    table = pd.DataFrame(rows, columns=["pair", "contender", "time_s", "others_cores"])
    table["disturbed"] = table.groupby("pair")["others_cores"].transform("max") > quiet_cores
    return table
