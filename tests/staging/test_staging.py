"""Staging that can be trusted: what arrives, what is refused, and what the plan says."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils import staging
from nurion_utils.staging.plans import RECORDS

ODD_NAMES = [
    "with spaces",
    "with\nnewline",
    "한국어 데이터.bin",
    "-rf",
    "*?[a]",
    "'\"$(x)",
    os.fsdecode(b"not-utf8-\xff"),
]


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def contents(folder: Path) -> dict:
    """Everything below a folder: bytes, modes and times of files, targets of links, modes of folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(RECORDS):
            continue
        state = path.lstat()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = stat.S_IMODE(state.st_mode)
        elif path.is_fifo():
            found[name] = "a pipe"
        else:
            found[name] = (path.read_bytes(), stat.S_IMODE(state.st_mode), state.st_mtime_ns)
    return found


@pytest.fixture
def source(tmp_path):
    """A small tree with everything that a data set may hold."""
    folder = tmp_path / "source"
    for i, name in enumerate(ODD_NAMES):
        write(folder / name, os.urandom(1000 * i))  # the first is empty
    write(folder / "deep/er/volume", os.urandom(3 << 20), mode=0o440)
    write(folder / "deep/exact", bytes(1 << 20))
    (folder / "empty folder").mkdir()
    (folder / "deep/link").symlink_to("er/volume")
    (folder / "deep/up").symlink_to("..")
    (folder / "deep/er").chmod(0o555)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_what_arrives_is_what_was_there(source, tmp_path, workers):
    report = staging.stage(source, tmp_path / "copy", workers=workers, verify=True)
    assert contents(tmp_path / "copy") == contents(source)
    assert (report.files, report.copied_files) == (9, 9)
    assert sorted(os.listdir(tmp_path / "copy" / RECORDS)) == ["lock", "manifest.jsonl"]


