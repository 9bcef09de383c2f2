"""Ranks on virtual nodes talk across their links alone; a node that is lost is named; nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import PATIENCE_S

from nurion_utils import ranks
from nurion_utils.ranks import failures
from nurion_utils.ranks.launchers import local, nodes

pytestmark = pytest.mark.lab

READY = "ranks are at work"
WAYS = ["by root", "by an ordinary user"]


@pytest.fixture(scope="module")
def linked(permitted: None) -> Iterator[ranks.World]:
    with ranks.start(3, rate_mbit=200) as world:
        yield world


@pytest.fixture
def mortal(linked: ranks.World) -> ranks.World:
    return linked if "running" in repr(linked) else linked.restart()


def here() -> dict:
    import socket

    from mpi4py import MPI

    return {
        "rank": MPI.COMM_WORLD.rank,
        "size": MPI.COMM_WORLD.allreduce(1),
        "name": socket.gethostname(),
        "address": socket.gethostbyname(socket.gethostname()),
        "neighbours": MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).size - 1,
        "processes": len([pid for pid in os.listdir("/proc") if pid.isdigit()]),
        **{kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "uts", "ipc", "pid", "mnt")},
        **{folder: os.stat(folder).st_dev for folder in ("/tmp", "/dev/shm")},
    }


def test_each_rank_has_a_node_to_itself(mortal: ranks.World) -> None:
    found = mortal.run(here)
    assert [(each["rank"], each["size"], each["name"]) for each in found] == [(i, 3, f"n{i + 1}") for i in range(3)]
    assert [each["address"] for each in found] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    assert all(each["neighbours"] == 0 for each in found)
    for kind in ("net", "uts", "ipc", "pid", "mnt"):
        assert len({os.readlink(f"/proc/self/ns/{kind}"), *(each[kind] for each in found)}) == 4
    for folder in ("/tmp", "/dev/shm"):
        assert len({os.stat(folder).st_dev, *(each[folder] for each in found)}) == 4
    assert all(each["processes"] < 20 for each in found)


def test_to_ask_ranks_where_they_are_does_not_disturb_them(mortal: ranks.World) -> None:
    assert failures.where([0, 1, 2], mortal._processes).count("between two calls") == 3
    found = mortal.run(here, timeout_s=PATIENCE_S)  # MPI may ask a launcher that is held, when it hears of a death
    assert [each["size"] for each in found] == [3, 3, 3]


def test_a_file_in_tmp_is_on_one_node_and_one_beside_the_program_on_all(mortal: ranks.World) -> None:
    def exchange(shared: str) -> tuple[list[str], list[str]]:
        from mpi4py import MPI

        for folder in ("/tmp", shared):
            Path(folder, f"of_rank{MPI.COMM_WORLD.rank}").touch()
        MPI.COMM_WORLD.barrier()
        return tuple(sorted(path.name for path in Path(folder).glob("of_rank*")) for folder in ("/tmp", shared))

    own, common = zip(*mortal.run(exchange, str(mortal._processes.directory)), strict=True)
    assert own == (["of_rank0"], ["of_rank1"], ["of_rank2"])
    assert common == (["of_rank0", "of_rank1", "of_rank2"],) * 3


def test_ranks_keep_what_they_write_to_their_run_directory(mortal: ranks.World) -> None:
    def folders() -> list[str]:
        return [os.environ[name] for name in ("TMPDIR", "IPYTHONDIR")]

    directory = mortal._processes.directory
    assert mortal.run(folders) == [[str(directory), str(directory / "ipython")]] * 3


def test_horovod_takes_the_ranks_for_nodes_too(mortal: ranks.World) -> None:
    def train() -> tuple[int, int, float]:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        return hvd.local_size(), hvd.cross_size(), float(hvd.allreduce(tf.ones(10), op=hvd.Sum)[0])

    assert mortal.run(train) == [(1, 3, 3.0)] * 3


def unplug(world: ranks.World, node: str) -> None:
    """Kill the node's first process, and with it all that runs there."""
    signal.pidfd_send_signal(world._processes._processes[node], signal.SIGKILL)


def barrier_in_a_file() -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.barrier()
    if MPI.COMM_WORLD.rank != 1:
        MPI.COMM_WORLD.barrier()
    time.sleep(1000)


def test_a_node_that_is_lost_is_named_and_the_others_say_where_they_stood(mortal: ranks.World) -> None:
    threading.Timer(1, unplug, [mortal, "n2"]).start()
    with pytest.raises(ranks.RankError) as caught:
        mortal.run(barrier_in_a_file, timeout_s=PATIENCE_S)
    message = str(caught.value)
    assert message.startswith("rank 1 was lost with its node n2\n") and caught.value.died == (1,)
    for rank in (0, 2):
        where = message.split(f"--- where rank {rank} was ---\n")[1].splitlines()[0]
        assert where.endswith("in barrier_in_a_file")
    with pytest.raises(ranks.RankError, match="^this world has ended because rank 1 was lost with its node n2; call"):
        mortal.run(here)
    assert [each["rank"] for each in mortal.restart().run(here)] == [0, 1, 2]


