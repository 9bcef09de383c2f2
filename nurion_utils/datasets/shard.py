"""Which rank trains on which sample, in which step: the plan of every epoch, as data.

All ranks take the same number of steps, so none waits for ever in an allreduce. Every sample counts once per epoch,
whatever N mod (P x B) is. And P ranks of batch B take the same steps as one rank of batch P x B: the weights make the
average over ranks of the local losses the plain mean over the samples of the step, also in the uneven last one, and no
rank is shown a sample of another step, so statistics over a batch are right as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import whole_number

if TYPE_CHECKING:
    import tensorflow as tf


@dataclass(frozen=True)
class Shard:
    """One rank's share of every epoch; ValueError if a number is out of its range."""

    samples: int  # in the data set, N
    world_size: int  # ranks, P
    rank: int  # which one of them, from 0
    batch_size: int  # samples per rank and step, B
    seed: int = 0  # of the epoch shuffles; the same on all ranks

    def __post_init__(self) -> None:
        for name, least in [("samples", 1), ("world_size", 1), ("batch_size", 1), ("rank", 0), ("seed", 0)]:
            whole_number(getattr(self, name), name, least=least)
        whole_number(self.rank, "rank", least=0, most=self.world_size - 1)

    @property
    def steps(self) -> int:
        """Steps per epoch, ceil(N / (P x B)): the same on every rank."""
        return self.steps_after(0)

    def steps_after(self, seen: int) -> int:
        """Steps that are left of an epoch of which `seen` samples were trained on, on however many ranks."""
        return -(-(self.samples - seen) // (self.world_size * self.batch_size))

    def epoch(self, epoch: int, seen: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The samples (int64) and weights (float32) of one epoch, both of shape (steps, batch_size).

        Without the first `seen` samples, where training stopped after these and goes on, be it on other ranks or with
        other batches: then there are `steps_after(seen)` steps.

        The weights are for losses that divide by `batch_size`: 1 in a full step. A last step with only R < P x B
        samples deals them out as evenly as it can and gives them P x B / R. With R < P each sample goes to ceil(P / R)
        ranks or slots, which share its weight: then each rank has one sample, or two (and if `batch_size` is 1, one
        column more). What remains empty repeats the rank's samples of that step with weight 0.
        """
        whole_number(seen, "seen", least=0, most=self.samples - 1)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)[seen:]
        slots = self.world_size * self.batch_size
        full, tail = divmod(len(order), slots)
        copies = -(-self.world_size // tail) if tail else 1
        width = max(self.batch_size, -(-tail * copies // self.world_size))
        indices = np.full((self.steps_after(seen), width), order[0])
        weights = np.zeros(indices.shape, np.float32)
        dealt = order[: full * slots].reshape(full, self.world_size, self.batch_size)
        indices[:full, : self.batch_size] = dealt[:, self.rank]
        weights[:full, : self.batch_size] = 1
        if tail:
            mine = np.array_split(np.tile(order[full * slots :], copies), self.world_size)[self.rank]
            indices[-1] = np.resize(mine, width)
            weights[-1, : len(mine)] = slots / (tail * copies)
        return indices, weights

    def dataset(self, x: Any, y: Any = None, *, start_epoch: int = 0, resume: Any = None) -> tf.data.Dataset:
        """Batches (x, y, weight) of this rank, epoch after epoch without end.

        >>> model.fit(shard.dataset(x, y), steps_per_epoch=shard.steps, epochs=3)  # doctest: +SKIP

        Empty slots of `epoch` are left out, so the last batch of an epoch may be smaller. Keras' own losses divide by
        the size of the batch, which is what these weights assume; they differ from 1 in that batch only, and there
        only where ranks have unequally many samples. Name metrics in ``compile(weighted_metrics=...)``.

        `x` and `y` are arrays of N samples each, or `x` alone a reader: N long, with a method ``read(indices)`` that
        returns such arrays, as `volumes.Volumes`. It begins with `start_epoch`; or, also within an epoch, where
        `resume`, a `training.ResumeCallback`, says when training begins.
        """
        position = (lambda: (start_epoch, 0)) if resume is None else resume.follow(self)
        # Of a run that resumes, other ranks may leave another last batch.
        full = resume is None and self.samples % (self.world_size * self.batch_size) == 0
        size = self.batch_size if full else None
        load = self._loader(x, y, size)
        import tensorflow as tf

        def epochs_from(_: tf.Tensor) -> tf.data.Dataset:
            begin, seen = tf.numpy_function(lambda: tuple(map(np.int64, position())), [], [tf.int64, tf.int64])
            epochs = tf.data.Dataset.counter(tf.ensure_shape(begin, []))
            return epochs.map(lambda epoch: (epoch, tf.where(epoch == begin, tf.ensure_shape(seen, []), 0)))

        def steps_of(*position: tf.Tensor) -> tf.data.Dataset:
            # One call into Python per epoch, not per step.
            indices, weights = tf.numpy_function(self.epoch, position, [tf.int64, tf.float32])
            plan = tuple(tf.ensure_shape(part, (None, None)) for part in (indices, weights))
            return tf.data.Dataset.from_tensor_slices(plan)

        def batch(indices: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, ...]:
            used = weights > 0
            weights = weights[used] * (tf.reduce_sum(tf.cast(used, tf.float32)) / self.batch_size)
            return *load(indices[used]), tf.ensure_shape(weights, (size,))

        epochs = tf.data.Dataset.from_tensors(0).flat_map(epochs_from)
        return epochs.flat_map(steps_of).map(batch).prefetch(2)

    def _loader(self, x: Any, y: Any, size: int | None) -> Callable[[tf.Tensor], tuple[tf.Tensor, ...]]:
        """From indices to a batch of so many samples; ValueError if the data are of another length, or cannot be."""
        for data in (x,) if y is None else (x, y):
            if len(data) != self.samples:
                raise ValueError(f"the data must hold the shard's {self.samples} samples, not {len(data)}")
        if y is None and not hasattr(x, "read"):
            raise ValueError("give dataset(x, y) two arrays, or one reader with a read(indices) method")
        import tensorflow as tf

        if y is not None:
            arrays = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
            return lambda indices: tuple(tf.ensure_shape(tf.gather(a, indices), (size, *a.shape[1:])) for a in arrays)
        first = x.read(np.zeros(1, int))
        dtypes, shapes = [part.dtype for part in first], [part.shape[1:] for part in first]

        def load(indices: tf.Tensor) -> tuple[tf.Tensor, ...]:
            parts = zip(tf.numpy_function(x.read, [indices], dtypes), shapes, strict=True)
            return tuple(tf.ensure_shape(part, (size, *shape)) for part, shape in parts)

        return load
