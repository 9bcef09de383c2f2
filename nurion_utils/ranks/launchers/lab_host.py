"""How a network lab starts: its first process, which builds the hosts and the links, and the notebook's part in it.

`start` runs this file as process 1 of new namespaces (``python -I -S``, the standard library alone). When it ends,
Linux kills every process of its pid namespace, and with them go the interfaces and the private /dev/shm. So it must
end when its standard input, a socket that the notebook holds open, is closed, when the notebook has died, and when
MPI has.
"""

import contextlib
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

if __name__ != "__main__":  # the notebook's part
    from nurion_utils.ranks import failures
    from nurion_utils.ranks.environment import own_environment, rank_environment
    from nurion_utils.ranks.failures import RankError

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
TICK_S = 0.1
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "ip": "iproute2", "tc": "iproute2"}
TOOLS["mpiexec"] = "mpich"
INSTEAD = "recordings.load('network_lab') has measurements from where it works"

SHM = "/dev/shm"  # private to the lab: MPI's shared memory, the socket and the ranks' last output
SOCKET = f"{SHM}/lab.sock"

# One packet must not be a large part of a message, or the chunks of a ring would not overlap; but each packet costs
# the cores time at every hop. A link that was idle lets a burst pass at once, as if it were free; but a small burst
# loses time whenever its timer is late. Measured on 2 cores at 100 Mbit/s, time over theory of the ring:
#   packet, burst (bytes)    2 ranks 16 KiB   2 ranks 2 MB   8 ranks 2 MB
#   4000, 6000                   0.70             1.02           1.04
#   2500, 4000                   0.83             1.03           1.08
#   1500, 3000                   0.92             1.05           1.22
MTU = 2500
BURST_S = 0.32e-3  # the free start is worth so many seconds; 4000 bytes at 100 Mbit/s
# Packets wait rather than drop: lost ones would cost TCP's retransmission time-outs of 200 ms.
LIMIT = "32mb"

SWITCH = f"""
mount -t tmpfs -o mode=0700 lab {SHM}
mount -t proc proc /proc 2>/dev/null || :  # containers may refuse; then the outer one does
ip link set lo up
ip link add switch mtu {MTU} type bridge mcast_snooping 0
ip link set switch addrgenmode none up
ip address add 10.77.0.254/24 dev switch
"""
# tc shapes what leaves an interface, so the two ends of a link shape its two directions. Each packet travels alone
# (gso), for counters that see each one's headers; Reno, because the time must not depend on this machine's choice.
HOST = """
touch {shm}/{host}
unshare --net={shm}/{host} true
ip link add port{rank} mtu {mtu} type veth peer name eth{rank} mtu {mtu}
ip link set eth{rank} netns {shm}/{host} name eth0
tc qdisc add dev port{rank} root {shaper}
ip link set port{rank} gso_max_segs 1 addrgenmode none master switch up
nsenter --net={shm}/{host} sh -ec '
ip link set lo up
tc qdisc add dev eth0 root {shaper}
ip link set eth0 gso_max_segs 1 addrgenmode none up
ip address add {host}/24 dev eth0
ip route change 10.77.0.0/24 dev eth0 src {host} congctl reno
'
"""
# What Hydra takes for ssh: the last arguments are the host and the command
LAUNCHER = f"""#!/bin/sh
while [ "${{1#10.77.0.}}" = "$1" ]; do shift; done
host=$1; shift
exec nsenter --net={SHM}/$host sh -c "$*"
"""


def start(ranks: int, rate_mbit: float, resources: contextlib.ExitStack) -> tuple[list[Connection], list[int], Path]:
    """Start a lab; returns connections to the ranks, their pids, and where the lab's /dev/shm can be read.

    Closing `resources` ends it all. Raises `RankError`.
    """
    environment = {
        **own_environment(),
        **rank_environment(threads=1),
        # this environment's mpiexec, and where ordinary users do not look for tc
        "PATH": os.pathsep.join([f"{sys.prefix}/bin", os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]),
        "UCX_TLS": "tcp,self",  # MPI must take the network, and the one with the slow links
        "UCX_NET_DEVICES": "eth0",
        "HOROVOD_GLOO_IFACE": "eth0",
        # UCX would send a large message in one piece, and with it hold up the word to the partner that it may send too:
        # exchanges of 4 MB and more, recursive doubling's for one, would go one way first and then the other.
        "UCX_RNDV_SCHEME": "am",
        "TMPDIR": SHM,
    }
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=environment["PATH"]) is None:
            raise RankError(f"the network lab needs the command {tool!r}: install {package} (on Linux); {INSTEAD}")
    # An ordinary user may become root of a user namespace; root needs none, unless a container took its rights.
    as_user = ["--user", "--map-root-user"]
    refusals = []
    for user in [[], as_user] if os.geteuid() == 0 else [as_user]:
        try:
            return _start(user, ranks, rate_mbit, environment, resources)
        except PermissionError as refusal:
            resources.close()
            refusals.append(str(refusal))
    raise RankError(
        f"this machine does not permit the network lab ({'; '.join(dict.fromkeys(refusals))}): it needs root's rights "
        f"or user namespaces (sysctl user.max_user_namespaces), which containers often refuse; {INSTEAD}"
    )


