"""Job scripts that bash can read, and of which some really run; a strict stand-in beside this file plays ime-ctl."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nurion_utils import sites
from nurion_utils.jobs import Job, Notebook, explain, script

TRAIN = 'python train.py "$DATA"'


def written(site, data, command, nodes, hours, **options):
    return script(Job(command, site, nodes, hours=hours, data=data, **options))


def require_bash(text):
    result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return text.splitlines()


def test_nurions_script_asks_pbs_for_the_burst_buffer_and_whole_nodes():
    lines = require_bash(written("nurion", "/scratch/$USER/imagenet", TRAIN, nodes=512, hours=1.5))
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


def run(machine, text, training):
    """Run a job script as PBS would, with a launcher and modules that only say that they were called."""
    for name, body in {"mpirun": 'shift 2\nexec "$@"', "python": training}.items():
        (machine.tmp / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (machine.tmp / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PBS_O_WORKDIR": str(machine.tmp), "BASH_FUNC_module%%": "() { echo module $*; }"}
    return subprocess.run(["bash"], input=text, text=True, capture_output=True, env=environment)


@pytest.mark.parametrize("name", ["data", 'da ta\'; "$HOME" `id` *'])
def test_nurions_script_stages_in_trains_from_the_buffer_and_brings_the_results_back(machine, name):
    machine.write(machine.scratch / "me" / name / "a", "volume")
    text = written(machine.site, f"{machine.scratch}/$USER/{name}", TRAIN, 2, 1, python=f"{machine.tmp}/bin/python")
    training = '[[ $2 == */scratch_ime/me/* ]] && cp "$2/a" "$RESULTS/model"'
    result = run(machine, text, training)
    assert result.returncode == 0, result.stderr
    assert machine.calls() == [("stage in", ["a"]), ("sync", ["model"]), ("purge", ["a", "model"])]
    assert re.fullmatch(r"cost: 2 nodes x \d s = 0\.00\d node-hours, exit status 0", result.stdout.splitlines()[-1])
    assert (machine.scratch / "me" / f"{name}-results/model").read_text() == "volume"
    assert (machine.scratch / "me" / name / "a").read_text() == "volume"


def test_a_failed_training_still_brings_back_what_it_wrote_and_the_job_fails(machine):
    machine.write(machine.scratch / "me/data/a")
    text = written(machine.site, f"{machine.scratch}/me/data", TRAIN, 2, 1, python=f"{machine.tmp}/bin/python")
    result = run(machine, text, 'echo half > "$RESULTS/model"; exit 3')
    assert result.returncode == 3
    assert machine.calls()[1:] == [("sync", ["model"]), ("purge", ["a", "model"])]


def test_nothing_is_trained_when_staging_fails(machine):
    text = written(machine.site, f"{machine.scratch}/me/missing", TRAIN, 2, 1, python=f"{machine.tmp}/bin/python")
    result = run(machine, text, "echo TRAINED")
    assert result.returncode != 0 and "TRAINED" not in result.stdout
    assert "No such file" in result.stderr


def test_coris_script_asks_slurm_and_datawarp():
    lines = require_bash(written("cori", "/global/cscratch1/sd/me/cosmo", TRAIN, 8192, 2, capacity_gb=1000))
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
    text = written(
        "elcapitan", "/p/lustre1/me/cosmo", TRAIN, 16, 2, capacity_gb=500, ranks_per_node=4, results="/p/lustre1/me/out"
    )
    lines = require_bash(text)
    first = lines.index('#FLUX: -S dw="""')
    assert lines[first + 1 : first + 5] == [
        "#FLUX: #DW jobdw type=xfs capacity=500GB name=buffer",
        "#FLUX: #DW copy_in source=/p/lustre1/me/cosmo destination=$DW_JOB_buffer/data",
        "#FLUX: #DW copy_out source=$DW_JOB_buffer/results destination=/p/lustre1/me/out",
        '#FLUX: """',
    ]
    assert "#FLUX: --nodes=16" in lines and f"flux run -N 16 -n 64 -c 24 {TRAIN}" in lines
    assert 'flux run -N 16 -n 64 -c 24 mkdir -p "$RESULTS"' in lines  # each node has a file system of its own


