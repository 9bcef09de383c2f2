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

import xxhash

from nurion_utils.staging.plans import RECORDS, File
from nurion_utils.staging.records import Record, line_of

BUFFER_BYTES = 1 << 20  # stays in a core's cache between hashing and writing
BATCH_FILES, BATCH_BYTES = 64, 64 << 20  # renamed together
AHEAD_FILES, AHEAD_BYTES = 64, 16 << 20  # opened before they are read
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no further file will fit either


class Changed(Exception):
    """A file that is no longer as it was planned."""


class Writer:
    """Puts files into a destination, batch by batch, and writes this copier's journal."""

    def __init__(self, destination: str):
        self.name = uuid.uuid4().hex[:12]
        self.folder = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
        journal = f"{RECORDS}/journal-{self.name}.jsonl"
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.folder)
        self.written: list[tuple[str, File, int, str]] = []
        self.batch_bytes = self.made = 0
        self.failures: dict[str, str] = {}
        self.full = ""  # why nothing more can be written

    def create(self, file: File) -> tuple[int, str]:
        """A temporary file beside the place of `file`: its descriptor and its path."""
        self.made += 1
        head, slash, _ = file.path.rpartition("/")
        temporary = f"{head}{slash}.nurion-part-{self.name}-{self.made}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        # the mode at once, without chmod: copiers run with a umask of 0
        return os.open(temporary, flags, file.mode & 0o777, dir_fd=self.folder), temporary

    def finish(self, descriptor: int, temporary: str, file: File, digest: str) -> None:
        """`file` is whole: it becomes visible with the next batch."""
        if file.mode & 0o7000:  # writing takes them away, and so may the file system refuse them
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, file.mode)
        os.utime(descriptor, ns=(file.mtime_ns, file.mtime_ns))
        kept_ns = os.fstat(descriptor).st_mtime_ns
        os.close(descriptor)
        self.written.append((temporary, file, kept_ns, digest))
        self.batch_bytes += file.size
        if len(self.written) >= BATCH_FILES or self.batch_bytes >= BATCH_BYTES:
            self.publish()

    def discard(self, descriptor: int, temporary: str) -> None:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        self.remove(temporary)

    def remove(self, temporary: str) -> None:
        with contextlib.suppress(OSError):  # then the next run does it
            os.unlink(temporary, dir_fd=self.folder)

    def publish(self) -> None:
        """Record what is written, then make it visible; what fails is in `failures`, and removed."""
        batch, self.written, self.batch_bytes = self.written, [], 0
        try:
            write_all(self.journal, "".join(line_of(file, kept, digest) for _, file, kept, digest in batch).encode())
        except OSError as error:
            for temporary, file, _, _ in batch:
                self.remove(temporary)
                self.fail(file.path, error)
            return
        for temporary, file, _, _ in batch:
            try:
                os.rename(temporary, file.path, src_dir_fd=self.folder, dst_dir_fd=self.folder)
            except OSError as error:
                self.remove(temporary)
                self.fail(file.path, error)

    def fail(self, path: str, error: OSError | Changed) -> None:
        self.failures[path] = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in FULL:
            self.full = f"not begun: {error.strerror}"

    def close(self) -> None:
        os.close(self.journal)
        os.close(self.folder)


def copy_share(
    source: str, destination: str, files: Sequence[File], present: Iterable[str], tell: Callable[[int], None]
) -> dict[str, str]:
    """Copy `files`; returns why for each that is not at the destination afterwards.

    Parameters
    ----------
    present
        Paths at which a file of the same size and time lies that is on no record: it is compared, not replaced.
    tell
        Called with numbers of bytes that are done.
    """
    try:
        folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return {file.path: f"not begun: {source!r}: {error.strerror}" for file in files}
    try:
        writer, present = Writer(destination), set(present)
    except OSError as error:  # not even a journal
        os.close(folder)
        return {file.path: f"not begun: {error.strerror}" for file in files}
    buffer = memoryview(bytearray(BUFFER_BYTES))
    umask = os.umask(0)
    try:
        with contextlib.closing(_opened(folder, files)) as opened:
            for i, (file, descriptor) in enumerate(opened):
                if writer.full:
                    writer.failures |= {file.path: writer.full for file in files[i:]}
                    break
                try:
                    if isinstance(descriptor, OSError):
                        raise descriptor
                    if file.path in present:
                        _adopt(descriptor, writer, file, buffer)
                    else:
                        _copy(descriptor, writer, file, buffer, tell)
                except (OSError, Changed) as error:
                    writer.fail(file.path, error)
        writer.publish()
    finally:
        os.umask(umask)
        os.close(folder)
        writer.close()
    return writer.failures


