"""Copy a share of the files: hashed on the way, under a temporary name until whole, and recorded before visible.

The order of the last steps makes a kill at any moment harmless.  Files are written under temporary names beside
their places; then their hashes are appended to this copier's journal; then they are renamed.  So whatever is visible
is whole and has its hash on record, and what a killed copier leaves besides are temporary files, which the next
run removes.  Renaming within a folder matters: between folders Linux lets only one rename at a time pass.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import xxhash

from nurion_utils.staging.plans import RECORDS, File, StageError
from nurion_utils.staging.records import line_of

BUFFER_BYTES = 1 << 20  # stays in a core's cache between hashing and writing
BATCH_FILES, BATCH_BYTES = 64, 64 << 20  # renamed together
AHEAD_FILES = 32  # opened before they are read
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no further file will fit either


class Changed(Exception):
    """A file that is no longer as it was planned."""


class Part(NamedTuple):
    """A file that is being written, under a temporary name."""

    file: File
    temporary: str
    descriptor: int
    hasher: xxhash.xxh3_128

    def write(self, data: memoryview) -> None:
        self.hasher.update(data)
        write_all(self.descriptor, data)


class Writer:
    """Puts files into a destination, batch by batch, and writes this copier's journal."""

    def __init__(self, destination: str):
        self.name = uuid.uuid4().hex[:12]
        self.folder = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
        journal = f"{RECORDS}/journal-{self.name}.jsonl"
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.folder)
        self.written: list[tuple[Part, int]] = []  # with the times that the file system keeps
        self.batch_bytes = self.made = 0
        self.failures: dict[str, str] = {}
        self.full = ""  # why nothing more can be written

    def create(self, file: File) -> Part:
        self.made += 1
        head, slash, _ = file.path.rpartition("/")
        temporary = f"{head}{slash}.nurion-part-{self.name}-{self.made}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, file.mode & 0o777, dir_fd=self.folder)
        return Part(file, temporary, descriptor, xxhash.xxh3_128())

    def finish(self, part: Part) -> None:
        """The file is whole: it becomes visible with the next batch."""
        file, descriptor = part.file, part.descriptor
        try:
            try:
                os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
                found = os.fstat(descriptor)
                if stat.S_IMODE(found.st_mode) != file.mode:  # because of the umask, or special bits
                    with contextlib.suppress(OSError):  # which a file system may refuse
                        os.fchmod(descriptor, file.mode)
            finally:
                os.close(descriptor)  # where a file system may first say that it is full
        except OSError:
            self.remove(part)
            raise
        self.written.append((part, found.st_mtime_ns))
        self.batch_bytes += file.size
        if len(self.written) >= BATCH_FILES or self.batch_bytes >= BATCH_BYTES:
            self.publish()

    def discard(self, part: Part) -> None:
        with contextlib.suppress(OSError):
            os.close(part.descriptor)
        self.remove(part)

    def remove(self, part: Part) -> None:
        with contextlib.suppress(OSError):  # then the next run does it
            os.unlink(part.temporary, dir_fd=self.folder)

    def publish(self) -> None:
        """Record what is written, then make it visible; what fails is in `failures`, and removed."""
        batch, self.written, self.batch_bytes = self.written, [], 0
        unrecorded = None
        try:
            lines = [line_of(part.file, kept_ns, part.hasher.hexdigest()) for part, kept_ns in batch]
            write_all(self.journal, "".join(lines).encode())
        except OSError as error:
            unrecorded = error
        for part, _ in batch:
            try:
                if unrecorded:
                    raise unrecorded
                os.rename(part.temporary, part.file.path, src_dir_fd=self.folder, dst_dir_fd=self.folder)
            except OSError as error:
                self.remove(part)
                self.fail(part.file.path, error)

    def fail(self, path: str, error: OSError | Changed) -> None:
        self.failures[path] = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in FULL:
            self.full = f"not begun: {error.strerror}"

    def close(self) -> None:
        os.close(self.journal)
        os.close(self.folder)


def copy_share(
    source: str, destination: str, files: Sequence[File], tell: Callable[[int], None] = lambda done: None
) -> dict[str, str]:
    """Copy `files`; returns why for each that is not at the destination afterwards.

    `tell` is called with numbers of bytes that are done.
    """
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(opened(source, os.O_DIRECTORY))
            writer = stack.enter_context(contextlib.closing(Writer(destination)))
        except OSError as error:  # not even a journal
            return {file.path: f"not begun: {error.filename!r}: {error.strerror}" for file in files}
        opening = stack.enter_context(contextlib.closing(ahead(folder, files)))
        for i, (file, descriptor) in enumerate(opening, 1):
            try:
                _copy(descriptor, writer, file, buffer, tell)
            except (OSError, Changed) as error:
                writer.fail(file.path, error)
            if writer.full:
                writer.failures |= {file.path: writer.full for file in files[i:]}
                break
        writer.publish()
    return writer.failures


