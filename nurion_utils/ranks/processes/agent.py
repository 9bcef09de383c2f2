"""Ranks on other nodes: beside each an agent, which looks after it for the notebook, and is all it leaves there.

The agent and the notebook's side, the mirror, talk through a broker, which sits in the process of the controller. The
mirror makes what an agent tells into files of the notebook's run directory, as ranks of this machine write themselves.
Everything is encrypted, and who lacks the world's keys is not heard. An agent that does not hear from the mirror for
`SILENCE_S` takes the notebook for gone and ends its rank; a mirror that does not hear from an agent takes its node for
lost.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import zmq
import zmq.auth.thread

from nurion_utils.ranks.failures import ASK, ASK_AROUND, LOST, RankError
from nurion_utils.ranks.processes import kernel
from nurion_utils.ranks.processes.folders import write_whole
from nurion_utils.ranks.processes.guardian import end_with_parent

TICK_S = 0.1
BEAT_S = 1.0
SILENCE_S = 10.0
LINGER_S = 3.0
FIRST_S = 60.0  # until they hear of each other for the first time
CONNECT_S = 5.0
MOST_BYTES = 1 << 16  # of a log at a time
MIRROR = b"mirror"


def keys() -> dict[str, str]:
    """The keys of a world: whoever has them can talk with its ranks."""
    (broker_public, broker_secret), (public, secret) = zmq.curve_keypair(), zmq.curve_keypair()
    named = {"broker_public": broker_public, "broker_secret": broker_secret, "public": public, "secret": secret}
    return {name: key.decode() for name, key in named.items()}


class _Known:
    """Whom the broker lets in."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


def serve(directory: Path, world: dict[str, Any], address: str) -> None:
    """Be the broker of a world, in a thread; ``broker.json`` in the directory then says where."""
    context = zmq.Context()
    allowed = zmq.auth.thread.ThreadAuthenticator(context)
    allowed.start()
    allowed.configure_curve_callback(credentials_provider=_Known(world["public"]))
    router = context.socket(zmq.ROUTER)
    router.curve_server, router.router_handover = True, True
    router.curve_secretkey, router.curve_publickey = world["broker_secret"].encode(), world["broker_public"].encode()
    where = {"address": address, "port": router.bind_to_random_port(f"tcp://{address}")}
    write_whole(directory / "broker.json", json.dumps(where).encode())

    def forward() -> None:
        while True:
            sender, receiver, *words = router.recv_multipart()
            router.send_multipart([receiver, sender, *words])

    threading.Thread(target=forward, name="nurion-broker", daemon=True).start()


def connect(world: dict[str, Any], where: dict[str, Any], name: bytes) -> zmq.Socket:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.identity, dealer.linger = name, 1000
    dealer.curve_serverkey = world["broker_public"].encode()
    dealer.curve_publickey, dealer.curve_secretkey = world["public"].encode(), world["secret"].encode()
    dealer.connect(f"tcp://{where['address']}:{where['port']}")
    return dealer


def choose(shared: Path, rank: int, for_nodes: Callable[[Path, str], list[str]]) -> dict[str, Any]:
    """Where all ranks find broker and controller: on the notebook's side or, if rank 0 cannot connect, beside it.

    `for_nodes` gives the command of a controller. RankError if this node cannot connect there.
    """
    if rank == 0:
        chosen = {**_read_when_there(shared / "broker.json"), "profile": str(shared / "profile")}
        if not can_reach(chosen):
            here = shared / "beside"
            here.mkdir(mode=0o700)
            (here / "world.json").symlink_to(shared / "world.json")
            address = address_towards(chosen["address"])
            subprocess.Popen(for_nodes(here, address), start_new_session=True, preexec_fn=end_with_parent)
            chosen = {**_read_when_there(here / "broker.json"), "profile": str(here / "profile")}
        write_whole(shared / "chosen.json", json.dumps(chosen).encode())
    chosen = _read_when_there(shared / "chosen.json")
    if not can_reach(chosen):
        raise RankError(
            f"node {os.uname().nodename}, of rank {rank}, cannot connect to {chosen['address']}, where the ranks meet: "
            "nodes must be able to connect to each other"
        )
    return chosen


