"""The notebook's side of a world: one progress bar for all ranks, and ``%%px`` cells that cannot hang."""

import contextlib
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from nurion_utils.ranks import failures
from nurion_utils.ranks.failures import shell

T = TypeVar("T")

_latest_world: Any = None  # the one that %%px cells run on


def somebody_watches() -> bool:
    """True in a notebook front end or a terminal; False under papermill and its like, which take no input."""
    kernel = getattr(shell(), "kernel", None)
    return kernel._allow_stdin if kernel is not None else sys.stderr.isatty()


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


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Raise an interrupt once more at the end of the block, if somebody swallowed it, as some libraries' imports do."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        usual(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
        if seen:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, usual)


def register_magics(world: Any) -> None:
    """Let ``%%px`` and ``%px`` run on the world's ranks; does nothing outside IPython."""
    if shell() is None:
        return
    from ipyparallel.client.asyncresult import AsyncResult
    from ipyparallel.client.magics import ParallelMagics

    # Only the latest world is held here: a cell that starts ranks ends its earlier ones when it is run again.
    global _latest_world
    _latest_world = world
    n, world = world.n, weakref.proxy(world)

    class RankResult(AsyncResult):
        """What a ``%%px`` cell returns: its ``get()`` raises the error that also a cell that waits shows."""

        def __init__(self, *args, **kwargs):
            self._shown: list[dict] = []
            super().__init__(*args, **kwargs)

        def _collect_exceptions(self, results):
            return failures.results(self, n)

        def _iopub_streaming_output_callback(self, eid, future, message):
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "error":
                return  # shown once, by RankError, which also knows about the ranks that wait
            if kind in ("display_data", "execute_result"):
                if any(content is shown for shown in self._shown):
                    return  # it came just when we began to listen, and was handed over twice
                self._shown.append(content)
            # what came before that has lost its origin, and one rank's text would replace another's
            message.setdefault("parent_header", {"msg_id": future.msg_id})
            super()._iopub_streaming_output_callback(eid, future, message)

    class RankMagics(ParallelMagics):
        """ipyparallel's ``%%px`` with a world's way of waiting."""

        def parallel_execute(self, cell, block=None, groupby="type", save_name=None, stream_output=None, **_):
            world._require_running()
            sent = self.view.execute(cell, silent=False, block=False)
            result = RankResult(sent._client, sent._children, fname="%px", targets=sent._targets)
            world._watch(result)
            self.last_result = result
            if save_name:
                self.shell.user_ns[save_name] = result
            if not (self.view.block if block is None else block):
                return result
            streams = stream_output is not False  # --no-stream: not as it comes, but in the order of the ranks
            with result.stream_output() if streams else contextlib.nullcontext():
                try:
                    world._wait(result)
                finally:
                    result.wait_for_output(1)
                    if not streams:
                        result.display_outputs(groupby)

    shell().register_magics(RankMagics(shell(), world._view))
