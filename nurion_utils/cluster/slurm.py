"""Virtual nodes with a Slurm of their own, as long as somebody holds them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from nurion_utils._checks import one_of
from nurion_utils.ranks.launchers import nodes as virtual
from nurion_utils.ranks.processes import Guarded

START_TIMEOUT_S = 60.0
PACKAGES = "slurmctld slurmd slurm-client munge"
TOOLS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sinfo")
CORES_PER_NODE = 8  # as Slurm counts them: nodes share those of the machine

PORTS = "6817-6818, 20000-21000"  # of Slurm, which may always be reached

CONFIGURATION = """\
ClusterName=nurion
SlurmctldHost={head}({address})
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SrunPortRange=20000-21000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
ReturnToService=2
InactiveLimit=0
KillWait=2
SlurmdTimeout=10
MinJobAge=60
SlurmdParameters=config_overrides
NodeName=n[1-{count}] CPUs={cores} RealMemory={memory_mb} State=UNKNOWN
PartitionName=main Nodes=n[1-{count}] Default=YES DefaultTime=10 MaxTime=60 State=UP OverSubscribe=NO
PartitionName=small Nodes=n1 MaxTime=5 MaxNodes=1 State=UP OverSubscribe=NO
"""
MUNGE = """
chmod 711 {directory}
mkdir -p {directory}/state
mungekey --create --keyfile={directory}/munge.key
munged --force --key-file={directory}/munge.key --socket={directory}/munge.socket \
    --pid-file={directory}/munge.pid --log-file={directory}/munge.log --seed-file={directory}/munge.seed
"""


class ClusterError(RuntimeError):
    """The cluster cannot be started, or has ended; the message says why."""


def _require_tools(path: str) -> None:
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=path) is None]:
        raise ClusterError(f"a cluster needs Slurm, of which {missing[0]!r} is missing: apt-get install {PACKAGES}")


class Cluster(contextlib.AbstractContextManager):
    """`nodes` virtual nodes, n1, n2 and so on, and a head from which jobs are submitted, with a Slurm of their own.

    All is gone when it is closed, when nobody holds it any more, and when this process ends, however it does.
    NodesError where there can be no virtual nodes, ClusterError where Slurm is not installed or does not start.

    Parameters
    ----------
    nodes
        1 to 32; each has eight cores as far as Slurm can tell, and an equal part of the memory.
    rate_mbit
        What each node's link carries each way, in 10^6 bit/s; None for as much as this machine's memory can.
    blocked
        "to head" or "from head": the direction in which no connection between head and nodes can be opened, but
        those of Slurm.
    """

    def __init__(self, nodes: int = 4, rate_mbit: float | None = None, blocked: str | None = None) -> None:
        self.nodes = virtual.names(nodes)
        self._resources = contextlib.ExitStack()
        env = virtual.environment()
        _require_tools(env["PATH"])
        self._guarded = Guarded(self._resources, around := virtual.namespaces(), env)
        self._guarded.end_with(self)
        self._user = ["--user"] if "--user" in around else []
        self.directory = self._guarded.directory
        self.environment = {**env, **virtual.NETWORK, "SLURM_CONF": str(self.directory / "slurm.conf")}
        try:
            self._begin(rate_mbit, blocked)
        except BaseException:
            self.close()
            raise

    def command(self, command: Sequence[str], on: str = "head") -> list[str]:
        """The command that runs `command` on a node or the head, in the folder that is the current one here."""
        one_of(on, "on", ["head", *self.nodes])
        enter = ["nsenter", "-t", str(self._head), *self._user, "--mount", "--net", "--ipc", "--uts", "--pid"]
        there = [] if on == "head" else [f"{virtual.SHM}/on", on]
        return [*enter, *there, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *command]

    def run(self, command: Sequence[str], on: str = "head", **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a node or the head and wait for it; `options` are those of `subprocess.run`."""
        usual = {"env": self.environment, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        return subprocess.run(self.command(command, on), **{**usual, **options})

    def unplug(self, node: str) -> None:
        """Have a node vanish, with all that runs on it, as if its power had failed."""
        one_of(node, "node", self.nodes)
        self.run(["sh", "-c", f"kill -9 $(cat {virtual.SHM}/{node}/first)"])

    def close(self) -> None:
        """End all that runs there. Calling it again does no harm."""
        self._resources.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, rate_mbit: float | None, blocked: str | None) -> None:
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // len(self.nodes)
        head, address = virtual.HEAD, virtual.HEAD_ADDRESS
        where = {"directory": self.directory, "head": head, "address": address, "count": len(self.nodes)}
        configuration = CONFIGURATION.format(cores=CORES_PER_NODE, memory_mb=memory_mb, **where)
        Path(self.environment["SLURM_CONF"]).write_text(configuration)
        build = virtual.build(len(self.nodes), rate_mbit, [self.directory], blocked, PORTS)
        build += MUNGE.format(directory=self.directory)
        daemons = {"slurmctld": ["slurmctld", "-D"]}
        daemons |= {node: [f"{virtual.SHM}/on", node, "slurmd", "-D", "-N", node] for node in self.nodes}
        self._guarded.begin(daemons, self.environment, build)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if (words := self._guarded.why_it_ended()) is not None:
                raise ClusterError(f"the cluster could not be started: {' '.join(words.split())}")
            if time.monotonic() > deadline:
                logs = [f"{log.name}: {log.read_text()[-500:]}" for log in sorted(self.directory.glob("*.log"))]
                raise ClusterError("\n".join([f"Slurm was not ready within {START_TIMEOUT_S:.0f} s", *logs]))
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        """Whether all daemons have been started and all nodes are idle."""
        if not (self.directory / f"{self.nodes[-1]}.process").exists():
            return False
        self._head = psutil.Process(self._guarded.process.pid).children()[0].pid  # below unshare
        states = self.run(["sinfo", "--noheader", "--partition=main", "--Node", "--format=%t"]).stdout.split()
        return states == ["idle"] * len(self.nodes)
