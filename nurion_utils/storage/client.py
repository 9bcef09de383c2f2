"""What reads from an emulated file system: it waits for its turn, then takes the bytes from the file behind it.

All queues are first come first served, and nobody reaches a target but through the one queue of the metadata server;
so when a request arrives, the moments at which it will be served are already settled. Each reader books them itself
on one clock for each queue, ``free = max(now, free) + service``, and sleeps until the last one has come. The clocks
are in memory that all readers share, one at a time. Who is killed while it waits leaves only its bookings behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nurion_utils.storage.model import METADATA, ParallelFileSystem

MOST_LOGGED = 200_000
ENTRY = [("path", "S255"), ("target", int), ("queued_s", float), ("start_s", float), ("end_s", float)]
ENTRY += [("length_bytes", int), ("failed", bool)]


class EmulatorError(RuntimeError):
    """The emulated file system has ended; the message says what to do."""


def layout(system: ParallelFileSystem) -> np.dtype:
    """Of the memory that readers share: when each queue will be empty, by the monotonic clock; and the requests."""
    # The last queue is the metadata server's: METADATA is -1.
    return np.dtype([("free_s", float, system.targets + 1), ("logged", int), ("log", ENTRY, MOST_LOGGED)])


class FileSystemClient:
    """What reads from an `EmulatedFileSystem`; pickles, and may be used by many threads at once."""

    def __init__(self, memory: str, root: Path, system: ParallelFileSystem) -> None:
        self._memory, self._inode, self._began_s = memory, os.stat(memory).st_ino, time.monotonic()
        self.root, self.system = root, system
        self.placed: dict[str, int] = {}  # the first targets of files, where somebody chose them

    def path(self, path: str | os.PathLike[str]) -> Path:
        """The backing file of `path`, relative to the file system's root or inside it; ValueError if it leads out."""
        full = (self.root / path).resolve()
        if not full.is_relative_to(self.root):
            raise ValueError(f"{str(path)!r} leads out of the file system; name a file below {self.root}")
        return full

    def read(self, path: str | os.PathLike[str]) -> bytes:
        """Open a file, wait for the targets that it lies on, and read it.

        OSError, with the file's name, if it cannot be read, or a request came to its turn too late (EIO); EmulatorError
        if the file system has ended.
        """
        full = self.path(path)
        length = full.stat().st_size
        self.wait(full)
        with open(full, "rb") as file:
            data = file.read(length)
        if len(data) < length:
            short = f"it became shorter while it was read: {len(data)} of {length} bytes were there"
            raise OSError(errno.EIO, short, str(full))
        return data

    def wait(self, *paths: str | os.PathLike[str]) -> None:
        """Wait as for reading all of these files, opened together, without reading them; raises as `read` does."""
        files = [self.path(path) for path in paths]
        names = [str(file.relative_to(self.root)) for file in files]
        first = [self.placed.get(name, zlib.crc32(os.fsencode(name)) % self.system.targets) for name in names]
        target, failed = self.request(names, [file.stat().st_size for file in files], first)
        if failed is not None:
            who = "the metadata server" if target == METADATA else f"target {target}"
            late = f"{who} did not answer within {self.system.timeout_s:g} s (its queue was longer)"
            raise OSError(errno.EIO, late, str(self.root / failed))

    def wait_until_idle(self) -> None:
        """Wait until all that has been asked for, by whichever client, is delivered."""
        with self.shared() as memory:
            until_s = memory["free_s"].max()
        self.sleep_until(until_s)

    def request(self, names: Sequence[str], lengths: Sequence[int], first: Sequence[int]) -> tuple[int, str | None]:
        """Wait for files with these names, lengths in bytes and first targets, opened together.

        Returns the target that came last, or failed, and the file that failed if one did.
        """
        asked_s = time.monotonic()  # not when its bookings could be made, which on busy cores may be late
        done, failed = [(asked_s, METADATA, None)], []
        with self.shared() as memory:
            for name, length, begins_on in zip(names, lengths, first, strict=True):
                opened_s, served = self._book(memory, name, METADATA, 0, asked_s, 1 / self.system.metadata_ops_per_s)
                (done if served else failed).append((opened_s, METADATA, name))
                shares = self.system.shares(length) if served else []
                for i in np.flatnonzero(shares):
                    target, share = int(begins_on + i) % self.system.targets, int(shares[i])
                    work_s = share / self.system.target_mb_per_s / 1e6
                    done_s, served = self._book(memory, name, target, share, opened_s, work_s)
                    (done if served else failed).append((done_s, target, name))
        until_s, target, name = min(failed) if failed else max(done, key=lambda piece: piece[0])
        self.sleep_until(until_s)
        return target, name if failed else None

    def _book(
        self, memory: np.void, name: str, target: int, length: int, asked_s: float, work_s: float
    ) -> tuple[float, bool]:
        """When a request is done, or given up; and whether it is served."""
        turn_s, gives_up_s = max(asked_s, float(memory["free_s"][target])), asked_s + self.system.timeout_s
        served = turn_s <= gives_up_s
        ends_s = turn_s + work_s if served else gives_up_s
        if served:
            memory["free_s"][target] = ends_s
        times_s = np.array([asked_s, turn_s if served else math.nan, ends_s]) - self._began_s
        memory["log"][memory["logged"] % len(memory["log"])] = os.fsencode(name), target, *times_s, length, not served
        memory["logged"] += 1
        return ends_s, served

    @contextlib.contextmanager
    def shared(self) -> Iterator[np.void]:
        """The memory of this `layout`, for nobody else meanwhile; EmulatorError if the file system has ended."""
        with self._open() as file:
            memory = np.memmap(file, layout(self.system), "r+", shape=1)[0]
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield memory
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough, if a child was forked meanwhile

    def sleep_until(self, until_s: float) -> None:
        """Wait for a moment of the monotonic clock; EmulatorError soon after the file system has ended."""
        while (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.1))
            self._open().close()

    def _open(self) -> io.FileIO:
        with contextlib.suppress(OSError):
            file = open(self._memory, "r+b", buffering=0)
            if os.fstat(file.fileno()).st_ino == self._inode:
                return file
            file.close()  # another one has got its number
        raise EmulatorError("the emulated file system has ended; start a new one with EmulatedFileSystem")
