"""Paths that must not be deleted, and an IME's commands.

/scratch_ime is played by a directory through which deleting really deletes the original, and ime-ctl by the strict
stand-in beside this file.
"""

import os
import subprocess

import pytest

from nurion_utils import sites, staging
from nurion_utils.jobs import BurstBufferError, Ime, guard

ODD_NAMES = ["with space", "-p", "quote'\"", "new\nline", "*", "$HOME", "ünï", os.fsdecode(b"\xff")]


def held(*files):
    """Dirty and clean bytes of each file, as the buffer's own command tells them."""
    words = subprocess.run(["ime-ctl", "-s", *files], check=True, capture_output=True, text=True).stdout.split()
    sizes = [int(words[i + 1]) for i, word in enumerate(words) if word in ("Dirty:", "Clean:")]
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def test_the_trap_is_real_a_file_deleted_in_the_buffer_is_gone_from_scratch(machine):
    original = machine.write(machine.scratch / "me/volume")
    subprocess.run(["rm", machine.buffer / "me/volume"], check=True)
    assert not original.exists()


def test_staging_into_the_buffer_by_copying_is_refused_before_anything_changes(machine):
    original = machine.write(machine.scratch / "me/data/volume")
    machine.write(machine.tmp / "source/volume", "other")
    with pytest.raises(staging.StageError, match="a change to its original"):
        staging.stage(machine.tmp / "source", machine.buffer / "me/data")
    assert original.read_text() == "data" and os.listdir(original.parent) == ["volume"]


@pytest.mark.parametrize(
    "spelling",
    [
        "scratch_ime",
        "scratch_ime/me/volume",
        "scratch_ime/somebody/volume",  # another user's files are originals too
        "scratch/me/../../scratch_ime/me/volume",
        "link/volume",
        "link to link/volume",
        "scratch/to me/../../scratch_ime/x",
        "deep/link/../me/volume",  # the kernel follows the link first
    ],
)
def test_a_path_that_leads_into_the_buffer_is_refused_however_it_is_spelt(machine, spelling):
    machine.write(machine.scratch / "me/volume")
    (machine.tmp / "deep").mkdir()
    (machine.tmp / "link").symlink_to(machine.buffer / "me")
    (machine.tmp / "link to link").symlink_to("link")
    (machine.scratch / "to me").symlink_to(machine.scratch / "me")
    (machine.tmp / "deep" / "link").symlink_to(machine.buffer / "me")
    for path in (machine.tmp / spelling, str(machine.tmp / spelling), os.fsencode(machine.tmp / spelling)):
        with pytest.raises(BurstBufferError, match=r"Ime\('played'\)\.purge"):
            guard(path)


def test_a_path_relative_to_here_is_looked_at_from_here(machine, monkeypatch):
    (machine.tmp / "here").mkdir()
    monkeypatch.chdir(machine.tmp / "here")
    with pytest.raises(BurstBufferError):
        guard("../scratch_ime/me")
    guard("scratch_ime/me")


@pytest.mark.parametrize(
    "path", ["scratch/me/volume", "scratch_image/x", "scratch_ime/../elsewhere", "loop/x", "", "/"]
)
def test_paths_elsewhere_are_let_through(machine, path):
    (machine.tmp / "loop").symlink_to("loop")
    guard(machine.tmp / path if path != "/" else path)


def test_a_directory_that_was_removed_meanwhile_is_no_reason_to_refuse_a_path(machine, monkeypatch):
    (machine.tmp / "here").mkdir()
    monkeypatch.chdir(machine.tmp / "here")
    (machine.tmp / "here").rmdir()
    guard(machine.tmp / "elsewhere")
    with pytest.raises(BurstBufferError):
        guard(machine.buffer / "me")


def test_every_site_with_an_ime_is_guarded():
    with pytest.raises(BurstBufferError, match="of 'nurion', .* in /scratch:"):
        guard("/scratch_ime/anybody/data")
    guard("/scratch/anybody/data")


def test_a_file_of_scratch_has_its_place_in_the_buffer(machine):
    ime = machine.ime
    assert ime.path_in_buffer(machine.scratch / "me/x") == f"{machine.buffer}/me/x"
    assert ime.path_in_buffer(machine.buffer / "me/x") == f"{machine.buffer}/me/x"
    assert ime.path_in_buffer(f"{machine.scratch}/me/../you") == f"{machine.buffer}/you"
    for path in ("/home/me/x", machine.scratch / "me/../../x", f"{machine.scratch}2/x"):
        with pytest.raises(BurstBufferError, match="not in the burst buffer's reach: name one below"):
            ime.path_in_buffer(path)


