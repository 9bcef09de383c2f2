"""What the operating system keeps of files in memory, so that reading can be measured with it and without."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable

import numpy as np


def drop_cache(paths: Iterable[str | os.PathLike[str]]) -> float:
    """Ask the operating system to forget the contents of files; returns which part of their pages it kept.

    0.0 means that the next reading is from the disk (or from what caches below the operating system there are),
    1.0 that the file system, such as tmpfs, cannot forget. No file is changed.
    """
    paths = list(paths)
    for path in paths:
        with open(path, "rb") as file:
            try:
                os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    return resident(paths)


def resident(paths: Iterable[str | os.PathLike[str]]) -> float:
    """Which part of the files' pages lies in the page cache, by mincore(2); empty files count as nothing.

    Linux tells it only of files that are the caller's or that the caller could write, and says 1.0 of others.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pages = kept = 0
    for path in paths:
        if not os.path.getsize(path):
            continue
        mapped = np.memmap(path, np.uint8, "r")
        flags = np.empty(-(-mapped.size // mmap.PAGESIZE), np.uint8)
        start, found = (array.ctypes.data_as(ctypes.c_void_p) for array in (mapped, flags))
        if libc.mincore(start, ctypes.c_size_t(mapped.size), found):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
        pages, kept = pages + flags.size, kept + int((flags & 1).sum())
    return kept / pages if pages else 0.0
