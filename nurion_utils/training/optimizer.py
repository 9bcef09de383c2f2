"""Keras 3 optimizers that average their gradients over all ranks.

Horovod's own Keras binding hooks methods that Keras 3 never calls: training runs, and every rank trains alone.
Here the hook sits where Keras 3 passes by exactly once per update, between the accumulation of gradients and
their clipping.  So P ranks with a batch of B take the same steps as one rank with a batch of P x B.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from nurion_utils.training.communicator import hvd

AVERAGE = hvd.Average if hvd else None
UNCOMPRESSED = hvd.Compression.none if hvd else None


def DistributedOptimizer(  # noqa: N802 - the name the field knows
    optimizer: keras.optimizers.Optimizer,
    *,
    op: Any = AVERAGE,
    compression: Any = UNCOMPRESSED,
    reducer: Callable[[np.ndarray], None] | None = None,
    observer: Callable[[list, Callable[[list], list], int], list] | None = None,
) -> keras.optimizers.Optimizer:
    """Make an optimizer average its gradients over all ranks before it clips and applies them.

    >>> model.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(1e-3)), loss="mse")

    The optimizer itself is taken over, not copied: slots, iterations, learning-rate schedules and exclusions
    from weight decay stay, so training resumes from a saved model with ``DistributedOptimizer(model.optimizer)``
    on any number of ranks.  It saves as the plain Keras optimizer it was, and loads without this package.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Any optimizer of Keras 3 or derived from one, `LossScaleOptimizer` and `MultiOptimizer` included.  Under
        the global policy ``mixed_float16`` it gets the `LossScaleOptimizer` that ``compile`` would put around it.
    op : Horovod's Average, Sum, Adasum, Min, Max or Product
        How Horovod combines the gradients; Adasum needs 2^k ranks.
    compression : horovod.tensorflow.Compression.none or .fp16, or a class with their two methods
    reducer : callable, optional
        Averages in Horovod's place: it gets all gradients as one flat array (float32, or float64 if one of them
        is) and must average it over the ranks in place.  Horovod is not initialised then, and need not be installed.
    observer : callable, optional
        Sees the gradients before and after, such as `nurion_utils.large_batch.NoiseScale`.  It is called with this
        rank's gradients, with the function that averages such a list, and with how many accumulated batches they
        are means of; it must return the averages.  A scalar that it adds to the list travels in the same message.

    Returns
    -------
    keras.optimizers.Optimizer
        What to compile the model with.

    Raises
    ------
    ImportError
        If Horovod cannot be imported, and there is no `reducer` to do without it.
    TypeError
        If `optimizer` is no Keras 3 optimizer, or is Horovod's own wrapper around one.
    ValueError
        If the optimizer is distributed already, or `op`, `compression`, `reducer` and `observer` do not go together.
        Later, when the training step is traced: if it is to be compiled with XLA (Horovod's operations cannot
        be), or if the model trains in float8, whose scales each rank would keep for itself.

    Notes
    -----
    One grouped allreduce per update and dtype, also with ``gradient_accumulation_steps``.  Loss scaling adds the
    allreduce of one number per batch: an overflow on one rank makes all ranks skip the step.

    Sparse gradients (of embeddings) are gathered, so each rank holds the slices of all; with a `reducer`, or an
    `op` other than Average and Sum, they are made dense first, and then ``clipnorm`` and Adam's moments differ from
    those of plain Keras, which clips and squares each slice by itself where a row occurs twice in a batch.

    `hvd.init` is called if it was not.  On a single rank nothing is reduced.
    """
    if isinstance(optimizer, _Distributed):
        raise ValueError("This optimizer is distributed already; pass it to compile() as it is.")
    if any(cls.__module__.startswith("horovod.") for cls in type(optimizer).__mro__):
        raise TypeError(
            "This optimizer comes from Horovod's own DistributedOptimizer, which reduces nothing under Keras 3; "
            "pass the plain Keras optimizer instead."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"DistributedOptimizer takes a Keras 3 optimizer such as Adam(), not {optimizer!r}.")
    if reducer is None:
        if hvd is None:
            raise ImportError(
                "Horovod cannot be imported here: pass reducer=, a function that averages an array over the ranks in "
                "place, such as one that calls mpi4py's MPI.COMM_WORLD.Allreduce."
            )
        if op not in (hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product):
            raise ValueError(f"op must be one of Horovod's, such as hvd.Average, not {op!r}.")
        if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
            raise ValueError(f"compression must be one of hvd.Compression, not {compression!r}.")
        if not hvd.is_initialized():
            hvd.init()
        reduction = _HorovodReduction(op, compression)
    else:
        if op != AVERAGE or compression is not UNCOMPRESSED:
            raise ValueError("op and compression are Horovod's; with a reducer of your own, leave them out.")
        if not callable(reducer):
            raise TypeError(f"reducer must be a function that averages an array in place, not {reducer!r}.")
        reduction = _PluggedReduction(reducer)

    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if observer is not None:
        if not callable(observer):
            raise TypeError(f"observer must be callable, such as NoiseScale(batch_per_rank=32), not {observer!r}.")
        if op != AVERAGE or compression is not UNCOMPRESSED:
            raise ValueError("An observer compares gradients with their exact average: leave op and compression out.")
        if isinstance(optimizer.inner_optimizer if scaled else optimizer, keras.optimizers.MultiOptimizer):
            raise ValueError("An observer must see all gradients at once, but a MultiOptimizer divides them.")
    if keras.config.dtype_policy().name == "mixed_float16" and not scaled and not optimizer.built:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    _take_over(optimizer, reduction, "gradients", observer)
    return optimizer


# The names of the reductions are fixed: Horovod matches them over the ranks, and Keras' automatic names differ
# between ranks as soon as one of them has made one layer or optimizer more than the others.


@dataclass(frozen=True)
class _HorovodReduction:
    op: Any
    compression: Any

    @property
    def is_needless(self) -> bool:
        # A graph that is traced on one rank of an elastic job may later run on several.
        return hvd.size() == 1 and not int(os.environ.get("HOROVOD_ELASTIC", 0))

    def average(self, gradients: list, name: str) -> list:
        if self.is_needless:
            return gradients
        with tf.name_scope(""):
            averages = list(gradients)
            dense: dict[tf.DType, list[int]] = {}
            for i, gradient in enumerate(gradients):
                if isinstance(gradient, tf.IndexedSlices) and self.op in (hvd.Average, hvd.Sum):
                    averages[i] = self._gather(gradient, f"{name}_{i}")
                else:
                    averages[i] = _without_bfloat16(tf.convert_to_tensor(gradient))
                    dense.setdefault(averages[i].dtype, []).append(i)
            how = {"op": self.op, "compression": self.compression, "ignore_name_scope": True}
            for dtype, group in dense.items():  # Horovod wants groups of one dtype, and for Adasum no group at all
                if self.op == hvd.Adasum:
                    received = [hvd.allreduce(averages[i], name=f"{name}_{i}", **how) for i in group]
                else:
                    received = hvd.grouped_allreduce([averages[i] for i in group], name=f"{name}_{dtype.name}", **how)
                for i, average in zip(group, received, strict=True):
                    averages[i] = tf.cast(average, gradients[i].dtype)
            return averages

    def _gather(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        # The slices that one rank would have with all samples.  Adding up those of one row first would be another
        # training: Keras clips, and squares for Adam's moments, each by itself.
        values = _without_bfloat16(slices.values)
        values = hvd.allgather(values, name=f"{name}_values", ignore_name_scope=True)
        indices = hvd.allgather(slices.indices, name=f"{name}_indices", ignore_name_scope=True)
        if self.op == hvd.Average:
            values /= tf.cast(hvd.size_op(), values.dtype)
        return tf.IndexedSlices(tf.cast(values, slices.dtype), indices, slices.dense_shape)

    def is_true_anywhere(self, condition: tf.Tensor, name: str) -> tf.Tensor:
        if self.is_needless:
            return condition
        with tf.name_scope(""):
            flag = tf.cast(condition, tf.float32)
            return hvd.allreduce(flag, op=hvd.Max, name=name, ignore_name_scope=True) > 0


def _without_bfloat16(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor  # Horovod does not know it


@dataclass(frozen=True)
class _PluggedReduction:
    reducer: Callable[[np.ndarray], None]

    def average(self, gradients: list, name: str) -> list[tf.Tensor]:
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        dtype = tf.float64 if any(g.dtype == tf.float64 for g in gradients) else tf.float32

        def call_reducer(values: np.ndarray) -> np.ndarray:
            buffer = np.array(values)  # the array TensorFlow passes in is its own memory
            returned = self.reducer(buffer)
            if returned is not None and returned is not buffer:
                raise TypeError("The reducer returned a new array; it must average the one it gets in place.")
            return buffer

        flat = tf.concat([tf.reshape(tf.cast(g, dtype), [-1]) for g in gradients], 0)
        average = tf.ensure_shape(tf.numpy_function(call_reducer, [flat], dtype), flat.shape)
        parts = tf.split(average, [tf.size(g) for g in gradients])
        return [
            tf.cast(tf.ensure_shape(tf.reshape(part, tf.shape(g)), g.shape), g.dtype)
            for part, g in zip(parts, gradients, strict=True)
        ]

    def is_true_anywhere(self, condition: tf.Tensor, name: str) -> tf.Tensor:
        return self.average([tf.cast(condition, tf.float32)], name)[0] > 0


class _Distributed:
    """Put before the optimizer's own class, in a class made for this one optimizer."""

    _reduction: _HorovodReduction | _PluggedReduction
    _reduction_name: str
    _observer: Callable[[list, Callable[[list], list], int], list] | None

    def __setattr__(self, name: str, value: Any) -> None:
        # The first thing LossScaleOptimizer and MultiOptimizer do to an optimizer that they wrap.
        if name == "loss_scale_factor" and value is None:
            raise ValueError(
                "A distributed optimizer cannot be wrapped, by compile() for a mixed_float16 model neither; wrap "
                "first and distribute last: DistributedOptimizer(LossScaleOptimizer(optimizer))."
            )
        super().__setattr__(name, value)


