"""Virtual nodes: parts of one machine that are nodes as far as MPI, schedulers and file systems can tell.

Each has namespaces of Linux to itself: a network with a cable to a switch, a host name, processes, and its own /tmp and
/dev/shm; all else of the file system is shared, as on a cluster. They live in outer namespaces whose first process is
a guardian: when that ends, Linux ends every process of theirs and removes networks and mounts. It takes root's rights,
or a kernel that lets ordinary users have namespaces.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from nurion_utils._checks import number, one_of, whole_number
from nurion_utils.ranks.environment import own_environment
from nurion_utils.ranks.failures import RankError

MOST = 32
HEAD = "head"  # the host name outside the nodes, where the switch is
ADDRESS = "10.77.0."  # of node 1 to `MOST`, and of the head
HEAD_ADDRESS = f"{ADDRESS}254"
SHM = "/dev/shm"  # outside the nodes it is theirs together: what their namespaces are called, and MPI's launcher
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "ip": "iproute2", "tc": "iproute2"}

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
TRIAL_S = 60.0
# MPI must take the network, and the one with the slow links; UCX takes nodes of one kernel for one host.
NETWORK = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0", "HOROVOD_GLOO_IFACE": "eth0"}

OUTSIDE = f"""
mount -t tmpfs -o mode=0711 nodes {SHM}
mount -t proc proc /proc 2>/dev/null || :  # containers may refuse; then the outer one does
hostname {HEAD}
printf '%s\\n' {{hosts}} > {SHM}/hosts
mount --bind {SHM}/hosts /etc/hosts
ip link set lo up
ip link add switch mtu {MTU} type bridge mcast_snooping 0
ip link set switch addrgenmode none up
ip address add {HEAD_ADDRESS}/24 dev switch
printf '%s' {{on_node}} > {SHM}/on
chmod 755 {SHM}/on
"""
# The first process of a node says who it is, as the /proc outside knows it, when all else is in place.
NODE = f"""
mkdir {SHM}/{{name}} {SHM}/{{name}}/tmp
cd {SHM}/{{name}}
mkfifo ready
{{{{ unshare --net --uts --ipc --mount --pid --fork --kill-child sh -ec '
exec 3> ready
read -r pid _ < /proc/self/stat
hostname {{name}}
mount -t proc proc /proc 2>/dev/null || :
mount --rbind /tmp tmp
mount -t tmpfs -o mode=1777 node /tmp
{{keep}}
cd /
umount -l {SHM}/{{name}}/tmp
ip link set lo up
mount -t tmpfs -o mode=1777 node {SHM}
echo $pid >&3
exec 3>&-
sleep infinity &
wait  # and with it for all that others leave here
' || echo failed > ready; }}}} &
"""
# tc shapes what leaves an interface, so the two ends of a link shape its two directions. Each packet travels alone
# (gso), for counters that see each one's headers; Reno, because the time must not depend on this machine's choice.
LINK = f"""
cd {SHM}/{{name}}
read -r pid < ready
echo $pid > first
touch pid net
mount --bind /proc/$pid/ns/pid pid
mount --bind /proc/$pid/ns/net net
ip link add port{{number}} mtu {MTU} type veth peer name eth{{number}} mtu {MTU}
ip link set eth{{number}} netns "$pid" name eth0
{{shape_port}}
ip link set port{{number}} addrgenmode none master switch up
nsenter --net=net sh -ec '
{{shape_node}}
ip link set eth0 addrgenmode none up
ip address add {ADDRESS}{{number}}/24 dev eth0
ip route change {ADDRESS}0/24 dev eth0 src {ADDRESS}{{number}} congctl reno
'
{{blocked}}
"""
# Who wants a connection sends a packet with SYN and without ACK first; what is dropped here is what would open one.
BLOCKED = """
nft add table inet wall
nft add chain inet wall {chain} '{{ type filter hook {chain} priority 0; }}'
nft add rule inet wall {chain} ip {end} {head} tcp dport != '{{ {but} }}' tcp flags '& (syn | ack) == syn' drop
"""
DIRECTIONS = {"to head": ("output", "daddr"), "from head": ("input", "saddr")}


# A shell's script that runs a command on the node that its first argument names. Not by its first process alone, whose
# number may be another's when the node is gone: where no process can be started any more, nothing is.
ON_NODE = f"""#!/bin/sh
here={SHM}/$1; shift
exec nsenter -t $(cat $here/first) --mount --uts --ipc --pid=$here/pid --net=$here/net "$@"
"""


class NodesError(RankError):
    """Virtual nodes cannot be made here; the message says what is missing."""

    __module__ = "nurion_utils.ranks"  # where the reader finds it


def names(count: int) -> list[str]:
    return [f"n{i + 1}" for i in range(count)]


def build(
    count: int, rate_mbit: float | None, shared: Iterable[str | Path], blocked: str | None = None, but: str = "1"
) -> str:
    """The shell script that makes `count` nodes, for the first process of `namespaces`.

    Parameters
    ----------
    rate_mbit
        What each link carries each way, in 10^6 bit/s; None for as much as this machine's memory can.
    shared
        Folders below /tmp that all nodes see nevertheless, as they do the current and the home folder and all that
        Python imports from.
    blocked
        "to head" or "from head": the direction in which no TCP connection between a node and the head can be opened,
        `but` to these ports.
    """
    whole_number(count, "the number of virtual nodes", most=MOST)
    shaper = ""
    if rate_mbit is not None:
        rate = 1e6 * number(rate_mbit, "rate_mbit", least=1, most=10_000)
        bucket = f"tbf rate {rate:.0f}bit burst {max(1.6 * MTU, rate / 8 * BURST_S):.0f} limit {LIMIT}"
        shaper = f"tc qdisc add dev {{0}} root {bucket}\nip link set {{0}} gso_max_segs 1"
    hosts = ["127.0.0.1 localhost", f"{HEAD_ADDRESS} {HEAD}"]
    hosts += [f"{ADDRESS}{i + 1} {name}" for i, name in enumerate(names(count))]
    wall = ""
    if blocked is not None:
        chain, end = DIRECTIONS[one_of(blocked, "blocked", DIRECTIONS)]
        rules = BLOCKED.format(chain=chain, end=end, head=HEAD_ADDRESS, but=but)
        wall = f"nsenter --net=net sh -ec {shlex.quote(rules)}"
    script = OUTSIDE.format(hosts=shlex.join(hosts), on_node=shlex.quote(ON_NODE))
    own = Path(__file__).parents[3]  # an editable installation need not be in sys.path
    usual = [os.getcwd(), Path.home(), sys.prefix, sys.base_prefix, own, *filter(None, sys.path)]
    paths = sorted({os.path.realpath(path) for path in [*usual, *shared]})
    each = [(shlex.quote(path), shlex.quote(path[1:])) for path in paths if path.startswith("/tmp/")]
    keep = "\n".join(f"mkdir -p {path}; mount --rbind {outside} {path}" for path, outside in each).replace("'", "'\\''")
    script += "".join(NODE.format(name=name, keep=keep) for name in names(count))
    for i, name in enumerate(names(count), start=1):
        ends = {"shape_port": f"port{i}", "shape_node": "eth0"}
        shape = {end: shaper.format(device) for end, device in ends.items()}
        script += LINK.format(name=name, number=i, blocked=wall, **shape)
    return script


def path() -> str:
    """Where to look for programs: this environment's MPI first, and last tc, which ordinary users do not find."""
    return os.pathsep.join([f"{sys.prefix}/bin", os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def environment() -> dict[str, str]:
    """That of this process, with `path`."""
    return {**own_environment(), "PATH": path()}


def namespaces() -> list[str]:
    """In front of a command it runs in new namespaces, as their first process, and may make nodes in them.

    NodesError if this machine lacks a tool or does not permit it.
    """
    env = environment()
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=env["PATH"]) is None:
            raise NodesError(f"virtual nodes need the command {tool!r}: install {package} (on Linux)")
    # An ordinary user may become root of a user namespace; root needs none, unless a container took its rights.
    refusals = []
    for user in [[], ["--user", "--map-root-user"]][os.geteuid() != 0 :]:
        command = ["unshare", *user, "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
        pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        try:
            trial = subprocess.run([*command, "sh", "-ec", build(1, 100, [])], env=env, timeout=TRIAL_S, **pipes)
        except subprocess.TimeoutExpired:
            refusals.append(f"one was not made within {TRIAL_S:.0f} s")
            continue
        if trial.returncode == 0:
            return command
        refusals.append(" ".join(trial.stderr.split()))
    raise NodesError(
        f"this machine does not permit virtual nodes ({'; '.join(dict.fromkeys(refusals))}): they need root's rights "
        "or user namespaces (sysctl user.max_user_namespaces), which containers often refuse"
    )