def test_a_job_without_data_asks_for_no_burst_buffer_and_exports_what_it_is_given():
    environment = {"HOROVOD_CPU_OPERATIONS": "MPI", "GREETING": "it's $HOME; `id`"}
    lines = require_bash(written("nurion", None, "python train.py", 2, 1, environment=environment))
    assert "export HOROVOD_CPU_OPERATIONS=MPI" in lines and "#PBS -P burst_buffer" not in lines
    assert "export GREETING='it'\"'\"'s $HOME; `id`'" in lines
    assert not any("ime-ctl" in line or "DATA" in line for line in lines)
    assert lines[-2:] == ["mpirun -n 2 python train.py", "ended=0"]


@pytest.mark.parametrize("source", ["/scratch/$USER/da ta", "/scratch/$USERS/data"])
def test_a_machine_without_a_burst_buffer_reads_from_its_shared_file_system(source, tmp_path):
    site = sites.load("cori").model_copy(update={"burst_buffer": None})
    lines = require_bash(written(site, source, TRAIN, 2, 1, results=f"{tmp_path}/a 'result'"))
    assert not any(line.startswith("#DW") for line in lines)
    export = "\n".join(line for line in lines if line.startswith(("export", "mkdir")))
    shown = subprocess.run(
        ["bash", "-c", f'{export}\nprintf %s "$DATA"'], env={"USER": "me", "PATH": os.environ["PATH"]}, stdout=-1
    )
    assert shown.stdout.decode() == source.replace("$USER/", "me/") and (tmp_path / "a 'result'").is_dir()


def walltime(site, hours):
    lines = written(site, None, TRAIN, 1, hours).splitlines()
    return next(line.split("=")[-1] for line in lines if re.search(r"-l walltime=|--time=|--time-limit=", line))


@pytest.mark.parametrize(
    ("hours", "clock"),
    [
        (1e-9, "00:01:00"),
        (0.001, "00:01:00"),
        (1 / 3, "00:20:00"),
        (0.55, "00:33:00"),  # 60 * 0.55 is more than 33
        (30.25, "30:15:00"),
        (47.999, "48:00:00"),
        (120, "120:00:00"),
        (np.float32(0.5), "00:30:00"),
    ],
)
def test_walltime_is_rounded_up_to_whole_minutes(hours, clock):
    assert walltime("pbs", hours) == walltime("cori", hours) == clock


@given(st.floats(1e-12, 120))
def test_a_walltime_is_never_less_than_was_asked_for_and_at_most_a_minute_more(hours):
    clock = walltime("cori", hours)
    minutes = sum(int(part) * factor for part, factor in zip(clock.split(":"), (60, 1, 1 / 60), strict=True))
    assert max(1, 60 * hours - 1e-6) <= minutes <= 60 * hours + 1
    assert walltime("elcapitan", hours) == f"{minutes:.0f}m"


NAMES = [
    "a" * 16,
    ".command.run",
    "1/12",
    "99_snap",
    "x y",
    "test%NYF",
    "naïve",
    "",
    "-x",
    "a\n#PBS -l",
    "a\n",
    5,
]