class _AveragesGradients(_Distributed):
    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise ValueError(
                "XLA cannot compile a training step that communicates: use compile(..., jit_compile=False)."
            )
        if any(map(self._overwrite_variable_with_gradient, trainable_variables or self._trainable_variables)):
            raise ValueError("Float8 models cannot be trained on several ranks: each would keep its own scales.")
        self._has_reduced = False
        super().apply(grads, trainable_variables)
        # Whatever another Keras does, ranks must never train each for itself in silence.  (An eager micro-batch
        # rightly ends without a reduction.)
        may_wait = self.gradient_accumulation_steps and tf.executing_eagerly()
        if len(grads) and not self._has_reduced and not may_wait:
            raise RuntimeError(
                f"{self.__class__.__name__} of Keras {keras.__version__} did not pass its gradients on for "
                "reduction; use the pinned Keras version, or an optimizer that does not replace apply()."
            )

    def _clip_gradients(self, grads: list) -> list:
        # Keras' own name for the step between accumulation and clipping; private, hence the check in apply().
        self._has_reduced = True
        average = partial(self._reduction.average, name=self._reduction_name)
        if self._observer is None:
            return super()._clip_gradients(average(grads))
        return super()._clip_gradients(self._observer(grads, average, self.gradient_accumulation_steps or 1))


