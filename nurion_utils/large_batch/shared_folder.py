"""What a sweep and a search share: a folder that keeps what is done, and claims by which ranks divide what is left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from nurion_utils._checks import whole_number
from nurion_utils.large_batch.recipes import RecipeError
from nurion_utils.ranks.environment import note_progress

KEPT = "claims-"  # by their name ranks see whether what they do is kept


@contextlib.contextmanager
def shared_folder(path: str | os.PathLike[str] | None) -> Iterator[tuple[Path, Path]]:
    """The folder at `path` and an empty one in it for the claims; temporary ones if `path` is None.

    `RecipeError` if another sweep or search is using the folder: both would train the same.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(path if path is not None else stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(folder / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"another sweep or search is using {folder}; wait, or choose another path") from None
        except OSError:
            pass  # a file system without locks
        prefix = "unkept-" if path is None else KEPT
        claims = tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)
        yield folder, Path(stack.enter_context(claims))


def claim(claims: Path, count: int) -> Iterator[int]:
    """Numbers below `count`, in order, each of which only one of the ranks gets."""
    for number in range(count):
        try:
            (claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield number  # and it has been done when the next is asked for
        if claims.name.startswith(KEPT):
            note_progress()


def distinct_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds, each once: a training that is repeated with the same seed is the same training."""
    try:
        seeds = list(seeds)
    except TypeError:
        raise RecipeError(f"seeds must be a list of whole numbers such as range(5), not {seeds!r}") from None
    if not seeds:
        raise RecipeError("give seeds to train each recipe with, such as range(5)")
    return list(dict.fromkeys(whole_number(seed, "a seed", least=0, error=RecipeError) for seed in seeds))


def reason(error: Exception) -> str:
    """Why a training failed, on one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
