"""The readers of an emulated workload: threads of this process or of ranks, in the order of events of `simulate`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nurion_utils.storage.client import EmulatorError, FileSystemClient, ReadTimeout
from nurion_utils.storage.model import METADATA, Workload


def file_of(directory: Path, step: int, reader: int, i: int) -> Path:
    """The file that a reader reads in a step as the i-th of its burst."""
    return directory / str(step) / f"{reader}-{i}"


def read_on_rank(client: FileSystemClient, workload: Workload, directory: Path, job: str) -> list[dict]:
    """The readers of one MPI rank, dealt out in turn."""
    from mpi4py import MPI

    mine = range(MPI.COMM_WORLD.rank, workload.readers, MPI.COMM_WORLD.size)
    return read_all(client, workload, directory, job, mine)


def read_all(client: FileSystemClient, workload: Workload, directory: Path, job: str, readers: range) -> list[dict]:
    """A thread for each of `readers`; a row for each of their steps."""
    if not readers:
        return []
    with ThreadPoolExecutor(len(readers)) as pool:
        tasks = [pool.submit(_steps, client, workload, directory, job, reader) for reader in readers]
        try:
            return [row for task in tasks for row in task.result()]
        except BaseException:
            with contextlib.suppress(EmulatorError):
                client.ask({"end": job})  # or the others would wait at the next barrier
            raise


def _steps(client: FileSystemClient, workload: Workload, directory: Path, job: str, reader: int) -> list[dict]:
    """All steps of one reader, or as many as come before the job ends."""

    def meet() -> bool:
        return client.ask({"meet": job, "of": workload.readers})

    def fetch(step: int) -> dict:
        files = [client.file(file_of(directory, step, reader, i)) for i in range(workload.files_per_step)]
        row = {"reader": reader, "step": step, "target": METADATA, "request_s": time.monotonic()}
        row |= dict.fromkeys(["ready_s", "begin_s", "end_s", "fails_s"], math.nan)
        try:
            target = client.wait_for(files, job)
            if target is not None:
                for file in files:
                    file.read()
                row |= {"target": target, "ready_s": time.monotonic()}
        except ReadTimeout as error:
            row |= {"target": error.target, "fails_s": time.monotonic()}
        return row

    rows: list[dict] = []
    meet()
    with ThreadPoolExecutor(1) as ahead:
        for row in _ahead(ahead, fetch, workload.steps) if workload.prefetch else map(fetch, range(workload.steps)):
            rows.append(row)
            if math.isnan(row["ready_s"]):
                break
            row["begin_s"] = time.monotonic()
            time.sleep(workload.compute_s)
            if not meet():
                break
            row["end_s"] = time.monotonic()
    return rows


def _ahead(pool: ThreadPoolExecutor, fetch: Callable[[int], dict], steps: int) -> Iterator[dict]:
    """``fetch(0)``, ``fetch(1)``, ...; each begins, in the thread of `pool`, when the one before is taken."""
    fetched = pool.submit(fetch, 0)
    for step in range(1, steps):
        row, fetched = fetched.result(), pool.submit(fetch, step)
        yield row
    yield fetched.result()
