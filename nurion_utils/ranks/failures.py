"""What a reader is told when ranks fail: who did what, where it happened, and nothing about the machinery."""

import contextlib
import itertools
import linecache
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOROVOD_ENDED = "Horovod has been shut down"  # all that it tells the ranks that wait, whatever the reason
PACKAGE = str(Path(__file__).parents[1])
# Lines of stacks and logs that are about how a rank works, not about the reader's code
MACHINERY = re.compile(
    r"/(ranks/(engine|calls)\.py|IPython|ipykernel|ipyparallel|traitlets|tornado|asyncio|selectors\.py)\b|<frozen "
    r'|\[IPController\]|"<string>", line 1 in <module>|^Extension modules|^WARNING: All log messages before absl'
    r"|^I\d{4} "
)
LAST_LINES = 12
END_OF_JOB = "job.end"  # the file that says how the ranks' job ended, if it did before them
LOST = "lost"  # what is noted down of how a rank ended whose node has gone
PATIENCE_S = 5.0
# A rank's main thread writes down where it is at the first of these signals, and any of its threads where all are at
# the second, for a main thread that none reaches. SIGUSR1 is MPICH's: it tells of a process that has died, and has
# MPI ask its launcher, which may be held.
ASK, ASK_AROUND = signal.SIGUSR2, signal.SIGRTMIN
WHOLE_STACK = r"(in <module>|\.\.\.)\n\Z"  # the outermost frame of a main thread, or the last that is written
# What Horovod's stall check logs: which ranks have not submitted what others wait for; the last line, and the marks
# of the ranks that it is about, only when it gives up.
MISSING = re.compile(r"Missing ranks:\n((?:\d+!?: \[.*\]\n)+)")
STALL = re.compile(MISSING.pattern + r'One or more rank \(marked by "!"\).*? than (\d+) seconds')


@dataclass(frozen=True)
class Failure:
    """What a function raised on a rank, in a form that always travels (an exception may not pickle)."""

    what: str  # "ValueError: no data"
    frames: list[tuple[str, int, str]]  # file, line, function; the notebook has the sources of its cells


class HorovodsLog:
    """What rank 0 writes below Python from now on: Horovod says there, and only there, for which ranks it waited."""

    def __init__(self, directory: Path) -> None:
        self._file, self._begin = directory / "rank0.log", 0
        with contextlib.suppress(OSError):  # it has ended
            self._begin = self._file.stat().st_size

    def read(self) -> str:
        with contextlib.suppress(OSError), open(self._file, "rb") as log:
            log.seek(self._begin)  # it may be long, and each call of a world looks here
            return log.read().decode(errors="replace")
        return ""


class RankError(RuntimeError):
    """A rank raised, died, or did not finish in time; the message names it and shows its traceback."""

    __module__ = "nurion_utils.ranks"  # where the reader finds it

    def __init__(self, *words: object, died: Iterable[int] = ()) -> None:
        super().__init__(*words)
        self.died = tuple(died)  # the ranks whose processes ended

    def _render_traceback_(self) -> list[str]:
        return rendered(self, f"RankError: {self}")


def plainly(interrupt: KeyboardInterrupt) -> KeyboardInterrupt:
    """The interrupt, which IPython will show as it shows a `RankError`."""
    # of the instance: Python ends a script that was interrupted in its own way only for this very class
    interrupt._render_traceback_ = lambda: rendered(interrupt, f"KeyboardInterrupt: {interrupt}".removesuffix(": "))
    return interrupt


def rendered(error: BaseException, sentence: str) -> list[str]:
    """What IPython shows of an error: the reader's own lines that led to it, without the frames of this package."""
    shown = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(PACKAGE) or MACHINERY.search(frame.filename) or not frame.lineno:
            continue
        name, line = cell_name(frame.filename), linecache.getline(frame.filename, frame.lineno).strip()
        if line.startswith("get_ipython()"):  # a magic, whose text the reader sees above
            continue
        within = "" if frame.name == "<module>" else f", in {frame.name}"
        where = f"Cell {name}, line {frame.lineno}" if name.startswith("In[") else f"File {name}:{frame.lineno}"
        shown.append(f"{where}{within}\n----> {frame.lineno} {line}\n")
    return [*shown, sentence]


def results(work: Any, n: int) -> list[Any]:
    """The results of an AsyncResult that is watched, by rank, or the one error that it comes down to, of `n` ranks."""
    found = errors(work)
    for error in found.values():
        if isinstance(error, RankError):
            raise error from None  # it tells the whole story
    if found:
        raise RankError(raised(found, n, work.horovods_log)) from None
    return [future.result() for future in work._children]


def errors(work: Any) -> dict[int, Any]:
    """What the ranks that have finished raised, by rank; ipyparallel hands a rank's error over as a result."""
    done = {rank: future.result() for rank, future in zip(work._targets, work._children, strict=True) if future.done()}
    return {rank: error for rank, error in done.items() if isinstance(error, Exception | Failure)}


def unfinished(work: Any) -> list[int]:
    """The ranks that are still at it."""
    return [rank for rank, future in zip(work._targets, work._children, strict=True) if not future.done()]


