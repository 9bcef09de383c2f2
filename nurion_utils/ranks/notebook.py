"""The notebook's side of a world: one progress bar for all ranks, and ``%%px`` cells that cannot hang."""

from __future__ import annotations

import sys
from typing import Any

from nurion_utils.ranks.failures import shell

_latest_world: Any = None  # the one that %%px cells run on


def somebody_watches() -> bool:
    """True in a notebook front end or a terminal; False under papermill and its like, which take no input."""
    kernel = getattr(shell(), "kernel", None)
    return kernel._allow_stdin if kernel is not None else sys.stderr.isatty()


class ProgressBar:
    """One tqdm bar over the sum of what the ranks report; silent where nobody watches."""

    def __init__(self) -> None:
        self._bar: Any = None

    def update(self, result: Any) -> None:
        reports = [m["data"]["progress"] for m in result._metadata if m.get("data", {}).get("progress")]
        if not reports or not somebody_watches():
            return
        done, total = (sum(report[i] for report in reports) for i in (0, 1))
        if self._bar is None:
            from tqdm.auto import tqdm

            _, _, description, unit = reports[0]
            self._bar = tqdm(total=total, desc=description or None, unit=unit, unit_scale=unit == "B")
        elif self._bar.total != total:  # a rank has joined in, or they have come to something new
            self._bar.reset(total)
        self._bar.update(done - self._bar.n)

    def close(self, result: Any) -> None:
        if self._bar is not None:
            result.wait_for_output(1)  # the last reports may come after the results
            self.update(result)
            self._bar.close()


def register_magics(world: Any) -> None:
    """Let ``%%px`` and ``%px`` run on the world's ranks; does nothing outside IPython."""
    if shell() is None:
        return
    from nurion_utils.ranks.magics import RankMagics

    # Only the latest world is held here: a cell that starts ranks ends its earlier ones when it is run again.
    global _latest_world
    _latest_world = world
    shell().register_magics(RankMagics(shell(), world))
