"""File systems that keep less than they are asked to, people who may do less than root, and files that come and go."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nurion_utils import staging
from nurion_utils.staging import StageError
from nurion_utils.staging.plans import RECORDS

# An ordinary user's rights, for root too
AS_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]
SLOW = pytest.mark.slow
PART = ".nurion-part-0123456789ab-1"

# Times are kept in granules of GRANULE_NS; what is named FAULTY fails with the error of that number.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
static void cut(const struct timespec *in, struct timespec *out) {
  long long granule = atoll(getenv("GRANULE_NS"));
  for (int i = 0; i < 2; i++) {
    out[i] = in[i];
    if (in[i].tv_nsec == UTIME_NOW || in[i].tv_nsec == UTIME_OMIT) continue;
    long long ns = in[i].tv_sec * 1000000000LL + in[i].tv_nsec;
    ns -= ns % granule;
    out[i].tv_sec = ns / 1000000000LL; out[i].tv_nsec = ns % 1000000000LL;
  }
}
int futimens(int fd, const struct timespec t[2]) {
  int (*next)(int, const struct timespec *) = dlsym(RTLD_NEXT, "futimens"); struct timespec u[2];
  if (!t) return next(fd, t);
  cut(t, u); return next(fd, u);
}
int utimensat(int d, const char *p, const struct timespec t[2], int flags) {
  int (*next)(int, const char *, const struct timespec *, int) = dlsym(RTLD_NEXT, "utimensat"); struct timespec u[2];
  if (!t) return next(d, p, t, flags);
  cut(t, u); return next(d, p, u, flags);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (source / name).write_bytes(os.urandom(1000))
        os.utime(source / name, ns=(1_700_000_001_234_567_891,) * 2)
    return source


def run(*arguments: object, before: list[str] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*(before or []), sys.executable, "-P", "-m", "nurion_utils.staging", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


@pytest.mark.parametrize(
    "granule_ns", [10**9, *(pytest.param(n, marks=SLOW) for n in (1, 100, 1000, 10**6, 2 * 10**9))]
)
def test_a_file_system_may_keep_times_less_finely_than_the_source(shim: Path, source: Path, granule_ns: int) -> None:
    copy, env = source.with_name("copy"), {"LD_PRELOAD": str(shim), "GRANULE_NS": str(granule_ns)}
    assert "2 copied" in run(source, copy, **env).stdout
    assert os.stat(copy / "a").st_mtime_ns % granule_ns == 0
    for again in ([], ["--verify"]):
        ended = run(source, copy, *again, **env)
        assert ended.returncode == 0 and "0 copied" in ended.stdout, ended.stderr
    os.utime(source / "a")  # a change of the source is still seen
    assert "1 copied" in run(source, copy, **env).stdout
    assert "2 files removed" in run("--purge", copy).stdout and not copy.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another group")
def test_special_bits_of_files_and_folders_are_copied_and_those_of_an_existing_folder_stay(source: Path) -> None:
    copy = source.with_name("copy")
    copy.mkdir()
    os.chown(copy, 0, 12345)
    os.chmod(copy, 0o3775)
    os.chmod(source / "sub", 0o2775)
    os.chmod(source / "a", 0o2755)
    staging.stage(source, copy)
    modes = [stat.S_IMODE(os.stat(copy / path).st_mode) for path in ("", "sub", "a")]
    assert modes == [0o3000 | stat.S_IMODE(os.stat(source).st_mode), 0o2775, 0o2755]
    assert os.stat(copy / "sub" / "b").st_gid == 12345


@pytest.mark.parametrize("mode", [pytest.param(0o755, marks=SLOW), 0o555])
def test_a_read_only_source_is_staged_again_verified_and_purged_by_an_ordinary_user(source: Path, mode: int) -> None:
    copy = source.with_name("copy")
    for folder in (source / "sub", source):
        os.chmod(folder, mode & 0o555 if folder != source else mode)
    try:
        for arguments in ([source, copy], [source, copy], [source, copy, "--verify"], ["--purge", copy]):
            ended = run(*arguments, before=AS_USER)
            assert ended.returncode == 0, ended.stderr
            if "--purge" not in arguments:
                assert stat.S_IMODE(os.stat(copy).st_mode) == mode
        assert not copy.exists()
    finally:
        for folder in (source, source / "sub"):
            os.chmod(folder, 0o755)


def test_a_purge_leaves_others_files_in_a_read_only_folder_and_its_mode_as_it_was(source: Path) -> None:
    copy = source.with_name("copy")
    os.chmod(source / "sub", 0o555)
    staging.stage(source, copy)
    os.chmod(copy / "sub", 0o755)
    (copy / "sub" / "mine").write_text("mine")
    os.chmod(copy / "sub", 0o555)
    assert "2 files removed" in run("--purge", copy, before=AS_USER).stdout
    assert [path.name for path in copy.rglob("*") if path.is_file()] == ["mine"]
    assert stat.S_IMODE(os.stat(copy / "sub").st_mode) == 0o555
    os.chmod(copy / "sub", 0o755)
    os.chmod(source / "sub", 0o755)


@pytest.mark.parametrize("folder", ["", "sub", "sub/deep"])
def test_what_another_staging_left_in_the_source_at_any_depth_is_not_data(source: Path, folder: str) -> None:
    there, copy = source / folder, source.with_name("copy")
    (there / RECORDS).mkdir(parents=True)
    (there / RECORDS / "manifest.jsonl").write_text("")
    (there / PART).write_bytes(b"half of a file")
    (there / ".nurion-part-notes").write_text("a reader's own")
    first, *others = [staging.stage(source, copy) for _ in range(3)]
    assert first.files == 3 and [other.copied_files for other in others] == [0, 0]
    assert not (copy / folder / PART).exists() and (copy / folder / ".nurion-part-notes").exists()
    assert folder == "" or not (copy / folder / RECORDS).exists()
    assert staging.purge(copy) == 3 and not copy.exists()


@pytest.fixture
def churn(source: Path) -> Iterator[None]:
    """Files, folders and links that come and go in the source."""
    script = """
