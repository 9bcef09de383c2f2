"""Recorded tables are found by name, and what made them is there."""

import importlib
import re
import subprocess
import sys

import pytest

from nurion_utils import recordings


def names():
    return sorted(file.stem for file in recordings.DIRECTORY.glob("*.csv"))


@pytest.mark.parametrize("name", names())
def test_every_table_names_its_sources_and_is_explained(name):
    table = recordings.load(name)
    assert len(table) and table["source"].str.len().gt(0).all()
    assert re.search(rf"^##.*{name}\.csv", (recordings.DIRECTORY / "README.md").read_text(), re.M)


@pytest.mark.parametrize("name", recordings.RECORDERS)
def test_every_recorder_exists_and_its_table_too(name):
    module, function = recordings.RECORDERS[name].function.split(":")
    assert callable(getattr(importlib.import_module(module), function)) and name in names()


def test_a_table_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="there is no table 'network'; choose from backends, "):
        recordings.load("network")


def test_a_missing_repository_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(recordings, "DIRECTORY", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="work in a clone of the repository"):
        recordings.load("network_lab")


def test_the_command_refuses_what_it_cannot_measure():
    for arguments in ([], ["published_io"], ["backends", "again"]):
        ended = subprocess.run(
            [sys.executable, "-m", "nurion_utils.recordings", *arguments], capture_output=True, text=True
        )
        assert ended.returncode == 1 and ended.stderr.startswith("usage: python -m nurion_utils.recordings NAME")
