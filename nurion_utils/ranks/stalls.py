"""Ranks that wait for ranks that have returned: the collective that not all of them call.

A rank that computes for minutes while the others have returned looks the same from outside. So the notebook asks the
ranks that are still at work, and a thread of theirs answers: which function of MPI or Horovod the main thread is in,
and whether it has been in that one call since it was asked before. It can, because both give up Python's lock while
they wait. Nothing is asked, and nothing is slower, as long as all ranks are at work or all have returned.
"""

import contextlib
import ctypes
import dis
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from nurion_utils.ranks import failures

ASK_AFTER_S = 4.0  # from when the last rank returned
ASK_EVERY_S = 1.0
NOTICE_S = 10.0  # then, if all others have been in one call for ASKED questions, the reader is told
ASKED = 4


def answer(own: Path) -> None:
    """On a rank: whenever asked through the fifo `own`.ask, write the communication that the main thread is in.

    ``{"call": "allreduce", "asked": 3}`` in `own`.call: in that call, and in no other since it was asked the last
    three times.
    """
    os.mkfifo(f"{own}.ask", mode=0o600)
    threading.Thread(target=_answer, args=[own], name="nurion-stalls", daemon=True).start()


def _answer(own: Path) -> None:
    questions = os.open(f"{own}.ask", os.O_RDWR)  # for writing too, so that it never comes to an end
    main, moved = threading.main_thread().ident, threading.Event()
    moved.set()
    # Python runs this in the main thread as soon as that is back from the call it is in: then it has moved.
    note = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: moved.set() or 0)
    asked = 0
    while os.read(questions, 1):
        if moved.is_set():
            moved.clear()
            ctypes.pythonapi.Py_AddPendingCall(note, None)
            asked = 0
        call = communication(sys._current_frames().get(main))
        asked = asked + 1 if call else 0
        Path(f"{own}.new").write_text(json.dumps({"call": call, "asked": asked}))
        os.replace(f"{own}.new", f"{own}.call")


def communication(frame: FrameType | None) -> str:
    """The name of the function of MPI or Horovod that is being called where `frame` is; "" if it is another one."""
    called = _called(frame) if frame else None
    owner = getattr(called, "__self__", None)
    if (owner if isinstance(owner, type) else type(owner)).__module__.startswith("mpi4py"):
        return called.__name__
    for _ in range(5):  # TensorFlow's wrappers of Horovod's operations call a few functions of TensorFlow's
        if frame is not None and frame.f_code.co_name.startswith("horovod_"):
            return frame.f_code.co_name.removeprefix("horovod_").removesuffix("_eager_fallback")
        frame = frame and frame.f_back
    return ""


def _called(frame: FrameType) -> Any:
    """The function that is called where the frame is, if it is a name or an attribute of one, as in ``a.b.c(...)``.

    The instructions that load it begin where the whole call begins, by their positions in the source, which a rank
    lacks. They are looked up again: nothing is called.
    """
    instructions = [i for i in dis.get_instructions(frame.f_code) if i.offset <= frame.f_lasti]
    begin = instructions[-1].positions
    scope = {**vars(sys.modules["builtins"]), **frame.f_globals, **frame.f_locals}
    found = None
    for each in instructions:
        if (each.positions.lineno, each.positions.col_offset) != (begin.lineno, begin.col_offset):
            continue
        if each.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            found = getattr(found, each.argval, None)
        elif each.opname in ("LOAD_NAME", "LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF"):
            found = scope.get(each.argval)
        elif each.opname == "CALL" and each is not instructions[-1]:
            found = None  # what another call returned is not known
    return found


class Call:
    """A call that ranks are at, on the notebook's side: do those that have not returned wait for those that have?"""

    def __init__(self, directory: Path) -> None:
        self.raised_s: float | None = None  # when a first rank raised
        self.notice = ""  # what the reader is to be told meanwhile
        self._directory = directory
        self._finished: list[int] = []
        self.since_s = self._asked_s = 0.0  # since the last rank returned
        self._log = failures.HorovodsLog(directory)

    def stall(self, finished: list[int], waiting: list[int]) -> str:
        """One sentence, if it has been so for `NOTICE_S`."""
        now_s = time.monotonic()
        if finished != self._finished:
            self._finished, self.since_s, self._log = finished, now_s, failures.HorovodsLog(self._directory)
        if not finished or now_s - self.since_s < ASK_AFTER_S or now_s - self._asked_s < ASK_EVERY_S:
            return ""
        answers, self._asked_s = [self._ask(rank) for rank in waiting], now_s
        calls = {call for call, asked in answers if asked >= ASKED}
        # Of a call in a graph Horovod alone knows: it logs that it misses just ranks that have returned.
        missed = failures.missing(self._log.read())
        in_vain = all(asked >= ASKED for _, asked in answers) or (missed and missed <= set(finished))
        if now_s - self.since_s < NOTICE_S or not in_vain:
            return ""
        has, waits = ("has", "have")[len(finished) > 1], ("waits", "wait")[len(waiting) > 1]
        return (
            f"{failures.numbered(finished)} {has} finished, and {failures.numbered(waiting)} {waits} in "
            f"{' and '.join(sorted(calls)) or 'a collective of Horovod'}: every rank must call the same collectives"
        )

    def _ask(self, rank: int) -> tuple[str, int]:
        """Ask a rank, and take its answer to the question before."""
        file, found = self._directory / f"rank{rank}.call", {"call": "", "asked": 0}
        with contextlib.suppress(OSError):
            found = json.loads(file.read_text())
            file.unlink()  # a rank that does not answer next time has no old answer
        with contextlib.suppress(OSError):  # it has ended
            fifo = os.open(self._directory / f"rank{rank}.ask", os.O_WRONLY | os.O_NONBLOCK)
            os.write(fifo, b"?")
            os.close(fifo)
        return found["call"], found["asked"]
