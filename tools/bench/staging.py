"""How long a folder takes to be staged; what people would use instead is the peer, and a plain reading the limit.

The source is on disk and the destination in memory, which stands for a node's NVMe: the disk under a virtual machine
would drown all differences in its own, of writing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from blocks import alternate

from nurion_utils.datasets.page_cache import drop_cache, resident

FOLDERS = 50
BUFFER_BYTES = 1 << 20
QUIET_CORES = 0.2  # the kernel's own threads and interrupts, which serve the disk for us, count as others
COMMANDS = {
    "nurion_utils": [sys.executable, "-P", "-m", "nurion_utils.staging", "{source}", "{destination}"],
    "cp": ["cp", "-r", "{source}", "{destination}"],
    "rsync": ["rsync", "-a", "{source}/", "{destination}"],
    "tar": ["sh", "-c", "mkdir {destination} && tar -C {source} -cf - . | tar -C {destination} -xf -"],
}


def measure(n_files: int, size_bytes: int, cold: bool, pairs: int = 5, destination: str = "/dev/shm") -> pd.DataFrame:
    """Time whole commands, the start of Python included, and ``read``: a plain reading of the files, one by one.

    Returns
    -------
    pandas.DataFrame
        As `blocks.alternate` makes it, with ``resident``: the part of the source that was in the page cache when the
        block began.  The contender ``fastest`` is, in each pair, the fastest of those that are not ours.
    """
    with tempfile.TemporaryDirectory() as top, tempfile.TemporaryDirectory(dir=destination) as into:
        source, copy = Path(top), Path(into) / "copy"
        files = _make(source, n_files, size_bytes)
        kept = []

        def prepare() -> None:
            if not cold:
                _read(files)
            kept.append(drop_cache(files) if cold else resident(files))

        def reading() -> float:
            prepare()
            begin = time.perf_counter()
            _read(files)
            return time.perf_counter() - begin

        def copying(name: str) -> float:
            prepare()
            command = [part.format(source=source, destination=copy) for part in COMMANDS[name]]
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            time_s = time.perf_counter() - begin
            shutil.rmtree(copy)  # at once: two copies might not fit into memory
            return time_s

        copying("nurion_utils")  # not counted: the first to touch a virtual machine's memory waits for the host
        kept.clear()
        contenders = {name: lambda name=name: copying(name) for name in COMMANDS} | {"read": reading}
        table = alternate(contenders, pairs, QUIET_CORES).assign(resident=kept)
    others = table[~table["contender"].isin(["nurion_utils", "read"])]
    fastest = others.loc[others.groupby("pair")["time_s"].idxmin()].assign(contender="fastest")
    return pd.concat([table, fastest], ignore_index=True)


def _make(source: Path, n_files: int, size_bytes: int) -> list[Path]:
    content = os.urandom(size_bytes)
    files = [source / f"{i % FOLDERS:02}" / f"{i:06}" for i in range(n_files)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    return sorted(files)


def _read(files: list[Path]) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)
