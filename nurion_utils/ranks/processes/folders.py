"""Folders in which the parts of a world leave word for each other, in use as long as somebody holds their lock."""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from nurion_utils.ranks.failures import RankError
from nurion_utils.ranks.processes.guardian import remove, shared_memory_of

FORGOTTEN_S = 3600.0  # a folder that is in use is touched every second
STARTING_S = 300.0  # in which a program that others may start has opened what it needs


def sweep() -> None:
    """Remove those whose owners were killed themselves, the one end after which they cannot clean up."""
    for directory in Path(tempfile.gettempdir()).glob("nurion-*"):
        with contextlib.suppress(OSError):
            if directory.stat().st_uid == os.getuid():
                with open(directory / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused as long as the owner lives
                    shutil.rmtree(directory)


def sweep_segments() -> None:
    """Remove what MPI left of killed programs: it would take it for its own where a process number comes again."""
    now_s, folder = time.time(), Path("/dev/shm")
    old = {file for file in folder.glob("mpich_shm_*") if _is_mine_and_older(file, now_s - STARTING_S)}
    if old:
        old -= {Path(name) for name in shared_memory_of([int(pid) for pid in os.listdir("/proc") if pid.isdigit()])}
        remove(set(map(str, old)))


def _is_mine_and_older(file: Path, than_s: float) -> bool:
    with contextlib.suppress(OSError):
        found = file.stat()
        return found.st_uid == os.getuid() and found.st_mtime < than_s
    return False


def on_all_nodes() -> Path:
    """The name of a new folder where all nodes of a cluster see it, as they do not see /tmp."""
    parent = Path.home() / ".nurion"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise RankError(f"ranks on other nodes need {parent}, which all nodes see: {error.strerror}") from None
    for folder in parent.glob("run-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > FORGOTTEN_S:
                shutil.rmtree(folder)
    return parent / f"run-{secrets.token_hex(6)}"


def write_whole(path: Path, content: bytes) -> None:
    """Whoever sees the file sees all of it; nobody else may read it."""
    new = path.with_name(f"{path.name}.new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    os.replace(new, path)