def numbered(ranks: list[int]) -> str:
    """The ranks in words: "rank 3", "ranks 0, 2"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))


def raised(errors: dict[int, Any], n: int, log: HorovodsLog | None) -> str:
    """One sentence on who raised what, or is to blame for it, then a traceback; `errors` by rank, `log` of the call."""
    # Ranks that Horovod let down are seldom the ones that began it.
    errors = {rank: error for rank, error in errors.items() if HOROVOD_ENDED not in _what(error)} or errors
    rank, error = next(iter(errors.items()))
    others = f" (and so did {numbered([r for r in errors if r != rank])})" if len(errors) > 1 else ""
    what = _what(error)
    if isinstance(error, Failure):
        frames = [
            traceback.FrameSummary(cell_name(file), line, name, line=linecache.getline(file, line))
            for file, line, name in error.frames
        ]
        trace = "".join(traceback.StackSummary.from_list(frames).format()) + what
    else:
        trace = getattr(error, "traceback", what)
    story = stall(log.read()) if log and HOROVOD_ENDED in what else ""
    story = story or f"rank {rank} of {n} raised {what}{others}"
    return f"{story}\n--- traceback of rank {rank} ---\n{trace}"


def _what(error: Any) -> str:
    if isinstance(error, Failure):
        return error.what
    # of ipyparallel: a %%px cell raised, or could not be run
    return f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"


def missing(horovods_log: str) -> set[int]:
    """The ranks that Horovod has missed last."""
    return {int(rank) for lines in MISSING.findall(horovods_log)[-1:] for rank in re.findall(r"(\d+)!?: \[", lines)}


def stall(horovods_log: str) -> str:
    """One sentence on the ranks that Horovod has waited for in vain, if that is why it ended; else nothing."""
    found = STALL.findall(horovods_log)
    if not found:
        return ""
    lines, wait_s = found[-1]
    ranks: dict[str, list[int]] = {}
    for rank, tensors in re.findall(r"(\d+)!: \[(.*)\]\n", lines):
        first, *more = tensors.split(", ")
        ranks.setdefault(f"{first!r}{' and others' * bool(more)}", []).append(int(rank))
    never = ", and ".join(f"{numbered(who)} never submitted tensor {tensor}" for tensor, who in ranks.items())
    return (
        f"{never}, for which other ranks waited over {wait_s} s: every rank must call the same collectives equally "
        "often (start Horovod anew with hvd.shutdown() and hvd.init() on all ranks)"
    )


def how_it_ended(status: int | None) -> str:
    """How a process ended, by what `subprocess` gives as its return code; None where that is not known."""
    if status is None:
        return "died"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"left its process with exit code {status}"


def ended(names: list[str], directory: Path) -> str:
    """How processes ended, and their last output; `names` is some of rank0, rank1, ... and controller."""
    _wait_for_text([directory / f"{name}.status" for name in names if name != "controller"])
    codes = {name: _read(directory / f"{name}.status") for name in names}
    ends = [(_called(name), _read(directory / f"{name}.node"), code) for name, code in codes.items()]
    return (
        _read(directory / END_OF_JOB)
        + " and ".join(
            f"{who} was lost with its node {node}"
            if code == LOST
            else f"{who}{f' on node {node}' * bool(node)} {how_it_ended(int(code) if code else None)}"
            for who, node, code in ends
        )
        + last_output(names, directory)
    )


def last_output(names: list[str], directory: Path) -> str:
    """What processes wrote below Python, each under its name."""
    text = ""
    for name in names:
        log = _read(directory / f"{name}.log").splitlines()
        lines = [line for line in log if line.strip() and not MACHINERY.search(line)]
        text += "\n".join(["", f"--- last output of {_called(name)} ---", *lines[-LAST_LINES:]]) if lines else ""
    return text


def where(ranks: list[int], processes: Any) -> str:
    """Where ranks are now, in words; `processes` are those of their launcher."""
    files = {rank: processes.directory / f"rank{rank}.stack" for rank in ranks}
    for file in files.values():
        with contextlib.suppress(OSError):
            os.truncate(file, 0)
    for rank in ranks:
        processes.signal(rank, ASK)
    silent = _without_answer(files)
    for rank in silent:
        processes.signal(rank, ASK_AROUND)
    unknown = _without_answer(silent)
    text = ""
    for rank, file in files.items():
        stack = re.split(r"^.*\(most recent call first\):\n", _read(file), flags=re.MULTILINE)[-1].splitlines()
        stack = [re.sub(r'File "(.+?)"', lambda match: f'File "{cell_name(match[1])}"', line) for line in stack]
        own = itertools.takewhile(lambda line: not MACHINERY.search(line), stack)
        lines = [] if rank in unknown else list(own) or ["  between two calls"]
        if rank in silent:
            lines.insert(0, f"  it gave no answer: {processes.state(rank)}")
        text += "\n".join([f"\n--- where rank {rank} was ---", *lines])
    return text


def _without_answer(files: dict[int, Path]) -> dict[int, Path]:
    """The ranks that have not written a whole stack by the time that busy cores may take."""
    _wait_for_text(files.values(), WHOLE_STACK)
    return {rank: file for rank, file in files.items() if not re.search(WHOLE_STACK, _read(file))}


def _called(name: str) -> str:
    return "the controller" if name == "controller" else name.replace("rank", "rank ")


def shell() -> Any:
    """The running IPython, if any, without importing it for those who do not use it."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def cell_name(file: str) -> str:
    """The reader knows a notebook cell as ``In[3]``, not by the temporary file it was compiled as."""
    names = getattr(getattr(shell(), "compile", None), "_filename_map", {})
    if file in names:
        return f"In[{names[file]}]"
    return "%%px cell" if re.search(r"/nurion-\w+/ipykernel_\d+/\d+\.py$", file) else file


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _wait_for_text(files: Iterable[Path], text: str = ".") -> None:
    """Until all files hold such a text; on busy cores that may take seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not all(re.search(text, _read(file)) for file in files):
        time.sleep(0.01)
