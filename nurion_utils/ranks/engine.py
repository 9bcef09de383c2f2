"""What one rank is given and runs: its share of the machine, then an ipyparallel engine.

Everything that must happen before TensorFlow, Horovod or MPI are loaded happens here: background threads
inherit the pinning only when they start after it.
"""

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1
HOROVOD_ENDED = "Horovod has been shut down"  # all that it tells the ranks that wait, whatever the reason


def cores_by_rank(n: int, cores: list[int]) -> list[list[int]]:
    """Deal out cores: consecutive ones to each of `n` ranks, or one shared core each if ranks outnumber them.

    >>> cores_by_rank(2, [0, 1, 2, 3])
    [[0, 1], [2, 3]]
    >>> cores_by_rank(4, [0, 1])
    [[0], [1], [0], [1]]
    """
    if n >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(n)]
    share = len(cores) // n
    return [cores[rank * share : (rank + 1) * share] for rank in range(n)]


def rank_environment(threads: int) -> dict[str, str]:
    """Environment variables that every rank starts with, for `threads` cores of its own."""
    environment = Path(sys.prefix)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "1",  # its default here; said aloud, TensorFlow does not log it on every rank
        "KERAS_BACKEND": "tensorflow",
        "UCX_TLS": "self,sm",  # MPI between ranks of one machine needs shared memory only, and no open port
        "HOROVOD_CPU_OPERATIONS": "MPI",  # this build would take oneCCL, which loses when ranks share cores
        "CCL_ROOT": str(environment),
        "CCL_ATL_TRANSPORT": "mpi",
        "CCL_LOG_LEVEL": "error",
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, [f"{environment}/lib", f"{environment}/lib/cpu", os.environ.get("LD_LIBRARY_PATH")])
        ),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # ranks import what the caller can
        "IPP_DISABLE_JS": "1",
    }


def main() -> None:
    run_directory, shares = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = int(os.environ["PMI_RANK"])
    end_with_parent()
    os.sched_setaffinity(0, shares[rank])
    if engine := os.fork():
        # This half only writes down how the rank ended, then stays: were mpiexec to see it end, it would kill
        # the other ranks before anyone could ask them where they stood. The guardian ends it.
        status = os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1])
        (run_directory / f"rank{rank}.status").write_text(str(status))
        while True:
            signal.pause()
    end_with_parent()

    # What a rank's libraries write below Python (MPI aborts, crashes) is kept per rank, for error messages.
    log = open(run_directory / f"rank{rank}.log", "wb", buffering=0)  # noqa: SIM115 (open for the process' life)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    stacks = open(run_directory / f"rank{rank}.stack", "wb", buffering=0)  # noqa: SIM115
    faulthandler.enable(log, all_threads=False)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    (run_directory / f"rank{rank}.pid").write_text(str(os.getpid()))

    # The slow imports come while the controller starts, too.
    import cloudpickle  # noqa: F401 (so that the first call finds it loaded)
    from ipykernel.iostream import OutStream
    from ipyparallel.engine.app import IPEngine
    from mpi4py import MPI

    # Cells show what Python prints. ipykernel would also forward what C++ libraries log; that stays in the log file.
    OutStream.__init__ = partialmethod(OutStream.__init__, watchfd=False)
    warnings.filterwarnings("ignore", "To exit: use")  # IPython's advice on sys.exit(), wrong for a rank
    # Interrupts are for cells only, which set their own handler. SIGTERM ends the rank; an ipyparallel engine
    # would stop listening and stay, and the notebook wait for it.
    IPEngine.init_signal = lambda self: signal.signal(signal.SIGINT, signal.SIG_IGN)
    MPI.COMM_WORLD.Barrier()
    remove_shared_memory_names()

    connection_file = run_directory / "profile" / "security" / "ipcontroller-engine.json"
    while not is_complete(connection_file):
        time.sleep(0.02)  # the guardian ends us if the controller never comes
    sys.argv = [
        "ipengine",
        f"--file={connection_file}",
        f"--profile-dir={run_directory / 'profile'}",
        "--mpi",
        "--timeout=60",
        "--IPEngine.enable_nanny=False",  # the guardian watches; saves one Python process per rank
        "--IPEngine.max_heartbeat_misses=0",  # nor need a rank suspect that the controller is gone
        "--IPEngine.startup_command=__import__('nurion_utils.ranks.engine').ranks.engine.name_stalls(get_ipython())",
        "--log-level=ERROR",
    ]
    IPEngine.launch_instance()


def controller() -> None:
    """What connects the notebook with the ranks; the command line is that of ipyparallel's controller."""
    os.register_at_fork(after_in_child=end_with_parent)  # it forks a process for the heartbeats
    from ipyparallel.controller.app import IPController

    IPController.launch_instance()


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends: the last resort, should the guardian be killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def remove_shared_memory_names() -> None:
    """Once all ranks have MPI's shared memory open, nobody needs its name: without one it cannot outlive them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if " /dev/shm/" in line:
            with contextlib.suppress(OSError):
                os.unlink(line.split(maxsplit=5)[5])


@dataclass(frozen=True)
class Failure:
    """What a function raised on a rank, in a form that always travels (an exception may not pickle)."""

    what: str  # "ValueError: no data"
    frames: list[tuple[str, int, str]]  # file, line, function; the notebook has the sources of its cells
    horovods_log: str = ""  # what rank 0 wrote below Python during the call, if Horovod ended meanwhile


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


def call(pickled: bytes) -> list[bytes] | Failure:
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
            return Failure(what, frames, log.read().decode(errors="replace") if HOROVOD_ENDED in what else "")
    try:
        return [cloudpickle.dumps(result)]
    except BaseException as error:
        what = f"TypeError: the result cannot be sent back ({error}); return something that can be pickled"
        return Failure(what, [])


def end_of_horovods_log() -> BinaryIO:
    """Where the log of rank 0 goes on: Horovod writes there, and only there, which ranks it has waited for."""
    try:
        own = os.readlink("/proc/self/fd/2")
        log = open(Path(own).with_name("rank0.log"), "rb")  # noqa: SIM115 (the caller closes it)
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
        if HOROVOD_ENDED in str(error):
            from nurion_utils.ranks import failures

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


def is_complete(path: Path) -> bool:
    """The controller writes the file in place: it exists before it is whole."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
