"""Jobs of a real Slurm that submit themselves again: what the walltime ends goes on, and ends as if undisturbed."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from helpers import PATIENCE_S
from helpers.clusters import BEGIN, leaves_nothing, make, traces

from nurion_utils.cluster import Cluster
from nurion_utils.ranks.environment import rank_environment

pytestmark = [pytest.mark.lab, pytest.mark.ranks]

PROGRAM = Path(__file__).parents[1] / "training" / "resumed.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with make() as cluster:
        yield cluster


@pytest.fixture
def work(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see; afterwards no job is left, nor anything of ours on a node."""
    folder = cluster.directory / request.node.name.partition("[")[0]
    folder.mkdir()
    with leaves_nothing() as found:
        yield folder
        found.append(lambda: traces(cluster, ["squeue", "--noheader"]))


HEAD = """
from nurion_utils import jobs
from nurion_utils.schedulers import slurm
from pathlib import Path

def submit(command, *nodes, **changes):
    return jobs.submit(jobs.Job(command, "slurm", *nodes, directory=work, **{"requeue": True, **changes}))

def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("\\n".join(file.read_text() for file in work.glob("*.o*")))
        time.sleep(0.1)

def end(job):
    until(lambda: jobs.status(job).ended)
    return jobs.status(job).name, jobs.status(job).exit_status, job.last.log.read_text()
"""