@pytest.mark.parametrize("site", ["nurion", "cori", "elcapitan"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_schedulers_refuse_are_refused_here(site, name):
    with pytest.raises(ValueError, match="name must be a letter and up to 14 letters, digits") as caught:
        written(site, None, TRAIN, 1, 1, name=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("site", "changes", "says"),
    [
        ("cori", {"data": "/s/my data"}, "no way to quote the ' ' in"),
        ("elcapitan", {"results": "/s/$USER/x"}, r"no way to quote the '\$' in"),
        ("cori", {"capacity_gb": None}, "capacity_gb is needed"),
        ("cori", {"capacity_gb": math.nan}, "capacity_gb must be a number above 0"),
        ("nurion", {"capacity_gb": "100"}, "capacity_gb must be a number above 0"),
        ("nurion", {"capacity_gb": True}, "capacity_gb must be a number above 0"),
        ("cori", {"data": "/s/a\n#DW x"}, "one line without '..'"),
        ("cori", {"data": "/s/a\r"}, "one line without '..'"),
        ("cori", {"data": Path("/s/a")}, "must be an absolute path"),
        ("nurion", {"data": "/home01/me/x"}, "name one below /scratch"),
        ("nurion", {"data": "data"}, "absolute path on 'nurion'"),
        ("nurion", {"data": ""}, "absolute path on 'nurion'"),
        ("nurion", {"data": "/scratch/me/../you"}, "without '..'"),
        ("nurion", {"results": "/scratch/me/data/out"}, "must not lie in the data"),
        ("nurion", {"results": "/scratch"}, "must not lie in the data"),
        ("nurion", {"data": None, "results": "/scratch/me/out"}, "results need data"),
        ("nurion", {"nodes": 2.0}, "nodes must be"),
        ("nurion", {"nodes": True}, "nodes must be"),
        ("nurion", {"nodes": "2"}, "nodes must be"),
        ("nurion", {"ranks_per_node": 0}, "ranks_per_node must be a whole number from 1 up"),
        ("nurion", {"cores_per_rank": 0}, "cores_per_rank must be a whole number from 1 up"),
        ("nurion", {"hours": 0}, "hours must be a number above 0, not 0"),
        ("nurion", {"hours": math.nan}, "hours must be a number above 0, not nan"),
        ("cori", {"hours": math.inf}, "hours must be a number above 0, not inf"),
        ("nurion", {"hours": "2"}, "hours must be a number above 0, not '2'"),
        ("nurion", {"hours": True}, "hours must be a number above 0, not True"),
        ("nurion", {"hours": None}, "hours must be a number above 0, not None"),
        ("nurion", {"queue": ""}, "queue must be a word"),
        ("slurm", {"queue": "a b"}, "queue must be a word"),
        ("nurion", {"options": {"-A": "tf\n#PBS -q x"}}, "options are such as"),
        ("nurion", {"options": {"A": "tf"}}, "options are such as"),
        ("neuron", {"options": {"--comment": 'a"b'}}, """cannot have '"' in its value"""),
        ("slurm", {"options": {"--time": "99:00:00"}}, "--time is a field of the job: give it there"),
        ("nurion", {"python": "python3"}, "python must be the path of an interpreter from the root on"),
        ("nurion", {"environment": {"A B": "x"}}, "environment must be names and a line of text"),
        ("nurion", {"environment": {"A": "x\n#PBS -q long"}}, "environment must be names and a line of text"),
        ("nurion", {"environment": {"A": 1}}, "environment must be names and a line of text"),
        ("nurion", {"command": "a\nb"}, "one line of shell"),
        ("nurion", {"command": "a\r#PBS"}, "one line of shell"),
        ("nurion", {"command": " "}, "one line of shell"),
        ("nurion", {"command": "# later"}, "one line of shell"),
        ("nurion", {"command": "-n 1 x"}, "one line of shell"),
        ("nurion", {"command": ["python", "train.py"]}, "one line of shell"),
        ("nurion", {"command": "python 'train.py"}, "bash cannot read the command .* unexpected EOF"),
        ("nurion", {"command": "python train.py; }"}, "bash cannot read the command"),
        ("elcapitan", {"requeue": True}, "jobs of Flux cannot submit themselves again: leave requeue out"),
        ("local", {}, "'local' has no scheduler: take one that has"),
        ("fugaku", {}, "no site 'fugaku'"),
    ],
)
def test_what_a_site_cannot_run_is_refused_in_one_sentence(site, changes, says):
    usual = {"data": "/scratch/me/data", "command": TRAIN, "nodes": 2, "hours": 1, "capacity_gb": 100}
    with pytest.raises(ValueError, match=says) as caught:
        written(site, **{**usual, **changes})
    assert "\n" not in str(caught.value)


ANY_TEXT = st.text(max_size=12) | st.text("ab /\\'\"$`;&|<>(){}#-=\n\t%!*~", max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["nurion", "cori", "elcapitan"]), ANY_TEXT, ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_whatever_is_not_refused_is_a_script_that_bash_can_read(site, folder, command, name, value):
    usual = {"data": "/scratch/me/data", "command": TRAIN, "nodes": 2, "hours": 1, "capacity_gb": 100}
    usual["requeue"] = site != "elcapitan"
    lines = len(written(site, **usual, environment={"A": "a"}, options={"-Z": "a"}).split("\n"))
    for changes in (
        {"data": f"/scratch/{folder}"},
        {"command": command},
        {"name": name},
        {"environment": {"A": value}},
        {"options": {"-Z": value}},
        {"python": f"/{folder}"},
    ):
        try:
            text = written(site, **{**usual, "environment": {"A": "a"}, "options": {"-Z": "a"}, **changes})
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert len(require_bash(text)) + 1 == lines  # so that none can be a directive of its own


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '\"$`\\"), min_size=1, max_size=12))
def test_any_name_reaches_the_shell_as_it_is(name):
    if "/" in name or "$USER" in name or name in (".", ".."):
        return
    text = written("nurion", f"/scratch/$USER/{name}", TRAIN, 1, 1)
    line = next(line for line in text.splitlines() if line.startswith("export DATA="))
    shown = subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "$DATA"'], env={"USER": "me"}, capture_output=True, check=True
    )
    assert shown.stdout.decode() == f"/scratch_ime/me/{name}"


WORDS = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '\"$`\\"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A notebook with the parameters n_ranks and x in a folder of that name, and a Python that tells its words."""
    import nbformat

    folder = tmp_path_factory.mktemp("books")
    recorder = folder / "python"
    recorder.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    recorder.chmod(0o755)

    def make(name):
        cell = nbformat.v4.new_code_cell("n_ranks = 1\nx = 1", metadata={"tags": ["parameters"]})
        path = folder / name / "book.ipynb"
        path.parent.mkdir(exist_ok=True)
        kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
        return path, recorder

    return make


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(WORDS.filter(lambda name: not set("/{}") & set(name) and name not in (".", "..")), VALUES)
def test_a_notebook_is_given_its_parameters_as_they_are(book, name, value):
    import json

    import yaml

    path, recorder = book(name)
    text = script(Job(Notebook(path, {"x": value}), "slurm", nodes=3, ranks_per_node=2, python=str(recorder)))
    require_bash(text)
    told = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=os.environ | {"SLURM_JOB_ID": "7"})
    words = json.loads(told.stdout.splitlines()[0])
    assert words[:4] == ["-m", "nurion_utils.jobs.executing", str(path), "book.7.ipynb"] and words[5] == str(
        path.parent
    )
    assert yaml.safe_load(words[-1]) == {"n_ranks": 6, "x": value}


