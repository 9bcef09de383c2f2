"""A machine with an IME and machines with a queue, played below a test's directory."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nurion_utils import sites
from nurion_utils.schedulers import pbs, slurm

STAND_IN = Path(__file__).with_name("scheduler_stand_in.py")
COMMANDS = {"pbs": ("qsub", "qstat", "qdel", "qselect"), "slurm": ("sbatch", "scontrol", "squeue", "scancel")}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nurion with its two file systems below the test's directory, and its ime-ctl played by the stand-in."""
    scratch, buffer = tmp_path / "scratch", tmp_path / "scratch_ime"
    (scratch / "me").mkdir(parents=True)
    buffer.symlink_to(scratch)
    text = (sites.DIRECTORY / "nurion.toml").read_text()
    text = text.replace('"/scratch/$USER"', f'"{scratch}/$USER"').replace('"/scratch_ime/$USER"', f'"{buffer}/$USER"')
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "played.toml").write_text(text)
    (tmp_path / "bin").mkdir()
    shutil.copy(Path(__file__).with_name("ime-ctl"), tmp_path / "bin")
    record = tmp_path / "record"
    for name, value in {"USER": "me", "IME_BUFFER": str(buffer), "IME_RECORD": str(record)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("nurion_utils.sites.reading.DIRECTORY", tmp_path / "sites")

    def write(path, text="data"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def calls():
        lines = record.read_text().splitlines() if record.exists() else []
        return [(call["action"], [os.path.basename(file) for file in call["files"]]) for call in map(json.loads, lines)]

    site = sites.load("played")
    return SimpleNamespace(scratch=scratch, buffer=buffer, site=site, calls=calls, write=write, tmp=tmp_path)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=["slurm", "pbs"])
def queue(request, tmp_path, monkeypatch):
    """A scheduler, played by the stand-in; nothing of it is left afterwards.

    `rules` changes what its machine has, `replace` one of its commands.
    """
    records, commands = tmp_path / "records", tmp_path / "commands"
    for folder in (records, commands, tmp_path / "home", tmp_path / "work"):
        folder.mkdir()
    for name in COMMANDS[request.param]:
        (commands / name).symlink_to(STAND_IN)

    def replace(name, body):
        (commands / name).unlink(missing_ok=True)
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)

    replace("mpiexec", 'shift 4; exec "$@"')
    replace("mpirun", 'shift 2; exec "$@"')
    python = commands / "python"  # beside which a job finds these launchers
    python.symlink_to(Path(sys.executable))
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STAND_IN", str(records))

    def rules(**values):
        monkeypatch.setenv("STAND_IN_RULES", json.dumps(values))

    def told():
        return {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}

    talk = {"slurm": slurm, "pbs": pbs}[request.param]
    work = tmp_path / "work"
    yield SimpleNamespace(
        kind=request.param, talk=talk, rules=rules, told=told, work=work, python=str(python), replace=replace
    )
    for id, job in told().items():
        if job["state"] != "F":
            talk.cancel(id)
    deadline = time.monotonic() + 30
    while any(alive(job["runner"]) for job in told().values() if job.get("runner")):
        assert time.monotonic() < deadline, "a job of the stand-in has not ended"
        time.sleep(0.05)
