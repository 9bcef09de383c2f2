"""Burst buffers: paths that must not be deleted, an IME's commands, and job scripts that really run.

/scratch_ime is played by a directory through which deleting really deletes the original, and ime-ctl by the strict
stand-in beside this file.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nurion_utils import sites, staging
from nurion_utils.jobs import burst_buffers
from nurion_utils.jobs.burst_buffers import BackEndError, Ime, guard, job_script

STAND_IN = Path(__file__).with_name("ime-ctl")
TRAIN = 'python train.py "$DATA"'
ODD_NAMES = ["with space", "-p", "quote'\"", "new\nline", "*", "$HOME", "ünï", os.fsdecode(b"\xff")]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Nurion with its two file systems below the test's directory, and its ime-ctl played by the stand-in."""
    scratch, buffer = tmp_path / "scratch", tmp_path / "scratch_ime"
    (scratch / "me").mkdir(parents=True)
    buffer.symlink_to(scratch)
    text = (sites._DIRECTORY / "nurion.toml").read_text()
    text = text.replace('"/scratch/$USER"', f'"{scratch}/$USER"').replace('"/scratch_ime/$USER"', f'"{buffer}/$USER"')
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "played.toml").write_text(text)
    (tmp_path / "bin").mkdir()
    shutil.copy(STAND_IN, tmp_path / "bin")
    record = tmp_path / "record"
    for name, value in {"USER": "me", "IME_BUFFER": str(buffer), "IME_RECORD": str(record)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(sites, "_DIRECTORY", tmp_path / "sites")

    def calls():
        lines = record.read_text().splitlines() if record.exists() else []
        return [(call["action"], [os.path.basename(file) for file in call["files"]]) for call in map(json.loads, lines)]

    site = sites.load("played")
    return SimpleNamespace(scratch=scratch, buffer=buffer, site=site, ime=Ime(site), calls=calls, tmp=tmp_path)


def write(path, text="data"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# -- the trap ---------------------------------------------------------------------------------------------------------


def test_the_trap_is_real_a_file_deleted_in_the_buffer_is_gone_from_scratch(machine):
    original = write(machine.scratch / "me/volume")
    subprocess.run(["rm", machine.buffer / "me/volume"], check=True)
    assert not original.exists()


def test_staging_into_the_buffer_by_copying_is_refused_before_anything_changes(machine):
    original = write(machine.scratch / "me/data/volume")
    write(machine.tmp / "source/volume", "other")
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
    write(machine.scratch / "me/volume")
    (machine.tmp / "deep").mkdir()
    (machine.tmp / "link").symlink_to(machine.buffer / "me")
    (machine.tmp / "link to link").symlink_to("link")
    (machine.scratch / "to me").symlink_to(machine.scratch / "me")
    (machine.tmp / "deep" / "link").symlink_to(machine.buffer / "me")
    for path in (machine.tmp / spelling, str(machine.tmp / spelling), os.fsencode(machine.tmp / spelling)):
        with pytest.raises(BackEndError, match=r"Ime\('played'\)\.purge"):
            guard(path, machine.site)
    with pytest.raises(BackEndError):
        guard(machine.tmp / spelling)


def test_a_path_relative_to_here_is_looked_at_from_here(machine, monkeypatch):
    (machine.tmp / "here").mkdir()
    monkeypatch.chdir(machine.tmp / "here")
    with pytest.raises(BackEndError):
        guard("../scratch_ime/me")
    guard("scratch_ime/me")


@pytest.mark.parametrize(
    "path", ["scratch/me/volume", "scratch_image/x", "scratch_ime/../elsewhere", "loop/x", "", "/"]
)
def test_paths_elsewhere_are_let_through(machine, path):
    (machine.tmp / "loop").symlink_to("loop")
    guard(machine.tmp / path if path != "/" else path, machine.site)


def test_every_site_with_an_ime_is_guarded_by_default_and_no_other():
    with pytest.raises(BackEndError, match="of 'nurion', .* in /scratch:"):
        guard("/scratch_ime/anybody/data")
    with pytest.raises(BackEndError):
        guard("/scratch_ime/anybody/data", "nurion")
    guard("/scratch_ime/anybody/data", "cori")
    guard("/scratch/anybody/data")


# -- commands ---------------------------------------------------------------------------------------------------------


def test_a_file_of_scratch_has_its_place_in_the_buffer(machine):
    ime = machine.ime
    assert ime.path_in_buffer(machine.scratch / "me/x") == f"{machine.buffer}/me/x"
    assert ime.path_in_buffer(machine.buffer / "me/x") == f"{machine.buffer}/me/x"
    assert ime.path_in_buffer(f"{machine.scratch}/me/../you") == f"{machine.buffer}/you"
    for path in ("/home/me/x", machine.scratch / "me/../../x", f"{machine.scratch}2/x"):
        with pytest.raises(BackEndError, match="not in the burst buffer's reach: name one below"):
            ime.path_in_buffer(path)


def test_files_come_into_the_buffer_are_written_back_and_leave_it_and_the_originals_stay(machine):
    data = [write(machine.scratch / "me/data" / str(i), "x" * i) for i in (3, 4)]
    ime = machine.ime
    assert ime.status(data)["clean_bytes"].tolist() == [0, 0]
    assert ime.stage_in([machine.scratch / "me/data"]) == 2
    assert ime.status(data)[["dirty_bytes", "clean_bytes"]].to_numpy().tolist() == [[0, 3], [0, 4]]
    write(data[0], "changed")
    assert ime.status(data)["dirty_bytes"].tolist() == [7, 0]
    assert ime.sync_out(data) == 2
    assert ime.status(data)["dirty_bytes"].tolist() == [0, 0]
    write(data[1], "changed as well")
    assert ime.purge(data) == 2
    assert ime.status(data)["clean_bytes"].tolist() == [0, 0]
    assert [file.read_text() for file in data] == ["changed", "changed as well"]


def test_odd_names_are_names_and_nothing_else(machine):
    for name in ODD_NAMES:
        write(machine.scratch / "me" / name)
    machine.ime.stage_in([machine.scratch / "me" / name for name in ODD_NAMES])
    assert machine.calls() == [("stage in", ODD_NAMES)]


def test_many_files_are_handed_over_in_as_few_calls_as_a_command_line_allows(machine):
    folder = machine.scratch / "me/many"
    names = [f"{i:04d}" + "x" * 200 for i in range(1000)]
    for name in names:
        write(folder / name)
    assert machine.ime.stage_in([folder]) == 1000
    calls = machine.calls()
    assert [name for _, files in calls for name in files] == names
    assert 2 < len(calls) < 10


@given(st.lists(st.integers(1, 4000), max_size=200))
def test_batches_keep_the_order_and_fit_a_command_line(lengths):
    files = ["x" * length for length in lengths]
    batches = list(burst_buffers._batches(files))
    assert [file for batch in batches for file in batch] == files
    assert all(batch and sum(map(len, batch)) < burst_buffers.BATCH_BYTES for batch in batches)


def test_what_is_missing_or_elsewhere_is_refused_before_a_command_starts(machine):
    write(machine.scratch / "me/there")
    for paths, says in [
        (["there", "missing"], "missing' does not exist"),
        (["there", "../../elsewhere"], "not in the burst buffer's reach"),
    ]:
        with pytest.raises(BackEndError, match=says):
            machine.ime.stage_in([machine.scratch / "me" / path for path in paths])
    with pytest.raises(BackEndError, match="a list"):
        machine.ime.purge(str(machine.scratch / "me/there"))
    assert machine.calls() == []


def test_a_failing_command_is_quoted_in_one_sentence(machine, monkeypatch):
    files = [write(machine.scratch / "me" / name) for name in "ab"]
    monkeypatch.setenv("IME_BUFFER", "/somewhere else")
    with pytest.raises(BackEndError) as caught:
        machine.ime.stage_in(files)
    message = str(caught.value)
    assert "'ime-ctl -i --block' failed with status 1 on" in message and "and 1 more" in message
    assert "not in the buffer" in message and "\n" not in message


def test_a_status_that_cannot_be_read_is_an_error_and_not_zero_bytes(machine):
    (machine.tmp / "bin/ime-ctl").write_text("#!/bin/sh\necho 3 files in cache\n")
    with pytest.raises(BackEndError, match="'3 files in cache'"):
        machine.ime.status([write(machine.scratch / "me/a")])


def test_a_missing_command_is_named(machine):
    (machine.tmp / "bin/ime-ctl").unlink()
    with pytest.raises(BackEndError, match="'ime-ctl' was not found: it is there on the nodes of 'played'"):
        machine.ime.stage_in([write(machine.scratch / "me/a")])


def test_a_site_without_an_ime_or_its_commands_is_refused():
    with pytest.raises(BackEndError, match="'cori' has no IME"):
        Ime("cori")
    nurion = sites.load("nurion")
    silent = nurion.model_copy(update={"burst_buffer": nurion.burst_buffer.model_copy(update={"purge_command": None})})
    with pytest.raises(BackEndError, match="burst_buffer.purge_command; add it"):
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
    changed = write(machine.scratch / "me/folder/changed")
    machine.ime.stage_in([changed])
    write(changed, "changed since")
    write(machine.scratch / "me/file")
    me = machine.buffer / "me"
    paths = {"file": me / "file", "folder": me / "folder", "changed": me / "folder/changed"}
    result = subprocess.run(["ime-ctl", *(word.format(**paths) for word in words)], capture_output=True, text=True)
    assert (result.returncode, says in result.stderr) == (status, True)


def test_staging_in_waits_until_the_data_is_there(machine):
    file = write(machine.scratch / "me/file")
    subprocess.run(["ime-ctl", "-i", machine.buffer / "me/file"], check=True)  # which returns too early
    assert machine.ime.status([file])["clean_bytes"].tolist() == [0]
    machine.ime.stage_in([file])
    assert machine.ime.status([file])["clean_bytes"].tolist() == [4]


# -- job scripts ------------------------------------------------------------------------------------------------------


def require_bash(script):
    result = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return script.splitlines()


def test_nurions_script_asks_pbs_for_the_burst_buffer_and_whole_nodes():
    lines = require_bash(job_script("nurion", "/scratch/$USER/imagenet", TRAIN, nodes=512, hours=1.5))
    for expected in (
        *["#PBS -q normal", "#PBS -A tf", "#PBS -P burst_buffer", "#PBS -l walltime=01:30:00", "#PBS -V"],
        *["#PBS -l select=512:ncpus=68:mpiprocs=1:ompthreads=68", 'cd "$PBS_O_WORKDIR"'],
        *["module load craype-mic-knl intel/18.0.3 impi/18.0.3", 'export DATA=/scratch_ime/"$USER"/imagenet'],
        *['ime-ctl -i --block --recursive "$DATA"', f"mpirun -n 512 {TRAIN}"],
    ):
        assert expected in lines
    assert any("rm under /scratch_ime deletes the original" in line for line in lines)
    assert any("Submit it from /scratch/$USER" in line for line in lines)
    assert not any(line.lstrip().startswith("rm ") for line in lines)
    directives = [i for i, line in enumerate(lines) if line.startswith("#PBS")]
    assert directives == list(range(1, len(directives) + 1))  # PBS stops looking at the first command


def run(machine, script, training):
    """Run a job script as PBS would, with a launcher and modules that only say that they were called."""
    for name, text in {"mpirun": 'shift 2\nexec "$@"', "python": training}.items():
        (machine.tmp / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (machine.tmp / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PBS_O_WORKDIR": str(machine.tmp), "BASH_FUNC_module%%": "() { echo module $*; }"}
    return subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment)


@pytest.mark.parametrize("name", ["data", 'da ta\'; "$HOME" `id` *'])
def test_nurions_script_stages_in_trains_from_the_buffer_and_brings_the_results_back(machine, name):
    write(machine.scratch / "me" / name / "a", "volume")
    script = job_script(machine.site, f"{machine.scratch}/$USER/{name}", TRAIN, 2, 1)
    training = '[[ $2 == */scratch_ime/me/* ]] && cp "$2/a" "$RESULTS/model"'
    result = run(machine, script, training)
    assert result.returncode == 0, result.stderr
    assert machine.calls() == [("stage in", ["a"]), ("sync", ["model"]), ("purge", ["a", "model"])]
    assert (machine.scratch / "me" / f"{name}-results/model").read_text() == "volume"
    assert (machine.scratch / "me" / name / "a").read_text() == "volume"


def test_a_failed_training_still_brings_back_what_it_wrote_and_the_job_fails(machine):
    write(machine.scratch / "me/data/a")
    script = job_script(machine.site, f"{machine.scratch}/me/data", TRAIN, 2, 1)
    result = run(machine, script, 'echo half > "$RESULTS/model"; exit 3')
    assert result.returncode == 3
    assert machine.calls()[1:] == [("sync", ["model"]), ("purge", ["a", "model"])]


def test_nothing_is_trained_when_staging_fails(machine):
    script = job_script(machine.site, f"{machine.scratch}/me/missing", TRAIN, 2, 1)
    result = run(machine, script, "echo TRAINED")
    assert result.returncode != 0 and "TRAINED" not in result.stdout
    assert "No such file" in result.stderr


def test_coris_script_asks_slurm_and_datawarp():
    lines = require_bash(job_script("cori", "/global/cscratch1/sd/me/cosmo", TRAIN, 8192, 2, 1000))
    for expected in (
        *["#SBATCH --nodes=8192", "#SBATCH --time=02:00:00", "#SBATCH --constraint=knl"],
        "#DW jobdw capacity=1000GB access_mode=striped type=scratch",
        "#DW stage_in source=/global/cscratch1/sd/me/cosmo destination=$DW_JOB_STRIPED/data type=directory",
        "#DW stage_out source=$DW_JOB_STRIPED/results destination=/global/cscratch1/sd/me/cosmo-results type=directory",
        *['export DATA="$DW_JOB_STRIPED/data"', f"srun -n 8192 --cpus-per-task=68 {TRAIN}"],
    ):
        assert expected in lines
    assert not any("PBS" in line or "ime" in line.split() for line in lines)


def test_a_rabbits_script_hands_its_directives_to_flux():
    script = job_script(
        "elcapitan", "/p/lustre1/me/cosmo", TRAIN, 16, 2, 500, ranks_per_node=4, results="/p/lustre1/me/out"
    )
    lines = require_bash(script)
    first = lines.index('#FLUX: -S dw="""')
    assert lines[first + 1 : first + 5] == [
        "#FLUX: #DW jobdw type=xfs capacity=500GB name=buffer",
        "#FLUX: #DW copy_in source=/p/lustre1/me/cosmo destination=$DW_JOB_buffer/data",
        "#FLUX: #DW copy_out source=$DW_JOB_buffer/results destination=/p/lustre1/me/out",
        '#FLUX: """',
    ]
    assert "#FLUX: --nodes=16" in lines and f"flux run -N 16 -n 64 -c 24 {TRAIN}" in lines
    assert 'flux run -N 16 -n 64 -c 24 mkdir -p "$RESULTS"' in lines  # each node has a file system of its own


@pytest.mark.parametrize(
    ("site", "changes", "says"),
    [
        ("cori", {"source": "/s/my data"}, "no way to quote ' '"),
        ("elcapitan", {"results": "/s/$USER/x"}, r"no way to quote '\$'"),
        ("cori", {"capacity_gb": None}, "capacity_gb is needed"),
        ("cori", {"capacity_gb": 2e6}, "fit the buffer"),
        ("cori", {"source": "/s/a\n#DW x"}, "without '..' or line breaks"),
        ("nurion", {"source": "/home01/me/x"}, "name a directory below /scratch"),
        ("nurion", {"source": "data"}, "absolute path on 'nurion'"),
        ("nurion", {"source": "/scratch/me/../you"}, "without '..'"),
        ("nurion", {"results": "/scratch/me/data/out"}, "must not lie in the data"),
        ("nurion", {"nodes": 8306}, "nodes must be a whole number from 1 to 8305, not 8306"),
        ("nurion", {"nodes": 2.0}, "nodes must be"),
        ("nurion", {"ranks_per_node": 69}, "from 1 to 68"),
        ("nurion", {"hours": 0}, "above 0 and at most 120"),
        ("nurion", {"hours": 121}, "above 0 and at most 120"),
        ("nurion", {"queue": "gpu"}, "no queue 'gpu': its queues are exclusive, normal"),
        ("nurion", {"application": "tf\n#PBS -q x"}, "application must be"),
        ("nurion", {"name": "two words"}, "name must be"),
        ("nurion", {"command": "a\nb"}, "one line of shell"),
        ("local", {}, "no burst buffer that jobs ask a scheduler for"),
        ("fugaku", {}, "no site 'fugaku'"),
    ],
)
def test_what_a_site_cannot_run_is_refused_in_one_sentence(site, changes, says):
    usual = {"source": "/scratch/me/data", "command": TRAIN, "nodes": 2, "hours": 1, "capacity_gb": 100}
    with pytest.raises(ValueError, match=says) as caught:
        job_script(site, **{**usual, **changes})
    assert "\n" not in str(caught.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '\"$`\\"), min_size=1, max_size=12))
def test_any_name_reaches_the_shell_as_it_is(name):
    if "/" in name or "$USER" in name or name in (".", ".."):
        return
    script = job_script("nurion", f"/scratch/$USER/{name}", TRAIN, 1, 1)
    line = next(line for line in script.splitlines() if line.startswith("export DATA="))
    shown = subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "$DATA"'], env={"USER": "me"}, capture_output=True, check=True
    )
    assert shown.stdout.decode() == f"/scratch_ime/me/{name}"


def test_purging_what_was_staged_never_reaches_the_originals_through_the_buffer(machine):
    (machine.tmp / "data").mkdir()
    (machine.tmp / "data/volume").write_bytes(b"dear")
    staging.stage(machine.tmp / "data", machine.tmp / "scratch/me/copy")
    through = machine.tmp / "scratch_ime/me/copy"
    assert (through / "volume").read_bytes() == b"dear"
    with pytest.raises(staging.StageError, match="lies in the burst buffer"):
        staging.purge(through)
    assert (machine.tmp / "scratch/me/copy/volume").read_bytes() == b"dear"
