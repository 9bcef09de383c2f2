"""Training that is killed, stopped or moved to other ranks goes on as if undisturbed, or says what is wrong.

Jobs are killed for real: `resumed.py` is what they run.
"""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.training import outcome, perceptron, rank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers
from keras.optimizers import SGD, Adam

from nurion_utils.ranks.environment import own_environment, rank_environment
from nurion_utils.training import checkpoints

pytestmark = pytest.mark.ranks

KILLS = int(os.environ.get("KILLS", 5))  # 100 once, when something about resuming has changed
PROGRAM = Path(__file__).with_name("resumed.py")
SAMPLES, EPOCHS = 211, 3  # as there


class Job:
    """The program on ranks of its own, as a job script starts it."""

    def __init__(self, folder: Path, ranks: int = 2, **environment: object) -> None:
        self.folder, self.ranks = folder, ranks
        folder.mkdir(exist_ok=True)
        (folder / "pids").unlink(missing_ok=True)
        environment = {name: str(value) for name, value in environment.items()}
        self.process = subprocess.Popen(
            [str(Path(sys.prefix, "bin", "mpiexec.gforker")), "-n", str(ranks), sys.executable, str(PROGRAM), folder],
            env={**own_environment(), **rank_environment(1), "PYTHONWARNINGS": "ignore", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_training(self) -> list[int]:
        """The processes of the ranks, once they train; none if there was nothing left to train."""
        pids = self.folder / "pids"
        while not pids.exists() or len(found := pids.read_text().splitlines()) < self.ranks:
            if self.process.poll() is not None:
                return []
            time.sleep(0.005)
        return [int(pid) for pid in found]

    def kill(self, pid: int) -> None:
        """This rank first, and all that is left of the job at once or a moment later."""
        with contextlib.suppress(ProcessLookupError):  # it has just come to its end
            os.kill(pid, signal.SIGKILL)
            time.sleep(random.choice([0, 0.1]))
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """The exit code, and what was printed."""
        output, _ = self.process.communicate(timeout=240)
        return self.process.returncode, output


def results(folder: Path) -> list[dict[str, np.ndarray]]:
    """All variables at the end, and what the last epoch reported, of each rank."""
    found = []
    for file in sorted(folder.glob("end*.npz")):
        with np.load(file) as arrays:
            found.append(dict(arrays))
    return found


def require_equal(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        if "loss" not in mine:  # killed when all was saved
            theirs = {name: value for name, value in theirs.items() if name.startswith("arr")}
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            np.testing.assert_array_equal(value, theirs[name])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = Job(folder).end()
    assert code == 0, output
    return results(folder)


def test_training_that_is_killed_again_and_again_ends_with_the_weights_bit_by_bit(tmp_path, undisturbed):
    kills, ends, resumed = 0, 0, 0
    while kills < KILLS or not ends:
        folder = tmp_path / str(ends)
        job = Job(folder, SLOW_S=0.01)
        pids = job.wait_for_training()
        if killed := bool(pids) and kills < KILLS:
            time.sleep(random.uniform(0, 0.7))
            job.kill(random.choice(pids))
        code, output = job.end()
        resumed += "training goes on after" in output
        if code == 0:
            require_equal(results(folder), undisturbed)
            ends += 1
        else:
            assert killed, output
            kills += 1
    print(f"{kills} kills, {resumed} times resumed, {ends} times at the end")
    assert resumed > KILLS / 2


def steps_of(folder: Path, starts: list[tuple[int, int]]) -> dict[tuple[int, int, int], set[int]]:
    """The samples of each step that counts: of a job that was killed those before its successor begins."""
    steps: dict[tuple[int, int, int], set[int]] = {}
    for line in map(json.loads, (folder / "seen").read_text().splitlines()):
        job, epoch, seen = line["job"], line["epoch"], line["seen"]
        if job + 1 == len(starts) or (epoch, seen) <= starts[job + 1]:
            steps.setdefault((job, epoch, seen), set()).update(line["samples"])
    return steps


def within_epoch(epoch: int, name: str) -> bool:
    """Whether this is a checkpoint from the middle of the epoch."""
    found = checkpoints.NAME.fullmatch(name)
    return bool(found) and int(found[1]) == epoch and int(found[2]) > 0


def start_of(output: str) -> tuple[int, int]:
    """The epoch and the samples of it after which a job went on."""
    seen, epoch = re.search(r"training goes on after (\d+) of \d+ samples of epoch (\d+)", output).groups()
    return int(epoch) - 1, int(seen)


def test_killed_and_moved_to_more_and_fewer_ranks_training_sees_each_sample_of_an_epoch_once(tmp_path):
    starts, numbers = [], (2, 3, 1)
    for number, ranks in enumerate(numbers):
        job = Job(tmp_path, ranks, JOB=number, SLOW_S=0.01)
        pids = job.wait_for_training()
        if number + 1 < len(numbers):
            while not any(within_epoch(number, file.name) for file in (tmp_path / "kept").iterdir()):
                assert job.process.poll() is None, job.end()
                time.sleep(0.001)
            job.kill(pids[0])
        code, output = job.end()
        starts.append(start_of(output) if number else (0, 0))
    assert code == 0, output
    assert any(seen for _, seen in starts), "no job went on within an epoch"
    steps = steps_of(tmp_path, starts)
    for epoch in range(EPOCHS):
        seen = [sample for key, samples in steps.items() if key[1] == epoch for sample in samples]
        assert sorted(seen) == list(range(SAMPLES))


def test_a_job_that_nears_its_end_stops_in_the_middle_of_an_epoch_and_its_successor_ends_alike(tmp_path, undisturbed):
    code, output = Job(tmp_path, NURION_ENDS_AT=time.time() + 3600, MARGIN_S=4000).end()
    assert code == os.EX_TEMPFAIL, output
    told = re.search(r"was stopped after (\d+) of 211 samples of epoch 1 of 3: the job ends in 3\d\d\d s; run", output)
    assert 0 < int(told[1]) < SAMPLES
    code, output = Job(tmp_path, NURION_ENDS_AT=time.time() + 3600).end()
    assert code == 0 and start_of(output) == (0, int(told[1]))
    require_equal(results(tmp_path), undisturbed)


def test_sigterm_on_any_rank_saves_and_stops_all_of_them(tmp_path):
    job = Job(tmp_path, SLOW_S=0.1)
    os.kill(job.wait_for_training()[-1], signal.SIGTERM)
    code, output = job.end()
    assert code == os.EX_TEMPFAIL, output
    assert ": SIGTERM came; run it again to go on (" in output


class Death(Exception):
    """Ends training without a word to the callback."""


class Die(keras.callbacks.Callback):
    def __init__(self, at):
        self.at = at

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at and logs:
            raise Death


def plain():
    return perceptron(1 + rank(), layers.Dropout(0.5, seed=rank())), Adam(0.01)


def train(folder, build=plain, epochs=2, die_at=None, others=(), samples=38, seed=0, **chosen):
    """On a rank: the variables at the end, the metrics of the last epoch, and the callback; five steps are an epoch."""
    import horovod.tensorflow as hvd

    from nurion_utils.datasets import Shard
    from nurion_utils.training import BroadcastCallback, DistributedOptimizer, ResumeCallback

    hvd.init()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(samples, 6)).astype("float32"), rng.normal(size=(samples, 3)).astype("float32")
    model, optimizer = build()
    model.compile(DistributedOptimizer(optimizer), "mse", weighted_metrics=["mae"])
    shard = Shard(samples, hvd.size(), hvd.rank(), 4, seed)
    resume = ResumeCallback(folder, **{"every_steps": 1} | chosen)
    fit = {"steps_per_epoch": shard.steps, "epochs": epochs, "verbose": 0}
    callbacks = [BroadcastCallback(), *others, resume, Die(die_at)]
    try:
        history = model.fit(shard.dataset(x, y, resume=resume), **fit, callbacks=callbacks).history
    except Death:
        return None
    variables = [
        keras.ops.convert_to_numpy(v).astype("float64") for v in (*model.variables, *model.optimizer.variables)
    ]
    return {"end": variables, "metrics": {name: of[-1] for name, of in history.items()}, "finished": resume.finished}


class Noise(layers.Layer):
    """Draws from the generator that no layer has of its own."""

    def call(self, x, training=False):
        return x + 0.1 * keras.random.normal(keras.ops.shape(x), dtype=x.dtype) if training else x


def accumulating():
    return perceptron(1 + rank(), Noise()), SGD(0.1, momentum=0.9, gradient_accumulation_steps=3)


def of_policy(name, middle, optimizer):
    def build():
        usual = keras.config.dtype_policy()
        keras.config.set_dtype_policy(name)
        model = perceptron(1 + rank(), *middle())
        keras.config.set_dtype_policy(usual)
        return model, optimizer()

    return build


BUILDS = {
    "gradients that accumulate, and a layer without a generator": accumulating,
    "bfloat16, statistics of batches and averages of weights": of_policy(
        "bfloat16", lambda: [layers.BatchNormalization()], lambda: Adam(0.01, use_ema=True, ema_overwrite_frequency=4)
    ),
    "float16 with a scaled loss, and dropout": of_policy(
        "mixed_float16",
        lambda: [layers.Dropout(0.5, seed=rank())],
        lambda: keras.optimizers.LossScaleOptimizer(Adam(0.01), 2.0**8, dynamic_growth_steps=2),
    ),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_what_dies_anywhere_goes_on_bit_by_bit_with_its_optimizer_generators_and_metrics(world2, tmp_path, build):
    folders = [str(tmp_path / name) for name in ("whole", "died")]
    whole = world2.run(train, folders[0], build, timeout_s=240)
    for at in [(0, 1), (1, 2)]:
        assert world2.run(train, folders[1], build, 2, at, timeout_s=240) == [None, None]
    died = world2.run(train, folders[1], build, timeout_s=240)
    for mine, theirs in zip(died, whole, strict=True):
        assert mine["metrics"] == theirs["metrics"] and mine["finished"]
        assert all((a == b).all() for a, b in zip(mine["end"], theirs["end"], strict=True))


def test_training_that_is_finished_is_not_done_again_but_goes_on_if_there_shall_be_more(world2, tmp_path):
    first = world2.run(train, str(tmp_path), timeout_s=240)
    again = world2.run(train, str(tmp_path), timeout_s=240)
    assert all(each["metrics"] == {} and each["finished"] for each in again)
    longer = world2.run(train, str(tmp_path), plain, 3, timeout_s=240)
    whole = world2.run(train, str(tmp_path / "whole"), plain, 3, timeout_s=240)
    for a, b in [(again, first), (longer, whole)]:
        for mine, theirs in zip(a, b, strict=True):
            assert all((x == y).all() for x, y in zip(mine["end"], theirs["end"], strict=True))


def test_training_that_another_callback_ended_has_ended(world2, tmp_path):
    def stopping():
        return [keras.callbacks.EarlyStopping("loss", min_delta=100, patience=1)]

    def train_until_it_learns_no_more(folder):
        return train(folder, epochs=9, others=stopping())

    first = world2.run(train_until_it_learns_no_more, str(tmp_path), timeout_s=240)
    again = world2.run(train_until_it_learns_no_more, str(tmp_path), timeout_s=240)
    assert all(each["finished"] and each["metrics"] for each in first)
    assert all(each["finished"] and not each["metrics"] for each in again)


def test_a_model_that_was_resumed_is_trained_from_its_first_epoch_by_a_later_fit(world2, tmp_path):
    def train_twice(folder):
        from nurion_utils.datasets import Shard
        from nurion_utils.training import ResumeCallback

        x = np.ones((8, 6), "float32")
        model, optimizer = plain()
        model.compile(optimizer, "mse")
        shard = Shard(8, 1, 0, 4)
        for _ in range(2):
            resume = ResumeCallback(f"{folder}/{rank()}")
            data = shard.dataset(x, x[:, :3], resume=resume)
            model.fit(data, steps_per_epoch=2, epochs=2, verbose=0, callbacks=[resume])
        return model.fit(x, x[:, :3], epochs=2, verbose=0).epoch

    assert world2.run(train_twice, str(tmp_path), timeout_s=240) == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"build": lambda: (perceptron(1, layers.Dense(5)), Adam(0.01))},
            "holds checkpoints of other training, .* in place of .*; name another folder, or empty it",
        ),
        ({"build": lambda: (perceptron(1), SGD(0.01))}, "holds checkpoints of other training, "),
        (
            {"samples": 39},
            "holds checkpoints of other training, 38 samples in place of 39 samples; name another folder",
        ),
        ({"seed": 1}, "shuffles of seed 0 in place of shuffles of seed 1; name another folder, or empty it"),
    ],
    ids=["model", "optimizer", "data", "shuffle"],
)
def test_checkpoints_of_other_training_are_refused_on_all_ranks(world2, tmp_path, change, says):
    def refused(folder):
        return outcome(lambda: train(folder, **change))

    world2.run(train, str(tmp_path), plain, 1, timeout_s=240)
    before = sorted(tmp_path.iterdir())
    for told in world2.run(refused, str(tmp_path), timeout_s=240):
        assert re.search(says, told) and told.startswith("ValueError: ") and "\n" not in told
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_to_is_refused_on_all_ranks(world2, tmp_path):
    (tmp_path / "file").touch()
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o500)

    def refused(folder):
        usual = os.geteuid()
        try:
            if not usual:
                os.seteuid(65534)  # permissions do not bind root
            return outcome(lambda: train(folder))
        finally:
            os.seteuid(usual)

    for folder in (tmp_path / "file", foreign):
        for told in world2.run(refused, str(folder), timeout_s=240):
            assert re.fullmatch(
                rf"ValueError: no checkpoints can be kept in {folder} \(.*\); name a folder of .*", told
            )


