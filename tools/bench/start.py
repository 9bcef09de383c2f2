"""How long four ranks take to start, as a notebook's first cell sees it; a plain ipyparallel cluster is the peer."""

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
from blocks import alternate

from nurion_utils.cluster import Cluster

# Each start in a fresh Python, imports and a first call on all ranks included; the end is not counted.
PROGRAM = "import time; begin = time.perf_counter(); {}; print(time.perf_counter() - begin); {}"
OURS = ("from nurion_utils import ranks; world = ranks.start(4{}); world.run(int)", "world.stop()")
PEER = (
    "import ipyparallel, logging, traitlets; "
    "cluster = ipyparallel.Cluster(n=4, log_level=logging.ERROR, {}); "
    "cluster.start_and_connect_sync()[:].apply_sync(int)",
    "cluster.stop_cluster_sync()",
)
# One engine on each node, as many as our ranks; unlike those they form no world of MPI.
TEMPLATE = "#!/bin/sh\n#SBATCH --nodes=4 --ntasks-per-node=1 --output=/dev/null\nsrun {program_and_args}\n"


def measure(pairs: int = 5, nodes: int = 0) -> pd.DataFrame:
    """Time the starts, on this machine or through Slurm on `nodes` virtual ones; see `blocks.alternate`."""
    # ipyparallel looks for mpiexec in the path, where it stands once the environment is activated
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    prefix, ours, peer = [], "", "engines='mpi'"
    with contextlib.ExitStack() as stack:
        if nodes:
            cluster = stack.enter_context(Cluster(nodes))
            launcher = {"batch_template": TEMPLATE, "batch_file_name": str(cluster.directory / "engines.sbatch")}
            config = f"traitlets.config.Config(SlurmEngineSetLauncher={launcher!r})"
            peer = f"engines='slurm', controller_ip='*', config={config}"
            prefix, ours = cluster.command([]), ", site='slurm'"
            environment = {**cluster.environment, "HOME": str(cluster.directory)}

        def starting(begin: str, end: str) -> float:
            command = [*prefix, sys.executable, "-P", "-c", PROGRAM.format(begin, end)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
            return float(done.stdout.splitlines()[-1])

        contenders = {"nurion_utils": (OURS, ours), "ipyparallel": (PEER, peer)}
        return alternate(
            {name: partial(starting, begin.format(how), end) for name, ((begin, end), how) in contenders.items()}, pairs
        )
