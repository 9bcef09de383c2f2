"""Optimizers for large batches: LARS, momentum SGD whose momentum survives a changing rate, and a LAMB that saves.

All of them leave vectors alone, that is biases and what batch normalisation learns: these get no weight decay, and
in LARS no rate of their own.  Everything happens in `update_step`, in operations without branches on values, so that
the same class trains one network under `fit` and many side by side.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

_register = keras.saving.register_keras_serializable("nurion_utils")


class _CoupledDecay:
    """Put before a Keras optimizer whose update holds the weight decay, of kernels only."""

    def build(self, variables: list) -> None:
        if not self.built:
            super().build(variables)
            self._decayed = [len(variable.shape) > 1 and self._use_weight_decay(variable) for variable in variables]

    def _apply_weight_decay(self, variables: list) -> None:
        """Keras' own weight decay, past the gradient: nothing is left for it to do."""

    def _decay(self, index: int, dtype: Any) -> tf.Tensor:
        decays = self._decayed[index] and self.weight_decay is not None
        return _number(self.weight_decay if decays else 0.0, dtype)


def _number(value: Any, dtype: Any) -> tf.Tensor:
    """A setting as a number of this type; it is a tensor where trainings side by side differ in it."""
    return ops.convert_to_tensor(value, dtype)  # Keras' cast would round it to float32 first


@_register
class LARS(_CoupledDecay, keras.optimizers.Optimizer):
    """Momentum SGD in which each layer has a rate that fits the size of its weights.

    You, Gitman and Ginsburg 2017 (arXiv 1708.03888), algorithm 1: with weights w and gradient g of one layer ::

        local = trust_coefficient * |w| / (|g| + weight_decay * |w|)
        v = momentum * v + rate * local * (g + weight_decay * w)
        w = w - v

    Parameters
    ----------
    learning_rate : float, LearningRateSchedule or callable
    momentum : float, in [0, 1)
    weight_decay : float
        Coupled: part of the gradient and of the local rate.
    trust_coefficient : float
        The share of its own length that a layer may move by at a rate of 1.
    nesterov : bool
        Step along ``momentum * v`` plus the newest term instead of v.
    epsilon : float
        Added to the denominator of the local rate; the paper has none.
    exclude : sequence of str
        Patterns (regular expressions) of variables that are treated as vectors are: at the raw rate, without weight
        decay.  They are looked for anywhere in a variable's path, such as ``head/kernel``; how it begins may change
        when a model is saved and loaded.
    **settings
        Those of every Keras optimizer: clipnorm, use_ema, gradient_accumulation_steps, name and so on.

    Raises
    ------
    ValueError
        If a number is out of its range or a pattern is none.

    Notes
    -----
    Where |w| or |g| is zero the local rate is 1, as implementations have it; the paper does not say.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        weight_decay: float | None = 1e-4,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        epsilon: float = 0.0,
        exclude: Sequence[str] = (),
        name: str = "lars",
        **settings: Any,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, not {momentum!r}")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient must be above 0, not {trust_coefficient!r}")
        if not epsilon >= 0 or not (weight_decay or 0) >= 0:
            raise ValueError(f"weight_decay and epsilon must not be negative, as {weight_decay!r} and {epsilon!r}")
        try:
            patterns = [re.compile(pattern).pattern for pattern in ([None] if isinstance(exclude, str) else exclude)]
        except (TypeError, re.error):
            raise ValueError(f"exclude takes a list of patterns such as ['head/'], not {exclude!r}") from None
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, name=name, **settings)
        self.momentum = float(momentum)
        self.trust_coefficient = float(trust_coefficient)
        self.nesterov = bool(nesterov)
        self.epsilon = float(epsilon)
        self.exclude = patterns

    def build(self, variables: list) -> None:
        if not self.built:
            super().build(variables)
            self.momentums = self.add_optimizer_variables(variables, "momentum")
            self._adapted = [len(variable.shape) > 1 and not self._excludes(variable) for variable in variables]

    def _excludes(self, variable: Any) -> bool:
        path = getattr(variable, "path", variable.name)
        return any(re.search(pattern, path) for pattern in self.exclude)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index, dtype = self._get_variable_index(variable), variable.dtype
        gradient = ops.cast(tf.convert_to_tensor(gradient), dtype)  # that of an embedding comes in slices
        rate, momentum = _number(learning_rate, dtype), _number(self.momentum, dtype)
        if self._adapted[index]:
            rate = rate * ops.cast(self._local_rate(gradient, variable, index), dtype)
            gradient = gradient + self._decay(index, dtype) * variable
        step = rate * gradient
        v = momentum * self.momentums[index] + step
        self.assign(self.momentums[index], v)
        self.assign_sub(variable, momentum * v + step if self.nesterov else v)

    def _local_rate(self, gradient: tf.Tensor, variable: Any, index: int) -> tf.Tensor:
        dtype = keras.backend.result_type(variable.dtype, "float32")  # half precision cannot hold a sum of squares
        size, slope = (ops.sqrt(ops.sum(ops.square(ops.cast(values, dtype)))) for values in (variable, gradient))
        usable = ops.logical_and(size > 0, slope > 0)
        divisor = slope + self._decay(index, dtype) * size + self.epsilon
        ratio = _number(self.trust_coefficient, dtype) * size / ops.where(usable, divisor, 1.0)
        return ops.where(usable, ratio, 1.0)

    def get_config(self) -> dict[str, Any]:
        own = ("momentum", "trust_coefficient", "nesterov", "epsilon", "exclude")
        return super().get_config() | {name: getattr(self, name) for name in own} | {"exclude": list(self.exclude)}


@_register
class CorrectedSGD(_CoupledDecay, keras.optimizers.SGD):
    """Momentum SGD that goes on rightly when the rate changes, with the weight decay of kernels in the gradient.

    Keras' momentum v = m v - rate g holds the rates of the past: after a jump of the rate its old part is too large
    or too small.  Goyal et al. 2017 (arXiv 1706.02677, section 3) correct it by the factor rate_new / rate_old.  That
    is the same as to keep the rate out of the momentum, which is done here and bears a rate of 0, too ::

        u = momentum * u + g + weight_decay * w
        w = w - rate * u

    Parameters are those of `keras.optimizers.SGD`, and at a constant rate without weight decay so are the steps.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index, dtype = self._get_variable_index(variable), variable.dtype
        gradient, rate = ops.cast(tf.convert_to_tensor(gradient), dtype), _number(learning_rate, dtype)
        step = gradient + self._decay(index, dtype) * variable
        if self.momentums:  # Keras makes none for a momentum of 0
            momentum = _number(self.momentum, dtype)
            u = momentum * self.momentums[index] + step
            self.assign(self.momentums[index], u)
            step = step + momentum * u if self.nesterov else u
        self.assign_sub(variable, rate * step)


