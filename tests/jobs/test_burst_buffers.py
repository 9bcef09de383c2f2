"""Paths that must not be deleted, and where an IME shows them.

/scratch_ime is played by a directory through which deleting really deletes the original, and ime-ctl by the strict
stand-in beside this file.
"""

import os
import subprocess

import pytest

from nurion_utils import sites, staging
from nurion_utils.jobs import BurstBufferError, Job, guard, script
from nurion_utils.jobs.burst_buffers import path_in_ime


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
        with pytest.raises(BurstBufferError, match="write back .* 'ime-ctl -r --block --recursive', then 'ime-ctl -p"):
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
    assert path_in_ime(machine.site, f"{machine.scratch}/me/x") == f"{machine.buffer}/me/x"
    assert path_in_ime(machine.site, f"{machine.buffer}/me/x") == f"{machine.buffer}/me/x"
    assert path_in_ime(machine.site, f"{machine.scratch}/me/../you") == f"{machine.buffer}/you"
    for path in ("/home/me/x", f"{machine.scratch}/me/../../x", f"{machine.scratch}2/x"):
        with pytest.raises(BurstBufferError, match="not in the burst buffer's reach: name one below"):
            path_in_ime(machine.site, path)


def test_a_site_whose_ime_lacks_a_command_is_refused():
    nurion = sites.load("nurion")
    silent = nurion.model_copy(update={"burst_buffer": nurion.burst_buffer.model_copy(update={"purge_command": None})})
    with pytest.raises(BurstBufferError, match="burst_buffer.purge_command; add it"):
        script(Job("python train.py", silent, data="/scratch/me/data"))


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
    subprocess.run(["ime-ctl", "-i", "--block", machine.buffer / "me/folder/changed"], check=True)
    machine.write(changed, "changed since")
    machine.write(machine.scratch / "me/file")
    me = machine.buffer / "me"
    paths = {"file": me / "file", "folder": me / "folder", "changed": me / "folder/changed"}
    result = subprocess.run(["ime-ctl", *(word.format(**paths) for word in words)], capture_output=True, text=True)
    assert (result.returncode, says in result.stderr) == (status, True)


def test_purging_what_was_staged_never_reaches_the_originals_through_the_buffer(machine):
    (machine.tmp / "data").mkdir()
    (machine.tmp / "data/volume").write_bytes(b"dear")
    staging.stage(machine.tmp / "data", machine.tmp / "scratch/me/copy")
    through = machine.tmp / "scratch_ime/me/copy"
    assert (through / "volume").read_bytes() == b"dear"
    with pytest.raises(staging.StageError, match="lies in the burst buffer"):
        staging.purge(through)
    assert (machine.tmp / "scratch/me/copy/volume").read_bytes() == b"dear"
