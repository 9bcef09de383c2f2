"""What reads from an emulated file system: it waits for its turn, then takes the bytes from the file behind it."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nurion_utils._checks import whole_number
from nurion_utils.storage.model import METADATA, ParallelFileSystem

PATIENCE_S = 30.0  # how much later than it can be an answer may be before the server counts as stuck


class EmulatorError(RuntimeError):
    """The emulated file system has ended, or does not answer; the message says what to do."""


class ReadTimeout(OSError):
    """EIO: which target did not answer, and within how many seconds."""

    def __init__(self, target: int, message: str, path: str) -> None:
        super().__init__(errno.EIO, message, path)
        self.target = target

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        return ReadTimeout, (self.target, self.strerror, self.filename)


class Range(NamedTuple):
    """Bytes of a file, and the name by which the server knows it."""

    name: str
    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes; OSError, which names the file, if some of them are gone."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            short = f"it became shorter while it was read: {len(data)} of {self.length} bytes were there"
            raise OSError(errno.EIO, short, str(self.path))
        return data


class FileSystemClient:
    """What reads from an `EmulatedFileSystem`; pickles, and may be used by many threads at once."""

    def __init__(self, address: str, root: Path, system: ParallelFileSystem) -> None:
        self._address, self._root, self._system = address, root, system
        self._connections = threading.local()

    def __reduce__(self) -> tuple[type, tuple[str, Path, ParallelFileSystem]]:
        return FileSystemClient, (self._address, self._root, self._system)

    def path(self, path: str | os.PathLike[str]) -> Path:
        """The backing file of `path`, which is relative to the file system's root, or inside it.

        Raises
        ------
        ValueError
            The path leads out of that directory.
        """
        full = (self._root / path).resolve()
        if not full.is_relative_to(self._root):
            raise ValueError(f"{str(path)!r} leads out of the file system; name a file below {self._root}")
        return full

    def read(self, path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> bytes:
        """Open a file, wait for the targets that the bytes lie on, and read them.

        Parameters
        ----------
        path
            As in `path`.
        offset, length
            The first byte, and how many; by default all to the file's end, where reading ends in any case.

        Raises
        ------
        OSError
            The file cannot be read, or a request came to its turn too late (EIO, `ReadTimeout`); names the file.
        EmulatorError
            The file system has ended.
        """
        wanted = self.range(path, offset, length)
        self.wait_for([wanted])
        return wanted.read()

    def wait(self, *paths: str | os.PathLike[str]) -> None:
        """Wait as for reading all of these files, opened together, without reading them; raises as `read` does."""
        self.wait_for([self.range(path) for path in paths])

    def wait_until_idle(self) -> None:
        """Wait until all that has been asked for, by whichever client, is delivered."""
        self.ask({"idle": True})

    def range(self, path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> Range:
        """What `wait_for` takes; the arguments are those of `read`."""
        full = self.path(path)
        offset = whole_number(offset, "offset", least=0)
        left = max(0, full.stat().st_size - offset)
        length = left if length is None else min(left, whole_number(length, "length", least=0))
        return Range(str(full.relative_to(self._root)), full, offset, length)

    def wait_for(self, ranges: Sequence[Range], job: str | None = None) -> int | None:
        """The target that took longest; None if the job that these reads are a part of has failed elsewhere."""
        system = self._system
        work_s = sum(each.length for each in ranges) / system.target_mb_per_s / 1e6
        patience_s = 2 * system.timeout_s + work_s + len(ranges) / system.metadata_ops_per_s + PATIENCE_S
        files = [[each.name, system.shares(each.length, each.offset).tolist()] for each in ranges]
        answer = self.ask({"read": files, "job": job}, None if math.isinf(patience_s) else patience_s)
        if answer is None:
            return None
        target, failed = answer
        if failed is not None:
            who = "the metadata server" if target == METADATA else f"target {target}"
            late = f"{who} did not answer within {system.timeout_s:g} s (its queue was longer)"
            raise ReadTimeout(target, late, str(self._root / failed))
        return target

    def ask(self, request: dict[str, Any], patience_s: float | None = None) -> Any:
        """The server's answer to a request of `server.Server.answer`."""
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
            raise EmulatorError(f"the emulated file system {what}; start a new one with EmulatedFileSystem") from None
        return json.loads(line)
