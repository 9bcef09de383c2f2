"""Checkpoints that are whole or not there: files whose names say how far training was, and what they must hash to.

They are NumPy's ``.npz``: Keras' own files lack the states of random generators, and HDF5, which writes them, ends the
process if the disk is full.
"""

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

NAME = re.compile(r"epoch(\d+)-sample(\d+)-(\w{32})\.npz")


def write(folder: Path, about: dict[str, Any], arrays: Sequence[np.ndarray], before: Path | None) -> Path:
    """Write a checkpoint that is there, after a loss of power too, if its name is; `about` must fit into JSON.

    All others but the one `before` are deleted then. OSError, and nothing is deleted, if it cannot be written.
    """
    temporary = folder / "unfinished"  # always the same, so that killed writers leave but one
    try:
        with open(temporary, "wb") as file:
            np.savez(file, *arrays, about=json.dumps(about))
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"epoch{about['epoch']:06}-sample{about['seen']:012}-{_checksum(temporary)}.npz"
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)  # of the new name
        os.close(descriptor)
        for other in set(_files(folder)) - {path, before}:
            other.unlink()
    return path


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[np.ndarray]] | None:
    """The latest checkpoint that is whole, None if there is none; a warning names damaged ones that are passed over.

    ValueError if all are damaged.
    """
    damaged = []
    for path in reversed(_files(folder)):
        if _checksum(path) != NAME.fullmatch(path.name)[3]:
            damaged.append(path.name)
            continue
        if damaged:
            warnings.warn(f"{', '.join(damaged)} in {folder} is damaged, so {path.name} is taken", stacklevel=2)
        with np.load(path) as arrays:
            return path, json.loads(str(arrays["about"])), [arrays[name] for name in arrays if name != "about"]
    if damaged:
        raise ValueError(f"all checkpoints in {folder} are damaged; delete {', '.join(damaged)} to begin anew")
    return None


def values(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """The values as NumPy can keep them: bfloat16, which it does not know, as float32."""
    arrays = map(keras.ops.convert_to_numpy, variables)
    return [array.astype(np.float32) if array.dtype.kind == "V" else array for array in arrays]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
