"""A call from the notebook, as a rank carries it out; and as the notebook sends it."""

import traceback
from typing import Any

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

    try:
        function, args = cloudpickle.loads(pickled)
        result = function(*args)
    except BaseException as error:  # SystemExit too: a rank that leaves is a failure of the run
        frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)[1:]]
        return failures.Failure("".join(traceback.format_exception_only(error)).strip(), frames)
    try:
        return [cloudpickle.dumps(result)]
    except BaseException as error:
        what = f"TypeError: the result cannot be sent back ({error}); return something that can be pickled"
        return failures.Failure(what, [])
