"""The process that plays a parallel file system: queues with a pace, for readers that connect to it.

`EmulatedFileSystem` starts it with the standard library alone (``python -I -S``) and hands it a listening socket.
All queues are first come first served, and nobody reaches a target but through the one queue of the metadata
server; so when a request arrives, the moments at which it will be served are already settled. The server books
them on one clock for each queue, ``free = max(now, free) + service``, and answers when the last one has come.
A timer that is late thus delays one answer, and never the queue.

Its standard input is a socket that its owner holds open. When that closes, or the owner ends (by SIGKILL too, or
while a forked child keeps the socket), the server ends.
"""

import asyncio
import json
import os
import socket
import struct
import sys
import time
import zlib
from collections import deque

METADATA = -1
LONGEST_MESSAGE = 2**28
MOST_LOGGED = 200_000


class Server:
    def __init__(self, settings: dict) -> None:
        self.targets: int = settings["targets"]
        self.s_per_byte: float = 1 / settings["target_mb_per_s"] / 1e6
        self.open_s: float = 1 / settings["metadata_ops_per_s"]
        self.timeout_s: float = settings["timeout_s"]
        self.began_s = time.monotonic()
        self.free_s = [0.0] * (self.targets + 1)  # the last one is the metadata server: METADATA is -1
        self.placed: dict[str, int] = {}
        self.log: deque[tuple] = deque(maxlen=MOST_LOGGED)
        self.ended: set[str] = set()  # jobs of which a read has failed
        self.meetings: dict[str, list] = {}  # by job: how many have come, and what they wait for

    def book(self, path: str, target: int, length: int, asked_s: float, service_s: float) -> tuple[float, bool]:
        """When a request is done, or given up; and whether it is served."""
        turn_s = max(asked_s, self.free_s[target])
        served = turn_s <= asked_s + self.timeout_s
        ends_s = turn_s + service_s if served else asked_s + self.timeout_s
        if served:
            self.free_s[target] = ends_s
        times_s = [asked_s - self.began_s, turn_s - self.began_s if served else None, ends_s - self.began_s]
        self.log.append((path, target, *times_s, length, not served))
        return ends_s, served

    def book_read(self, files: list, asked_s: float) -> tuple[float, int, str | None]:
        """Open `files` (path, bytes on its first target, on the next, ...) at once.

        Returns the moment at which all are read, or at which the first fails; the target that took or failed
        last; and the path that failed.
        """
        last, failures = (asked_s, METADATA, None), []
        for path, shares in files:
            opened_s, served = self.book(path, METADATA, 0, asked_s, self.open_s)
            if not served:
                failures.append((opened_s, METADATA, path))
                continue
            first = self.placed[path] if path in self.placed else zlib.crc32(path.encode()) % self.targets
            last = max(last, (opened_s, METADATA, None), key=lambda piece: piece[0])
            for i, share in enumerate(shares):
                if share:
                    target = (first + i) % self.targets
                    done_s, served = self.book(path, target, share, opened_s, share * self.s_per_byte)
                    if served:
                        last = max(last, (done_s, target, None), key=lambda piece: piece[0])
                    else:
                        failures.append((done_s, target, path))
        return min(failures) if failures else last

    async def answer(self, request: dict) -> object:
        if "read" in request:
            return await self.read(request["read"], request["job"])
        if "meet" in request:
            return await self.meet(request["meet"], request["of"])
        if "end" in request:
            return self.end(request["end"])
        if "place" in request:
            return self.placed.update(request["place"])
        if "idle" in request:
            return await asyncio.sleep(max(self.free_s) - time.monotonic())
        return list(self.log)

    async def read(self, files: list, job: str | None) -> list | None:
        """The last target, and the path that failed if one did; None when the job has ended meanwhile."""
        asked_s = time.monotonic()
        if job in self.ended:
            return None
        until_s, target, failed = self.book_read(files, asked_s)
        await asyncio.sleep(until_s - time.monotonic())
        if job in self.ended:
            return None
        if failed is not None and job is not None:
            self.end(job)
        return [target, failed]

    async def meet(self, job: str, of: int) -> bool:
        """Wait until so many readers of a job have come; False when the job has ended."""
        if job in self.ended:
            return False
        meeting = self.meetings.setdefault(job, [0, asyncio.get_running_loop().create_future()])
        meeting[0] += 1
        if meeting[0] == of:
            self.meetings.pop(job)[1].set_result(True)
        return await asyncio.shield(meeting[1])

    def end(self, job: str) -> None:
        self.ended.add(job)
        if meeting := self.meetings.pop(job, None):
            meeting[1].set_result(False)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one reader, a line of JSON for a line of JSON, until it goes away."""
        credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] != os.getuid():
            return writer.close()  # the socket has no file whose permissions would keep others out
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self.answer(json.loads(line))).encode() + b"\n")
                await writer.drain()
        except OSError:
            pass  # it went away before its answer came
        finally:
            writer.close()


async def main(settings: dict) -> None:
    over = asyncio.Event()
    owner = os.pidfd_open(settings["owner"])
    if os.getppid() != settings["owner"]:
        return  # it has ended already
    for descriptor in (owner, sys.stdin.fileno()):
        asyncio.get_running_loop().add_reader(descriptor, over.set)
    server = Server(settings)
    listener = socket.socket(fileno=settings["listener"])
    async with await asyncio.start_unix_server(server.serve, sock=listener, limit=LONGEST_MESSAGE):
        await over.wait()  # readers that still wait hear of the end by that of their connections


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
