"""The readers of an emulated workload: threads of this process or of ranks, in the order of events of `simulate`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils.storage.client import EmulatorError, FileSystemClient
from nurion_utils.storage.model import Workload

if TYPE_CHECKING:
    from mpi4py import MPI


def read_on_rank(client: FileSystemClient, workload: Workload) -> list[dict]:
    """The readers of one MPI rank, dealt out in turn."""
    from mpi4py.MPI import COMM_WORLD as comm

    mine = range(comm.rank, workload.readers, comm.size)
    with_readers = comm.Split(bool(mine))
    rows = read_all(client, workload, mine, with_readers) if mine else []
    with_readers.Free()
    return rows


def read_all(client: FileSystemClient, workload: Workload, readers: range, comm: MPI.Comm | None = None) -> list[dict]:
    """A thread for each of `readers`, who meet those of the other ranks of `comm`; a row for each of their steps."""
    first, lengths = workload.first_targets(client.system), [workload.file_bytes] * workload.files_per_step
    failed, over = np.zeros((2, 1), int)

    def meet_ranks() -> None:
        over[:] = failed
        request = comm.Iallreduce(failed, over) if comm is not None else None  # ranks on which a reader failed
        while request is not None and not request.Test() and not meeting.broken:
            time.sleep(0.0005)  # MPI's own waiting would take a core from the readers

    def meet(fails: bool) -> bool:
        """Wait for all readers of all ranks; whether a read of any of them has failed."""
        if fails:
            failed[0] = 1
        meeting.wait()
        return bool(over[0])

    def fetch(step: int, reader: int) -> dict:
        names = [f"{step}/{reader}-{i}" for i in range(workload.files_per_step)]
        row = {"reader": reader, "step": step, "request_s": time.monotonic()}
        row |= dict.fromkeys(["ready_s", "begin_s", "end_s", "fails_s"], math.nan)
        target, late = client.request(names, lengths, first[step, reader])
        return row | {"target": target, "fails_s" if late else "ready_s": time.monotonic()}

    meeting = threading.Barrier(len(readers), meet_ranks)
    with ThreadPoolExecutor(len(readers)) as pool:
        tasks = [pool.submit(_steps, workload, reader, fetch, meet) for reader in readers]
        try:
            return [row for task in tasks for row in task.result()]
        finally:
            meeting.abort()  # or readers would wait for ever where this is interrupted


def _steps(workload: Workload, reader: int, fetch: Callable, meet: Callable) -> list[dict]:
    """All steps of one reader, or as many as come before a read of any reader fails."""
    rows: list[dict] = []
    meet(False)
    with ThreadPoolExecutor(1) as ahead:
        fetched = ahead.submit(fetch, 0, reader)
        for step in range(1, workload.steps + 1):
            try:
                rows.append(row := fetched.result())
            except EmulatorError:
                meet(True)
                raise
            if served := math.isnan(row["fails_s"]):
                row["begin_s"] = time.monotonic()
                if workload.prefetch and step < workload.steps:
                    fetched = ahead.submit(fetch, step, reader)
                time.sleep(workload.compute_s)
            if meet(not served):
                break
            row["end_s"] = time.monotonic()
            if not workload.prefetch and step < workload.steps:
                fetched = ahead.submit(fetch, step, reader)
    return rows
