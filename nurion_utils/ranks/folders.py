"""Folders in which the parts of a world leave word for each other, in use as long as somebody holds their lock."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


def sweep() -> None:
    """Remove those whose owners were killed themselves, the one end after which they cannot clean up."""
    for directory in Path(tempfile.gettempdir()).glob("nurion-*"):
        with contextlib.suppress(OSError):
            if directory.stat().st_uid == os.getuid():
                with open(directory / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused as long as the owner lives
                    shutil.rmtree(directory)


def on_this_node() -> Path:
    """A new folder of this process and those that it forks."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix="nurion-"))
    lock = os.open(folder / "lock", os.O_CREAT | os.O_WRONLY, 0o600)  # open for the process' life
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder


def write_whole(path: Path, content: bytes) -> None:
    """Whoever sees the file sees all of it; nobody else may read it."""
    new = path.with_name(f"{path.name}.new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    os.replace(new, path)