def test_a_full_disk_stops_no_training_and_leaves_the_last_checkpoint(world2, tmp_path):
    def train_on_a_full_disk(folder):
        class Fill(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                return train(folder, others=[Fill()]) and [str(each.message) for each in told]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    on0, on1 = world2.run(train_on_a_full_disk, str(tmp_path), timeout_s=240)
    told = [each for each in on0 if "checkpoint" in each]
    last = str(max(tmp_path.glob("*.npz")))
    assert "epoch000001-sample000000000000" in last and not any("checkpoint" in each for each in on1)
    assert len(told) == 5 and all(
        re.match(r"no checkpoint could be written \(.*File too large\)", each) for each in told
    )
    assert all(each.endswith(f"; the last is {last}") for each in told)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".npz", ".npz"]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_checkpoint_is_passed_over_and_training_ends_alike(world2, tmp_path, damage):
    def train_warned(folder):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            return train(folder), [str(each.message) for each in told if "damaged" in str(each.message)]

    whole = world2.run(train, str(tmp_path / "whole"), timeout_s=240)
    world2.run(train, str(tmp_path), plain, 2, (1, 2), timeout_s=240)
    good, newest = sorted(tmp_path.glob("*.npz"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data if damage == "changed" else data[:-1])
    (on0, told), (on1, nothing) = world2.run(train_warned, str(tmp_path), timeout_s=240)
    assert told == [f"{newest.name} in {tmp_path} is damaged, so {good.name} is taken"] and not nothing
    for mine, theirs in zip((on0, on1), whole, strict=True):
        assert all((a == b).all() for a, b in zip(mine["end"], theirs["end"], strict=True))


def test_fit_that_could_not_be_resumed_is_refused(world2, tmp_path):
    def refusals(folder):
        from nurion_utils.datasets import Shard
        from nurion_utils.training import ResumeCallback

        def fit(knows=True, steps=2, at_once=1):
            model, optimizer = plain()
            model.compile(optimizer, "mse", steps_per_execution=at_once)
            resume, x = ResumeCallback(folder), np.ones((8, 6), "float32")
            data = Shard(8, 1, 0, 4).dataset(x, x[:, :3], resume=resume if knows else None)
            model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[resume])

        return [outcome(partial(fit, **wrong)) for wrong in ({"knows": False}, {"steps": 1}, {"at_once": 2})]

    for told in sum(world2.run(refusals, str(tmp_path), timeout_s=240), []):
        assert told.startswith("ValueError: training can be resumed only with data from shard.dataset(..., resume=")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"every_steps": 0}, "every_steps must be a whole number from 1 up, not 0"),
        ({"every_s": 0}, "every_s must be a number above 0, not 0"),
        ({"ends_at": "noon"}, "ends_at must be a finite number, not 'noon'"),
        ({"margin_s": -1}, "margin_s must be a number from 0, not -1"),
    ],
)
def test_numbers_that_are_not_possible_are_refused(tmp_path, wrong, says):
    from nurion_utils.training import ResumeCallback

    with pytest.raises(ValueError, match=f"^{says}$"):
        ResumeCallback(tmp_path, **wrong)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_damages_the_newest_checkpoint_it_is_found_out(tmp_path, data):
    for old in tmp_path.iterdir():
        old.unlink()
    first, about = None, {"epoch": 0, "seen": 5}
    first = checkpoints.write(tmp_path, about, [np.arange(3.0)], None)
    newest = checkpoints.write(tmp_path, {"epoch": 1, "seen": 2}, [np.arange(4.0)], first)
    assert checkpoints.newest(tmp_path)[0] == newest
    content = newest.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    newest.write_bytes(data.draw(st.sampled_from([content[:at], flipped, content + b"\0"])))
    with pytest.warns(UserWarning, match=f"^{newest.name} in .* is damaged, so {first.name} is taken$"):
        path, told, (array,) = checkpoints.newest(tmp_path)
    assert (path, told) == (first, about) and (array == np.arange(3.0)).all()
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=f"all checkpoints in .* are damaged; delete {newest.name}, {first.name} to"):
        checkpoints.newest(tmp_path)


def test_two_checkpoints_are_kept_and_what_is_not_one_stays(tmp_path):
    (tmp_path / "notes.npz").touch()
    before = None
    written = []
    for seen in range(4):
        before = checkpoints.write(tmp_path, {"epoch": 0, "seen": seen}, [np.arange(3)], before)
        written.append(before)
    assert sorted(tmp_path.iterdir()) == [*written[-2:], tmp_path / "notes.npz"]
