"""An interrupt is never lost. The face needs this before anything else of this room, so it imports next to nothing."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Raise an interrupt once more at the end of the block, if somebody swallowed it.

    Imports do, at the end of each module: Python's import system then runs a weak reference's callback (``cb`` in
    ``importlib._bootstrap._get_module_lock``), and what such a callback or a ``__del__`` raises Python can only print.
    Some modules also catch all errors of an import, to try something else instead.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        usual(number, frame)

    try:
        signal.signal(signal.SIGINT, note)
        yield
        if seen:
            raise KeyboardInterrupt
    except BaseException:
        # Somebody may also have made another error of it.
        if seen:
            from nurion_utils.ranks.failures import plainly

            raise plainly(KeyboardInterrupt()) from None
        raise
    finally:
        signal.signal(signal.SIGINT, usual)


def close_for(owner: int, resources: contextlib.ExitStack) -> None:
    """Close what nobody holds any more: a callback of `weakref.finalize`, whose errors Python only prints.

    An interrupt while the processes end would be lost, so it comes afterwards.
    """
    if os.getpid() != owner:
        return  # a forked child of the notebook must not end its parent's ranks
    usual, seen = signal.getsignal(signal.SIGINT), threading.Event()
    heard = threading.current_thread() is threading.main_thread() and callable(usual)
    if heard:
        signal.signal(signal.SIGINT, lambda number, frame: seen.set())
    try:
        resources.close()
    finally:
        if heard:
            signal.signal(signal.SIGINT, usual)
        if seen.is_set():
            # When the callback has returned; and a signal, for that also ends a sleep.
            again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
            again.daemon = True
            again.start()