def on_head(cluster: Cluster, work: Path, code: str, **given: Any) -> Any:
    """Run code where jobs are submitted: what it says at last."""
    values = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    words = [sys.executable, "-c", f"{BEGIN}{HEAD}work = Path({str(work)!r})\n{values}{code}"]
    ran = cluster.run(words, timeout=6 * PATIENCE_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


# As ranks of a world have it; and the jobs take the end of their time for near, as Slurm will end them before.
RANKS = {name: value for name, value in rank_environment(1).items() if name not in ("UCX_TLS", "PYTHONPATH")}
RANKS |= {"NURION_ENDS_AT": "0", "PYTHONWARNINGS": "ignore"}
# Steps take a second, so that there is time, but in the last job.
TRAIN = """
slow = f'$([ "$(ls {work}/*.sh | wc -l)" -lt {jobs_in_all} ] && echo 1 || echo 0)'
command = f"env -u NURION_ENDS_AT SLOW_S={slow} {sys.executable} {program} {work}"
pids = work / "pids"

def trains():
    return pids.exists() and len(pids.read_text().split()) == 2 and any((work / "kept").glob("epoch*"))

def let_end(job, seconds):
    # Slurm looks at limits every half a minute only.
    pids.unlink(missing_ok=True)
    until(trains)
    number = job.last.id
    os.system(f"scontrol update JobId={number} EndTime=now+{seconds}")
    until(lambda: job.last.id != number)
    until(lambda: slurm.state(number).ended)
    return slurm.state(number).reason, work.joinpath(f"train.o{number}").read_text()
"""


def results(folder: Path) -> list[np.ndarray]:
    """All variables at the end, of both ranks."""
    found = []
    for rank in range(2):
        with np.load(folder / f"end{rank}.npz") as arrays:
            found += [arrays[name] for name in arrays]
    return found


@pytest.mark.slow
def test_training_that_the_walltime_kills_twice_goes_on_and_ends_bit_by_bit_as_undisturbed(
    cluster: Cluster, work: Path
) -> None:
    code = f"""{TRAIN}
(work / "whole").mkdir()
alone = f"env -u NURION_ENDS_AT {{sys.executable}} {{program}} ."
whole = jobs.submit(jobs.Job(alone, "slurm", 2, directory=work / "whole", environment=environment))
job = submit(command, 2, hours=0.1, environment=environment)
ends = [let_end(job, 2) for _ in range(2)]
last = end(job)
until(lambda: jobs.status(whole).ended)
say([ends, last])
"""
    given = {"program": str(PROGRAM), "environment": RANKS, "jobs_in_all": 3}
    ends, (name, _, log) = on_head(cluster, work, code, **given)
    assert name == "done", log
    for reason, told in ends:
        assert reason == "TIMEOUT TimeLimit" and "goes on as job" in told
    assert "training goes on after" in log
    for mine, theirs in zip(results(work), results(work / "whole"), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_slurm_warns_training_of_the_end_so_that_it_saves_and_ends_cleanly(cluster: Cluster, work: Path) -> None:
    code = f"""{TRAIN}
job = submit(command, 2, hours=0.1, environment=environment)
say([*let_end(job, 40), end(job)])  # it is warned 36 s before, a tenth of the walltime
"""
    given = {"program": str(PROGRAM), "environment": RANKS, "jobs_in_all": 2}
    reason, told, (name, _, log) = on_head(cluster, work, code, **given)
    assert "SIGTERM came; run it again to go on" in told and "exit status 75" in told and "TIMEOUT" not in reason
    assert name == "done" and "training goes on after" in log


def test_two_jobs_without_progress_end_the_chain(cluster: Cluster, work: Path) -> None:
    name, status, log = on_head(cluster, work, "say(end(submit('sh -c \"exit 75\"')))")
    assert (name, status) == ("failed", 75)
    assert "is not submitted again: 2 jobs in a row have made no progress" in log


def test_a_chain_is_cancelled(cluster: Cluster, work: Path) -> None:
    code = """
job = submit("sh -c 'echo saved > $NURION_PROGRESS; [ ! -e second ] || sleep 600; touch second; exit 75'")
until(lambda: job.last.id != job.id and jobs.status(job).name == "running")
jobs.cancel(job)
until(lambda: jobs.status(job).ended)
say([jobs.status(job).name, len([*work.glob("*.sh")])])
"""
    assert on_head(cluster, work, code) == ["cancelled", 2]


TRAINING = """
def train(margin_s):
    import horovod.tensorflow as hvd
    import keras
    from nurion_utils.datasets import Shard, digits
    from nurion_utils import models
    from nurion_utils.training import DistributedOptimizer, ResumeCallback

    hvd.init()
    x, y, *_ = digits.load()
    shard = Shard(len(x), hvd.size(), hvd.rank(), batch_size=32, seed=1)
    model, resume = models.mlp(), ResumeCallback("kept", margin_s=margin_s)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(DistributedOptimizer(keras.optimizers.Adam(1e-3)), loss, jit_compile=False)
    data = shard.dataset(x, y, resume=resume)
    done = []  # steps that were done before pass by without logs
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: done.append(bool(logs)))
    model.fit(data, steps_per_epoch=shard.steps, epochs=2, callbacks=[count, resume], verbose=0)
    return resume.exit_code, sum(done)

import sys
from pathlib import Path
from nurion_utils import ranks

margin_s = 0 if Path("begun").exists() else 1e6  # the first job shall have no time left
Path("begun").touch()
with ranks.start(n_ranks) as world:
    code, steps = world.run(train, margin_s)[0]
print(steps, "steps")
if code:
    sys.exit(code)
"""


@pytest.mark.slow
def test_a_notebook_goes_through_its_cells_again_and_its_training_goes_on(cluster: Cluster, work: Path) -> None:
    cells = [nbformat.v4.new_code_cell("n_ranks = 1", metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(each) for each in (TRAINING, "print('the end')")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), work / "book.ipynb")
    words = "--site slurm --nodes 2 --hours 0.1 --requeue --wait".split()
    command = [sys.executable, "-m", "nurion_utils.jobs", "book.ipynb", *words]
    ran = cluster.run(["sh", "-c", 'cd "$0" && exec "$@"', str(work), *command], timeout=6 * PATIENCE_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first, second = (file.read_text() for file in sorted(work.glob("book.o*"), key=lambda file: file.stat().st_mtime))
    assert "goes on as job" in ran.stdout and "exit status 75" in first and "exit status 0" in second
    steps = [int(re.search(r"^(\d+) steps$", log, re.MULTILINE)[1]) for log in (first, second)]
    assert 0 < steps[0] < sum(steps) == 38 and "the end" in second and "the end" not in first
