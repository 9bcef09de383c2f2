"""A real Jupyter kernel, driven as a front end drives it."""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import KernelManager


@dataclass
class Outputs:
    """What a cell showed, as text without colours."""

    seconds: float = 0.0
    printed: str = ""  # stdout and stderr of the notebook itself
    shown: list[str] = field(default_factory=list)  # displays and the cell's value
    error: str = ""  # the traceback as the reader sees it
    widgets: dict[str, dict[str, Any]] = field(default_factory=dict)  # their last state

    @property
    def text(self) -> str:
        return "\n".join([self.printed, *self.shown])


class Notebook:
    """Use as a context manager; ``notebook.run(cell)`` returns its `Outputs`."""

    def __init__(self, env: dict[str, str] | None = None, allow_stdin: bool = True, **start: Any):
        self.allow_stdin = allow_stdin
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={**child_environment(), **(env or {})}, **start)
        self._client = self.manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def send(self, cell: str) -> str:
        self._sent = time.monotonic()
        return self._client.execute(cell, allow_stdin=self.allow_stdin)

    def outputs(self, request: str, timeout_s: float = 60) -> Outputs:
        """Collect what the cell shows until it has ended."""
        outputs, deadline = Outputs(), time.monotonic() + timeout_s
        displays: dict[str, int] = {}
        while True:
            message = self._client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                outputs.seconds = time.monotonic() - self._sent
                return outputs
            if kind == "stream":
                outputs.printed += _plain(content["text"])
            elif kind == "error":
                outputs.error = _plain("\n".join(content["traceback"]))
            elif kind in ("comm_open", "comm_msg"):
                state = outputs.widgets.setdefault(content["comm_id"], {})
                state.update(content["data"].get("state", {}))
            elif kind in ("display_data", "execute_result", "update_display_data"):
                text = _plain(content["data"].get("text/plain", ""))
                name = content.get("transient", {}).get("display_id", f"anonymous {len(outputs.shown)}")
                if kind == "update_display_data" and name in displays:
                    outputs.shown[displays[name]] = text
                else:
                    displays[name] = len(outputs.shown)
                    outputs.shown.append(text)

    def run(self, cell: str, timeout_s: float = 60) -> Outputs:
        return self.outputs(self.send(cell), timeout_s)

    def interrupt(self, cell: str, after_s: float, times: int = 1) -> Outputs:
        """Run a cell and press the interrupt button; ``seconds`` count from there."""
        request = self.send(cell)
        time.sleep(after_s)
        self._sent = time.monotonic()
        for _ in range(times):
            self.manager.interrupt_kernel()
            time.sleep(0.3)
        return self.outputs(request)

    def close(self) -> None:
        self._client.stop_channels()
        self.manager.shutdown_kernel()

    def __enter__(self) -> "Notebook":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def child_environment() -> dict[str, str]:
    """The environment for a process that finds the same packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
