"""The live shared file system: what readers meet at it, against the simulator, and how it ends."""

import contextlib
import errno
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from nurion_utils.storage import Storage, Workload, simulate, summarise
from nurion_utils.storage.emulate import SharedStore, StoreClient, StoreError

PATIENCE_S = 20  # on a machine with much else to do
# 8 ms to serve 200 kB, of all four targets 100 MB/s; an open takes 2 ms
STORAGE = Storage(targets=4, target_mb_per_s=25, metadata_per_s=500, timeout_s=30)
FAST_OPENS = replace(STORAGE, metadata_per_s=10_000)
FILE_BYTES = 200_000


# -- the live store ---------------------------------------------------------------------------------------------------


def live(root: Path, storage: Storage, workload: Workload, repeats: int = 1) -> dict[str, float]:
    """The median of each figure of the summary over some runs."""
    with SharedStore(root, storage) as store:
        rows = [summarise(store.run(workload), workload) for _ in range(repeats)]
    assert list(root.iterdir()) == []
    return pd.DataFrame(rows).drop(columns="failed_at").median().to_dict()


def test_throughput_stays_at_the_ceiling_however_many_read(tmp_path):
    for readers in (4, 8, 16, 32):
        steps = 96 // readers
        workload = Workload(readers, steps, 4, FILE_BYTES, 0.0, prefetch=2, synchronous=False, placement="even")
        found = live(tmp_path, FAST_OPENS, workload)["throughput_gb_per_s"]
        assert found == pytest.approx(FAST_OPENS.bandwidth_gb_per_s, rel=0.1)


def test_the_hottest_target_sets_the_pace(tmp_path):
    workload = Workload(8, 4, 2, FILE_BYTES, 0.0, placement="one")
    found = live(tmp_path, FAST_OPENS, workload)["throughput_gb_per_s"]
    assert found == pytest.approx(FAST_OPENS.target_mb_per_s / 1e3, rel=0.1)


def test_many_small_files_are_held_up_by_their_opens(tmp_path):
    workload = Workload(8, 5, 10, 100, 0.0, synchronous=False, prefetch=1)
    assert live(tmp_path, STORAGE, workload)["epoch_s"] == pytest.approx(400 / STORAGE.metadata_per_s, rel=0.1)


AGREE = {
    "a barrier at each step": Workload(8, 5, 1, FILE_BYTES, 0.03),
    "no barrier": Workload(8, 6, 1, FILE_BYTES, 0.03, synchronous=False),
    "read ahead": Workload(8, 6, 2, FILE_BYTES, 0.04, prefetch=2),
    "read ahead, no barrier": Workload(12, 4, 2, FILE_BYTES, 0.02, prefetch=1, synchronous=False),
    "large files": Workload(4, 4, 1, 8 * FILE_BYTES, 0.02, placement="even"),
    "many readers": Workload(32, 3, 1, FILE_BYTES, 0.02),
}


@pytest.mark.parametrize("kind", AGREE)
@pytest.mark.parametrize("stripe_count", [1, 3])
def test_what_readers_meet_is_what_the_simulator_says(tmp_path, kind, stripe_count):
    storage, workload = replace(STORAGE, stripe_count=stripe_count, stripe_bytes=50_000), AGREE[kind]
    measured, simulated = live(tmp_path, storage, workload, repeats=3), summarise(simulate(storage, workload), workload)
    for name in ("epoch_s", "accelerator_utilisation"):
        assert measured[name] == pytest.approx(simulated[name], rel=0.15)


def test_a_clients_own_network_is_paced_too(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10**6))
    with SharedStore(tmp_path, replace(FAST_OPENS, target_mb_per_s=1000, client_mb_per_s=10)) as store:
        client = store.client()
        began = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(client.read, ["file"] * 3))
        assert 0.3 <= time.monotonic() - began < 0.45


def test_readers_on_ranks_share_the_store(tmp_path, world2):
    workload = Workload(6, 4, 1, FILE_BYTES, 0.03)
    with SharedStore(tmp_path, STORAGE) as store:
        table = store.run(workload, world2)
        (tmp_path / "file").write_bytes(b"from the store")
        client = store.client()
        assert world2.run(lambda: client.read("file")) == [b"from the store"] * 2
    assert set(table["reader"]) == set(range(6)) and table["end_s"].notna().all()
    expected = summarise(simulate(STORAGE, workload), workload)["epoch_s"]
    assert summarise(table, workload)["epoch_s"] == pytest.approx(expected, rel=0.25)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in "abcdefgh":
        (tmp_path / name).write_bytes(name.encode() * FILE_BYTES)
    return tmp_path


