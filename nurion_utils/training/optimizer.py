"""Keras 3 optimizers that average their gradients over all ranks.

Horovod's own Keras binding hooks methods that Keras 3 never calls: training runs, and every rank trains alone. Here
the hook sits where Keras 3 passes by once per update, between the accumulation of gradients and their clipping. So P
ranks with a batch of B take the same steps as one rank with a batch of P x B.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from nurion_utils._checks import positive
from nurion_utils.training.reduction import HorovodReduction, PluggedReduction, as_agreed, kind_of


def DistributedOptimizer(  # the name that the field knows
    optimizer: keras.optimizers.Optimizer,
    *,
    reducer: Callable[[np.ndarray], None] | None = None,
    observer: Callable[[list, Callable[[list], list], int], list] | None = None,
    bucket_mb: float = 8,
    compression: Any = None,
) -> keras.optimizers.Optimizer:
    """Make an optimizer average its gradients over all ranks before it clips and applies them.

    >>> model.compile(optimizer=DistributedOptimizer(keras.optimizers.Adam(1e-3)), loss="mse")  # doctest: +SKIP

    The optimizer itself is taken over, not copied, with all that it has learned and excludes; so a saved model goes on
    with ``DistributedOptimizer(model.optimizer)`` on any number of ranks. It saves as the plain Keras optimizer it
    was, and loads without this package.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Any of Keras 3 or derived from one, `LossScaleOptimizer` and `MultiOptimizer` included. Under the global policy
        ``mixed_float16`` it gets the `LossScaleOptimizer` that ``compile`` would put around it.
    reducer : callable, optional
        Averages in Horovod's place: it gets all gradients as one flat array (float32, or float64 if one of them
        is) and must average it over the ranks in place. Horovod is not initialised then, and need not be installed.
    observer : callable, optional
        Sees the gradients before and after, such as `nurion_utils.large_batch.NoiseScale`: called with this rank's
        gradients, the function that averages such a list, and how many accumulated batches they are means of, it
        returns the averages. A scalar that it adds to the list travels with them.
    bucket_mb : float
        Gradients travel in buckets of about so many 10^6 bytes, those of the last layers first, while those before
        them are still being computed; ``bucket_mb=1e6`` makes one message of all, which waits for the first layer.
    compression : optional
        One of Horovod's: ``hvd.Compression.fp16`` halves the bytes, and rounds each gradient to 11 bits.

    Raises
    ------
    ImportError
        If Horovod cannot be imported, and there is no `reducer` to do without it.
    TypeError
        If `optimizer` is not a Keras 3 optimizer, or is, or wraps, Horovod's own wrapper around one; if `compression`
        is not Horovod's, or there is a `reducer` as well.
    ValueError
        If the optimizer is distributed already, or is a `MultiOptimizer` and has an `observer`. When the training step
        is traced: if XLA is to compile it, if the model trains in float8, or if ranks do not train the same variables.

    Notes
    -----
    One grouped allreduce per update, dtype and bucket, also with ``gradient_accumulation_steps``. Where gradients are
    accumulated or scaled, all are computed before the first is sent. Loss scaling adds an allreduce of one number per
    batch: an overflow on one rank makes all ranks skip the step. A variable without a gradient (None) on all ranks is
    left alone, as by Keras. If ranks differ in that, from then on a None counts as zero, for all.

    Sparse gradients (of embeddings) are gathered, so each rank holds the slices of all; with a `reducer` they are made
    dense first, and then ``clipnorm`` and Adam's moments differ from those of plain Keras, which clips and squares
    each slice by itself where a row occurs twice in a batch.

    `hvd.init` is called if it was not. On a single rank nothing is reduced.
    """
    _require_undistributed(optimizer)
    if reducer is not None and not callable(reducer):
        raise TypeError(f"reducer must be a function that averages an array in place, not {reducer!r}")
    if observer is not None:
        if not callable(observer):
            raise TypeError(f"observer must be callable, such as NoiseScale(batch_per_rank=32), not {observer!r}")
        if any(isinstance(each, keras.optimizers.MultiOptimizer) for each in nested(optimizer)):
            raise ValueError("an observer must see all gradients at once, but a MultiOptimizer divides them")
    size_bytes = 1e6 * positive(bucket_mb, "bucket_mb")
    if compression is not None and not (hasattr(compression, "compress") and reducer is None):
        raise TypeError(
            f"compression must be Horovod's, such as hvd.Compression.fp16, and without a reducer, not {compression!r}"
        )
    reduction = HorovodReduction(size_bytes, compression) if reducer is None else PluggedReduction(reducer)
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if keras.config.dtype_policy().name == "mixed_float16" and not scaled and not optimizer.built:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    # The name is fixed: Horovod matches by it over the ranks, and Keras' automatic names differ between ranks as soon
    # as one of them has made one layer or optimizer more than the others.
    _take_over(optimizer, reduction, "gradients", observer)
    return optimizer


def nested(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizer and all that it wraps, at any depth."""
    yield optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        yield from nested(optimizer.inner_optimizer)
    elif isinstance(optimizer, keras.optimizers.MultiOptimizer):
        for inner in optimizer.optimizers:
            yield from nested(inner)


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """All variables of an optimizer and of those that it wraps.

    Horovod's own wrapper replaces `variables` by one that fails on Keras 3, and must still be found out.
    """
    return [v for each in nested(optimizer) for v in keras.optimizers.Optimizer.variables.fget(each)]


