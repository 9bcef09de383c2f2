"""Processes that end with this one, whatever happens to it: started and ended by a guardian."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nurion_utils.ranks.interrupts import close_for
from nurion_utils.ranks.processes.folders import sweep, sweep_segments

GUARDIAN = Path(__file__).with_name("guardian.py")


class Guarded:
    """A guardian, `process`, and a `directory` for what its processes share; both go with `resources`.

    The command `around` runs it, as that of `nodes.namespaces`, in the environment `env`.
    """

    def __init__(self, resources: contextlib.ExitStack, around: Sequence[str], env: Mapping[str, str]) -> None:
        sweep()
        sweep_segments()
        self.process: subprocess.Popen | None = None
        self._resources = resources
        # An interrupt may come between any two lines: what must be undone is noted down before it is done.
        parent = tempfile.gettempdir()
        # the name of a socket in it has at most 107 bytes
        self.directory = Path(parent if len(parent) < 75 else "/tmp", f"nurion-{secrets.token_hex(6)}")
        resources.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.directory.mkdir(mode=0o700)
        resources.callback(self.end)
        owner = os.pidfd_open(os.getpid())
        resources.callback(os.close, owner)
        self.process = subprocess.Popen(
            [*around, sys.executable, "-I", "-S", str(GUARDIAN), str(self.directory), str(owner)],
            env=env,
            pass_fds=[owner],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in a terminal is for the notebook, not for the clean-up
        )

    def begin(
        self, commands: Mapping[str, Sequence[str]], env: Mapping[str, str], build: str = "", farewell: str = ""
    ) -> None:
        """Have the guardian carry out `build`, in a shell, and then start the commands; their logs are NAME.log.

        When all has been ended it carries out `farewell`, also if this process was killed.
        """
        request: dict[str, Any] = {"build": build, "commands": commands, "env": env, "farewell": farewell}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def end_with(self, holder: object) -> None:
        """Close the resources when nobody holds `holder` any more."""
        weakref.finalize(holder, close_for, os.getpid(), self._resources)

    def why_it_ended(self) -> str | None:
        """What the guardian said before it ended by itself; None as long as it lives."""
        return None if self.process.poll() is None else self.process.stderr.read().decode(errors="replace")

    def has_ended(self, name: str) -> bool:
        """Whether the command of that name has ended by itself."""
        return (self.directory / f"{name}.ended").exists()

    def end(self) -> None:
        """End all processes, and wait until that is done."""
        if self.process is None:
            return
        with contextlib.suppress(OSError, ValueError):  # it has ended, or was told before
            self.process.stdin.write(b"end\n")  # said explicitly: a forked child may keep the pipe open
            self.process.stdin.close()
        self.process.wait()
        self.process.stderr.close()
