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

from nurion_utils.storage.model import METADATA, ParallelFileSystem

PATIENCE_S = 30.0  # how much later than it can be an answer may be before the server counts as stuck


class EmulatorError(RuntimeError):
    """The emulated file system has ended, or does not answer; the message says what to do."""


class ReadTimeout(OSError):
    """EIO: which target did not answer, and within how many seconds."""

    target: int


class File(NamedTuple):
    """A file with the bytes that it has when it is asked for, and the name by which the server knows it."""

    name: str
    path: Path
    length: int

    def read(self) -> bytes:
        """The bytes; OSError, which names the file, if some of them are gone."""
        with open(self.path, "rb") as file:
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

    def read(self, path: str | os.PathLike[str]) -> bytes:
        """Open a file, wait for the targets that it lies on, and read it.

        Raises
        ------
        OSError
            The file cannot be read, or a request came to its turn too late (EIO, `ReadTimeout`); names the file.
        EmulatorError
            The file system has ended.
        """
        wanted = self.file(path)
        self.wait_for([wanted])
        return wanted.read()

    def wait(self, *paths: str | os.PathLike[str]) -> None:
        """Wait as for reading all of these files, opened together, without reading them; raises as `read` does."""
        self.wait_for([self.file(path) for path in paths])

    def wait_until_idle(self) -> None:
        """Wait until all that has been asked for, by whichever client, is delivered."""
        self.ask({"idle": True})

    def file(self, path: str | os.PathLike[str]) -> File:
        """What `wait_for` takes."""
        full = self.path(path)
        return File(str(full.relative_to(self._root)), full, full.stat().st_size)

    def wait_for(self, files: Sequence[File], job: str | None = None) -> int | None:
        """The target that took longest; None if the job that these reads are a part of has failed elsewhere."""
        system = self._system
        work_s = sum(file.length for file in files) / system.target_mb_per_s / 1e6
        patience_s = 2 * system.timeout_s + work_s + len(files) / system.metadata_ops_per_s + PATIENCE_S
        request = {"read": [[file.name, system.shares(file.length).tolist()] for file in files], "job": job}
        answer = self.ask(request, None if math.isinf(patience_s) else patience_s)
        if answer is None:
            return None
        target, failed = answer
        if failed is not None:
            who = "the metadata server" if target == METADATA else f"target {target}"
            late = f"{who} did not answer within {system.timeout_s:g} s (its queue was longer)"
            error = ReadTimeout(errno.EIO, late, str(self._root / failed))
            error.target = target
            raise error
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
