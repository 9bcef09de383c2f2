"""What reads from an emulated file system: it waits for its turn, then takes the bytes from the file behind it."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nurion_utils.storage.model import METADATA, ParallelFileSystem


class EmulatorError(RuntimeError):
    """The emulated file system has ended; the message says what to do."""


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
            The file cannot be read, or a request came to its turn too late (EIO); names the file.
        EmulatorError
            The file system has ended.
        """
        full = self.path(path)
        length = full.stat().st_size
        self._wait_for([(full, length)])
        with open(full, "rb") as file:
            data = file.read(length)
        if len(data) < length:
            short = f"it became shorter while it was read: {len(data)} of {length} bytes were there"
            raise OSError(errno.EIO, short, str(full))
        return data

    def wait(self, *paths: str | os.PathLike[str]) -> None:
        """Wait as for reading all of these files, opened together, without reading them; raises as `read` does."""
        self._wait_for([(full, full.stat().st_size) for full in map(self.path, paths)])

    def wait_until_idle(self) -> None:
        """Wait until all that has been asked for, by whichever client, is delivered."""
        self.ask({"idle": True})

    def _wait_for(self, files: Sequence[tuple[Path, int]]) -> None:
        target, failed = self.request([(str(full.relative_to(self._root)), length) for full, length in files])
        if failed is not None:
            who = "the metadata server" if target == METADATA else f"target {target}"
            late = f"{who} did not answer within {self._system.timeout_s:g} s (its queue was longer)"
            raise OSError(errno.EIO, late, str(self._root / failed))

    def request(self, files: Sequence[tuple[str, int]], job: str | None = None) -> tuple[int, str | None] | None:
        """Wait for files of these names and lengths, opened together.

        Returns the target that came last, or failed, and the file that failed if one did; None if the job that these
        reads are a part of has failed elsewhere.
        """
        return self.ask({"read": [[name, self._system.shares(length).tolist()] for name, length in files], "job": job})

    def ask(self, request: dict[str, Any]) -> Any:
        """The server's answer to a request of `server.Server.answer`."""
        mine = self._connections
        try:
            if getattr(mine, "process", None) != os.getpid():  # or a forked child would talk on its parent's
                mine.socket = socket.socket(socket.AF_UNIX)
                mine.socket.connect(self._address)
                mine.file, mine.process = mine.socket.makefile("rb"), os.getpid()
            mine.socket.sendall(json.dumps(request).encode() + b"\n")
            line = mine.file.readline()
            if not line.endswith(b"\n"):
                raise ConnectionError("it closed the connection")
        except BaseException as error:
            mine.process = None  # what may still come on this connection would be taken for another answer
            if not isinstance(error, OSError):
                raise
            raise EmulatorError("the emulated file system has ended; start a new one with EmulatedFileSystem") from None
        return json.loads(line)
