"""Nothing hangs: ranks that die, that raise while others wait for them, or that return while others wait for them."""

import contextlib
import signal
import threading
import time
import weakref
from concurrent.futures import InvalidStateError, wait
from typing import Any

from nurion_utils.ranks import failures, notebook
from nurion_utils.ranks.failures import RankError, plainly
from nurion_utils.ranks.launchers.local import LocalRanks
from nurion_utils.ranks.launchers.remote import RemoteRanks
from nurion_utils.ranks.stalls import Call

GRACE_S = 3.0  # how long ranks may go on after one has raised, before they count as waiting for it
STALL_LIMIT_S = 60.0  # how long a reader who was told that ranks wait in vain may look into it, before it is an error
TICK_S = 0.1
STOPPED_AT_WORK = RankError("this world was stopped while its ranks were at work")


class Watcher:
    """A thread that looks after started ranks, and the one way to wait for them."""

    def __init__(self, processes: LocalRanks | RemoteRanks, client: Any) -> None:
        self.broken: str | None = None  # why these ranks are of no more use
        self.stopping = threading.Event()
        self.ending = threading.RLock()
        self._ended: RankError | None = None  # what those hear who still wait for ranks that are gone
        self._processes, self._client, self._n = processes, client, processes.n
        self._calls: dict[Any, Call] = {}  # by their AsyncResults
        self._thread = threading.Thread(target=_watch, args=[weakref.ref(self)], name="nurion-watcher", daemon=True)
        self._thread.start()

    def watch(self, result: Any) -> Any:
        """Look after what `result`, an AsyncResult of ipyparallel, waits for."""
        self._calls[result] = Call(self._processes.directory)
        result.horovods_log = failures.HorovodsLog(self._processes.directory)
        return result

    def wait(self, result: Any, timeout_s: float | None = None) -> list[Any]:
        """Wait for all ranks; show their progress; turn whatever went wrong into one error."""
        deadline = time.monotonic() + (timeout_s or float("inf"))
        bar, told = notebook.ProgressBar(), ""
        call = self._calls.get(result)  # it may be over
        try:
            while wait(result._children, timeout=TICK_S).not_done:
                bar.update(result)
                if call and call.notice != told:
                    print(told := call.notice)
                if time.monotonic() > deadline:
                    late = failures.unfinished(result)
                    self._break(f"{failures.numbered(late)} did not finish within {timeout_s:g} s", late)
                if self.broken or self.stopping.is_set():  # and it came when the others had been answered
                    with self.ending:
                        _answer_all(self._client, self._ended or STOPPED_AT_WORK)
        except KeyboardInterrupt:
            self._interrupt(result)
            raise plainly(KeyboardInterrupt()) from None
        finally:
            bar.close(result)
        return failures.results(result, self._n)

    def stop(self) -> None:
        """Watch no longer; whoever still waits is told."""
        self.stopping.set()
        _answer_all(self._client, STOPPED_AT_WORK)

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _interrupt(self, result: Any) -> None:
        """Pass a keyboard interrupt on; ranks that sit in a collective cannot take it and are ended."""
        self._calls.pop(result, None)
        for rank in range(self._n):
            self._processes.signal(rank, signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):  # a second one means: do not wait
            wait(result._children, timeout=GRACE_S)
        if late := failures.unfinished(result):
            self._break(f"{failures.numbered(late)} did not react to the interrupt", late)
            raise plainly(KeyboardInterrupt(str(self._ended))) from None

    def _look_after(self) -> bool:
        """Notice what goes wrong; False when there is nothing left to watch."""
        dead = self._processes.dead()
        if self.stopping.is_set() or self.broken:
            return False
        if dead:
            self._break("", [rank for rank in range(self._n) if f"rank{rank}" not in dead], dead)
            return False
        for result, call in list(self._calls.items()):
            waiting = failures.unfinished(result)
            if not waiting:
                self._calls.pop(result, None)
            elif errors := failures.errors(result):
                call.raised_s = call.raised_s or time.monotonic()
                if time.monotonic() - call.raised_s > GRACE_S:
                    self._break(failures.raised(errors, self._n, result.horovods_log), waiting)
            elif story := call.stall([rank for rank in range(self._n) if rank not in waiting], waiting):
                if time.monotonic() - call.since_s > STALL_LIMIT_S or not notebook.somebody_watches():
                    self._break(story, waiting)
                elif not call.notice:
                    call.notice = f"{story}{failures.where(waiting, self._processes)}"
        return not self.broken

    def _break(self, reason: str, waiting: list[int], dead: list[str] | None = None) -> None:
        """End all ranks and answer everything that still waits for them with the reason."""
        with self.ending:
            if self.broken or self.stopping.is_set():
                return
            died = [int(name.removeprefix("rank")) for name in dead or [] if name != "controller"]
            try:
                stacks = failures.where(waiting, self._processes)
                if dead:
                    reason = failures.ended(dead, self._processes.directory)
                time.sleep(0.3)  # ranks send what they printed every 0.2 s: let it arrive
                self.broken = f"this world has ended because {reason.splitlines()[0]}"
                advice = "All ranks have been ended; call world.restart() to start them afresh."
                self._ended = RankError(f"{reason}{stacks}\n{advice}", died=died)
            finally:
                self.broken = self.broken or "this world has ended"
                self._ended = self._ended or RankError(self.broken, died=died)
                self._processes.end()
                _answer_all(self._client, self._ended)


def _watch(watcher: weakref.ref[Watcher]) -> None:
    """Body of the watcher's thread; it holds no world, so that one that nobody uses any more can go."""
    while (watched := watcher()) is not None and watched._look_after():
        del watched
        time.sleep(TICK_S)


def _answer_all(client: Any, error: RankError) -> None:
    """Let nobody wait any longer for ranks that are gone."""
    for future in list(client._futures.values()):
        with contextlib.suppress(InvalidStateError):  # the rank was quicker
            future.set_result(error)  # a result, as ipyparallel does with errors
