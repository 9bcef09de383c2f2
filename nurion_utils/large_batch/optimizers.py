"""Optimizers for large batches: LARS, momentum SGD whose momentum survives a changing rate, and a LAMB that saves.

Also a recipe's learning rates as a Keras schedule. All optimizers leave vectors alone, that is biases and what batch
normalisation learns: these get no weight decay, and in LARS no rate of their own. Everything happens in operations
without branches on values, so that the same class trains one network under `fit` and many side by side.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from nurion_utils._checks import number, positive, whole_number
from nurion_utils.large_batch.recipes import Recipe, RecipeError

_register = keras.saving.register_keras_serializable("nurion_utils")


def make_optimizer(recipe: Recipe, samples: int) -> keras.optimizers.Optimizer:
    """A Keras optimizer that trains `samples` by a recipe; for several ranks, put `DistributedOptimizer` around it."""
    rate = RecipeSchedule(recipe, samples)
    if recipe.optimizer == "lamb":
        return Lamb(rate, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "lars":
        return LARS(rate, recipe.momentum, recipe.weight_decay, recipe.trust_coefficient)
    return CorrectedSGD(rate, recipe.momentum, weight_decay=recipe.weight_decay)


@_register
class RecipeSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate that a recipe sets for each step of a training on so many samples; it saves and loads.

    A step past the end has the last rate. With ``gradient_accumulation_steps`` Keras counts the parts of a batch as
    steps, and the batch of the recipe must be that of a part. `RecipeError` if recipe and data do not go together.
    """

    def __init__(self, recipe: Recipe, samples: int):
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"a schedule is made from a recipe, such as Recipe(batch=512), not {recipe!r}")
        self.recipe, self.samples = recipe, whole_number(samples, "samples", error=RecipeError)
        self.rates = recipe.rates(self.samples)

    def __call__(self, step: Any) -> tf.Tensor:
        step = ops.cast(ops.convert_to_tensor(step), "int64")
        return tf.gather(tf.constant(self.rates), tf.clip_by_value(step, 0, len(self.rates) - 1))

    def get_config(self) -> dict[str, Any]:
        return {"recipe": self.recipe.as_dict(), "samples": self.samples}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RecipeSchedule:
        return cls(Recipe(**config["recipe"]), config["samples"])


class _DecaysKernels:
    """Put before a Keras optimizer: the weight decay is part of the update, and of kernels only.

    Keras' own ``exclude_from_weight_decay`` counts on, but it is not saved: a run that resumes would decay everything.
    """

    def build(self, variables: list) -> None:
        if not self.built:
            super().build(variables)
            self._decayed = [len(variable.shape) > 1 and self._use_weight_decay(variable) for variable in variables]

    def _apply_weight_decay(self, variables: list) -> None:
        """Keras' own weight decay, past the gradient: nothing is left for it to do."""

    def _decay(self, variable: Any, dtype: Any) -> tf.Tensor:
        decays = self._decayed[self._get_variable_index(variable)] and self.weight_decay is not None
        return _number(self.weight_decay if decays else 0.0, dtype)


def _number(value: Any, dtype: Any) -> tf.Tensor:
    """A setting as a number of this type; it is a tensor where trainings side by side differ in it."""
    return ops.convert_to_tensor(value, dtype)  # Keras' cast would round it to float32 first


@_register
class LARS(_DecaysKernels, keras.optimizers.Optimizer):
    """Momentum SGD in which each layer has a rate that fits the size of its weights.

    You, Gitman and Ginsburg 2017 (arXiv 1708.03888), algorithm 1: with weights w and gradient g of one layer ::

        local = trust_coefficient * |w| / (|g| + weight_decay * |w|)
        v = momentum * v + rate * local * (g + weight_decay * w)
        w = w - v

    So `trust_coefficient` is the share of its own length that a layer may move by at a rate of 1. Where |w| or |g| is
    zero the local rate is 1, as implementations have it; the paper does not say. Further settings are those of every
    Keras optimizer; ValueError if a number is out of its range.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        weight_decay: float | None = 1e-4,
        trust_coefficient: float = 0.001,
        **settings: Any,
    ):
        number(weight_decay or 0.0, "weight_decay", least=0)
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **settings)
        self.momentum = number(momentum, "momentum", least=0)
        if momentum >= 1:
            raise ValueError(f"momentum must be below 1, not {momentum!r}")
        self.trust_coefficient = positive(trust_coefficient, "trust_coefficient")

    def build(self, variables: list) -> None:
        if not self.built:
            super().build(variables)
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        dtype, momentums = variable.dtype, self.momentums[self._get_variable_index(variable)]
        gradient = ops.cast(tf.convert_to_tensor(gradient), dtype)  # that of an embedding comes in slices
        rate, momentum = _number(learning_rate, dtype), _number(self.momentum, dtype)
        if len(variable.shape) > 1:
            rate = rate * ops.cast(self._local_rate(gradient, variable), dtype)
            gradient = gradient + self._decay(variable, dtype) * variable
        v = momentum * momentums + rate * gradient
        self.assign(momentums, v)
        self.assign_sub(variable, v)

    def _local_rate(self, gradient: tf.Tensor, variable: Any) -> tf.Tensor:
        dtype = keras.backend.result_type(variable.dtype, "float32")  # half precision cannot hold a sum of squares
        size, slope = (ops.sqrt(ops.sum(ops.square(ops.cast(values, dtype)))) for values in (variable, gradient))
        usable = ops.logical_and(size > 0, slope > 0)
        divisor = slope + self._decay(variable, dtype) * size
        ratio = _number(self.trust_coefficient, dtype) * size / ops.where(usable, divisor, 1.0)
        return ops.where(usable, ratio, 1.0)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"momentum": self.momentum, "trust_coefficient": self.trust_coefficient}


@_register
class CorrectedSGD(_DecaysKernels, keras.optimizers.SGD):
    """Momentum SGD that goes on rightly when the rate changes, with the weight decay of kernels in the gradient.

    Keras' momentum v = m v - rate g holds the rates of the past: after a jump of the rate its old part is too large
    or too small. Goyal et al. 2017 (arXiv 1706.02677, section 3) correct it by the factor rate_new / rate_old. That
    is the same as to keep the rate out of the momentum, which is done here and allows a rate of 0, too ::

        u = momentum * u + g + weight_decay * w
        w = w - rate * u

    Parameters are those of `keras.optimizers.SGD`, and at a constant rate without weight decay so are the steps.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        dtype = variable.dtype
        gradient, rate = ops.cast(tf.convert_to_tensor(gradient), dtype), _number(learning_rate, dtype)
        step = gradient + self._decay(variable, dtype) * variable
        if self.momentums:  # Keras makes none for a momentum of 0
            momentum, momentums = _number(self.momentum, dtype), self.momentums[self._get_variable_index(variable)]
            u = momentum * momentums + step
            self.assign(momentums, u)
            step = step + momentum * u if self.nesterov else u
        self.assign_sub(variable, rate * step)


@_register
class Lamb(_DecaysKernels, keras.optimizers.Lamb):
    """Keras' LAMB, with its weight decay past the gradient, of kernels only."""

    def _apply_weight_decay(self, variables: list) -> None:
        for variable in variables:
            decay = self._decay(variable, variable.dtype) * _number(self.learning_rate, variable.dtype)
            variable.assign(variable - variable * decay)
