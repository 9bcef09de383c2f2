"""A parallel file system that really chokes: readers wait their turn at its metadata server and storage targets.

>>> lustre = ParallelFileSystem(targets=4, target_mb_per_s=50, metadata_ops_per_s=400)
>>> with EmulatedFileSystem(directory, lustre) as running:  # doctest: +SKIP
...     client = running.client()  # may travel to threads and to MPI ranks
...     data = client.read("volumes/0.npy")

The bytes come from ordinary files under a directory; when they come is as `ParallelFileSystem` says. A server process
(`nurion_utils.storage.server`) holds the queues.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.storage.client import EmulatorError, FileSystemClient
from nurion_utils.storage.model import ParallelFileSystem, Workload
from nurion_utils.storage.readers import name_of, read_all, read_on_rank
from nurion_utils.storage.simulation import tabulate

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

MOST_FILES = 100_000  # of which `run` tells the server the targets


class EmulatedFileSystem:
    """A running parallel file system over the files below `root`. Use it as a context manager, or call `close`.

    A file's first stripe lies on a target that follows from its name, as good as random, unless `place` says which.

    Raises
    ------
    ValueError
        `root` is not a directory; nothing was started.
    """

    def __init__(self, root: str | os.PathLike[str], system: ParallelFileSystem) -> None:
        if not isinstance(system, ParallelFileSystem):
            raise ValueError(f"system must be a ParallelFileSystem(targets, target_mb_per_s, ...), not {system!r}")
        self.root, self.system = Path(root).resolve(), system
        if not self.root.is_dir():
            raise ValueError(f"{str(root)!r} is not a directory; name one that has, or may have, files to read")
        token = secrets.token_hex(16)
        # In Linux' abstract namespace: a socket without a file cannot be left behind by anybody.
        address = f"\0nurion-files-{token}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(4096)
            settings = {"owner": os.getpid(), "listener": listener.fileno()}
            program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("server.py"))]
            self._process = subprocess.Popen(
                [*program, json.dumps(asdict(system) | settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C in a terminal is for the notebook
            )
        self.close = weakref.finalize(self, _close, self._process, os.getpid())
        self._client = FileSystemClient(address, self.root, system)

    def client(self) -> FileSystemClient:
        """What reads from it."""
        return self._client

    def place(self, targets: Mapping[str | os.PathLike[str], int]) -> None:
        """Say on which target the first stripe of each file lies, as ``lfs setstripe -i`` does when it makes one."""
        placed = {}
        for path, target in targets.items():
            name = str(self._client.path(path).relative_to(self.root))
            placed[name] = whole_number(target, f"the target of {name!r}", 0, self.system.targets - 1)
        self._client.ask({"place": placed})

    def log(self) -> pd.DataFrame:
        """The last 200,000 requests, those still waiting too, in the order in which they came to their queues.

        Returns
        -------
        pandas.DataFrame
            path, target (-1 for the metadata server), queued_s, start_s (not a number if it was dropped), end_s,
            length_bytes, failed; times are since the start.
        """
        import pandas as pd

        times = ["queued_s", "start_s", "end_s"]
        columns = ["path", "target", *times, "length_bytes", "failed"]
        table = pd.DataFrame(self._client.ask({"log": True}), columns=columns)
        return table.astype(dict.fromkeys(times, float))

    def run(self, workload: Workload, world: World | None = None) -> pd.DataFrame:
        """Carry a workload out: the same table as `simulate`, of what readers met in real time.

        Each reader is a thread, of this process or of a rank of `world`, which deals the readers out. The files need
        not be there: a reader waits its turns as if they were. It begins when all queues are empty.
        """
        import pandas as pd

        if not isinstance(workload, Workload):
            raise ValueError(f"workload must be a Workload, not {workload!r}")
        first = workload.first_targets(self.system)
        if first.size > MOST_FILES:
            raise ValueError(f"a run can have {MOST_FILES:,} files, and this workload has {first.size:,}; simulate it")
        job = secrets.token_hex(8)
        placed = {name_of(job, *at): int(target) for at, target in np.ndenumerate(first)}
        self._client.ask({"place": placed})
        self._client.wait_until_idle()
        try:
            if world is None:
                rows = read_all(self._client, workload, job, range(workload.readers))
            else:
                rows = [row for rows in world.run(read_on_rank, self._client, workload, job) for row in rows]
        finally:
            with contextlib.suppress(EmulatorError):
                self._client.ask({"end": job})  # of which threads learn that are still at work
        table = pd.DataFrame(rows)
        times = table.columns[table.columns.str.endswith("_s")]
        table[times] -= table["request_s"].min()
        return tabulate(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EmulatedFileSystem over {self.root}: {'running' if self.close.alive else 'closed'}>"


def _close(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # a forked child of the owner must not end its server
        process.kill()
        process.wait()
        process.stdin.close()
