"""Two ranks that train together, one core each: by our optimizer, or in another library."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import rank_side

from nurion_utils import ranks


@contextlib.contextmanager
def training(
    ways: list[str],
    network: Any,
    batch: int,
    block_s: float,
    prepare: Callable = rank_side.prepare,
    rate_mbit: float | None = None,
) -> Iterator[dict[str, Callable[[], float]]]:
    """Start two ranks; yields, for each way that `prepare` knows, what times one step in a block.

    `rate_mbit` puts them on virtual nodes that are joined by links of so many 10^6 bit/s.
    """
    interface = "lo" if rate_mbit is None else "eth0"
    with ranks.start(2, env={"GLOO_SOCKET_IFNAME": interface}, rate_mbit=rate_mbit) as world:
        world.run(prepare, ways, network, batch)

        def send(number: signal.Signals) -> None:
            for rank in range(world.n):
                world._processes.signal(rank, number)

        def steps(way: str, count: int) -> float:
            send(signal.SIGCONT)
            try:
                return max(world.run(rank_side.block, way, count))
            finally:
                if way != "tensorflow":  # whose ranks look after each other by the clock
                    send(signal.SIGSTOP)  # Horovod asks for work every millisecond, also when idle

        yield {way: _contender(functools.partial(steps, way), block_s) for way in ways}


def _contender(steps: Callable[[int], float], block_s: float) -> Callable[[], float]:
    """What takes steps for about `block_s` seconds and returns the time of one."""
    steps(2)
    count = max(1, round(block_s / steps(3) * 3))
    return lambda: steps(count) / count
