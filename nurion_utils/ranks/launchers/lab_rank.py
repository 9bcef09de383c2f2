"""One rank of a network lab: it runs what the notebook sends, and answers."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Client
from pathlib import Path

from nurion_utils.ranks.calls import call
from nurion_utils.ranks.engine import note_output, stay_outside
from nurion_utils.ranks.environment import identity
from nurion_utils.ranks.launchers.lab_host import SHM, SOCKET


def main() -> None:
    """One rank: run what the notebook sends, and answer."""
    rank = identity().rank
    own = f"{SHM}/rank{rank}"
    stay_outside(Path(f"{own}.status"))
    note_output(Path(own))  # what a rank prints would else travel through the network that is measured

    from mpi4py import MPI

    notebook = Client(SOCKET)
    notebook.send(rank)
    with contextlib.suppress(EOFError):
        while True:
            pause_s = 0.001
            # The last bytes that this rank has sent may need MPI's help to leave it, and others wait for them.
            while not notebook.poll(pause_s):
                MPI.COMM_WORLD.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
                pause_s = min(1.1 * pause_s, 0.05)
            notebook.send(call(notebook.recv_bytes()))


if __name__ == "__main__":
    main()
