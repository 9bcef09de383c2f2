"""Which rank trains on which sample, in which step: the plan of every epoch, as data.

The plan answers three questions at once.  All ranks take the same number of steps, so none waits for ever
in an allreduce.  Every sample is trained on exactly once per epoch, whatever N mod (P x B) is.  And P ranks
of batch B take the same steps as one rank of batch P x B: the weights make the average over ranks of the
local losses equal the plain mean over the samples of the step, also in the uneven last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf


class Reader(Protocol):
    """What `Shard.dataset` needs of data that stay on disk."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Shard:
    """One rank's share of every epoch.

    Parameters
    ----------
    samples : int
        Samples in the data set, N.
    world_size : int
        Number of ranks, P.
    rank : int
        This rank, 0 <= rank < P.
    batch_size : int
        Samples per rank and step, B.
    seed : int
        Seed of the epoch shuffles; it must be the same on all ranks.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    samples: int
    world_size: int
    rank: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in [("samples", 1), ("world_size", 1), ("batch_size", 1), ("rank", 0), ("seed", 0)]:
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size, {self.world_size}, not {self.rank}.")

    @property
    def steps(self) -> int:
        """Steps per epoch, ceil(N / (P x B)): the same on every rank."""
        return -(-self.samples // (self.world_size * self.batch_size))

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples and weights of one epoch.

        Returns
        -------
        indices : numpy.ndarray, int64, shape (steps, batch_size)
        weights : numpy.ndarray, float32, shape (steps, batch_size)
            1 in a full step.  A last step with only R < P x B samples deals them out as evenly as it can and
            gives them P x B / R; the empty slots repeat a sample with weight 0, which changes nothing.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        slots = self.world_size * self.batch_size
        full, tail = divmod(self.samples, slots)
        indices = np.full((self.steps, self.batch_size), order[0])
        weights = np.zeros((self.steps, self.batch_size), np.float32)
        indices[:full] = order[: full * slots].reshape(full, self.world_size, self.batch_size)[:, self.rank]
        weights[:full] = 1
        if tail:
            mine = np.array_split(order[full * slots :], self.world_size)[self.rank]
            indices[-1, : len(mine)] = mine
            weights[-1, : len(mine)] = slots / tail
        return indices, weights

    def dataset(self, x: Any, y: Any = None, *, start_epoch: int = 0) -> tf.data.Dataset:
        """Batches (x, y, weight) of this rank, epoch after epoch without end.

        >>> model.fit(shard.dataset(x, y), steps_per_epoch=shard.steps, epochs=3)

        Keras' own losses divide by the batch size, which is what the weights assume; name metrics in
        ``compile(weighted_metrics=...)``, so that they too leave out the empty slots.

        Parameters
        ----------
        x, y : array of N samples each; or a `Reader` alone, such as `volumes.Volumes`
        start_epoch : int
            Where to begin, for a run that resumes.
        """
        for data in (x,) if y is None else (x, y):
            if len(data) != self.samples:
                raise ValueError(f"The data must hold the shard's {self.samples} samples, not {len(data)}.")
        if y is None and not hasattr(x, "read"):
            raise ValueError("Give dataset(x, y) two arrays, or one reader with a read(indices) method.")
        import tensorflow as tf

        if y is not None:
            x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)

            def load(indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                return tf.gather(x, indices), tf.gather(y, indices)

        else:
            first = x.read(np.zeros(1, int))
            dtypes, shapes = [part.dtype for part in first], [part.shape[1:] for part in first]

            def load(indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                parts = zip(tf.numpy_function(x.read, [indices], dtypes), shapes, strict=True)
                return tuple(tf.ensure_shape(part, (self.batch_size, *shape)) for part, shape in parts)

        def steps_of(epoch: tf.Tensor) -> tf.data.Dataset:
            # One call into Python per epoch, not per step.
            indices, weights = tf.numpy_function(self.epoch, [epoch], [tf.int64, tf.float32])
            shape = (self.steps, self.batch_size)
            return tf.data.Dataset.from_tensor_slices(
                (tf.ensure_shape(indices, shape), tf.ensure_shape(weights, shape))
            )

        plan = tf.data.Dataset.counter(start_epoch).flat_map(steps_of)
        return plan.map(lambda indices, weights: (*load(indices), weights)).prefetch(2)
