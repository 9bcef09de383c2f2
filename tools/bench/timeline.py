"""Reading a Horovod timeline of a million events, against json.load and a loop that makes a pandas table."""

import json
import math
import tempfile
import time
from pathlib import Path

import pandas as pd
from blocks import alternate

from nurion_utils.backends import timeline

START_US = 1_795_551_301_659_418
FUSED, TENSORS = 8, 40


def measure(n_events: int = 1_000_000, pairs: int = 10) -> pd.DataFrame:
    """Time both readers on the same file; see `blocks.alternate` for the table.

    Both are first held to the same table, so that they do the same job.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.json"
        write(path, n_events)
        readers = {"nurion_utils": timeline.read, "json + pandas": read_by_json}
        ours, peer = (read(path) for read in readers.values())
        pd.testing.assert_frame_equal(ours, peer, check_dtype=False, check_categorical=False)

        def reading(read) -> float:
            begin = time.perf_counter()
            read(path)
            return time.perf_counter() - begin

        return alternate({name: lambda read=read: reading(read) for name, read in readers.items()}, pairs)


def write(path: Path, n_events: int) -> None:
    """The file of steps in which 2 ranks allreduce 40 tensors, 8 to a buffer, in the format of Horovod's writer."""
    n_written, time_us = 0, 0
    head = '{"name": "process_name", "ph": "M", "pid": %d, "args": {%s}},\n'
    head += '{"name": "process_sort_index", "ph": "M", "pid": %d, "args": {"sort_index": %d}}'
    heads = [head % (0, f'"start_time_since_epoch_in_micros":{START_US}', 0, 0)]
    heads += [head % (pid, f'"name": "gradients/layer_{pid}/kernel"', pid, pid) for pid in range(1, TENSORS + 1)]
    with open(path, "w") as file:
        file.write("[\n" + ",\n".join(heads))

        def events(letter: str, name: str, pids: range, more: str = "") -> None:
            nonlocal n_written, time_us
            name = name and f', "name": "{name}"'
            for pid in pids[: n_events - n_written]:
                time_us += 3
                n_written += 1
                shape = more.replace("PID", str(pid))
                file.write(f',{{"ph": "{letter}"{name}, "ts": {time_us}, "pid": {pid}{shape}}}')

        while n_written < n_events:
            for first in range(1, TENSORS + 1, FUSED):
                pids = range(first, first + FUSED)
                events("B", "NEGOTIATE_ALLREDUCE", pids)
                events("X", "1", pids, ', "dur": 0')
                events("X", "0", pids, ', "dur": 0')
                events("E", "", pids)
                events("B", "ALLREDUCE", pids)
                for activity in ("MEMCPY_IN_FUSION_BUFFER", "MPI_ALLREDUCE", "MEMCPY_OUT_FUSION_BUFFER"):
                    events("B", activity, pids)
                    events("E", "", pids)
                events("E", "", pids, ', "args": {"dtype": "float32", "shape": "[PID, 3, 64]"}')
        file.write("]")


def read_by_json(path: Path) -> pd.DataFrame:
    """The table of `timeline.read`, the straightforward way; of a whole file with allreduces of float32 only."""
    phases = {
        "NEGOTIATE_ALLREDUCE": "negotiate",
        "ALLREDUCE": "allreduce",
        "MEMCPY_IN_FUSION_BUFFER": "fuse",
        "MPI_ALLREDUCE": "wire",
        "MEMCPY_OUT_FUSION_BUFFER": "unfuse",
    }
    names, stacks, occurrence, spans = {}, {}, {}, []  # an occurrence: its bytes and its buffer
    open_operations, buffer = 0, -1
    with open(path) as file:
        events = json.load(file)
    for event in events:
        letter, pid = event["ph"], event["pid"]
        if letter == "B":
            name = event["name"]
            stacks[pid].append((name, event["ts"]))
            if name == "ALLREDUCE":
                buffer += not open_operations
                open_operations += 1
                occurrence[pid][1] = buffer
        elif letter == "E":
            name, begin = stacks[pid].pop()
            spans.append((pid, phases[name], name, -1, begin, event["ts"], occurrence[pid]))
            if name == "ALLREDUCE":
                open_operations -= 1
                occurrence[pid][0] = 4 * math.prod(map(int, event["args"]["shape"][1:-1].split(", ")))
                occurrence[pid] = [None, -1]
        elif letter == "X":
            spans.append((pid, "ready", "", int(event["name"]), event["ts"], event["ts"], occurrence[pid]))
        elif event["name"] == "process_name" and pid:
            names[pid], stacks[pid], occurrence[pid] = event["args"]["name"], [], [None, -1]
    pids, phase, activity, rank, begin_us, end_us, of = zip(*spans, strict=True)
    start_s, end_s = pd.Series(begin_us) / 1e6, pd.Series(end_us) / 1e6
    return pd.DataFrame(
        {
            "tensor": pd.Categorical([names[pid] for pid in pids]),
            "phase": pd.Categorical(phase),
            "activity": pd.Categorical(activity),
            "rank": rank,
            "start_s": start_s,
            "duration_s": end_s - start_s,
            "bytes": [size for size, _ in of],
            "buffer": [number for _, number in of],
        }
    )