def _require_undistributed(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"DistributedOptimizer takes a Keras 3 optimizer such as Adam(), not {optimizer!r}")
    for each in nested(optimizer):
        if isinstance(each, _Distributed):
            raise ValueError("this optimizer is distributed already; pass it to compile() as it is")
        if any(cls.__module__.startswith("horovod.") for cls in type(each).__mro__):
            raise TypeError(
                "this optimizer comes from Horovod's own DistributedOptimizer, which reduces nothing under Keras 3; "
                "pass the plain Keras optimizer instead"
            )


class _Distributed:
    """Put before the optimizer's own class, in a class made for this one optimizer."""

    _reduction: HorovodReduction | PluggedReduction
    _reduction_name: str
    _observer: Callable[[list, Callable[[list], list], int], list] | None
    _agreements: dict[tuple[int, ...], list[tuple[str, ...]]]  # of which kind gradients are, by the variables' ids

    def __setattr__(self, name: str, value: Any) -> None:
        # The first thing LossScaleOptimizer and MultiOptimizer do to an optimizer that they wrap.
        if name == "loss_scale_factor" and value is None:
            raise ValueError(
                "a distributed optimizer cannot be wrapped, not even by compile() for a mixed_float16 model; wrap "
                "first and distribute last: DistributedOptimizer(LossScaleOptimizer(optimizer))"
            )
        super().__setattr__(name, value)


class _AveragesGradients(_Distributed):
    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise ValueError(
                "XLA cannot compile a training step that communicates: use compile(..., jit_compile=False)"
            )
        variables = list(trainable_variables or self._trainable_variables)
        if any(map(self._overwrite_variable_with_gradient, variables)):
            raise ValueError("float8 models cannot be trained on several ranks: each would keep its own scales")
        if len(grads) == len(variables):  # else Keras explains what is wrong
            grads = self._complete(grads, variables)
        self._has_reduced = False
        super().apply(grads, trainable_variables)
        # Whatever another Keras does, ranks must never train each for itself in silence. (An eager micro-batch
        # rightly ends without a reduction.)
        may_wait = self.gradient_accumulation_steps and tf.executing_eagerly()
        if len(grads) and not self._has_reduced and not may_wait:
            raise RuntimeError(
                f"{self.__class__.__name__} of Keras {keras.__version__} did not pass its gradients on for "
                "reduction; use the pinned Keras version, or an optimizer that does not replace apply()"
            )

    def _complete(self, grads: list, variables: list) -> list:
        """The gradients, and zeros where only other ranks have one: Keras drops None, and positions would shift."""
        mine = [kind_of(gradient) for gradient in grads]
        agreements = self._agreements.setdefault(tuple(map(id, variables)), [])
        for agreed in agreements:
            if all(not kind or other in (kind, "dense") for kind, other in zip(mine, agreed, strict=True)):
                break
        else:
            with tf.init_scope():  # now, while the step is traced, and not in each step
                agreed = self._reduction.agree(mine, variables)
            agreements.append(agreed)
        self._has_agreed = agreements.index(agreed)
        return [as_agreed(*each) for each in zip(grads, variables, agreed, strict=True)]

    def _clip_gradients(self, grads: list) -> list:
        # Keras' own name for the step between accumulation and clipping; private, hence the check in apply().
        self._has_reduced = True
        # Ranks that went by different agreements wait for each other in vain, but never mix up their gradients.
        name = f"{self._reduction_name}{f'.{self._has_agreed}' if self._has_agreed else ''}"
        average = partial(self._reduction.average, name=name)
        if self._observer is None:
            return super()._clip_gradients(average(grads))
        return super()._clip_gradients(self._observer(grads, average, self.gradient_accumulation_steps or 1))


class _Delegates(_Distributed):
    """An optimizer around others, which do the averaging."""

    def build(self, variables: list) -> None:
        super().build(variables)
        self._take_over_inner()  # a MultiOptimizer may learn only here which optimizers it has

    def _take_over_inner(self) -> None:
        for i, optimizer in enumerate(list(nested(self))[1:]):
            if not isinstance(optimizer, _Distributed):
                _take_over(optimizer, self._reduction, f"{self._reduction_name}_{i}", self._observer)

    def check_finite(self, grads: list) -> tf.Tensor:  # of a LossScaleOptimizer
        # Otherwise the rank with the overflow would skip a step whose allreduce the others wait in.
        overflow = tf.logical_not(super().check_finite(grads))
        return tf.logical_not(self._reduction.is_true_anywhere(overflow, f"{self._reduction_name}_overflow"))


def _take_over(optimizer: keras.optimizers.Optimizer, reduction: Any, name: str, observer: Callable | None) -> None:
    cls = type(optimizer)
    wraps = isinstance(optimizer, keras.optimizers.LossScaleOptimizer | keras.optimizers.MultiOptimizer)
    role = _Delegates if wraps else _AveragesGradients
    # `__class__` is what Keras saves an optimizer under: showing the original one makes the file a plain one.
    shown = {"__class__": property(lambda self: cls), "_reduction": reduction, "_reduction_name": name}
    shown |= {"_observer": staticmethod(observer), "_agreements": {}}  # a plain function must not become a method
    # Changing the class in place keeps what no configuration holds: variables, callables, exclusions. Keras'
    # own __setattr__ would try to track it.
    object.__setattr__(optimizer, "__class__", type(f"Distributed{cls.__name__}", (role, cls), shown))
    if wraps and optimizer.built:
        optimizer._take_over_inner()