def test_what_is_read_is_what_the_file_holds(files):
    (files / "numbers").write_bytes(bytes(range(100)))
    (files / "empty").write_bytes(b"")
    with SharedStore(files, replace(STORAGE, stripe_count=3, stripe_bytes=7)) as store:
        client = pickle.loads(pickle.dumps(store.client()))
        assert client.read("numbers") == bytes(range(100))
        assert client.read(files / "numbers", offset=90, length=100) == bytes(range(90, 100))
        assert client.read("numbers", 5, 2) == b"\5\6" and client.read("numbers", 200) == b"" == client.read("empty")
        assert client.wait("a", "b") is None and client.path("a") == files / "a"
        log = store.log()
    assert log.loc[log["path"] == "numbers", "length_bytes"].sum() == 100 + 10 + 2
    assert (log["start_s"] >= log["queued_s"]).all() and (log["end_s"] > log["start_s"]).all()


def test_a_turn_that_comes_too_late_is_an_error_and_the_others_are_served(files):
    """A file takes 8 ms of its target: at 20 ms the turns at 0, 8 and 16 ms are in time, and five are not."""
    storage = replace(STORAGE, metadata_per_s=1e6, timeout_s=0.02)
    with SharedStore(files, storage) as store:
        store.place({name: 3 for name in "abcdefgh"})
        (files / "elsewhere").write_bytes(b"here")
        store.place({"elsewhere": 1})
        client, wait = store.client(), threading.Barrier(8)

        def read(name: str) -> object:
            client.read("elsewhere")  # so that each thread has its connection
            wait.wait()
            try:
                return len(client.read(name))
            except OSError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read, "abcdefgh"))
        errors = [each for each in found if isinstance(each, OSError)]
        assert 3 <= found.count(FILE_BYTES) <= 5 and len(errors) == 8 - found.count(
            FILE_BYTES
        )  # if they were not together
        for error in errors:
            assert error.errno == errno.EIO and "target 3 did not answer within 0.02 s" in str(error)
            assert Path(error.filename).parent == files
        assert client.read("elsewhere") == b"here" and client.read("a") == b"a" * FILE_BYTES
        log = store.log()
        log = log[log["target"] == 3]
        assert log["failed"].sum() == len(errors) and log.loc[log["failed"], "start_s"].isna().all()
        served = log[~log["failed"]]
        assert (served["start_s"].to_numpy()[1:] >= served["end_s"].to_numpy()[:-1]).all()  # one at a time
        assert (served["end_s"] - served["start_s"]).to_numpy() == pytest.approx(0.008)  # none of it for the dropped
        assert log["queue_length"].max() >= 5


def test_a_job_whose_read_times_out_ends_for_all_readers(tmp_path):
    storage, workload = replace(FAST_OPENS, timeout_s=0.1), Workload(12, 50, 2, FILE_BYTES, 0.01, placement="one")
    expected = simulate(storage, workload)
    with SharedStore(tmp_path, storage) as store:
        began = time.monotonic()
        table = store.run(workload)
        assert time.monotonic() - began < 2  # and not 50 steps
        again = store.run(replace(workload, readers=2, steps=2))
        assert again["end_s"].notna().all()
    assert summarise(table, workload)["failed_at"] == summarise(expected, workload)["failed_at"] == 0
    assert table.loc[table["failed"], "end_s"].max() == pytest.approx(0.1, rel=0.3)
    assert table["end_s"].notna().sum() == table["failed"].sum()


def test_a_path_that_leads_out_of_the_store_is_refused(files):
    (files / "inside").mkdir()
    (files / "inside" / "link").symlink_to("/etc/hostname")
    with SharedStore(files / "inside", STORAGE) as store:
        for path in ("../a", "/etc/hostname", "link", files / "a"):
            with pytest.raises(ValueError, match="leads out of the store; name a file below"):
                store.client().read(path)
        with pytest.raises(FileNotFoundError):
            store.client().read("nothing")


