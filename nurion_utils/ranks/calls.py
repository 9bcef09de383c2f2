"""A call from the notebook, as a rank carries it out; and as the notebook sends it."""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from nurion_utils.ranks import failures


def pickle_call(function: Any, args: tuple, timeout_s: Any) -> bytes:
    """What `call` takes; raises TypeError or ValueError, before anything runs, for what ranks cannot be asked."""
    import cloudpickle

    if not callable(function):
        raise TypeError(f"run needs a function and its arguments, as in run(len, 'abc'), not {function!r}")
    if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s > 0):
        raise ValueError(f"timeout_s must be a positive number of seconds, or None, not {timeout_s!r}")
    try:
        return cloudpickle.dumps((function, args))
    except Exception as error:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"{name} or its arguments cannot be sent to the ranks ({error}); "
            "create what cannot be pickled inside the function"
        ) from None


def call(pickled: bytes) -> list[bytes] | failures.Failure:
    """Run a pickled ``(function, args)`` and pickle its result; a rank's side of ``World.run``.

    The result is alone in a list, for the notebook to take it out: ipyparallel's futures refer to each other
    in circles, and would keep large results in memory for long.
    """
    import cloudpickle

    with end_of_horovods_log() as log:
        try:
            function, args = cloudpickle.loads(pickled)
            result = function(*args)
        except BaseException as error:  # SystemExit too: a rank that leaves is a failure of the run
            frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)[1:]]
            what = "".join(traceback.format_exception_only(error)).strip()
            return failures.Failure(
                what, frames, log.read().decode(errors="replace") if failures.HOROVOD_ENDED in what else ""
            )
    try:
        return [cloudpickle.dumps(result)]
    except BaseException as error:
        what = f"TypeError: the result cannot be sent back ({error}); return something that can be pickled"
        return failures.Failure(what, [])


def end_of_horovods_log() -> BinaryIO:
    """Where the log of rank 0 goes on: Horovod writes there, and only there, which ranks it has waited for."""
    try:
        own = os.readlink("/proc/self/fd/2")
        log = open(Path(own).with_name("rank0.log"), "rb")
    except OSError:
        return io.BytesIO()
    log.seek(0, os.SEEK_END)
    return log


def name_stalls(shell: Any) -> None:
    """Have %%px cells say which rank Horovod has waited for in vain; for `call` the notebook's side says it."""
    log, show = end_of_horovods_log(), shell.showtraceback
    named: list[RuntimeError] = []

    def begin() -> None:
        named.clear()
        log.seek(0, os.SEEK_END)

    def showtraceback(exc_tuple: Any = None, *args: Any, **settings: Any) -> None:
        kind, error, trace = exc_tuple or sys.exc_info()
        if failures.HOROVOD_ENDED in str(error):
            if story := failures.stall(log.read().decode(errors="replace")):
                kind, error = RuntimeError, RuntimeError(story)
                named.append(error)
        show((kind, error, trace), *args, **settings)

    def end(result: Any) -> None:
        if named:
            result.error_in_exec = named[0]  # what the notebook is answered

    shell.events.register("pre_execute", begin)
    shell.events.register("post_run_cell", end)
    shell.showtraceback = showtraceback