def ahead(folder: int, files: Iterable[File]) -> Iterator[tuple[File, int | OSError]]:
    """Each file with its descriptor, for the caller to close, or with what kept it from opening.

    The data of small files after it are on their way meanwhile: a disk or a server that is asked for many pieces at
    once has them sooner than one that is asked for one after the other.  Long files the system reads ahead itself.
    """
    window: collections.deque[tuple[File, int | OSError]] = collections.deque()
    try:
        for file in files:
            try:
                descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                if file.size <= BUFFER_BYTES:
                    advise(descriptor, file.size, os.POSIX_FADV_WILLNEED)
                window.append((file, descriptor))
            except OSError as error:
                window.append((file, error))
            if len(window) > AHEAD_FILES:
                yield window.popleft()
        while window:
            yield window.popleft()
    finally:
        for _, descriptor in window:
            if isinstance(descriptor, int):
                os.close(descriptor)


def _copy(source: int | OSError, writer: Writer, file: File, buffer: memoryview, tell: Callable[[int], None]) -> None:
    if isinstance(source, OSError):
        raise source
    try:
        part, done = writer.create(file), 0
        try:
            while length := os.readv(source, [buffer]):
                part.write(buffer[:length])
                done += length
                if file.size > BUFFER_BYTES:
                    # Not read again here: what it takes of memory is the next block's, not other data's nor the copy's.
                    advise(source, done, os.POSIX_FADV_DONTNEED)
                tell(length)
                if done >= file.size:  # whether it has grown is seen without reading on
                    break
            require_unchanged(source, file, done)
        except BaseException:
            writer.discard(part)
            raise
        writer.finish(part)
    finally:
        os.close(source)


def verify_share(
    source: str,
    destination: str,
    known: Sequence[tuple[File, str]],
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, str]:
    """Read staged files, of which the hashes are `known`, again, and copy again what is damaged.

    Returns, for each that was damaged, why it still is, or nothing ("") where it is no longer.
    """
    damaged = _damaged(destination, known, tell)
    again = [(file, digest) for file, digest in known if file.path in damaged]
    failures = copy_share(source, destination, [file for file, _ in again])
    return dict.fromkeys(damaged, "") | _damaged(destination, again) | failures


def _damaged(
    destination: str, known: Sequence[tuple[File, str]], tell: Callable[[int], None] = lambda done: None
) -> dict[str, str]:
    """What is wrong with the files that differ from what is known of them; they are removed."""
    failures: dict[str, str] = {}
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for file, digest in known:
        path = os.path.join(destination, file.path)
        try:
            with opened(path, os.O_NOFOLLOW) as descriptor:
                # from the device where the page cache can be dropped, or memory would be read
                advise(descriptor, 0, os.POSIX_FADV_DONTNEED)
                hasher = xxhash.xxh3_128()
                while length := os.readv(descriptor, [buffer]):
                    hasher.update(buffer[:length])
            if hasher.hexdigest() != digest:
                failures[file.path] = "the copy is damaged: its checksum is not that of the source"
        except OSError as error:
            failures[file.path] = error.strerror or str(error)
        tell(file.size)
    for path in failures:  # nobody reads them, and the next run copies them, should this one be killed or fail
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(destination, path))
    return failures


def require_unchanged(descriptor: int, file: File, done: int) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise Changed("it is no longer a file")
    if found.st_size < file.size or done < file.size:
        raise Changed(f"truncated while it was copied: {min(found.st_size, done)} bytes instead of {file.size}")
    if (found.st_size, found.st_mtime_ns, done) != (file.size, file.mtime_ns, file.size):
        raise Changed("changed while it was copied")


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    while len(data) > (done := os.write(descriptor, data)):
        data = data[done:]


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def advise(descriptor: int, length: int, advice: int) -> None:
    with contextlib.suppress(OSError):  # a file system need not take it
        os.posix_fadvise(descriptor, 0, length, advice)


@contextlib.contextmanager
def lock(destination: str, first: bool = True) -> Iterator[None]:
    """Keep a second staging, or a purge, from beginning before all who write to a destination have ended."""
    with open(os.path.join(destination, RECORDS, "lock"), "a") as file:
        try:
            if first:  # alone, and then every other copier holds it too
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"another staging to {destination!r} is at work; wait for it to end") from None
        except OSError:
            pass  # some file systems know no locks
        yield