import os, sys
os.chdir(sys.argv[1])
while True:
    for i in range(100): open(f"tmp{i}", "w").close(); os.mkdir(f"dir{i}"); os.symlink("a", f"link{i}")
    for i in range(100): os.unlink(f"tmp{i}"); os.rmdir(f"dir{i}"); os.unlink(f"link{i}")
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(source)])
    yield
    process.kill()
    process.wait()


@SLOW
@pytest.mark.usefixtures("churn")
def test_files_that_come_and_go_while_the_source_is_looked_at_do_no_harm(source: Path) -> None:
    for i in range(300):
        (source / f"keep{i}").write_bytes(b"x")
    for _ in range(30):
        plan = staging.plan(source, source.with_name("copy"))
        assert len([file for file in plan.files if file.path.startswith("keep")]) == 300


LOCKED = {
    "a folder that cannot be entered": lambda source, copy: os.chmod(source / "sub", 0o444),
    "a folder that cannot be listed": lambda source, copy: os.chmod(source / "sub", 0o333),
    "a file that cannot be read": lambda source, copy: os.chmod(source / "a", 0o200),
    "a destination in which nothing can be made": lambda source, copy: (
        (copy.mkdir(), os.chmod(copy, 0o500)) and os.chown(copy, 65534, -1)
    ),
    "records that cannot be read": lambda source, copy: (staging.stage(source, copy), os.chmod(copy / RECORDS, 0)),
    "a manifest that cannot be read": lambda source, copy: (
        staging.stage(source, copy),
        os.chmod(copy / RECORDS / "manifest.jsonl", 0),
    ),
    "a lock that cannot be opened": lambda source, copy: (
        staging.stage(source, copy),
        os.chmod(copy / RECORDS / "lock", 0),
    ),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file somebody else's")
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", LOCKED)
def test_what_may_not_be_touched_is_named_in_one_sentence_and_nobody_hangs(source, fault: str, ranks: int) -> None:
    copy = source.with_name("copy")
    LOCKED[fault](source, copy)
    mpiexec = [os.path.join(sys.prefix, "bin", "mpiexec"), "-n", "2"] if ranks == 2 else []
    try:
        ended = run(source, copy, before=[*AS_USER, *mpiexec])
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
        (sentence,) = [line for line in ended.stderr.splitlines() if line.strip() and not line.startswith(("=", "PID"))]
        assert "cannot be" in sentence and ("source" in sentence or "copy" in sentence or "'" in sentence)
    finally:
        for path in (source / "sub", source / "a", copy, copy / RECORDS):
            if path.exists():
                os.chmod(path, 0o755)


def test_a_purge_of_records_that_are_somebody_elses_is_refused_in_one_sentence(source: Path) -> None:
    copy = source.with_name("copy")
    staging.stage(source, copy)
    os.chmod(copy / RECORDS, 0o500)
    (copy / RECORDS / "lock").chmod(0o444)
    ended = run("--purge", copy, before=AS_USER)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "Permission denied" in ended.stderr
    os.chmod(copy / RECORDS, 0o755)


@pytest.mark.parametrize("name", ["x" * 255, "\udcff\udcfe", "a\nb", "'\""])
def test_odd_and_long_names_are_staged_and_purged(source: Path, name: str) -> None:
    (source / name).write_text("odd")
    copy = source.with_name("copy")
    assert staging.stage(source, copy).files == 3 and (copy / name).read_text() == "odd"
    assert staging.stage(source, copy, verify=True).copied_files == 0
    assert staging.purge(copy) == 3 and not copy.exists()


def test_a_path_that_is_too_long_for_the_destination_is_named(source: Path) -> None:
    deep = source
    for _ in range(10):
        deep = deep / ("d" * 200)
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    far = source.with_name("c")
    while len(str(far)) < 2300:
        far = far / ("e" * 200)
    with pytest.raises(StageError, match="cannot be made|too long"):
        staging.stage(source, far)


DAMAGED = ["[1, 2]", "5", '["a", 1000]', "null", '{"a": 1}', "[", '["a", 1, 2, "x", 3, 4]']
DAMAGED += ['[["a"], 1000, 2, "x", 3]', '[5, 1000, 2, "x", 3]', '["a", 1000, null, "x", null]']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_a_manifest_is_no_record(source: Path, line: str) -> None:
    copy = source.with_name("copy")
    staging.stage(source, copy)
    with open(copy / RECORDS / "manifest.jsonl", "a") as manifest:
        manifest.write(f"{line}\n")
    assert staging.stage(source, copy).copied_files == 0
    assert staging.purge(copy) == 2 and not copy.exists()


def test_nor_does_it_disturb_a_staging_in_which_a_file_fails(source: Path) -> None:
    copy = source.with_name("copy")
    staging.stage(source, copy)
    with open(copy / RECORDS / "manifest.jsonl", "a") as manifest:
        manifest.write("5\n[]\n{}\n")
    (source / "new").write_bytes(b"n" * 2_000_000)
    os.utime(source / "new", ns=(0, 0))
    command = [sys.executable, "-P", "-c", FAILS, str(source), str(copy)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "StageError: 1 file could not be staged" in ended.stderr and "Traceback" in ended.stderr
    assert staging.stage(source, copy).copied_files == 1


def test_a_changed_file_that_fails_stays_as_it_was_and_is_copied_by_the_next_run(source: Path) -> None:
    copy = source.with_name("copy")
    (source / "new").write_bytes(b"old")
    staging.stage(source, copy)
    (source / "new").write_bytes(b"n" * 2_000_000)
    os.utime(source / "new", ns=(0, 0))
    assert subprocess.run([sys.executable, "-P", "-c", FAILS, str(source), str(copy)], timeout=120).returncode == 1
    assert (copy / "new").read_bytes() == b"old"
    assert staging.stage(source, copy).copied_files == 1
    assert (copy / "new").read_bytes() == (source / "new").read_bytes()


def test_a_damaged_copy_that_cannot_be_mended_is_removed_and_copied_by_the_next_run(source: Path) -> None:
    copy = source.with_name("copy")
    staging.stage(source, copy)
    state = (copy / "a").stat()
    (copy / "a").write_bytes(os.urandom(1000))
    os.utime(copy / "a", ns=(state.st_atime_ns, state.st_mtime_ns))
    command = [sys.executable, "-P", "-c", VANISHES, str(source), str(copy)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "'a': No such file or directory" in ended.stderr and not (copy / "a").exists()
    (source / "b").rename(source / "a")
    assert staging.stage(source, copy).copied_files == 1
    assert (copy / "a").read_bytes() == (source / "a").read_bytes()


# The file grows shorter between the plan and the copy.
FAILS = """
import os, sys
from nurion_utils import staging
from nurion_utils.staging import session, stager
begin = stager.begin
def cut(job):
    os.truncate(os.path.join(job.plan.source, "new"), 1_999_999)
    return begin(job)
stager.begin = cut
staging.stage(*sys.argv[1:])
"""

# A file goes away before the copies are verified.
VANISHES = """
import os, sys
from nurion_utils.staging import stage, stager
on_record = stager.on_record
def vanish(plan):
    os.rename(os.path.join(plan.source, "a"), os.path.join(plan.source, "b"))
    return on_record(plan)
stager.on_record = vanish
stage(*sys.argv[1:], verify=True)
"""