def test_a_notebook_is_checked_before_anything_is_written(book, tmp_path):
    path, _ = book("checked")
    with pytest.raises(ValueError, match="has no parameter 'y'; those of its parameters cell: n_ranks, x"):
        Notebook(path, {"y": 1})
    with pytest.raises(ValueError, match="must be without braces"):
        Notebook(book("{n_ranks}")[0])
    with pytest.raises(ValueError, match="parameters must be numbers, texts, lists"):
        Notebook(path, {"x": np.ones(2)})
    with pytest.raises(ValueError, match="cannot be read as a notebook"):
        Notebook(tmp_path / "missing.ipynb")
    (tmp_path / "other.ipynb").write_text("print(1)")
    with pytest.raises(ValueError, match="cannot be read as a notebook") as caught:
        Notebook(tmp_path / "other.ipynb")
    assert "\n" not in str(caught.value)


def test_the_number_of_ranks_is_the_readers_own_if_it_is_given(book):
    path, recorder = book("own")
    assert "{n_ranks: 1, x: 2}" in script(Job(Notebook(path, {"n_ranks": 1, "x": 2}), "pbs", nodes=3))


def test_a_function_is_called_on_each_rank_with_what_it_brings_along(tmp_path):
    greeting = "it's $HOME"

    def greet():
        print("greets:", greeting)

    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text('#!/bin/bash\n[ "$1 $2 $3 $4" = "-n 4 -ppn 2" ] && shift 4 && for i in 1 2 3 4; do "$@"; done\n')
    mpiexec.chmod(0o755)
    link = tmp_path / "python"
    link.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    link.chmod(0o755)
    text = script(Job(greet, "slurm", nodes=2, ranks_per_node=2, python=str(link)))
    assert "#SBATCH --job-name=greet" in require_bash(text)
    ran = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.count(f"greets: {greeting}\n") == 4, ran.stderr
    with pytest.raises(ValueError, match="bytes along: let it read data from a file"):
        big = np.zeros(100_000)
        Job(lambda: big.sum(), "slurm")
    lock = threading.Lock()
    for wrong in (lambda n: n, lambda: lock.locked()):
        with pytest.raises(ValueError, match="cannot be sent to the nodes .*: it must need no arguments, nor what"):
            Job(wrong, "slurm")


