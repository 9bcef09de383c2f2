"""``%%px`` with a world's way of waiting; importing it imports ipyparallel."""

import contextlib
import weakref
from typing import Any

from ipyparallel.client.asyncresult import AsyncResult
from ipyparallel.client.magics import ParallelMagics

from nurion_utils.ranks import failures


class RankResult(AsyncResult):
    """What a ``%%px`` cell returns: its ``get()`` raises the error that also a cell that waits shows."""

    horovods_log: failures.HorovodsLog | None = None  # until it is watched: ranks may be quicker than that

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shown: list[dict] = []
        super().__init__(*args, **kwargs)

    def _collect_exceptions(self, results: Any) -> list[Any]:
        return failures.results(self, len(self._targets))

    def _iopub_streaming_output_callback(self, eid: Any, future: Any, message: dict) -> None:
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
    """The magics of a world, which they do not keep alive."""

    def __init__(self, shell: Any, world: Any) -> None:
        super().__init__(shell, world._view)
        self._world = weakref.proxy(world)

    def parallel_execute(
        self,
        cell: str,
        block: bool | None = None,
        groupby: str = "type",
        save_name: str | None = None,
        stream_output: bool | None = None,
        **_: Any,
    ) -> Any:
        """Run a cell on all ranks, in turn with what other threads have them do."""
        with self._world._turn:
            self._world._require_running()
            sent = self.view.execute(cell, silent=False, block=False)
            result = RankResult(sent._client, sent._children, fname="%px", targets=sent._targets)
            self._world._watcher.watch(result)
            self.last_result = result
            if save_name:
                self.shell.user_ns[save_name] = result
            if not (self.view.block if block is None else block):
                return result
            streams = stream_output is not False  # --no-stream: not as it comes, but in the order of the ranks
            with result.stream_output() if streams else contextlib.nullcontext():
                try:
                    self._world._watcher.wait(result)
                finally:
                    result.wait_for_output(1)
                    if not streams:
                        result.display_outputs(groupby)