class _DecaysKernels:
    """Put before a Keras optimizer whose weight decay, past the gradient, is not for vectors."""

    def _use_weight_decay(self, variable: Any) -> bool:
        # Keras' own exclusions count on, but cannot be asked for where variables are stateless.
        excludes = hasattr(self, "_exclude_from_weight_decay")
        return len(variable.shape) > 1 and (not excludes or super()._use_weight_decay(variable))

    def _apply_weight_decay(self, variables: list) -> None:
        if self.weight_decay is not None:
            for variable in filter(self._use_weight_decay, variables):
                rate, decay = (_number(value, variable.dtype) for value in (self.learning_rate, self.weight_decay))
                variable.assign(variable - variable * decay * rate)


@functools.cache
def _decaying_kernels(cls: type[keras.optimizers.Optimizer]) -> type[keras.optimizers.Optimizer]:
    return _register(type(cls.__name__, (_DecaysKernels, cls), {"__module__": __name__, "__doc__": cls.__doc__}))


# What is saved under these names must be found under them.
Adam, AdamW, Lamb, Lion = (_decaying_kernels(getattr(keras.optimizers, n)) for n in ("Adam", "AdamW", "Lamb", "Lion"))


def exclude_vectors(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Spare biases and batch normalisation, all variables of rank 1 or less, from Keras' weight decay.

    Keras' own ``exclude_from_weight_decay`` must be called before the optimizer is built, and is not saved: a run that
    resumes from a file decays everything.  This may be called at any time, and the file keeps it; the optimizer
    becomes one of a registered class with the same name.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Changed in place.  `LARS` and `CorrectedSGD` are as they should be already.

    Returns
    -------
    keras.optimizers.Optimizer
        The same.

    Raises
    ------
    ValueError
        If the optimizer is distributed already.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        exclude_vectors(optimizer.inner_optimizer)
    elif type(optimizer) is not optimizer.__class__:
        raise ValueError("exclude vectors first and distribute last: DistributedOptimizer(exclude_vectors(optimizer))")
    elif not isinstance(optimizer, _CoupledDecay | _DecaysKernels):
        # in place, as variables and schedule stay; Keras' own __setattr__ would try to track it
        object.__setattr__(optimizer, "__class__", _decaying_kernels(type(optimizer)))
    return optimizer
