"""How gradients are averaged over the ranks: by Horovod, or by a function of one's own."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nurion_utils.training.communicator import communicator, hvd, is_alone, outline, require_alike


def kind_of(gradient: Any) -> str:
    """Empty for None, "dense", or the type of the indices of a sparse gradient."""
    if gradient is None:
        return ""
    return gradient.indices.dtype.name if isinstance(gradient, tf.IndexedSlices) else "dense"


def as_agreed(gradient: Any, variable: keras.Variable, kind: str) -> Any:
    """The gradient as one of this kind; zeros, or no slice at all, instead of None."""
    if gradient is None and kind == "dense":
        return tf.zeros(variable.shape, variable.dtype)
    if gradient is None and kind:
        none = tf.zeros((0, *variable.shape[1:]), variable.dtype)
        return tf.IndexedSlices(none, tf.zeros([0], kind), tf.constant(variable.shape, kind))
    return tf.convert_to_tensor(gradient) if kind == "dense" else gradient


@dataclass(frozen=True)
class HorovodReduction:
    bucket_bytes: float
    compression: Any  # one of Horovod's

    def __post_init__(self) -> None:
        if hvd is None:
            raise ImportError(
                "Horovod cannot be imported here: pass reducer=, a function that averages an array over the ranks in "
                "place, such as one that calls mpi4py's MPI.COMM_WORLD.Allreduce"
            )
        communicator()  # starts it

    def agree(self, kinds: list[str], variables: Sequence[keras.Variable]) -> tuple[str, ...]:
        """Of which kind each gradient is to be, the same on all ranks; ValueError if their variables differ."""
        if is_alone():
            return tuple(kinds)
        ranks = communicator()
        require_alike(ranks, outline(variables))
        everyones = ranks.allgather(kinds)
        if all(theirs == kinds for theirs in everyones):
            return tuple(kinds)
        # Another step may take another branch, on one rank only: so all variables take part.
        found = [set(each) - {""} for each in zip(*everyones, strict=True)]
        return tuple("dense" if len(each) != 1 else each.pop() for each in found)

    def average(self, gradients: list, name: str) -> list:
        if is_alone():
            return gradients
        with tf.name_scope(""):
            averages = list(gradients)
            buckets: dict[tuple[tf.DType, float], list[int]] = {}  # Horovod wants groups of one dtype
            begun_bytes: Counter[tf.DType] = Counter()
            for i, gradient in reversed([*enumerate(gradients)]):  # those of the last layers are known first
                if isinstance(gradient, tf.IndexedSlices):
                    averages[i] = self._gather(gradient, f"{name}_{i}")
                else:
                    averages[i] = _without_bfloat16(tf.convert_to_tensor(gradient))
                    dtype = averages[i].dtype
                    buckets.setdefault((dtype, begun_bytes[dtype] // self.bucket_bytes), []).append(i)
                    begun_bytes[dtype] += (averages[i].shape.num_elements() or 0) * dtype.size
            how = {"compression": self.compression or hvd.Compression.none, "ignore_name_scope": True}
            for (dtype, number), bucket in buckets.items():
                sent = [averages[i] for i in bucket]
                name_of_bucket = f"{name}_{dtype.name}_{number:.0f}"
                received = hvd.grouped_allreduce(sent, op=hvd.Average, name=name_of_bucket, **how)
                for i, average in zip(bucket, received, strict=True):
                    averages[i] = tf.cast(average, gradients[i].dtype)
            return averages

    def _gather(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        # The slices that one rank would have with all samples. Adding up those of one row first would be another
        # training: Keras clips, and squares for Adam's moments, each by itself.
        values = _without_bfloat16(slices.values)
        values = hvd.allgather(values, name=f"{name}_values", ignore_name_scope=True)
        indices = hvd.allgather(slices.indices, name=f"{name}_indices", ignore_name_scope=True)
        values /= tf.cast(hvd.size_op(), values.dtype)
        return tf.IndexedSlices(tf.cast(values, slices.dtype), indices, slices.dense_shape)

    def is_true_anywhere(self, condition: tf.Tensor, name: str) -> tf.Tensor:
        if is_alone():
            return condition
        with tf.name_scope(""):
            flag = tf.cast(condition, tf.float32)
            return hvd.allreduce(flag, op=hvd.Max, name=name, ignore_name_scope=True) > 0


def _without_bfloat16(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor  # Horovod does not know it


@dataclass(frozen=True)
class PluggedReduction:
    reducer: Callable[[np.ndarray], None]

    def _reduced(self, values: np.ndarray) -> np.ndarray:
        buffer = np.array(values)  # the array TensorFlow passes in is its own memory
        returned = self.reducer(buffer)
        if returned is not None and returned is not buffer:
            raise TypeError("the reducer returned a new array; it must average the one it gets in place")
        return buffer

    def agree(self, kinds: list[str], variables: Sequence[keras.Variable]) -> tuple[str, ...]:
        """The same, of dense gradients only."""
        shares = self._reduced(np.array([bool(kind) for kind in kinds], np.float32))
        differ = bool(((0 < shares) & (shares < 1)).any())
        return tuple("dense" if differ or share else "" for share in shares)

    def average(self, gradients: list, name: str) -> list[tf.Tensor]:
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        dtype = tf.float64 if any(g.dtype == tf.float64 for g in gradients) else tf.float32
        flat = tf.concat([tf.reshape(tf.cast(g, dtype), [-1]) for g in gradients], 0)
        average = tf.ensure_shape(tf.numpy_function(self._reduced, [flat], dtype), flat.shape)
        parts = tf.split(average, [tf.size(g) for g in gradients])
        return [
            tf.cast(tf.ensure_shape(tf.reshape(part, tf.shape(g)), g.shape), g.dtype)
            for part, g in zip(parts, gradients, strict=True)
        ]

    def is_true_anywhere(self, condition: tf.Tensor, name: str) -> tf.Tensor:
        return self.average([tf.cast(condition, tf.float32)], name)[0] > 0