def test_a_rank_that_dies_is_named_with_its_node(mortal: ranks.World) -> None:
    def die_on_rank_1() -> None:
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        MPI.COMM_WORLD.barrier()

    with pytest.raises(ranks.RankError, match="^rank 1 on node n2 was ended by SIGKILL\n") as caught:
        mortal.run(die_on_rank_1, timeout_s=PATIENCE_S)
    assert str(caught.value).count("in die_on_rank_1") == 2


def test_a_loss_between_two_calls_is_noticed(mortal: ranks.World) -> None:
    unplug(mortal, "n3")
    deadline = time.monotonic() + PATIENCE_S
    while mortal.is_running and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ranks.RankError, match="because rank 2 was lost with its node n3; call world.restart"):
        mortal.run(here)


def test_nodes_whose_building_stalls_are_given_up_and_leave_nothing(
    permitted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local, "START_TIMEOUT_S", 2.0)
    found = nodes.namespaces()
    monkeypatch.setattr(nodes, "namespaces", lambda: found)
    monkeypatch.setattr(nodes, "OUTSIDE", "sleep 1000\n" + nodes.OUTSIDE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {*psutil.Process().children(recursive=True)}
    with pytest.raises(ranks.RankError, match="^the ranks did not start within 2 s"):
        ranks.start(2, rate_mbit=100)
    assert {*psutil.Process().children(recursive=True)} <= before
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_stalls_is_given_up(permitted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "TRIAL_S", 1.0)
    monkeypatch.setattr(nodes, "OUTSIDE", "sleep 1000\n" + nodes.OUTSIDE)
    with pytest.raises(ranks.NodesError, match="does not permit virtual nodes .*one was not made within 1 s"):
        nodes.namespaces()


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, "fast"])
def test_impossible_rates_are_refused(rate: object) -> None:
    with pytest.raises(ValueError, match="rate_mbit must be a number from 1 up to 10,000"):
        ranks.start(2, rate_mbit=rate)


def test_a_direction_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="blocked must be one of 'to head', 'from head', not 'up'"):
        nodes.build(2, None, [], blocked="up")


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    which = nodes.shutil.which
    monkeypatch.setattr("shutil.which", lambda name, **path: None if name == "tc" else which(name, **path))
    with pytest.raises(ranks.NodesError, match="^virtual nodes need the command 'tc': install iproute2"):
        ranks.start(2, rate_mbit=100)


def test_a_machine_that_permits_no_namespaces_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    unshare.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ranks.NodesError) as caught:
        ranks.start(2, rate_mbit=100)
    message = str(caught.value)
    assert "does not permit virtual nodes (unshare: unshare failed: Operation not permitted)" in message
    assert "\n" not in message


@pytest.mark.parametrize("rate_mbit", [None, 50])
@pytest.mark.parametrize("blocked", [None, "to head", "from head"])
def test_a_connection_can_be_opened_in_the_directions_that_are_not_blocked(
    permitted: None, blocked: str | None, rate_mbit: float | None
) -> None:
    listen = 'python3 -c \'import socket; s = socket.create_server(("", 5000)); print(s.accept()[0].send(b"x"))\''
    connect = "python3 -c 'import socket; print(socket.create_connection((\"{}\", 5000), 1).recv(1))'"
    script = nodes.build(2, rate_mbit, [], blocked)
    for name, server, client, address in (
        ("to head", "", f"{nodes.SHM}/on n2 ", "head"),
        ("from head", f"{nodes.SHM}/on n2 ", "", "n2"),
    ):
        script += f"\n{server}{listen} & sleep 0.5; {client}{connect.format(address)} && echo {name}: open || :"
    run = {"env": nodes.environment(), "capture_output": True, "text": True, "timeout": PATIENCE_S}
    printed = subprocess.run([*nodes.namespaces(), "sh", "-ec", script], **run).stdout
    for direction in ("to head", "from head"):
        assert (f"{direction}: open" in printed) == (direction != blocked)


SCRIPT = f"""
import os, time
from nurion_utils import ranks
world = ranks.start(2, rate_mbit=200)
print(world.run(os.getuid), {READY!r}, flush=True)
world.run(time.sleep, 1000)
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_is_ended_at_work_leaves_nothing(
    permitted: None, tmp_path: Path, number: signal.Signals, way: str
) -> None:
    """Run by root, take root's rights away, as a container does; an ordinary user has none to begin with."""
    # but for the one that Linux asks of root, not of others, who wants to be root of a user namespace
    weak = ("setpriv", "--bounding-set=-all,+setfcap", "--inh-caps=-all") if os.geteuid() == 0 else ()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "NURION_TEST": str(tmp_path)}
    before = traces(tmp_path)
    script = subprocess.Popen(
        [*(weak if way == WAYS[1] else ()), sys.executable, "-c", SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout.readline() == f"[0, 0] {READY}\n"
    assert traces(tmp_path) > before
    script.send_signal(number)
    assert script.wait(timeout=PATIENCE_S) == -number
    deadline = time.monotonic() + PATIENCE_S
    while traces(tmp_path) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces(tmp_path) == before


def traces(directory: Path) -> set[str]:
    """What nodes could leave on the machine: interfaces, mounts, files, processes with the test's mark."""
    found = {
        *Path("/proc/mounts").read_text().splitlines(),
        *map(str, directory.iterdir()),
        *os.listdir("/sys/class/net"),
    }
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("NURION_TEST") == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(f"{process.pid}")
    return found
