"""A recipe's learning rates as a Keras schedule."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from nurion_utils._checks import whole_number
from nurion_utils.large_batch.recipes import Recipe, RecipeError


@keras.saving.register_keras_serializable("nurion_utils")
class RecipeSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate that a recipe sets for each step; it saves and loads with the optimizer.

    The formula is in `Recipe.rate` alone; here is its table, and a step past the end has the last rate.

    Parameters
    ----------
    recipe : Recipe
    samples : int
        Samples in the training data.

    Attributes
    ----------
    rates : numpy.ndarray, float32, shape (steps,)
        The table.

    Raises
    ------
    RecipeError
        If the recipe and the data do not go together.

    Notes
    -----
    A step is what Keras counts: with ``gradient_accumulation_steps`` it counts the parts of a batch, and the batch of
    the recipe must be that of such a part.
    """

    def __init__(self, recipe: Recipe, samples: int):
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"a schedule is made from a recipe, such as Recipe(batch=512), not {recipe!r}")
        self.recipe, self.samples = recipe, whole_number(samples, "samples", error=RecipeError)
        self.rates = recipe.rates(self.samples)

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(keras.ops.convert_to_tensor(step), tf.int64)
        return tf.gather(tf.constant(self.rates), tf.clip_by_value(step, 0, len(self.rates) - 1))

    def get_config(self) -> dict[str, Any]:
        return {"recipe": self.recipe.as_dict(), "samples": self.samples}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RecipeSchedule:
        return cls(Recipe(**config["recipe"]), config["samples"])
