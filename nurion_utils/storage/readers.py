"""The readers of an emulated workload: threads of this process or of ranks, in the order of events of `simulate`."""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import ThreadPoolExecutor

from nurion_utils.storage.client import EmulatorError, FileSystemClient
from nurion_utils.storage.model import METADATA, Workload


def name_of(job: str, step: int, reader: int, i: int) -> str:
    """The file that a reader reads in a step as the i-th of its burst."""
    return f"{job}/{step}/{reader}-{i}"


def read_on_rank(client: FileSystemClient, workload: Workload, job: str) -> list[dict]:
    """The readers of one MPI rank, dealt out in turn."""
    from mpi4py import MPI

    return read_all(client, workload, job, range(MPI.COMM_WORLD.rank, workload.readers, MPI.COMM_WORLD.size))


def read_all(client: FileSystemClient, workload: Workload, job: str, readers: range) -> list[dict]:
    """A thread for each of `readers`; a row for each of their steps."""
    with ThreadPoolExecutor(max(len(readers), 1)) as pool:
        tasks = [pool.submit(_steps, client, workload, job, reader) for reader in readers]
        try:
            return [row for task in tasks for row in task.result()]
        except BaseException:
            with contextlib.suppress(EmulatorError):
                client.ask({"end": job})  # or the others would wait at the next barrier
            raise


def _steps(client: FileSystemClient, workload: Workload, job: str, reader: int) -> list[dict]:
    """All steps of one reader, or as many as come before the job ends."""
    meeting = {"meet": job, "of": workload.readers}

    def fetch(step: int) -> dict:
        files = [(name_of(job, step, reader, i), workload.file_bytes) for i in range(workload.files_per_step)]
        row = {"reader": reader, "step": step, "target": METADATA, "request_s": time.monotonic()}
        row |= dict.fromkeys(["ready_s", "begin_s", "end_s", "fails_s"], math.nan)
        if answer := client.request(files, job):
            target, failed = answer
            row |= {"target": target, "ready_s" if failed is None else "fails_s": time.monotonic()}
        return row

    rows: list[dict] = []
    client.ask(meeting)
    with ThreadPoolExecutor(1) as ahead:
        fetched = ahead.submit(fetch, 0)
        for step in range(1, workload.steps + 1):
            row = fetched.result()
            rows.append(row)
            if math.isnan(row["ready_s"]):
                break
            row["begin_s"] = time.monotonic()
            if workload.prefetch and step < workload.steps:
                fetched = ahead.submit(fetch, step)
            time.sleep(workload.compute_s)
            if not client.ask(meeting):
                break
            row["end_s"] = time.monotonic()
            if not workload.prefetch and step < workload.steps:
                fetched = ahead.submit(fetch, step)
    return rows