def test_a_second_run_copies_nothing_and_a_changed_file_is_copied_again(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    assert staging.stage(source, tmp_path / "copy").copied_files == 0
    write(source / "with spaces", b"changed")
    assert staging.stage(source, tmp_path / "copy").copied_files == 1
    assert contents(tmp_path / "copy") == contents(source)


def test_a_staged_folder_can_be_staged_on(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    staging.stage(tmp_path / "copy", tmp_path / "further")
    assert contents(tmp_path / "further") == contents(source)


def test_verify_finds_a_damaged_copy_and_mends_it(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    path = tmp_path / "copy/deep/exact"
    state = path.stat()
    path.write_bytes(b"\1" + bytes((1 << 20) - 1))  # as a bad disk would: size and time stay
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert staging.stage(source, tmp_path / "copy").copied_files == 0
    assert staging.stage(source, tmp_path / "copy", verify=True).mended_files == 1
    assert contents(tmp_path / "copy") == contents(source)


def test_purge_removes_what_was_staged_and_nothing_else(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    write(tmp_path / "copy/results.csv", b"mine")
    write(tmp_path / "copy/with spaces", b"changed by me")
    before = contents(source)
    (tmp_path / "copy").chmod(0o755)
    staging.purge(tmp_path / "copy")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o755
    left = {name for name, what in contents(tmp_path / "copy").items() if isinstance(what, tuple)}
    assert left == {"results.csv", "with spaces"}
    assert not (tmp_path / "copy/deep").exists()  # files, links and folders
    assert contents(source) == before


def test_purge_leaves_no_folder_where_nobody_else_put_anything(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    staging.purge(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_purge_never_leaves_the_destination_whatever_the_manifest_says(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    victim = tmp_path / "victim"
    write(victim, b"dear")
    state = victim.stat()
    with open(tmp_path / "copy" / RECORDS / "manifest.jsonl", "a") as manifest:
        manifest.write(json.dumps(["..", -2, 0, ""]) + "\n")
        for path in ("../victim", str(victim), "deep/up/../../victim"):
            manifest.write(json.dumps([path, state.st_size, state.st_mtime_ns, "0"]) + "\n")
    staging.purge(tmp_path / "copy")
    assert victim.read_bytes() == b"dear"


def link(target):
    return lambda source, tmp_path: (source / "bad").symlink_to(target)


REFUSED = {
    "the source does not exist": (lambda s, t: s.rename(t / "gone"), "does not exist; name the folder"),
    "the source is a file": (lambda s, t: (s.rename(t / "gone"), write(s, b"")), "is not a folder; name the folder"),
    "a link out of the source": (link("../outside"), "'bad' -> '../outside' leaves the source"),
    "an absolute link": (link("/etc/passwd"), "'bad' has the absolute target"),
    "a link in a circle": (link("bad"), "'bad' -> 'bad' goes in a circle"),
    "a link to nothing": (link("nothing"), "'bad' -> 'nothing' leads nowhere"),
    "a pipe": (lambda s, t: os.mkfifo(s / "bad"), "'bad' is a pipe, a socket or a device"),
    "a destination that is a file": (lambda s, t: write(t / "copy", b""), "is not a folder; choose another name"),
    "another's file": (lambda s, t: write(t / "copy/-rf", b"not ours"), "'-rf' was not staged from here; move it away"),
    "another's link": (
        lambda s, t: ((t / "copy/deep").mkdir(parents=True), (t / "copy/deep/up").symlink_to("/tmp")),
        "the link 'deep/up' was not staged from here",
    ),
    "a folder in a file's place": (lambda s, t: (t / "copy/-rf").mkdir(parents=True), "'-rf' is not a file"),
    "a file in a folder's place": (lambda s, t: write(t / "copy/deep", b""), "'deep' is not a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_in_one_sentence_and_touches_nothing(source, tmp_path, name):
    spoil, message = REFUSED[name]
    (tmp_path / "outside").write_bytes(b"")
    spoil(source, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(staging.StageError) as caught:
        staging.stage(source, tmp_path / "copy")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.failures == {}
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["source", "source/deep/new", "."])
def test_source_and_destination_must_lie_apart(source, tmp_path, place):
    before = contents(tmp_path)
    with pytest.raises(staging.StageError, match="choose"):
        staging.stage(source, tmp_path / place)
    (tmp_path / "alias").symlink_to(tmp_path / place)
    with pytest.raises(staging.StageError, match="choose"):
        staging.stage(source, tmp_path / "alias")
    (tmp_path / "alias").unlink()
    assert contents(tmp_path) == before


def test_a_copy_that_somebody_changed_is_not_overwritten(source, tmp_path):
    staging.stage(source, tmp_path / "copy")
    write(tmp_path / "copy/with spaces", b"results of a long run")
    with pytest.raises(staging.StageError, match="'with spaces' was changed after it had been staged; move it away"):
        staging.stage(source, tmp_path / "copy")
    assert (tmp_path / "copy/with spaces").read_bytes() == b"results of a long run"


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**9), max_size=200), st.integers(1, 50))
def test_every_file_has_one_reader_and_shares_differ_from_the_mean_by_less_than_the_largest_file(sizes, ranks):
    costs = [size + staging.plans.FILE_COST_BYTES for size in sizes]
    readers = list(staging.StagePlan.of_sizes(sizes, ranks).reader)
    assert len(readers) == len(sizes) and readers == sorted(readers)
    shares = [sum(cost for cost, reader in zip(costs, readers, strict=True) if reader == rank) for rank in range(ranks)]
    assert sum(shares) == sum(costs)
    for share in shares:
        assert abs(share - sum(costs) / ranks) <= max(costs, default=0) + 1e-6


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50), st.integers(1, 9))
def test_passing_on_reads_everything_once_and_brings_it_to_everyone(sizes, ranks):
    plan = staging.StagePlan.of_sizes(sizes, ranks, replicate=True)
    table = plan.table()
    assert table["reads_bytes"].sum() == sum(sizes)
    assert (table["writes_bytes"] == sum(sizes)).all()
    assert table["sends_bytes"].sum() == table["receives_bytes"].sum() == (ranks - 1) * sum(sizes)


def test_a_thousand_nodes_that_pass_on_need_the_source_once():
    everyone = staging.StagePlan.of_sizes([8_000_000] * 2048, 1024, replicate=True)
    seconds = everyone.time(source_gb_per_s=100, link_gb_per_s=10)
    assert seconds == pytest.approx(2046 * 8e6 / 10e9)  # all but what the neighbour has read, through one link
    naive = 1024 * everyone.bytes / 100e9
    assert naive / seconds > 100


def run(*arguments, **options):
    command = [sys.executable, "-P", "-m", "nurion_utils.staging", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_the_command_plans_stages_verifies_and_purges(source, tmp_path):
    copy = tmp_path / "copy"
    assert "9 files" in run(source, copy, "--dry-run").stdout and not copy.exists()
    done = run(source, copy, "--verify", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["copied_files"] == 9
    assert contents(copy) == contents(source)
    assert run("--purge", copy).stdout == "11 files removed\n"


def test_the_command_says_in_one_sentence_what_is_wrong(source, tmp_path):
    assert "choose one outside" in json.loads(run(source, source / "deep/new", "--json").stdout)["error"]
    refused = run(source, source / "deep/new")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "choose one outside" in refused.stderr
    assert run(source).returncode == 2
    assert run("--purge", tmp_path).returncode == 2


@pytest.mark.ranks
def test_two_ranks_of_mpiexec_share_the_work(source, tmp_path):
    mpiexec = [Path(sys.prefix) / "bin/mpiexec.gforker", "-n", "2"]
    command = [*mpiexec, sys.executable, "-P", "-m", "nurion_utils.staging", source, tmp_path / "copy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 copied") == 1
    assert contents(tmp_path / "copy") == contents(source)


def test_the_ranks_of_a_world_share_the_work(source, tmp_path, world2):
    report = staging.stage(source, tmp_path / "copy", world2, verify=True)
    assert report.copied_files == 9
    assert contents(tmp_path / "copy") == contents(source)


def test_every_rank_gets_everything_and_what_one_lacks_later_is_passed_on_again(source, tmp_path, world2):
    write(source / "long", os.urandom(20 << 20))  # longer than a block, so it goes round in parts
    for _ in range(2):
        staging.stage(source, tmp_path / "node{rank}", world2, replicate=True, verify=True)
        for rank in (0, 1):
            assert contents(tmp_path / f"node{rank}") == contents(source)
        (tmp_path / "node1/long").unlink()
        (tmp_path / "node0/deep/exact").unlink()


def test_ranks_of_one_node_do_not_write_to_the_same_place(source, tmp_path, world2):
    with pytest.raises(staging.StageError, match="put {rank} into the destination"):
        staging.stage(source, tmp_path / "node", world2, replicate=True)
    assert not (tmp_path / "node").exists()