def address_towards(other: str) -> str:
    """This node's own address on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((other, 9))  # no packet is sent
        return way.getsockname()[0]


def can_reach(where: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((where["address"], where["port"]), CONNECT_S):
        return True
    return False


def look_after(child: int, rank: int, shared: Path, world: dict[str, Any], where: dict[str, Any]) -> None:
    """Beside a rank whose process is `child`, until the notebook wants it no longer; its files are SHARED/rankN.*."""
    dealer, ending, own = connect(world, where, b"%d" % rank), os.pidfd_open(child), shared / f"rank{rank}"
    poller = zmq.Poller()
    for each in (dealer, ending):
        poller.register(each, zmq.POLLIN)
    told, logged, beat_s, status, held = {}, 0, 0.0, "", None
    silent_at_s, heard = time.monotonic() + FIRST_S, False
    tell = partial(_tell, dealer)
    while time.monotonic() < silent_at_s:
        ready = dict(poller.poll(1000 * TICK_S))
        if ending in ready:
            poller.unregister(ending)
            status, beat_s = str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), 0.0
        if heard:  # what nobody listens to is lost
            logged = _tell_news(own, told, logged, tell)
            if time.monotonic() - beat_s > BEAT_S:
                beat_s = time.monotonic()
                tell(b"file", "node", os.uname().nodename.encode())
                if status:
                    tell(b"file", "status", status.encode())
        while dealer.poll(0):
            _, word, *arguments = dealer.recv_multipart()
            silent_at_s, heard = time.monotonic() + SILENCE_S, True
            if word == b"end":
                status or os.kill(child, signal.SIGKILL)
                tell(b"file", "gone", b"1")
                _let_go(held)
                time.sleep(LINGER_S)  # MPI's launcher ends all others when the first one leaves
                return
            with contextlib.suppress(OSError):
                if word == b"hold":
                    held = _hold_launcher(shared)
                    tell(b"file", "held", b"1")
                if word == b"ask":
                    _ask(own)
                if word == b"signal" and not status:
                    _signal(child, int(arguments[0]), own, told, tell)
    _let_go(held)
    shutil.rmtree(shared, ignore_errors=True)  # the notebook is gone, and all that would do it


def _tell(dealer: zmq.Socket, kind: bytes, name: str, content: bytes) -> None:
    dealer.send_multipart([MIRROR, kind, name.encode(), content])


def _tell_news(own: Path, told: dict[str, bytes], logged: int, tell: Callable[[bytes, str, bytes], None]) -> int:
    """Tell what a rank has written since; gives how long its log is by now."""
    while log := _from(Path(f"{own}.log"), logged):
        logged += len(log)
        tell(b"log", "log", log)
    for name in ("stack", "call"):
        content = _from(Path(f"{own}.{name}"), 0)
        if content and content != told.get(name):
            tell(b"file", name, content)
        told[name] = content
    return logged


def _hold_launcher(shared: Path) -> int | None:
    """Stop the launcher in a job's script, if it runs on this node: held, it does not end all ranks for one node."""
    with contextlib.suppress(OSError, ValueError):
        node, pid = (shared / "launcher").read_text().split()
        if node == os.uname().nodename:
            os.kill(int(pid), signal.SIGSTOP)
            return int(pid)
    return None


def _let_go(launcher: int | None) -> None:
    """Or the job would stay; the folder that tells of the launcher may be gone by now, by another agent's hand."""
    with contextlib.suppress(OSError):
        launcher and os.kill(launcher, signal.SIGCONT)


def _signal(
    child: int, number: int, own: Path, told: dict[str, bytes], tell: Callable[[bytes, str, bytes], None]
) -> None:
    if number == ASK:
        told["stack"] = os.truncate(f"{own}.stack", 0)
    if number == ASK_AROUND:
        tell(b"file", "state", kernel.state(child).encode())
    os.kill(child, number)


def _ask(own: Path) -> None:
    """Have the rank write down which communication it is in, as `stalls` does on one machine."""
    Path(f"{own}.call").unlink(missing_ok=True)
    fifo = os.open(f"{own}.ask", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fifo, b"?")
    os.close(fifo)


def _from(path: Path, begin: int) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(begin)
        return file.read(MOST_BYTES)
    return b""


def mirror() -> None:
    """On the notebook's side: make files of what agents tell, and pass on what is asked for in ``commands``."""
    directory, shared = Path(sys.argv[1]), Path(sys.argv[2])
    world = json.loads((shared / "world.json").read_text())
    commands = os.fdopen(os.open(directory / "commands", os.O_RDWR), "rb", buffering=0)  # never at its end
    asked: dict[int, int] = {}  # fifos, through which somebody asks a rank where it is, by their descriptors
    for rank in range(world["n"]):
        os.mkfifo(fifo := directory / f"rank{rank}.ask", mode=0o600)
        asked[os.open(fifo, os.O_RDWR | os.O_NONBLOCK)] = rank
    dealer = connect(world, _read_when_there(shared / "chosen.json", float("inf")), MIRROR)
    poller = zmq.Poller()
    for readable in (dealer, commands, *asked):
        poller.register(readable, zmq.POLLIN)
    heard: dict[int, float] = {}
    lost: set[int] = set()
    beat_s = 0.0
    while True:
        ready = dict(poller.poll(1000 * TICK_S))
        if commands.fileno() in ready:
            for line in os.read(commands.fileno(), 1 << 16).split(b"\n")[:-1]:
                rank, *words = line.split()
                for one in heard if rank == b"all" else [int(rank)]:
                    dealer.send_multipart([b"%d" % one, *words])
        for fifo in asked.keys() & ready.keys():
            os.read(fifo, 1 << 10)
            dealer.send_multipart([b"%d" % asked[fifo], b"ask"])
        while dealer.poll(0):
            sender, kind, name, content = dealer.recv_multipart()
            heard[int(sender)] = time.monotonic()
            _note(directory / f"rank{int(sender)}.{name.decode()}", kind, content)
        if time.monotonic() - beat_s > BEAT_S:
            beat_s = time.monotonic()
            for rank in range(world["n"]):
                dealer.send_multipart([b"%d" % rank, b"beat"])
            os.utime(shared)  # which is swept up when it is old
        for rank in {rank for rank, when in heard.items() if time.monotonic() - when > SILENCE_S} - lost:
            lost.add(rank)
            if not (directory / f"rank{rank}.status").exists():
                write_whole(directory / f"rank{rank}.status", LOST.encode())


def _read_when_there(path: Path, patience_s: float = FIRST_S) -> dict[str, Any]:
    """What a file says that others write, once they have."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(path.read_text())
        os.listdir(path.parent)  # a network file system may remember that there was none
        time.sleep(TICK_S)
    raise RankError(
        f"{path} has not come within {FIRST_S:.0f} s: is {path.parent} on a file system that all nodes share"
    )


def _note(path: Path, kind: bytes, content: bytes) -> None:
    if kind == b"log":
        with open(path, "ab") as file:
            file.write(content)
    elif kind == b"file" and not (path.suffix == ".status" and path.exists()):
        write_whole(path, content)