def _start(
    user: list[str], ranks: int, rate_mbit: float, environment: dict[str, str], resources: contextlib.ExitStack
) -> tuple[list[Connection], list[int], Path]:
    notebook, theirs = socket.socketpair()
    resources.enter_context(notebook)
    words = resources.enter_context(tempfile.TemporaryFile())  # without a name, so it cannot be left behind
    owner = os.pidfd_open(os.getpid())
    resources.callback(os.close, owner)
    with theirs:
        process = subprocess.Popen(
            [
                *["unshare", *user, "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child"],
                *[sys.executable, "-I", "-S", __file__, str(ranks), str(rate_mbit), str(owner)],
            ],
            env=environment,
            stdin=theirs,
            stdout=words,
            stderr=words,
            pass_fds=[owner],
            start_new_session=True,  # a Ctrl-C in a terminal is for the notebook, not for the clean-up
        )
    resources.callback(_end, process, notebook)

    notebook.settimeout(START_TIMEOUT_S)
    try:
        answer, descriptors, *_ = socket.recv_fds(notebook, 4096, 2)
    except TimeoutError:
        raise RankError(f"the network lab was not built within {START_TIMEOUT_S:.0f} s") from None
    for descriptor in descriptors:
        resources.callback(os.close, descriptor)
    if answer != b"built":
        words.seek(0)
        raise PermissionError((answer or words.read()).decode(errors="replace").strip())
    listener, directory = descriptors
    shm = Path(f"/proc/self/fd/{directory}")  # the lab's own, which has no other path here
    return *_meet(ranks, listener, process, shm, resources), shm


def _meet(
    ranks: int, listener: int, process: subprocess.Popen[bytes], shm: Path, resources: contextlib.ExitStack
) -> tuple[list[Connection], list[int]]:
    """Wait until all ranks have answered."""
    found: dict[int, tuple[Connection, int]] = {}
    names = [f"rank{rank}" for rank in range(ranks)]
    deadline = time.monotonic() + START_TIMEOUT_S
    with socket.socket(fileno=os.dup(listener)) as waiting:
        waiting.settimeout(TICK_S)
        while len(found) < ranks:
            if ended := [name for name in names if (shm / f"{name}.status").exists()]:
                raise RankError(f"the ranks of the lab did not start: {failures.ended(ended, shm)}")
            if process.poll() is not None or time.monotonic() > deadline:
                raise RankError(f"the ranks of the lab did not start{failures.last_output(['mpiexec', *names], shm)}")
            with contextlib.suppress(TimeoutError):
                rank_socket, _ = waiting.accept()
                rank_socket.setblocking(True)
                pid, _, _ = struct.unpack("3i", rank_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                connection = Connection(rank_socket.detach())
                resources.callback(connection.close)
                found[connection.recv()] = connection, pid
    connections, pids = zip(*(found[rank] for rank in range(ranks)), strict=True)
    return list(connections), list(pids)


def _end(process: subprocess.Popen[bytes], notebook: socket.socket) -> None:
    with contextlib.suppress(OSError):
        notebook.shutdown(socket.SHUT_RDWR)  # said aloud: a forked child may keep the socket open
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # and unshare takes process 1 with it
        process.wait()


def main() -> None:
    """Build the hosts, hand the notebook a socket for the ranks to answer on, start MPI, and wait for the end."""
    ranks, rate_mbit, owner = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    notebook = socket.socket(fileno=0)
    hosts = [f"10.77.0.{rank + 1}" for rank in range(ranks)]
    burst = max(1.6 * MTU, rate_mbit * 1e6 / 8 * BURST_S)
    shaper = f"tbf rate {rate_mbit * 1e6:.0f}bit burst {burst:.0f} limit {LIMIT}"
    links = [HOST.format(shm=SHM, host=h, rank=r, mtu=MTU, shaper=shaper) for r, h in enumerate(hosts)]
    with tempfile.TemporaryFile() as words:
        command = ["sh", "-ec", SWITCH + "".join(links)]
        building = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        ready, *_ = select.select([notebook, owner, os.pidfd_open(building.pid)], [], [])
        if notebook in ready or owner in ready:
            return
        if building.wait():
            words.seek(0)
            notebook.sendall(words.read().strip() or b"the links could not be made")
            return
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(SOCKET)
        listener.listen(ranks)
        directory = os.open(SHM, os.O_RDONLY | os.O_DIRECTORY)
        socket.send_fds(notebook, [b"built"], [listener.fileno(), directory])
    launcher = Path(SHM, "launcher")
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o700)
    with open(f"{SHM}/mpiexec.log", "wb") as log:
        mpi = subprocess.Popen(
            [
                *["mpiexec", "-launcher", "ssh", "-launcher-exec", launcher, "-localhost", "10.77.0.254"],
                *["-hosts", ",".join(hosts), "-ppn", "1", "-n", str(ranks)],
                *[sys.executable, "-P", "-m", "nurion_utils.ranks.launchers.lab"],
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    select.select([notebook, owner, os.pidfd_open(mpi.pid)], [], [])


if __name__ == "__main__":
    main()