def _opened(folder: int, files: Iterable[File]) -> Iterator[tuple[File, int | OSError]]:
    """Each file with its descriptor, open until the next one is asked for, or with what kept it from opening.

    The data of small files after it are on their way meanwhile: a disk or a server that is asked for many pieces at
    once has them sooner than one that is asked for one after the other.  Long files the system reads ahead itself.
    """
    ahead: collections.deque[tuple[File, int | OSError]] = collections.deque()
    ahead_bytes = 0

    def done() -> None:
        nonlocal ahead_bytes
        file, descriptor = ahead.popleft()
        ahead_bytes -= file.size
        if isinstance(descriptor, int):
            os.close(descriptor)

    try:
        for file in files:
            try:
                descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                ahead.append((file, descriptor))
                if file.size <= BUFFER_BYTES:
                    with contextlib.suppress(OSError):  # it is only advice
                        os.posix_fadvise(descriptor, 0, file.size, os.POSIX_FADV_WILLNEED)
            except OSError as error:
                ahead.append((file, error))
            ahead_bytes += file.size
            while len(ahead) > AHEAD_FILES or ahead_bytes > AHEAD_BYTES:
                yield ahead[0]
                done()
        while ahead:
            yield ahead[0]
            done()
    finally:
        while ahead:
            done()


def _copy(source: int, writer: Writer, file: File, buffer: memoryview, tell: Callable[[int], None]) -> None:
    descriptor, temporary = writer.create(file)
    try:
        if file.size <= BUFFER_BYTES:  # the common case of many small files, in as few calls as possible
            data = buffer[: os.readv(source, [buffer])]
            digest, done = xxhash.xxh3_128_hexdigest(data), len(data)
            write_all(descriptor, data)
            tell(done)
        else:
            digest, done = _copy_blocks(source, descriptor, file, buffer, tell)
        require_unchanged(source, file, done)
    except BaseException:
        writer.discard(descriptor, temporary)
        raise
    writer.finish(descriptor, temporary, file, digest)


def _copy_blocks(
    source: int, descriptor: int, file: File, buffer: memoryview, tell: Callable[[int], None]
) -> tuple[str, int]:
    """Copy a long file, its holes as holes; returns the hash and the number of bytes."""
    hasher, done = xxhash.xxh3_128(), 0
    sparse = file.allocated < file.size
    while done <= file.size:  # one beyond the end shows a file that has grown
        if sparse and (hole := _next_data(source, done, file.size) - done):
            zeros = bytes(BUFFER_BYTES)
            for start in range(0, hole, BUFFER_BYTES):
                hasher.update(zeros[: hole - start])
            done = os.lseek(source, done + hole, os.SEEK_SET)
            os.lseek(descriptor, done, os.SEEK_SET)
            tell(hole)
        length = os.readv(source, [buffer])
        if not length:
            break
        hasher.update(buffer[:length])
        write_all(descriptor, buffer[:length])
        done += length
        # Not read again here: what it takes of memory is the next block's, not other data's nor the copy's.
        with contextlib.suppress(OSError):  # advice, which a file system need not take
            os.posix_fadvise(source, 0, done, os.POSIX_FADV_DONTNEED)
        tell(length)
    if sparse:
        os.ftruncate(descriptor, done)
    return hasher.hexdigest(), done


def _next_data(source: int, offset: int, size: int) -> int:
    try:
        return os.lseek(source, os.lseek(source, offset, os.SEEK_DATA), os.SEEK_SET)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return max(offset, size)  # nothing but a hole up to the end


def _adopt(source: int, writer: Writer, file: File, buffer: memoryview) -> None:
    """Take a file that someone else put there for staged, if it has the same content."""
    there = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=writer.folder)
    digests = []
    try:
        for descriptor in (source, there):
            digests.append(hash_file(descriptor, buffer))
        require_unchanged(source, file, file.size)
        kept_ns = os.fstat(there).st_mtime_ns
    finally:
        os.close(there)
    if digests[0] != digests[1]:
        raise Changed("a file with other content is at the destination, and was not staged from here; move it away")
    write_all(writer.journal, line_of(file, kept_ns, digests[0]).encode())


def verify_share(destination: str, files: Sequence[tuple[str, Record]], tell: Callable[[int], None]) -> dict[str, str]:
    """Read staged files again; returns what is wrong with those that differ from their records."""
    failures: dict[str, str] = {}
    buffer = memoryview(bytearray(BUFFER_BYTES))
    try:
        folder = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return {path: f"{destination!r}: {error.strerror}" for path, _ in files}
    try:
        for path, (size, _, digest, _) in files:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
                try:
                    # from the device where the page cache can be dropped, or memory would be read
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    if hash_file(descriptor, buffer) != digest:
                        failures[path] = "the copy is damaged: its checksum is not that of the source"
                finally:
                    os.close(descriptor)
            except OSError as error:
                failures[path] = error.strerror or str(error)
            tell(size)
    finally:
        os.close(folder)
    return failures


def hash_file(descriptor: int, buffer: memoryview) -> str:
    hasher = xxhash.xxh3_128()
    while length := os.readv(descriptor, [buffer]):
        hasher.update(buffer[:length])
    return hasher.hexdigest()


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
def shared_lock(destination: str) -> Iterator[None]:
    """Held by whoever writes to a destination, so that a second staging does not begin before all have ended."""
    with open(os.path.join(destination, RECORDS, "lock"), "a") as lock:
        with contextlib.suppress(OSError):  # some file systems know no locks
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