class _Delegates(_Distributed):
    """An optimizer around others, which do the averaging."""

    def _inner(self) -> list[keras.optimizers.Optimizer]:
        return self.optimizers

    def build(self, variables: list) -> None:
        super().build(variables)
        self._take_over_inner()  # a MultiOptimizer may learn only here which optimizers it has

    def _take_over_inner(self) -> None:
        for i, optimizer in enumerate(self._inner()):
            if not isinstance(optimizer, _Distributed):
                _take_over(optimizer, self._reduction, f"{self._reduction_name}_{i}", self._observer)


class _ScalesLoss(_Delegates):
    def _inner(self) -> list[keras.optimizers.Optimizer]:
        return [self.inner_optimizer]

    def check_finite(self, grads: list) -> tf.Tensor:
        # Else the rank with the overflow would skip a step whose allreduce the others wait in.
        overflow = tf.logical_not(super().check_finite(grads))
        return tf.logical_not(self._reduction.is_true_anywhere(overflow, f"{self._reduction_name}_overflow"))


def _take_over(optimizer: keras.optimizers.Optimizer, reduction: Any, name: str, observer: Callable | None) -> None:
    cls = type(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        role = _ScalesLoss
    elif isinstance(optimizer, keras.optimizers.MultiOptimizer):
        role = _Delegates
    else:
        role = _AveragesGradients
    # `__class__` is what Keras saves an optimizer under: showing the original one makes the file a plain one.
    shown = {"__class__": property(lambda self: cls), "_reduction": reduction, "_reduction_name": name}
    shown["_observer"] = staticmethod(observer)  # a plain function must not become a method
    # Changing the class in place keeps what no configuration holds: variables, callables, exclusions.  Keras'
    # own __setattr__ would try to track it.
    object.__setattr__(optimizer, "__class__", type(f"Distributed{cls.__name__}", (role, cls), shown))
    if role is not _AveragesGradients and optimizer.built:
        optimizer._take_over_inner()
