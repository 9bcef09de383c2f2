"""What ``data/backends.csv`` and ``data/resnet_epochs.csv`` hold: other numbers of ranks, memory and networks."""

import pandas as pd

from nurion_utils.backends.choosing import BACKENDS, GLOO_AS_SHIPPED, KEEP_MEMORY, Backend
from nurion_utils.backends.measuring import measure_backends
from nurion_utils.backends.trainings import measure_epochs

WITHOUT_WORKER = Backend("CCL", {"CCL_ALLREDUCE": "ring", "CCL_WORKER_OFFLOAD": "0"})
SIZES = [2**12, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26]


def backends() -> pd.DataFrame:
    """All backends, oneCCL without its worker thread, and Gloo as shipped, on 2 and 4 ranks, memory freed and kept."""
    contenders = {**BACKENDS, "oneCCL ring, no worker": WITHOUT_WORKER, "Gloo as shipped": GLOO_AS_SHIPPED}
    tables = []
    for ranks in (2, 4):
        for memory, env in (("freed", {}), ("kept", KEEP_MEMORY)):
            table = measure_backends(SIZES, ranks, contenders, repeats=7, cycles_ms=(1.0, 0.1), env=env)
            tables.append(table.assign(memory=memory))
    return _complete(tables)


def resnet_epochs() -> pd.DataFrame:
    """ResNet-50 over three backends: two sizes of images in memory, one across links of 1000 and of 200 Mbit/s."""
    names = ["MPI", "Gloo", "oneCCL ring"]
    tables = [measure_epochs(names, image=image, steps=4, repeats=7) for image in (64, 128)]
    for rate_mbit in (1000.0, 200.0):
        across = measure_epochs(names, image=64, steps=1, repeats=3, rate_mbit=rate_mbit)
        tables.append(across.assign(rate_mbit=rate_mbit))
    return _complete(tables)


def _complete(tables: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables)
    if table["absent"].any():
        why = table.loc[table["absent"] != "", "absent"].iloc[0]
        raise RuntimeError(f"a recording must be complete, and it lacks: {why}")
    return table
