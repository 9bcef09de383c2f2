"""Staging when something goes wrong: killed, out of room, and a source that is not what it was."""

import contextlib
import os
import pickle
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nurion_utils import ranks, staging
from nurion_utils.staging import copying
from nurion_utils.staging.plans import RECORDS, TEMPORARY, scan

KILLS = int(os.environ.get("KILLS", 20))
STAGE = "import sys; from nurion_utils.staging import stage; print(stage(*sys.argv[1:3], workers=2))"


def start(source, destination) -> subprocess.Popen:
    command = [sys.executable, "-P", "-c", STAGE, str(source), str(destination)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def visible(folder: Path) -> dict[str, Path]:
    """The files that a reader of a destination would find."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {n: p for n, p in found.items() if not n.startswith(RECORDS) and not TEMPORARY.search(n)}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if TEMPORARY.fullmatch(path.name)]


@pytest.mark.slow
def test_killed_at_random_moments_no_file_is_ever_wrong_and_the_next_run_goes_on(tmp_path):
    rng, source = random.Random(4), tmp_path / "source"
    for i in range(240):  # enough for several batches, and long files that a kill meets half-way
        path = source / f"{i % 7}" / f"{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(2_500_000 if i % 40 == 0 else rng.choice([0, 1, 20_000])))
    truth = {name: path.read_bytes() for name, path in visible(source).items()}
    durations, destination, went_on = [], tmp_path / "copy0", 0
    for _ in range(3):
        began = time.perf_counter()
        assert start(source, destination).wait() == 0
        durations.append(time.perf_counter() - began)
        staging.purge(destination)
    kills = runs = 0
    # A busy machine lets few kills meet a copy half-way; then there are more of them.
    while kills < KILLS or (went_on <= KILLS / 10 and kills < 5 * KILLS):
        runs += 1
        process = start(source, destination)
        if kills % 2:  # while files appear, however long a busy machine takes to get there
            enough = rng.randrange(1, len(truth))
            while process.poll() is None and not (destination.exists() and len(visible(destination)) >= enough):
                time.sleep(0.001)
        else:
            time.sleep(rng.uniform(0, 1.1) * statistics.median(durations))
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
            run = psutil.Process(process.pid)
            copiers = run.children()
            victim = rng.choice(copiers) if copiers and rng.random() < 0.5 else run
            victim.kill()
            kills += 1
            process.wait(30)
            assert not psutil.wait_procs(copiers, timeout=30)[1], "copiers outlived the run"
        process.wait(30)
        for name, path in visible(destination).items() if destination.exists() else ():
            assert path.read_bytes() == truth[name]
        went_on += 0 < len(visible(destination)) < len(truth) if destination.exists() else 0
        if rng.random() < 0.2 or process.returncode == 0:  # otherwise the next run goes on where this one was killed
            report = staging.stage(source, destination, workers=0, verify=True)
            assert report.files == len(truth)
            assert {name: path.read_bytes() for name, path in visible(destination).items()} == truth
            assert not leftovers(destination)
            destination = tmp_path / f"copy{runs}"
    assert went_on > KILLS / 10, "the kills came too early or too late to show anything"
    assert {name: path.read_bytes() for name, path in visible(source).items()} == truth


@pytest.mark.slow
def test_a_second_run_copies_only_what_a_killed_one_did_not(tmp_path):
    for i in range(300):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{i:03}").write_bytes(os.urandom(300_000))
    process = start(tmp_path / "source", tmp_path / "copy")
    while len(visible(tmp_path / "copy") if (tmp_path / "copy").exists() else ()) < 100:
        assert process.poll() is None
    process.kill()
    process.wait()
    time.sleep(0.2)  # the copiers end a moment after it
    there = len(visible(tmp_path / "copy"))
    assert staging.stage(tmp_path / "source", tmp_path / "copy").copied_files == 300 - there


@pytest.mark.slow
def test_an_interrupted_run_ends_at_once_without_a_traceback_and_the_next_one_goes_on(tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(2000):
        (tmp_path / "source" / f"{i:04}").write_bytes(os.urandom(100_000))
    command = [sys.executable, "-P", "-m", "nurion_utils.staging", tmp_path / "source", tmp_path / "copy"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(visible(tmp_path / "copy") if (tmp_path / "copy").exists() else ()) < 100:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "interrupted; a further run goes on from here\n")
    there = len(visible(tmp_path / "copy"))
    assert process.returncode == 130 and there < 2000
    assert staging.stage(tmp_path / "source", tmp_path / "copy").copied_files == 2000 - there
    assert not leftovers(tmp_path / "copy")


@pytest.mark.ranks
def test_a_lost_rank_is_reported_with_the_files_that_are_missing(tmp_path):
    for i in range(40):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{i:02}").write_bytes(os.urandom(100_000))
    with ranks.start(2) as world:
        pids = world.run(os.getpid)
        os.kill(pids[1], signal.SIGSTOP)  # so that it cannot have finished
        timer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -KILL {pids[1]}"])
        with pytest.raises(staging.StageError, match="rank 1") as caught:
            staging.stage(tmp_path / "source", tmp_path / "copy", world)
        timer.wait()
        missing = set(visible(tmp_path / "source")) - set(visible(tmp_path / "copy"))
        assert set(caught.value.failures) == missing != set()
        assert staging.stage(tmp_path / "source", tmp_path / "copy", world.restart()).files == 40
    for name, path in visible(tmp_path / "source").items():
        assert path.read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_a_copier_whose_run_ended_before_it_had_begun_copies_nothing(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(b"data")
    (tmp_path / "copy" / RECORDS).mkdir(parents=True)
    share = (str(tmp_path / "source"), str(tmp_path / "copy"), scan(str(tmp_path / "source")).files)
    job = pickle.dumps((copying.copy_share, share))
    command = [sys.executable, "-P", "-m", "nurion_utils.staging.worker"]
    ended = subprocess.Popen(["true"])
    ended.wait()
    for parent, copied in ((ended.pid, False), (os.getpid(), True)):
        subprocess.run([*command, str(parent)], input=job, stdout=subprocess.DEVNULL, check=True)
        assert (tmp_path / "copy/file").exists() == copied


def test_two_runs_to_one_destination_do_not_mix(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(b"data")
    (tmp_path / "copy" / RECORDS).mkdir(parents=True)
    with copying.lock(str(tmp_path / "copy"), first=False):  # as a copier of a run that is at work holds it
        with pytest.raises(staging.StageError, match="another staging.*is at work"):
            staging.stage(tmp_path / "source", tmp_path / "copy")
    assert staging.stage(tmp_path / "source", tmp_path / "copy").copied_files == 1


# -- a source that is not what it was ---------------------------------------------------------------------------------


def append(path):
    with open(path, "ab") as file:
        file.write(b"more")


def rewrite(path):
    with open(path, "r+b") as file:
        file.write(b"other")


CHANGES = {
    "changed while it was copied": [append, rewrite],
    "truncated while it was copied": [lambda path: os.truncate(path, 2_000_000)],
}


@pytest.mark.parametrize(("why", "change"), [(why, change) for why, changes in CHANGES.items() for change in changes])
def test_a_file_that_changes_during_the_copy_is_named_and_all_others_are_in_place(tmp_path, why, change):
    source, destination = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    for name in "abc":
        (source / name).write_bytes(os.urandom(3 << 20))
    files = scan(str(source)).files
    (destination / RECORDS).mkdir(parents=True)
    changed = []

    def tell(done):
        if not changed and len(told) == 4:  # a is done, in three parts, and b is being copied
            change(source / "b")
            changed.append(True)
        told.append(done)

    told: list[int] = []
    failures = copying.copy_share(str(source), str(destination), files, tell)
    assert changed and list(failures) == ["b"] and failures["b"].startswith(why)
    assert sorted(visible(destination)) == ["a", "c"] and not leftovers(destination)
    assert staging.stage(source, destination).copied_files == 1
    for name in "abc":
        assert (source / name).read_bytes() == (destination / name).read_bytes()


def test_a_file_that_cannot_be_read_any_more_is_named_and_all_others_are_in_place(tmp_path):
    (tmp_path / "source").mkdir()
    for name in "abc":
        (tmp_path / "source" / name).write_bytes(b"data")
    files = scan(str(tmp_path / "source")).files
    (tmp_path / "source/b").unlink()
    (tmp_path / "source/b").mkdir()  # it opens, and reading it is an error
    (tmp_path / "copy" / RECORDS).mkdir(parents=True)
    failures = copying.copy_share(str(tmp_path / "source"), str(tmp_path / "copy"), files)
    assert failures == {"b": os.strerror(21)}  # EISDIR
    assert sorted(visible(tmp_path / "copy")) == ["a", "c"] and not leftovers(tmp_path / "copy")


def without_rights(*command, **options):
    """Run as a user whom permissions bind, root too."""
    prefix = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.getuid() == 0 else []
    return subprocess.run([*prefix, *map(str, command)], capture_output=True, text=True, timeout=60, **options)


def test_an_unreadable_file_is_refused_before_anything_is_copied(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/open").write_bytes(b"data")
    (tmp_path / "source/secret").write_bytes(b"data")
    (tmp_path / "source/secret").chmod(0)
    command = [sys.executable, "-P", "-m", "nurion_utils.staging", tmp_path / "source", tmp_path / "copy"]
    done = without_rights(*command)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "'secret' cannot be read: Permission denied\n")
    assert not (tmp_path / "copy").exists()


# -- a destination that is too small ----------------------------------------------------------------------------------


def on_small_disk(tmp_path: Path, options: str, script: str) -> None:
    """Run a Python script with a small tmpfs of its own at ``disk``; fails as the script does."""
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs "$1/disk" && cd "$1" && exec "$2" -P -c "$3"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a file system of his own")
    assert done.returncode == 0, done.stderr


PRELUDE = """
import os, pathlib, subprocess
from nurion_utils import staging
from nurion_utils.staging import preflight, stager
def refused():
    try:
        staging.stage("source", "disk/copy", workers=2)
    except staging.StageError as error:
        return error
"""


def test_too_little_room_is_refused_before_anything_is_copied(tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(4):
        (tmp_path / "source" / f"{i}").write_bytes(bytes(1_000_000))
    script = PRELUDE + "error = refused(); assert '2.1 MB free, and 4.02 MB are needed' in str(error), error\n"
    script += "assert error.failures == {} and os.listdir('disk') == []"
    on_small_disk(tmp_path, "size=2m", script)


def test_too_few_inodes_are_refused_before_anything_is_copied(tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"{i}").touch()
    script = PRELUDE + "error = refused(); assert 'room for 29 more files, and 49 are needed' in str(error), error\n"
    script += "assert error.failures == {} and os.listdir('disk') == []"
    on_small_disk(tmp_path, "nr_inodes=30", script)


def test_a_disk_that_fills_up_leaves_whole_files_and_names_the_others(tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"{i:02}").write_bytes(os.urandom(200_000))
    script = (
        PRELUDE
        + """
preflight._require_room = lambda *_: None  # others fill the disk after the look at it
error = refused()
there = [path for path in pathlib.Path('disk/copy').iterdir() if path.is_file()]
assert 0 < len(there) < 40, there
for path in there:
    assert path.read_bytes() == pathlib.Path('source', path.name).read_bytes()
assert set(error.failures) == {f'{i:02}' for i in range(40)} - {path.name for path in there}
assert 'No space left on device' in str(error), error
subprocess.run(['mount', '-o', 'remount,size=20m', 'disk'], check=True)
assert staging.stage('source', 'disk/copy').copied_files == 40 - len(there)
assert not subprocess.run(['diff', '-r', '-x', '.nurion-stage', 'source', 'disk/copy']).returncode
"""
    )
    on_small_disk(tmp_path, "size=4m", script)


# -- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thirty_thousand_empty_files_arrive(tmp_path):
    for i in range(30_000):
        if i % 1000 == 0:
            (folder := tmp_path / "source" / f"{i // 1000}").mkdir(parents=True)
        os.close(os.open(folder / f"{i}", os.O_CREAT | os.O_WRONLY))
    assert staging.stage(tmp_path / "source", tmp_path / "copy").copied_files == 30_000
    assert len(visible(tmp_path / "copy")) == 30_000
    assert staging.stage(tmp_path / "source", tmp_path / "copy").copied_files == 0


@pytest.mark.slow
def test_a_long_file_is_copied_and_verified_in_little_memory(tmp_path):
    (tmp_path / "source").mkdir()
    with open(tmp_path / "source/long", "wb") as file:
        file.truncate(300 << 20)
    script = STAGE.replace("workers=2", "workers=2, verify=True") + "; print(open('/proc/self/status').read())"
    command = [sys.executable, "-P", "-c", script, tmp_path / "source", tmp_path / "copy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 64 * 1024  # KiB: Python and a few buffers
    assert not subprocess.run(["cmp", tmp_path / "source/long", tmp_path / "copy/long"]).returncode


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system to write to")
def test_the_destination_may_be_another_file_system(tmp_path):
    import tempfile

    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(os.urandom(2 << 20))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert os.stat(folder).st_dev != tmp_path.stat().st_dev
        staging.stage(tmp_path / "source", Path(folder) / "copy", verify=True)
        assert (Path(folder) / "copy/file").read_bytes() == (tmp_path / "source/file").read_bytes()
