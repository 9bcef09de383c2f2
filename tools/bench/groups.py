"""Two processes that train together, one core each: our ranks, or a peer's."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rank_side

from nurion_utils import ranks

HERE = Path(__file__).parent
TIMEOUT_S = 300  # for one block, or for the imports before the first


@contextlib.contextmanager
def our_ranks(
    ways: list[str], size: Any, batch: int, block_s: float, prepare: Callable = rank_side.prepare
) -> Iterator[dict[str, Callable[[], float]]]:
    """Start two of our ranks; yields, for each way that `prepare` knows, what times one step in a block."""
    with ranks.start(2) as world:
        pids = world.run(os.getpid)
        world.run(prepare, ways, size, batch)

        def steps(way: str, count: int) -> float:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            try:
                return max(world.run(rank_side.block, way, count))
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)  # Horovod asks for work every millisecond, also when idle

        yield {way: _contender(functools.partial(steps, way), block_s) for way in ways}


@contextlib.contextmanager
def peer(module: str, size: int, batch: int, block_s: float) -> Iterator[Callable[[], float]]:
    """Start a peer's two ranks (see `peer`); yields what times one of its steps in a block."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (directory / "ports").write_text(json.dumps(_free_ports(2)))
        processes = []
        for rank in range(2):
            process = subprocess.Popen(
                [sys.executable, HERE / "peer.py", module, str(rank), directory, str(size), str(batch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(directory / f"{rank}.log").open("w"),
                text=True,
                env={**os.environ, **ranks.rank_environment(1), "GLOO_SOCKET_IFNAME": "lo"},
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)

        def steps(count: int) -> float:
            for process in processes:
                process.stdin.write(f"{count}\n")
                process.stdin.flush()
            waiting, times = [process.stdout for process in processes], []
            while waiting:
                ready = select.select(waiting, [], [], TIMEOUT_S)[0]
                lines = [stream.readline() for stream in ready]
                if not ready or "" in lines:  # one that ended; the other may wait for it for ever
                    logs = "".join((directory / f"{rank}.log").read_text()[-2000:] for rank in range(2))
                    raise RuntimeError(f"{module} {'ended' if ready else 'hung'} while it trained:\n{logs}")
                waiting = [stream for stream in waiting if stream not in ready]
                times += map(float, lines)
            return max(times)

        yield _contender(steps, block_s)


def _contender(steps: Callable[[int], float], block_s: float) -> Callable[[], float]:
    """What takes steps for about `block_s` seconds and returns the time of one."""
    steps(2)
    count = max(1, round(block_s / steps(3) * 3))
    return lambda: steps(count) / count


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
