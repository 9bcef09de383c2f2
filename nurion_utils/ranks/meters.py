"""How far ranks are, told by the ranks themselves; the notebook shows it as one bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nurion_utils.ranks.failures import shell

T = TypeVar("T")


def progress(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterator[T]:
    """Iterate on a rank and let the notebook show one progress bar for all ranks.

    Parameters
    ----------
    iterable
        What to go through.
    total
        Number of items, needed where `iterable` has no length.
    description
        Text in front of the bar.
    """
    total = len(iterable) if total is None and _on_rank() else total  # type: ignore[arg-type]
    tell = meter(total, description)
    for item in iterable:
        yield item
        tell(1)


def _on_rank() -> bool:
    """Whether this is a rank, and a notebook could show how far it is."""
    # of the kernel, not of the shell: a notebook's own shell says that it has a publisher, and fails to make one
    return getattr(getattr(shell(), "kernel", None), "data_pub_class", None) is not None


def meter(total: int | None, description: str = "", unit: str = "it") -> Callable[[int], None]:
    """What a rank calls with each amount that is done, so that the notebook can show one bar for all ranks.

    Elsewhere the calls do nothing.
    """
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
