"""A parallel file system that really chokes: readers wait their turn at its metadata server and storage targets.

>>> lustre = ParallelFileSystem(targets=4, target_mb_per_s=50, metadata_ops_per_s=400)
>>> with EmulatedFileSystem(directory, lustre) as running:  # doctest: +SKIP
...     client = running.client()  # may travel to threads and to MPI ranks
...     data = client.read("volumes/0.npy")

The bytes come from ordinary files under a directory; when they come is as `ParallelFileSystem` says. No process plays
it: the readers keep its queues themselves (`nurion_utils.storage.client`), in memory that is this process's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.storage.client import FileSystemClient, layout
from nurion_utils.storage.model import ParallelFileSystem, Workload
from nurion_utils.storage.readers import read_all, read_on_rank
from nurion_utils.storage.simulation import tabulate

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World


class EmulatedFileSystem:
    """A running parallel file system over the files below `root`. Use it as a context manager, or call `close`.

    A file's first stripe lies on a target that follows from its name, as good as random, unless `place` says which.
    ValueError if `root` is not a directory.
    """

    def __init__(self, root: str | os.PathLike[str], system: ParallelFileSystem) -> None:
        if not isinstance(system, ParallelFileSystem):
            raise ValueError(f"system must be a ParallelFileSystem(targets, target_mb_per_s, ...), not {system!r}")
        self.root, self.system = Path(root).resolve(), system
        if not self.root.is_dir():
            raise ValueError(f"{str(root)!r} is not a directory; name one that has, or may have, files to read")
        # A file without a name cannot be left behind by anybody; other processes of this user reach it through /proc.
        descriptor = os.memfd_create("nurion-files")
        os.ftruncate(descriptor, layout(system).itemsize)
        self.close = weakref.finalize(self, os.close, descriptor)
        self._client = FileSystemClient(f"/proc/{os.getpid()}/fd/{descriptor}", self.root, system)

    def client(self) -> FileSystemClient:
        """What reads from it."""
        return self._client

    def place(self, targets: Mapping[str | os.PathLike[str], int]) -> None:
        """Say on which target the first stripe of each file lies, as ``lfs setstripe -i`` does when it makes one.

        Clients that are on ranks already do not hear of it.
        """
        placed = {}
        for path, target in targets.items():
            name = str(self._client.path(path).relative_to(self.root))
            placed[name] = whole_number(target, f"the target of {name!r}", 0, self.system.targets - 1)
        with self._client.shared():
            self._client.placed.update(placed)

    def log(self) -> pd.DataFrame:
        """The last 200,000 requests, those still waiting too, in the order in which they came to their queues.

        Columns: path (its first 255 bytes), target (-1 for the metadata server), queued_s, start_s (not a number if it
        was dropped), end_s, length_bytes, failed; times are since the start.
        """
        import pandas as pd

        with self._client.shared() as memory:
            logged, log = memory["logged"], memory["log"]
            table = pd.DataFrame(log[np.arange(max(0, logged - len(log)), logged) % len(log)])
        table["path"] = table["path"].map(os.fsdecode)
        return table

    def run(self, workload: Workload, world: World | None = None) -> pd.DataFrame:
        """Carry a workload out: the same table as `simulate`, of what readers met in real time.

        Each reader is a thread, of this process or of a rank of `world`, which deals the readers out. The files need
        not be there: a reader waits its turns as if they were. It begins when all queues are empty.
        """
        import pandas as pd

        if not isinstance(workload, Workload):
            raise ValueError(f"workload must be a Workload, not {workload!r}")
        self._client.wait_until_idle()
        if world is None:
            rows = read_all(self._client, workload, range(workload.readers))
        else:
            rows = [row for rows in world.run(read_on_rank, self._client, workload) for row in rows]
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