def test_files_come_into_the_buffer_are_written_back_and_leave_it_and_the_originals_stay(machine):
    data = [machine.write(machine.scratch / "me/data" / str(i), "x" * i) for i in (3, 4)]
    ime, buffered = machine.ime, [machine.buffer / "me/data" / str(i) for i in (3, 4)]
    assert held(*buffered) == [(0, 0), (0, 0)]
    ime.stage_in([machine.scratch / "me/data"])
    assert held(*buffered) == [(0, 3), (0, 4)]
    machine.write(data[0], "changed")
    assert held(*buffered) == [(7, 0), (0, 4)]
    ime.sync_out(data)
    assert held(*buffered) == [(0, 7), (0, 4)]
    machine.write(data[1], "changed as well")
    ime.purge(data)
    assert held(*buffered) == [(0, 0), (0, 0)]
    assert [file.read_text() for file in data] == ["changed", "changed as well"]


def test_odd_names_are_names_and_nothing_else(machine):
    for name in ODD_NAMES:
        machine.write(machine.scratch / "me" / name)
    machine.ime.stage_in([machine.scratch / "me" / name for name in ODD_NAMES])
    assert machine.calls() == [("stage in", ODD_NAMES)]


def test_more_paths_than_a_command_line_takes_are_refused_in_one_sentence(machine):
    file = machine.write(machine.scratch / "me" / ("x" * 200))
    with pytest.raises(BurstBufferError, match="and 19999 more could not be started .Argument list too long."):
        machine.ime.stage_in([file] * 20_000)


def test_what_is_missing_or_elsewhere_is_refused_before_a_command_starts(machine):
    machine.write(machine.scratch / "me/there")
    for paths, says in [
        (["there", "missing"], "missing' does not exist"),
        (["there", "../../elsewhere"], "not in the burst buffer's reach"),
    ]:
        with pytest.raises(BurstBufferError, match=says):
            machine.ime.stage_in([machine.scratch / "me" / path for path in paths])
    with pytest.raises(BurstBufferError, match="a list"):
        machine.ime.purge(str(machine.scratch / "me/there"))
    assert machine.calls() == []


def test_a_failing_command_is_quoted_in_one_sentence(machine, monkeypatch):
    files = [machine.write(machine.scratch / "me" / name) for name in "ab"]
    monkeypatch.setenv("IME_BUFFER", "/somewhere else")
    with pytest.raises(BurstBufferError) as caught:
        machine.ime.stage_in(files)
    message = str(caught.value)
    assert "'ime-ctl -i --block --recursive' on" in message and "and 1 more failed with status 1" in message
    assert "not in the buffer" in message and "\n" not in message


def test_a_missing_command_is_named(machine):
    (machine.tmp / "bin/ime-ctl").unlink()
    with pytest.raises(BurstBufferError, match="No such file or directory.; it is there on the nodes of 'played'"):
        machine.ime.stage_in([machine.write(machine.scratch / "me/a")])


def test_a_site_without_an_ime_or_its_commands_is_refused():
    with pytest.raises(BurstBufferError, match="'cori' has no IME"):
        Ime("cori")
    nurion = sites.load("nurion")
    silent = nurion.model_copy(update={"burst_buffer": nurion.burst_buffer.model_copy(update={"purge_command": None})})
    with pytest.raises(BurstBufferError, match="burst_buffer.purge_command; add it"):
        Ime(silent)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["-x", "{file}"], 2, "unknown option -x"),
        (["-i", "--blok", "{file}"], 2, "unknown option --blok"),
        (["-i", "-p", "{file}"], 2, "one of"),
        (["-i"], 2, "no file"),
        (["-p", "--block", "{file}"], 2, "makes no sense"),
        (["-i", "/etc/hostname"], 1, "not in the buffer"),
        (["-i", "{file}2"], 1, "No such file"),
        (["-i", "{folder}"], 1, "Is a directory"),
        (["-p", "{changed}"], 1, "not written back"),
    ],
)
def test_the_stand_in_is_strict(machine, words, status, says):
    changed = machine.write(machine.scratch / "me/folder/changed")
    machine.ime.stage_in([changed])
    machine.write(changed, "changed since")
    machine.write(machine.scratch / "me/file")
    me = machine.buffer / "me"
    paths = {"file": me / "file", "folder": me / "folder", "changed": me / "folder/changed"}
    result = subprocess.run(["ime-ctl", *(word.format(**paths) for word in words)], capture_output=True, text=True)
    assert (result.returncode, says in result.stderr) == (status, True)


def test_staging_in_waits_until_the_data_is_there(machine):
    file, buffered = machine.write(machine.scratch / "me/file"), machine.buffer / "me/file"
    subprocess.run(["ime-ctl", "-i", buffered], check=True)  # which returns too early
    assert held(buffered) == [(0, 0)]
    machine.ime.stage_in([file])
    assert held(buffered) == [(0, 4)]


def test_purging_what_was_staged_never_reaches_the_originals_through_the_buffer(machine):
    (machine.tmp / "data").mkdir()
    (machine.tmp / "data/volume").write_bytes(b"dear")
    staging.stage(machine.tmp / "data", machine.tmp / "scratch/me/copy")
    through = machine.tmp / "scratch_ime/me/copy"
    assert (through / "volume").read_bytes() == b"dear"
    with pytest.raises(staging.StageError, match="lies in the burst buffer"):
        staging.purge(through)
    assert (machine.tmp / "scratch/me/copy/volume").read_bytes() == b"dear"
