"""A machine with an IME, played below a test's directory."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nurion_utils import sites


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
