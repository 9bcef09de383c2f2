"""One rank of a peer: ``python peer.py MODULE RANK DIRECTORY SIZE BATCH``.

It reads numbers of steps, one a line, takes them, and answers with their time in seconds.
"""

import importlib
import os
import sys
import time
from pathlib import Path

from nurion_utils.ranks.engine import cores_by_rank
from nurion_utils.ranks.processes.guardian import end_with_parent


def main() -> None:
    module, rank, directory, size, batch = sys.argv[1:]
    end_with_parent()
    os.sched_setaffinity(0, cores_by_rank(2, sorted(os.sched_getaffinity(0)))[int(rank)])  # as our ranks are
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    step = importlib.import_module(module).prepare(int(rank), Path(directory), int(size), int(batch))
    for line in sys.stdin:
        float(step())
        begin = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        float(loss)
        print(time.perf_counter() - begin, file=answers, flush=True)
    os._exit(0)  # the strategies of some peers wait for each other at exit


if __name__ == "__main__":
    main()
