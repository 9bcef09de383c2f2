"""What a notebook shows of a world: one bar of how far its ranks are, as they tell, and ``%%px`` that cannot hang."""

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from nurion_utils.ranks.failures import shell

T = TypeVar("T")

_latest_world: Any = None  # the one that %%px cells run on
_earlier_worlds: list[weakref.ref] = []


def somebody_watches() -> bool:
    """True in a notebook front end or a terminal; False under papermill and its like, which take no input."""
    kernel = getattr(shell(), "kernel", None)
    return kernel._allow_stdin if kernel is not None else sys.stderr.isatty()


class ProgressBar:
    """One tqdm bar over the sum of what the ranks report; silent where nobody watches."""

    def __init__(self) -> None:
        self._bar: Any = None

    def update(self, result: Any) -> None:
        reports = [m["data"]["progress"] for m in result._metadata if m.get("data", {}).get("progress")]
        if not reports or not somebody_watches():
            return
        done, total = (sum(report[i] for report in reports) for i in (0, 1))
        if self._bar is None:
            from tqdm.auto import tqdm

            _, _, description, unit = reports[0]
            self._bar = tqdm(total=total, desc=description or None, unit=unit, unit_scale=unit == "B")
        elif self._bar.total != total:  # a rank has joined in, or they have come to something new
            self._bar.reset(total)
        self._bar.update(done - self._bar.n)

    def close(self, result: Any) -> None:
        if self._bar is not None:
            result.wait_for_output(1)  # the last reports may come after the results
            self.update(result)
            self._bar.close()


def progress(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterator[T]:
    """Iterate on a rank and let the notebook show one bar for all ranks, with a `description` in front of it.

    `total` is the number of items, needed where `iterable` has no length.
    """
    tell = meter(len(iterable) if total is None and _on_rank() else total, description)  # type: ignore[arg-type]
    for item in iterable:
        yield item
        tell(1)


def _on_rank() -> bool:
    """Whether this is a rank, and a notebook could show how far it is."""
    # of the kernel, not of the shell: a notebook's own shell says that it has a publisher, and fails to make one
    return getattr(getattr(shell(), "kernel", None), "data_pub_class", None) is not None


def meter(total: int | None, description: str = "", unit: str = "it") -> Callable[[int], None]:
    """What a rank calls with each amount that is done, for one bar of all ranks; elsewhere the calls do nothing."""
    if not _on_rank():
        return lambda amount: None
    publish, done, told_at = shell().data_pub.publish_data, 0, 0.0
    publish({"progress": (0, total, description, unit)})

    def tell(amount: int) -> None:
        nonlocal done, told_at
        done += amount
        if done == total or time.monotonic() - told_at > 0.2:
            publish({"progress": (done, total, description, unit)})
            told_at = time.monotonic()

    return tell


def register_magics(world: Any) -> None:
    """Let ``%%px`` and ``%px`` run on the world's ranks; does nothing outside IPython."""
    if shell() is None:
        return
    from nurion_utils.ranks.magics import RankMagics

    # Only the latest world is held here: a cell that starts ranks ends its earlier ones when it is run again.
    global _latest_world
    if _latest_world not in (None, world):
        _earlier_worlds.append(weakref.ref(_latest_world))
    _latest_world = world
    shell().register_magics(RankMagics(shell(), world))


def give_back_magics(world: Any) -> None:
    """When the latest world has stopped, ``%%px`` runs on the one before that somebody still uses."""
    global _latest_world
    while world is _latest_world and _earlier_worlds:
        if (earlier := _earlier_worlds.pop()()) is not None and earlier.is_running:
            _latest_world = None
            register_magics(earlier)
