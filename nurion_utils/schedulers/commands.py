"""The commands of a scheduler, and what they say of a job, in words that are the same for all of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PATIENCE_S = 60.0  # busy schedulers answer late, dead ones not at all


class SchedulerError(RuntimeError):
    """A scheduler refused something, or could not be asked; says what it said, in one sentence."""


@dataclass(frozen=True)
class State:
    """How a job is doing.

    ``never`` waits, and cannot ever run; ``gone`` has ended, and the scheduler no longer knows how. `reason` is in the
    scheduler's own words, or empty. `starts_at` is when it began, or is expected to, in seconds since 1970.
    """

    name: Literal["waiting", "never", "running", "done", "failed", "cancelled", "gone"]
    reason: str = ""
    starts_at: float | None = None
    exit_status: int | None = None
    nodes: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether it will not run any more; one that never can has not ended, and is to be cancelled."""
        return self.name not in ("waiting", "never", "running")


def run(words: Sequence[str | os.PathLike[str]], directory: str | os.PathLike[str] | None = None) -> tuple[int, str]:
    """Run a command: its exit status, and what it printed, or what it complained of in one line if it failed."""
    name = os.fspath(words[0])
    if shutil.which(name) is None:
        raise SchedulerError(
            f"{name} is not found: it is on the login nodes of a machine with this scheduler; go there"
        )
    try:
        ran = subprocess.run(
            words, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise SchedulerError(
            f"{name} has not answered for {PATIENCE_S:g} s: ask again when the scheduler is up"
        ) from None
    if ran.returncode == 0:
        return 0, ran.stdout.strip()
    lines = filter(None, map(str.strip, (ran.stderr or ran.stdout).splitlines()))
    said = "; ".join(re.sub(rf"^{name}: (error: )?", "", line) for line in lines)
    return ran.returncode, said or f"it failed with status {ran.returncode} and no word"


def submitted(words: Sequence[str | os.PathLike[str]], directory: str | os.PathLike[str] | None) -> str:
    """What a command that submits prints last; SchedulerError with its reason if it refuses."""
    code, said = run(words, directory)
    if code != 0 or not said:
        raise SchedulerError(f"{words[0]} refused the job: {said or 'it gave no number'}")
    return said.splitlines()[-1].strip()