def test_a_forked_child_has_a_connection_of_its_own(files):
    with SharedStore(files, replace(STORAGE, target_mb_per_s=0.5)) as store:  # 0.4 s for a file
        store.place({"a": 0, "b": 1})
        client = store.client()
        client.read("a", length=1)
        child = os.fork()
        if child == 0:
            os._exit(0 if client.read("b") == b"b" * FILE_BYTES else 1)
        time.sleep(0.1)
        began = time.monotonic()
        assert client.read("a", length=1) == b"a"
        assert time.monotonic() - began < 0.2  # and not after the child's
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.read("a", length=1) == b"a"  # a child that ends leaves the store alone


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_get_no_answer(files):
    with SharedStore(files, STORAGE) as store:
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            with contextlib.suppress(ConnectionError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(PATIENCE_S)
                connection.connect(store._client._address)
                connection.sendall(b'{"log": true}\n')
                os._exit(len(connection.recv(1)))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_no_request_ends_its_connection_and_no_other(files):
    with SharedStore(files, STORAGE) as store, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(store._client._address)
        connection.sendall(b"hello\n")
        assert connection.recv(1) == b""
        assert store.client().read("a") == b"a" * FILE_BYTES


# -- endings ----------------------------------------------------------------------------------------------------------

OWNER = """
import os, sys, time
from nurion_utils.storage.emulate import SharedStore
from nurion_utils.storage import Storage, Workload
store = SharedStore(sys.argv[1], Storage(4, 25, 500))
{forked}
print(store._process.pid, flush=True)
store.run(Workload(2, 1000, 1, 200_000, 0.01))
"""
FORKED = """
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(100)
    os._exit(0)
"""


def sockets() -> int:
    return Path("/proc/net/unix").read_text().count("@nurion-store-")


def ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], PATIENCE_S)[0])


@pytest.mark.parametrize("forked", ["", FORKED], ids=["alone", "with a forked child that lives on"])
def test_when_its_owner_is_killed_nothing_is_left(tmp_path, forked):
    before = sockets()
    command = [sys.executable, "-c", OWNER.format(forked=forked), str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, *_ = sorted([int(owner.stdout.readline()) for _ in range(2 if forked else 1)], reverse=True)
    server = [
        p
        for p in Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
        if int(p) != child or not forked
    ]
    pidfd = os.pidfd_open(int(server[0]))
    deadline = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob(".shared-store-*/*/0/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.iterdir())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    try:
        assert ended(pidfd) and list(tmp_path.iterdir()) == []
        assert forked or sockets() == before
    finally:
        owner.stdout.close()
        os.close(pidfd)
        if forked:
            os.kill(child, signal.SIGKILL)


def test_a_killed_server_is_an_error_for_those_who_wait_and_leaves_nothing(files):
    before = sockets()
    with SharedStore(files, replace(STORAGE, target_mb_per_s=0.01)) as store:  # 20 s for a file
        threading.Timer(0.3, store._process.kill).start()
        client, began = store.client(), time.monotonic()
        with pytest.raises(StoreError, match="the shared store has ended; open a new one with SharedStore"):
            client.read("a")
        with pytest.raises(StoreError, match="has ended"):
            client.read("a")
        assert time.monotonic() - began < 10
    assert sockets() == before and sorted(path.name for path in files.iterdir()) == list("abcdefgh")


def test_a_run_whose_server_is_killed_ends(tmp_path):
    with SharedStore(tmp_path, STORAGE) as store:
        threading.Timer(0.5, store._process.kill).start()
        with pytest.raises(StoreError, match="has ended"):
            store.run(Workload(6, 1000, 1, FILE_BYTES, 0.01, prefetch=2))
    assert list(tmp_path.iterdir()) == []


def test_a_client_killed_while_it_waits_is_no_harm_to_others(files):
    with SharedStore(files, replace(STORAGE, target_mb_per_s=0.5)) as store:  # 0.4 s for a file
        store.place({"a": 0, "b": 1})
        client = store.client()
        child = os.fork()
        if child == 0:
            client.read("a")
            os._exit(0)
        deadline = time.monotonic() + PATIENCE_S
        while len(store.log()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert client.read("b", length=10) == b"b" * 10 and client.read("a", length=10) == b"a" * 10


def test_a_closed_store_says_so(files):
    store = SharedStore(files, STORAGE)
    client = store.client()
    client.read("a")
    assert "running" in repr(store)
    store.close()
    store.close()
    assert "closed" in repr(store)
    with pytest.raises(StoreError, match="has ended"):
        client.read("a")


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_sentence(files):
    with SharedStore(files, STORAGE) as store:
        client: StoreClient = store.client()
        for attempt, sentence in [
            (lambda: SharedStore("/etc/hostname", STORAGE), "'/etc/hostname' is no directory"),
            (lambda: SharedStore("/tmp", "lustre"), "storage must be a Storage"),
            (lambda: store.place({"a": 4}), "the targets are 0 to 3, and 'a' was placed on 4"),
            (lambda: client.read("a", offset=-1), "offset must be a whole number from 0 up, not -1"),
            (lambda: client.read("a", length=1.5), "length must be a whole number from 0 up, not 1.5"),
            (lambda: store.run("epoch"), "workload must be a Workload"),
            (lambda: store.run(Workload(1000, 200, 1, 1, 0)), "can have 100,000 files.*200,000; simulate it"),
        ]:
            with pytest.raises(ValueError, match=sentence):
                attempt()
