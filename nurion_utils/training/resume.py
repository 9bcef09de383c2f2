"""Training that outlives its job: all that it depends on is saved, and it ends by itself before the walltime does."""

import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.random.seed_generator import global_seed_generator  # nothing public leads to its state

from nurion_utils._checks import number, whole_number
from nurion_utils.ranks.environment import end_of_job, note_progress
from nurion_utils.training import checkpoints
from nurion_utils.training.callbacks import all_variables, broadcast_model, outline_of_slots, ranks_of
from nurion_utils.training.communicator import digest, first_difference, outline
from nurion_utils.training.optimizer import nested


class ResumeCallback(keras.callbacks.Callback):
    """Save training in a folder; the same `fit`, called again after whatever ended it, goes on from there.

    >>> resume = ResumeCallback("/scratch/me/run7")  # doctest: +SKIP
    >>> data = shard.dataset(x, y, resume=resume)  # doctest: +SKIP
    >>> model.fit(data, steps_per_epoch=shard.steps, epochs=90, callbacks=[..., resume])  # doctest: +SKIP
    >>> sys.exit(resume.exit_code)  # doctest: +SKIP

    On as many ranks as before the weights become, bit by bit, those of training that nothing disturbed. On another
    number, or with other batches, the rest of the epoch is dealt out anew: each sample is still trained on once.

    Rank 0 writes and reads for all: weights, optimizer variables and the position in the data, and of each rank the
    states of Keras' random generators, statistics of batch normalisation and sums of metrics. Ranks of another number
    take the means of the latter two, and generators of their own. The last two checkpoints are kept. A damaged one is
    passed over, and a full disk stops no training, but a warning says so.

    Not saved are histories and states of callbacks, such as the patience of `EarlyStopping` or a warm-up that counts
    for itself (schedules of an optimizer go by its own count, which is saved), and the generators of NumPy, Python and
    TensorFlow. Callbacks see the steps of an epoch that were done before pass by, without logs. Place this one last:
    what later ones do when an epoch ends comes after it is saved. (Keras' own `BackupAndRestore` has no part in ranks,
    generators and checksums, and begins an epoch anew with the weights from its middle.)

    Parameters
    ----------
    folder : str or os.PathLike
        For the checkpoints of this training alone.
    every_steps, every_s : int, float
        Save after so many steps of an epoch, and when the last checkpoint is so many seconds old; besides at its end.
    ends_at : float, optional
        When the job ends, in seconds since 1970; by default what ``NURION_ENDS_AT`` or ``SLURM_JOB_END_TIME`` says.
    margin_s : float
        So long before that, training is saved and stopped; it must do for both, and for a validation. The same happens
        when any rank gets SIGTERM, as by ``sbatch --signal=TERM@300``, unless something else handles it.

    After `fit`, `finished` tells whether training came to its end and was not stopped here, and `exit_code` tells a job
    script: it is 0, or 75 (``os.EX_TEMPFAIL``) if there is more to do.

    Raises
    ------
    ValueError
        If an argument is not valid. By `fit`, on all ranks and before the first step, if checkpoints are of another
        model, data set or shuffle, or all damaged, if the folder cannot be written to, or if `fit` is not called as
        above: with data that know of the callback, ``steps_per_epoch``, and no ``steps_per_execution``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_s: float = 600.0,
        ends_at: float | None = None,
        margin_s: float = 120.0,
    ) -> None:
        super().__init__()
        self.folder, self.finished = Path(folder).absolute(), False
        self._every_steps = None if every_steps is None else whole_number(every_steps, "every_steps")
        self._every_s = number(every_s, "every_s", above=0)
        self._ends_at = end_of_job() if ends_at is None else number(ends_at, "ends_at")
        self._margin_s = number(margin_s, "margin_s", least=0)
        self._shard: Any = None
        self._epoch = self._begin = 0  # where training begins; later the epoch it is in, and where that was begun

    @property
    def exit_code(self) -> int:
        return 0 if self.finished else os.EX_TEMPFAIL

    def follow(self, shard: Any) -> Callable[[], tuple[int, int]]:
        """For `Shard.dataset`: returns what tells in which epoch training begins, and after how many samples."""
        self._shard = shard
        return lambda: (self._epoch, self._begin)

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self._shard is None or self.params["steps"] != self._shard.steps or self.model.steps_per_execution != 1:
            needs = "data from shard.dataset(..., resume=callback), steps_per_epoch=shard.steps, steps_per_execution=1"
            raise ValueError(f"training can be resumed only with {needs}")
        self._ranks, self._path = ranks_of(self.model), None
        self._epoch = self._begin = self._seen = self._step = self._talked_step = self._next_talk = 0
        self._saved_s = self._talked_s = time.monotonic()
        self._talk_s, self._reason, self._signal, self._is_first_epoch = 0.0, "", "", True
        slots = all_variables(self.model)[len(self.model.weights) :]
        own = [f"a state of shape {tuple(v.shape)} and type {v.dtype}" for v in _own_variables(self.model)]
        self._about = {"data": [f"{self._shard.samples} samples", f"shuffles of seed {self._shard.seed}"]}
        self._about["variables"] = [*outline(self.model.weights), *outline_of_slots(slots), *own]
        found = self._ranks.allgather(self._find() if self._ranks.rank == 0 else None)[0]
        if isinstance(found, str):
            raise ValueError(found)
        if found is not None:
            self._go_on(*found)
        self._listen()

    def _find(self) -> str | tuple[dict[str, Any], list[np.ndarray]] | None:
        """On rank 0: take over weights and optimizer variables; return the rest, or None, or why that cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
            if (found := checkpoints.newest(self.folder)) is None:
                return None
        except OSError as error:
            return f"no checkpoints can be kept in {self.folder} ({error.strerror}); name a folder of your own"
        except ValueError as error:
            return str(error)
        self._path, about, arrays = found
        for what, mine in self._about.items():
            if about[what] != mine:
                other = "{1} in place of {2}".format(*first_difference(about[what], mine))
                return f"{self.folder} holds checkpoints of other training, {other}; name another folder, or empty it"
        for variable, value in zip(variables := all_variables(self.model), arrays, strict=False):
            variable.assign(value)
        return about, arrays[len(variables) :]

    def _go_on(self, about: dict[str, Any], own: list[np.ndarray]) -> None:
        broadcast_model(self.model)
        self._epoch, self._begin, epochs = about["epoch"], about["seen"], self.params["epochs"]
        self._are_as_many = about["ranks"] == self._ranks.size
        variables = _own_variables(self.model)
        self._metrics = own[len(variables) :]
        self._assign(variables, own[: len(variables)])
        ended = about["ended"] or self._epoch >= epochs
        self.model._initial_epoch = epochs if ended else self._epoch  # this is how Keras' own callback does it
        if self._ranks.rank == 0:
            where = f"{self._begin:,} of {self._shard.samples:,} samples of epoch {self._epoch + 1} of {epochs}"
            print("training is finished" if ended else f"training goes on after {where}", f"({self._path})", flush=True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if not self._is_first_epoch:
            self._begin = 0
        self._epoch, self._seen, self._is_first_epoch = epoch, self._begin, False
        self.model._initial_epoch = None  # or a later fit would begin there, too
        self._passed = self._shard.steps - self._shard.steps_after(self._begin)
        if self._begin:
            self._pass_over()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        shard, steps = self._shard, batch + 1 - self._passed
        if steps <= 0:
            return
        self._step += 1
        self._seen = min(self._begin + steps * shard.world_size * shard.batch_size, shard.samples)
        due = self._every_steps is not None and (batch + 1) % self._every_steps == 0
        if self._step >= self._next_talk:
            due |= self._talk()
        if self._reason:
            self.model.stop_training = due = True
        if due and self._seen < shard.samples:
            self._save(self._epoch, self._seen)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._seen == self._shard.samples:  # else Keras ends an epoch that was stopped
            self._save(epoch + 1, 0, ended=self.model.stop_training and not self._reason)

    def on_train_end(self, logs: dict | None = None) -> None:
        self.model._initial_epoch = None
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        epochs, samples = self.params["epochs"], self._shard.samples
        self.finished = not self._reason or (self._epoch + 1 == epochs and self._seen == samples)
        if not self.finished and self._ranks.rank == 0:
            where = f"after {self._seen:,} of {samples:,} samples of epoch {self._epoch + 1} of {epochs}"
            print(
                f"training was stopped {where}: {self._reason}; run it again to go on ({self._path or 'anew'})",
                flush=True,
            )

    def _save(self, epoch: int, seen: int, ended: bool = False) -> None:
        own = self._gather()
        self._saved_s = time.monotonic()
        if self._ranks.rank == 0:
            about = self._about | {"epoch": epoch, "seen": seen, "ended": ended, "ranks": self._ranks.size}
            arrays = checkpoints.values(all_variables(self.model)) + own
            try:
                self._path = checkpoints.write(self.folder, about, arrays, self._path)
                note_progress()
            except OSError as error:
                warnings.warn(
                    f"no checkpoint could be written ({error}); the last is {self._path or 'not there'}", stacklevel=2
                )

    def _gather(self) -> list[np.ndarray]:
        """What ranks have of their own: of each variable the values of all, or one where it is the same on all."""
        mine = checkpoints.values(_own_variables(self.model) + self.model.metrics_variables)
        digests = np.array(self._ranks.allgather([digest(value.tobytes()) for value in mine]))
        differ = (digests != digests[0]).any(axis=0)
        everyones = self._ranks.allgather([value for value, other in zip(mine, differ, strict=True) if other])
        others = zip(*everyones, strict=True)
        return [np.stack(next(others) if other else [value]) for value, other in zip(mine, differ, strict=True)]

    def _assign(self, variables: list[keras.Variable], saved: list[np.ndarray]) -> None:
        for variable, by_rank in zip(variables, saved, strict=True):
            if self._are_as_many:
                variable.assign(by_rank[self._ranks.rank % len(by_rank)])
            elif keras.backend.is_float_dtype(variable.dtype):
                variable.assign(by_rank.mean(axis=0))

    def _pass_over(self) -> None:
        """Let `fit` count steps that were done before; Keras has no other way to begin within an epoch."""
        model, train, left = self.model, self.model.train_function, iter(range(self._passed))

        def counted(iterator: Any) -> dict:
            if next(left, None) is not None:
                return {}
            model.train_function = train
            model._symbolic_build(data_batch=iterator.element_spec)  # or metrics would be made in the step, of zeros
            metrics = model.metrics_variables
            if [tuple(variable.shape) for variable in metrics] == [by_rank.shape[1:] for by_rank in self._metrics]:
                self._assign(metrics, self._metrics)
            return train(iterator)

        model.train_function = counted

    def _talk(self) -> bool:
        """Agree with all ranks whether to stop, and when to talk again; returns whether to save."""
        begin_s = time.monotonic()
        step_s = (begin_s - self._talked_s) / (self._step - self._talked_step)
        pause_s = min(max(1.0, 200 * self._talk_s), 10.0)  # so that talking takes half a per cent of the time
        left_s = float("inf") if self._ends_at is None else self._ends_at - time.time()
        reason = self._signal or (f"the job ends in {left_s:.0f} s" if left_s <= self._margin_s else "")
        due = begin_s - self._saved_s >= self._every_s
        everyones = self._ranks.allgather((reason, due, max(1, int(pause_s / step_s))))
        self._talked_s, self._talked_step = time.monotonic(), self._step
        self._talk_s = self._talked_s - begin_s
        self._reason = next((reason for reason, _, _ in everyones if reason), "")
        _, due, pause = everyones[0]  # clocks differ
        self._next_talk = self._step + pause
        return due

    def _listen(self) -> None:
        # Not to SIGUSR1, which Slurm may also send: with MPICH it says that another rank has died.
        is_main = threading.current_thread() is threading.main_thread()  # others cannot
        self._listens = is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self._listens:
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self._signal = "SIGTERM came"
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process


def _own_variables(model: keras.Model) -> list[keras.Variable]:
    """What a rank may have of its own, besides metrics: statistics, generators, gradients not averaged yet."""
    sums = [v for each in nested(model.optimizer) for v in getattr(each, "_accumulated_gradients", [])]
    return [*model.non_trainable_variables, *sums, global_seed_generator().state]
