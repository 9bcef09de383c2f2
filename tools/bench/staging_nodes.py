"""How long a folder takes to reach the own disks of four nodes, from a source behind one slow link.

The source is on a fifth virtual node, a file server whose link all four share, as they share that of a file system: it
serves files over SFTP, and the nodes mount them with sshfs, without ssh, so that nothing is encrypted. The disks are
memory.  All is done from the first node, in a job of a real Slurm that has the four:

* ours: `stage(..., replicate=True)` on ranks that run already, as Slurm's daemons do;
* "everyone": every node copies everything with cp;
* "sbcast": Slurm's own broadcast, of an archive that is ready at the source, and each node unpacks it;
* "rsync": every node asks an rsync daemon at the source for everything.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
from blocks import QUIET_WITH_LINKS, alternate

from nurion_utils.cluster import Cluster

SERVER = "n5"
FTP_PORT, RSYNC_PORT = 7000, 7001
SFTP = "/usr/lib/openssh/sftp-server"
PACKAGES = {"sshfs": "sshfs", SFTP: "openssh-sftp-server", "rsync": "rsync"}
SHARED, COPY = "/tmp/shared", "/tmp/copy"
SERVE = f"""
import socket, subprocess
server = socket.create_server(("", {FTP_PORT}))
while True:
    with server.accept()[0] as connection:
        subprocess.Popen([{SFTP!r}], stdin=connection, stdout=connection)
"""
CONNECT = f"import socket; [socket.create_connection(({SERVER!r}, port)) for port in ({FTP_PORT}, {RSYNC_PORT})]"
STAGE = f"""
import time
from nurion_utils import ranks, staging
with ranks.start(4) as world:
    world.run(int)
    begin = time.perf_counter()
    staging.stage("{SHARED}/files", "{COPY}", world, replicate=True)
    print(time.perf_counter() - begin)
"""
TIMED = """
import subprocess, sys, time
begin = time.perf_counter()
subprocess.run(["sh", "-ec", sys.argv[1]], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - begin)
"""
CONTENDERS = {
    "nurion_utils": [STAGE],
    "everyone": [TIMED, f"srun -N4 cp -r {SHARED}/files {COPY}"],
    "sbcast": [
        TIMED,
        f"sbcast {SHARED}/archive.tar {COPY}.tar; srun -N4 sh -c 'mkdir {COPY} && tar -C {COPY} -xf {COPY}.tar'",
    ],
    "rsync": [TIMED, f"srun -N4 rsync -a --port={RSYNC_PORT} {SERVER}::source/files/ {COPY}"],
}


def measure(n_files: int, size_bytes: int, rate_mbit: float, pairs: int = 5) -> pd.DataFrame:
    """Time the copies, from the first look at the source until all nodes have all; see `blocks.alternate`."""
    for tool, package in PACKAGES.items():
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed: apt-get install {package}")
    with Cluster(5, rate_mbit=rate_mbit) as cluster:
        source = cluster.directory / "source"
        (source / "files").mkdir(parents=True)
        for i in range(n_files):
            (source / "files" / f"{i:05}").write_bytes(os.urandom(size_bytes))
        subprocess.run(["tar", "-C", source / "files", "-cf", source / "archive.tar", "."], check=True)
        with _served(cluster, source):
            contenders = {name: partial(_copying, cluster, source, *words) for name, words in CONTENDERS.items()}
            return alternate(contenders, pairs, QUIET_WITH_LINKS)


@contextmanager
def _served(cluster: Cluster, source: Path) -> Iterator[None]:
    """The source is to be had at the server's ports."""
    configuration = cluster.directory / "rsyncd.conf"
    configuration.write_text(f"[source]\npath={source}\nuse chroot=no\nuid=root\ngid=root\n")
    rsync = ["rsync", "--daemon", "--no-detach", f"--port={RSYNC_PORT}", f"--config={configuration}"]
    servers = [
        subprocess.Popen(cluster.command(command, on=SERVER), env=cluster.environment)
        for command in ([sys.executable, "-c", SERVE], rsync)
    ]
    try:
        while cluster.run([sys.executable, "-c", CONNECT]).returncode:
            pass
        yield
    finally:
        for server in servers:
            server.kill()
            server.wait()


def _copying(cluster: Cluster, source: Path, program: str, *arguments: str) -> float:
    """Seconds that one contender takes; nodes mount the source afresh, so that none has read anything of it before."""
    nodes = cluster.nodes[:4]
    mount = f"mkdir -p {SHARED}; sshfs -o directport={FTP_PORT} {SERVER}:{source} {SHARED}"
    for node in nodes:
        cluster.run(["sh", "-ec", mount], on=node, check=True)
    job = ["salloc", "--quiet", "--nodes=4", f"--nodelist={','.join(nodes)}", "--time=5"]
    done = cluster.run([*job, sys.executable, "-P", "-c", program, *arguments], on=nodes[0], timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    for node in nodes:
        arrived = cluster.run(["diff", "-r", "--exclude=.nurion-stage", source / "files", COPY], on=node)
        if arrived.returncode:
            raise RuntimeError(f"{node} did not get all: {arrived.stdout}{arrived.stderr}")
        cluster.run(["sh", "-ec", f"umount {SHARED}; rm -rf {COPY} {COPY}.tar"], on=node, check=True)
    return float(done.stdout.splitlines()[-1])
