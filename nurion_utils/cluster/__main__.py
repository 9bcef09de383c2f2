"""A shell, or a command, on the head of a little cluster with a real Slurm; all is gone when it ends."""

import argparse
import os
import subprocess
import sys

from nurion_utils.cluster.slurm import Cluster, ClusterError
from nurion_utils.ranks import NodesError


def main() -> int:
    parser = argparse.ArgumentParser("python -m nurion_utils.cluster", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4, help="how many nodes (default: 4)")
    parser.add_argument("--rate-mbit", type=float, help="speed of each node's link in 10^6 bit/s (default: no limit)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run (default: your shell)")
    arguments = parser.parse_args()
    try:
        cluster = Cluster(arguments.nodes, arguments.rate_mbit)
    except (ClusterError, NodesError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    with cluster:
        command = arguments.command
        if not command:
            command = [os.environ.get("SHELL", "/bin/sh")]
            print(
                f"{arguments.nodes} nodes: try sinfo, srun -N{arguments.nodes} hostname, sbatch, squeue; exit ends it"
            )
        return subprocess.run(cluster.command(command), env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
