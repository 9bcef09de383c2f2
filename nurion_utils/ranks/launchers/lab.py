"""A small network on one machine: virtual nodes on a switch, with links as slow as one likes, and MPI across them.

>>> from nurion_utils import ranks
>>> with ranks.start(4, rate_mbit=100) as world:  # doctest: +SKIP
...     table = world.run(work)

So one sees what algorithms differ in: bytes on the wire.
"""

import sys
from functools import partial
from pathlib import Path

from nurion_utils.ranks.launchers import nodes
from nurion_utils.ranks.launchers.local import Placement

SETTINGS = {
    **nodes.NETWORK,
    # UCX would send a large message in one piece, and with it hold up the word to the partner that it may send too:
    # exchanges of 4 MB and more, recursive doubling's for one, would go one way first and then the other.
    "UCX_RNDV_SCHEME": "am",
}
# What Hydra takes for ssh: the last arguments are the host and the command, a line for the shell.
LAUNCHER = """#!/bin/sh
while ! [ -e {shm}/$1/first ]; do shift; done
node=$1; shift
exec {shm}/on $node sh -c "$*"
"""


def placement(n: int, rate_mbit: float) -> Placement:
    """`n` ranks, each on a virtual node of its own with a link of `rate_mbit`; NodesError if there can be none here."""
    launcher = f"{nodes.SHM}/launcher"
    hydra = ["-launcher", "ssh", "-launcher-exec", launcher, "-localhost", nodes.HEAD_ADDRESS, "-ppn", "1"]
    return Placement(
        around=tuple(nodes.namespaces()),
        build=partial(_build, n, rate_mbit, launcher),
        mpiexec=(f"{sys.prefix}/bin/mpiexec", *hydra, "-hosts", ",".join(nodes.names(n))),
        env={"PATH": nodes.path(), **SETTINGS},
        sockets=True,
        progress_s=0.05,
    )


def _build(n: int, rate_mbit: float, launcher: str, directory: Path) -> str:
    script = nodes.build(n, rate_mbit, [directory])
    return f"{script}\ncat > {launcher} <<'END'\n{LAUNCHER.format(shm=nodes.SHM)}END\nchmod 700 {launcher}\n"
