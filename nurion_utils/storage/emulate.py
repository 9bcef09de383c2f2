"""A shared file system that really chokes: readers wait their turn at its metadata server and storage targets.

>>> lustre = Storage(targets=4, target_mb_per_s=50, metadata_per_s=400)
>>> with SharedStore(directory, lustre) as store:  # doctest: +SKIP
...     client = store.client()  # may travel to threads and to MPI ranks
...     data = client.read("volumes/0.npy")

The bytes come from ordinary files under a directory; when they come is as `Storage` says.  A server process
(`nurion_utils.storage.server`) holds the queues.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.storage.model import METADATA, Storage, Workload, tabulate

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.ranks import World

PATIENCE_S = 30.0  # how much later than it can be an answer may be before the server counts as stuck
MOST_FILES = 100_000  # that `run` makes


class StoreError(RuntimeError):
    """The store has ended, or does not answer; the message says what to do."""


class _Part(NamedTuple):
    """A range of a file, and where the store knows it."""

    name: str
    path: Path
    offset: int
    length: int


class StoreClient:
    """What reads from a `SharedStore`; pickles, and may be used by many threads at once.

    One client is one node: where `Storage.client_mb_per_s` limits a node's network, the threads that use the same
    client share it.
    """

    def __init__(self, address: str, root: Path, storage: Storage) -> None:
        self._address, self._root, self._storage = address, root, storage
        self._connections = threading.local()
        self._link, self._link_free_s = threading.Lock(), 0.0

    def __reduce__(self) -> tuple[type, tuple[str, Path, Storage]]:
        return StoreClient, (self._address, self._root, self._storage)

    def path(self, path: str | os.PathLike[str]) -> Path:
        """The backing file of `path`, which is relative to the store's directory, or inside it.

        Raises
        ------
        ValueError
            The path leads out of that directory.
        """
        full = (self._root / path).resolve()
        if not full.is_relative_to(self._root):
            raise ValueError(f"{str(path)!r} leads out of the store; name a file below {self._root}")
        return full

    def read(self, path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> bytes:
        """Open a file, wait for the targets that the bytes lie on, and read them.

        Raises
        ------
        OSError
            EIO: a request came to its turn too late (`Storage.timeout_s`); the message names the target.
        StoreError
            The store has ended.
        """
        part = self._part(path, offset, length)
        self._wait([part])
        return _read(part)

    def wait(self, *paths: str | os.PathLike[str]) -> None:
        """Wait as for reading all of these files, opened together, without reading them; raises as `read` does."""
        self._wait([self._part(path) for path in paths])

    def _part(self, path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> _Part:
        full = self.path(path)
        offset = whole_number(offset, "offset", least=0)
        left = max(0, full.stat().st_size - offset)
        length = left if length is None else min(left, whole_number(length, "length", least=0))
        return _Part(str(full.relative_to(self._root)), full, offset, length)

    def _wait(self, parts: Sequence[_Part], job: str | None = None) -> int | None:
        """The target that took longest; None if the job that these reads are a part of has failed elsewhere."""
        asked_s, limit_mb_per_s = time.monotonic(), self._storage.client_mb_per_s
        size_bytes = sum(part.length for part in parts)
        work_s = size_bytes / self._storage.target_mb_per_s / 1e6 + len(parts) / self._storage.metadata_per_s
        patience_s = 2 * self._storage.timeout_s + work_s + PATIENCE_S
        files = [[part.name, self._storage.shares(part.length, part.offset).tolist()] for part in parts]
        answer = self._ask({"read": files, "job": job}, None if math.isinf(patience_s) else patience_s)
        if answer is None:
            return None
        target, failed = answer
        if failed is not None:
            who = "the metadata server" if target == METADATA else f"target {target}"
            late = f"{who} did not answer within {self._storage.timeout_s:g} s (its queue was longer)"
            raise ReadTimeout(target, late, str(self._root / failed))
        if limit_mb_per_s:
            with self._link:
                self._link_free_s = max(self._link_free_s, asked_s) + size_bytes / limit_mb_per_s / 1e6
                free_s = self._link_free_s
            time.sleep(max(0.0, free_s - time.monotonic()))
        return target

    def _ask(self, request: dict[str, Any], patience_s: float | None = None) -> Any:
        mine = self._connections
        try:
            if getattr(mine, "process", None) != os.getpid():  # or a forked child would talk on its parent's
                mine.socket = socket.socket(socket.AF_UNIX)
                mine.socket.connect(self._address)
                mine.file, mine.process = mine.socket.makefile("rb"), os.getpid()
            mine.socket.settimeout(patience_s)
            mine.socket.sendall(json.dumps(request).encode() + b"\n")
            line = mine.file.readline()
            if not line.endswith(b"\n"):
                raise ConnectionError("it closed the connection")
        except BaseException as error:
            mine.process = None  # what may still come on this connection would be taken for another answer
            if not isinstance(error, OSError):
                raise
            late = isinstance(error, TimeoutError)
            what = f"does not answer: nothing came for {patience_s:g} s" if late else "has ended"
            raise StoreError(f"the shared store {what}; open a new one with SharedStore(root, storage)") from None
        return json.loads(line)


class ReadTimeout(OSError):
    """EIO, and the target that it comes from."""

    def __init__(self, target: int, message: str, path: str) -> None:
        super().__init__(errno.EIO, message, path)
        self.target = target

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        return ReadTimeout, (self.target, self.strerror, self.filename)


def _read(part: _Part) -> bytes:
    with open(part.path, "rb") as file:
        file.seek(part.offset)
        return file.read(part.length)


class SharedStore:
    """A running shared file system over the files below `root`.  Use it as a context manager, or call `close`.

    A file's first stripe lies on a target that follows from its name, as good as random, unless `place` says which.

    Raises
    ------
    ValueError
        `root` is no directory; nothing was started.
    """

    def __init__(self, root: str | os.PathLike[str], storage: Storage) -> None:
        if not isinstance(storage, Storage):
            raise ValueError(f"storage must be a Storage(targets, target_mb_per_s, metadata_per_s), not {storage!r}")
        self.root, self.storage = Path(root).resolve(), storage
        if not self.root.is_dir():
            raise ValueError(f"{str(root)!r} is no directory; name one that has, or may have, files to read")
        token = secrets.token_hex(16)
        self._directory = self.root / f".shared-store-{token[:8]}"
        # In Linux' abstract namespace: a socket without a file cannot be left behind by anybody.
        self._client = StoreClient(f"\0nurion-store-{token}", self.root, storage)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._client._address)
            listener.listen(4096)
            settings = {
                **asdict(storage),
                **{"owner": os.getpid(), "listener": listener.fileno(), "directory": str(self._directory)},
            }
            self._process = subprocess.Popen(
                [
                    *[sys.executable, "-I", "-S", str(Path(__file__).with_name("server.py"))],
                    json.dumps(settings),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C in a terminal is for the notebook
            )
        self.close = weakref.finalize(self, _close, self._process, self._directory, os.getpid())
        try:
            self._client._ask({"idle": True}, PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def client(self) -> StoreClient:
        """A reader of its own; see `StoreClient`."""
        return StoreClient(self._client._address, self.root, self.storage)

    def place(self, targets: Mapping[str | os.PathLike[str], int]) -> None:
        """Say on which target the first stripe of each file lies, as ``lfs setstripe -i`` does when it makes one."""
        named = {str(self._client.path(path).relative_to(self.root)): target for path, target in targets.items()}
        for name, target in named.items():
            if whole_number(target, f"the target of {name!r}", least=0) >= self.storage.targets:
                raise ValueError(
                    f"the targets are 0 to {self.storage.targets - 1}, and {name!r} was placed on {target}"
                )
        self._client._ask({"place": {name: int(target) for name, target in named.items()}})

    def log(self) -> pd.DataFrame:
        """The last 200,000 requests, those still waiting too, in the order in which they came to their queues.

        Returns
        -------
        pandas.DataFrame
            path, target (-1 for the metadata server), queued_s, start_s (not a number if it was dropped), end_s,
            length_bytes, queue_length (others that it found there), failed; times are since the store began.
        """
        import pandas as pd

        times = ["queued_s", "start_s", "end_s"]
        columns = ["path", "target", *times, "length_bytes", "queue_length", "failed"]
        table = pd.DataFrame(self._client._ask({"log": True}), columns=columns)
        return table.astype(dict.fromkeys(times, float))

    def run(self, workload: Workload, world: World | None = None) -> pd.DataFrame:
        """Carry a workload out: the same table as `simulate`, of what readers met in real time.

        Each reader is a thread, of this process or of a rank of `world`, which deals the readers out.  The files
        are made for the run, without contents that take room, and removed after it.  It begins when the store is idle.
        """
        import pandas as pd

        if not isinstance(workload, Workload):
            raise ValueError(f"workload must be a Workload, not {workload!r}")
        first = workload.first_targets(self.storage)
        if first.size > MOST_FILES:
            raise ValueError(f"a run can have {MOST_FILES:,} files, and this workload has {first.size:,}; simulate it")
        job = secrets.token_hex(8)
        directory = self._directory / job
        try:
            placed = {}
            for step in range(workload.steps):
                (directory / str(step)).mkdir(parents=True)
            for (step, reader, i), target in np.ndenumerate(first):
                path = _file(directory, step, reader, i)
                with open(path, "wb") as file:
                    file.truncate(workload.file_bytes)
                placed[str(path.relative_to(self.root))] = int(target)
            self._client._ask({"place": placed})
            self._client._ask({"idle": True})
            if world is None:
                rows = _read_all(self._client, workload, directory, job, range(workload.readers))
            else:
                ranks = world.run(_read_on_rank, self._client, workload, directory, job)
                rows = [row for rows in ranks for row in rows]
        finally:
            with contextlib.suppress(StoreError):
                self._client._ask({"end": job})  # of which threads learn that are still at work
            shutil.rmtree(self._directory, ignore_errors=True)
        table = pd.DataFrame(rows)
        times = [name for name in table if name.endswith("_s")]
        table[times] = table[times].astype(float) - table["request_s"].min()
        return tabulate(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SharedStore over {self.root}: {'running' if self.close.alive else 'closed'}>"


def _close(process: subprocess.Popen[bytes], directory: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child of the owner must not end its store
        return
    process.kill()
    process.wait()
    process.stdin.close()
    shutil.rmtree(directory, ignore_errors=True)


def _read_on_rank(client: StoreClient, workload: Workload, directory: Path, job: str) -> list[dict]:
    from mpi4py import MPI

    mine = range(MPI.COMM_WORLD.rank, workload.readers, MPI.COMM_WORLD.size)
    return _read_all(client, workload, directory, job, mine)


def _read_all(client: StoreClient, workload: Workload, directory: Path, job: str, readers: range) -> list[dict]:
    """A thread for each of `readers`."""
    if not readers:
        return []
    with ThreadPoolExecutor(len(readers)) as pool:
        arguments = (client._address, client._root, client._storage)
        tasks = [pool.submit(_steps, StoreClient(*arguments), workload, directory, job, reader) for reader in readers]
        try:
            return [row for task in tasks for row in task.result()]
        except BaseException:
            with contextlib.suppress(StoreError):
                client._ask({"end": job})  # or the others would wait at the next barrier
            raise


def _steps(client: StoreClient, workload: Workload, directory: Path, job: str, reader: int) -> list[dict]:
    """All steps of one reader, in the same order of events as `simulate` has them."""
    rows: list[dict] = []
    ready: queue.SimpleQueue[dict] = queue.SimpleQueue()
    room = threading.Semaphore(workload.prefetch)
    over = threading.Event()
    _meet(client, job, workload)

    def fetch(step: int) -> dict:
        parts = [client._part(_file(directory, step, reader, i)) for i in range(workload.files_per_step)]
        row = {"reader": reader, "step": step, "target": METADATA, "request_s": time.monotonic()}
        row |= dict.fromkeys(["ready_s", "begin_s", "end_s", "fails_s"], math.nan)
        try:
            target = client._wait(parts, job)
            if target is not None:
                for part in parts:
                    _read(part)
                row |= {"target": target, "ready_s": time.monotonic()}
        except ReadTimeout as error:
            row |= {"target": error.target, "fails_s": time.monotonic()}
        return row

    def read_ahead() -> None:
        for step in range(workload.steps):
            room.acquire()
            if over.is_set():
                return
            try:
                row = fetch(step)
            except Exception as error:
                return ready.put(error)
            ready.put(row)
            if math.isnan(row["ready_s"]):
                return

    if workload.prefetch:
        producer = threading.Thread(target=read_ahead, daemon=True)
        producer.start()
    try:
        for step in range(workload.steps):
            row = ready.get() if workload.prefetch else fetch(step)
            if isinstance(row, Exception):
                raise row
            rows.append(row)
            if math.isnan(row["ready_s"]):
                break
            room.release()
            row["begin_s"] = time.monotonic()
            time.sleep(workload.compute_s)
            if workload.synchronous and not _meet(client, job, workload):
                break
            row["end_s"] = time.monotonic()
    finally:
        over.set()
        room.release()
    return rows


def _file(directory: Path, step: int, reader: int, i: int) -> Path:
    return directory / str(step) / f"{reader}-{i}"


def _meet(client: StoreClient, job: str, workload: Workload) -> bool:
    return client._ask({"meet": job, "of": workload.readers})