def test_a_launcher_that_says_what_is_not_known_is_refused():
    site = sites.load("slurm")
    odd = site.model_copy(update={"scheduler": site.scheduler.model_copy(update={"launcher": "srun -n {size}"})})
    with pytest.raises(ValueError, match=r"may have {ranks_per_node}, .*, {ranks}, not 'srun -n {size}'"):
        script(Job("x", odd))


def test_a_job_that_is_ended_says_what_it_cost_and_does_not_pass_for_done(tmp_path):
    text = script(Job("sleep 60", "slurm")).replace("mpiexec -n 1 -ppn 1 ", "")
    with subprocess.Popen(["bash", "-c", text], stdout=-1, text=True, cwd=tmp_path, process_group=0) as job:
        while "sleep" not in [child.name() for child in psutil.Process(job.pid).children()]:
            assert job.poll() is None
        os.killpg(job.pid, signal.SIGTERM)
        told = job.communicate()[0]
    assert job.returncode != 0 and re.fullmatch(r"cost: 1 nodes x .* exit status 143\n", told)


@pytest.mark.parametrize("site", ["nurion", "cori", "elcapitan", "pbs", "slurm"])
def test_an_explained_script_is_the_script_with_reasons_and_sources(site):
    settings = {"environment": {"A": "a"}, "options": {"-Z": "z"}, "requeue": site != "elcapitan"}
    job = Job(TRAIN, site, data="/scratch/me/data", capacity_gb=100, **settings)
    plain, told = script(job).splitlines(), require_bash(explain(job))
    reasons = [line for line in told if re.fullmatch(r" *# .+ \[.+\]", line) and line not in plain]
    assert [line for line in told if line not in reasons] == plain
    directive = re.compile(r"#(SBATCH|PBS|FLUX:) -")
    assert all(before in reasons for before, line in zip(told, told[1:], strict=False) if directive.match(line))


def test_explained_lines_cite_the_site():
    told = explain(Job(TRAIN, "nurion", data="/scratch/me/data"))
    assert "# the application that runs [guide, 2026-03]\n#PBS -A tf\n" in told
    assert "[Intel MPI takes the nodes from PBS]\nmpirun -n 1" in told
