"""How long four ranks take to start, as a notebook's first cell sees it; a plain ipyparallel cluster is the peer."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from blocks import alternate

# Each start in a fresh Python, imports and a first call on all ranks included; the end is not counted.
PROGRAM = "import time; begin = time.perf_counter(); {}; print(time.perf_counter() - begin); {}"
CONTENDERS = {
    "nurion_utils": (
        "from nurion_utils import ranks; world = ranks.start(4); world.run(int)",
        "world.stop()",
    ),
    "ipyparallel": (
        "import ipyparallel, logging; "
        "cluster = ipyparallel.Cluster(engines='mpi', n=4, log_level=logging.ERROR); "
        "cluster.start_and_connect_sync()[:].apply_sync(int)",
        "cluster.stop_cluster_sync()",
    ),
}


def measure(pairs: int = 5) -> pd.DataFrame:
    """Time the starts; see `blocks.alternate` for the table."""
    # ipyparallel looks for mpiexec in the path, where it stands once the environment is activated
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def starting(name: str) -> float:
        command = [sys.executable, "-P", "-c", PROGRAM.format(*CONTENDERS[name])]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
        return float(done.stdout.splitlines()[-1])

    return alternate({name: lambda name=name: starting(name) for name in CONTENDERS}, pairs)
