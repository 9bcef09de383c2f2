"""Notebooks on the head of a little cluster, or in its jobs, and what they must not leave there."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helpers import PATIENCE_S
from nurion_utils.cluster import Cluster
from nurion_utils.cluster.slurm import ClusterError
from nurion_utils.ranks import NodesError

BEGIN = """
import json, os, signal, sys, threading, time
from nurion_utils import ranks

def who():
    import socket
    from mpi4py import MPI
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.allreduce(1), socket.gethostname()

def say(found):
    print(json.dumps(found), flush=True)
"""
Notebook = Callable[..., subprocess.Popen]


def make(**options: object) -> Cluster:
    try:
        cluster = Cluster(4, **options)
    except (ClusterError, NodesError) as missing:
        pytest.skip(str(missing))
    cluster.environment["HOME"] = str(cluster.directory)  # where runs of other tests are not met
    return cluster


@contextlib.contextmanager
def leaves_nothing() -> Iterator[list[Callable[[], list[str]]]]:
    """At the end what is asked for says that nothing is left."""
    asked = []
    yield asked
    deadline = time.monotonic() + PATIENCE_S
    while (left := [line for ask in asked for line in ask()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [], left


def traces(cluster: Cluster, list_jobs: list[str]) -> list[str]:
    """Jobs in the queue, processes of ours on a node, folders on any, and output where it was not asked for."""
    left = cluster.run(list_jobs, check=True).stdout.splitlines()
    left += map(str, [*cluster.directory.glob(".nurion/*"), *Path.cwd().glob("slurm-*.out")])
    for node in cluster.nodes:
        listed = cluster.run(["sh", "-c", "ls -d /tmp/nurion-* 2>/dev/null; pgrep -f -a nurion_utils"], on=node).stdout
        left += [f"{node}: {line}" for line in listed.splitlines() if str(cluster.directory) not in line]
    return [line for line in left if "pgrep" not in line]


@contextlib.contextmanager
def notebooks(cluster: Cluster) -> Iterator[Notebook]:
    """Runs commands on the head as notebooks would be, and ends those that still run."""
    started = []

    def start(command: list[str], **env: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(cluster.command(command), env={**cluster.environment, **env}, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def answer(process: subprocess.Popen) -> object:
    """What the code said at last; its errors, if it said nothing."""
    output, errors = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def at_work(site: str, n: int) -> str:
    """Code whose ranks work until they are ended."""
    return f"""
world = ranks.start({n}, site={site!r})
say("at work")
world.run(time.sleep, 1000)
"""


def until_at_work(process: subprocess.Popen) -> None:
    assert '"at work"\n' in iter(process.stdout.readline, ""), process.stderr.read()


def script_of(process: subprocess.Popen) -> psutil.Process:
    """The process that runs a notebook's code, below what brings it to the head, or into a job."""
    own = psutil.Process(process.pid)
    for each in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has ended by now
            words = each.cmdline()
            if words[:2] == [sys.executable, "-c"] and BEGIN in words[2]:
                return each
    raise AssertionError("the notebook's code does not run")
