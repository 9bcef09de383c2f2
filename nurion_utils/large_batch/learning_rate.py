"""A recipe's learning rates as a Keras schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nurion_utils._checks import whole_number
from nurion_utils.large_batch.recipes import Recipe, RecipeError


@keras.saving.register_keras_serializable("nurion_utils")
class RecipeSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate that a recipe sets for each step.

    >>> schedule = RecipeSchedule(Recipe(256, warmup="gradual", warmup_epochs=5), samples=32_768)
    >>> optimizer = keras.optimizers.SGD(schedule)

    The formula stands in `Recipe.rate` alone; here is its table, and a step past the end has the last rate.

    Parameters
    ----------
    recipe : Recipe
    samples : int
        Samples in the training data.
    changes : sequence of (step, batch)
        From which step on the batch was another one; `changed` writes it.

    Attributes
    ----------
    rates : numpy.ndarray, float32, shape (steps,)
        The table.
    epochs : numpy.ndarray, float64, shape (steps,)
        Where in the training each step begins, in epochs.

    Raises
    ------
    RecipeError
        If the recipe and the data do not go together, or a change is out of place.

    Notes
    -----
    A step is what Keras counts: with ``gradient_accumulation_steps`` it counts the parts of a batch, and the batch of
    the recipe must be that of such a part.
    """

    def __init__(self, recipe: Recipe, samples: int, changes: Sequence[tuple[int, int]] = ()):
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"a schedule is made from a recipe, such as Recipe(batch=512), not {recipe!r}")
        self.recipe, self.changes = recipe, []
        try:
            self.samples = whole_number(samples, "samples")
        except ValueError as error:
            raise RecipeError(str(error)) from None
        self.epochs = np.arange(recipe.steps(self.samples)) / recipe.steps_per_epoch(self.samples)
        self.rates = recipe.rates(self.samples)
        for step, batch in changes:
            self._change(step, batch)

    def _change(self, step: int, batch: int) -> None:
        """Go on from `step` with another batch: what is left of the epochs, in other steps."""
        try:
            step = whole_number(step, "step", least=0)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if self.changes and step < self.changes[-1][0]:
            raise RecipeError(f"step {step:,} lies before the last change, at step {self.changes[-1][0]:,}")
        if step >= len(self.rates):
            raise RecipeError(f"step {step:,} lies past the training, which has {len(self.rates):,} steps")
        recipe = self.recipe.changed(batch=batch)
        per_epoch, here = recipe.steps_per_epoch(self.samples), self.epochs[step]
        left = max(1, round((recipe.epochs - here) * per_epoch))
        epochs = here + np.arange(left) / per_epoch
        self.epochs = np.concatenate([self.epochs[:step], epochs])
        self.rates = np.concatenate([self.rates[:step], np.asarray(recipe.rate(epochs), np.float32)])
        self.changes.append((step, recipe.batch))

    @property
    def batch(self) -> int:
        """The batch after all changes."""
        return self.changes[-1][1] if self.changes else self.recipe.batch

    def changed(self, step: int, ranks: tuple[int, int] | None = None, batch: int | None = None) -> RecipeSchedule:
        """The schedule of a run whose batch is another one from `step` on, as after a change of the world size.

        The run keeps its place in the training, in epochs, and the rate is that which the recipe sets at this place
        for the new batch.

        >>> model.optimizer.learning_rate = schedule.changed(step, ranks=(4, 3))
        >>> model.make_train_function(force=True)  # a step that is compiled already keeps its rates

        Parameters
        ----------
        step : int
            Steps that are done, ``int(model.optimizer.iterations)``.
        ranks : (int, int)
            World size before and after; the batch of a rank stays.
        batch : int
            Or the new batch of all ranks together.

        Raises
        ------
        RecipeError
            If not exactly one of `ranks` and `batch` is given, the ranks do not divide the batch, or `step` lies
            before an earlier change or past the training.
        """
        if (ranks is None) == (batch is None):
            raise RecipeError("say either the ranks before and after, ranks=(4, 3), or the new batch, batch=96")
        if ranks is not None:
            try:
                before, after = (whole_number(count, "ranks") for count in ranks)
            except (TypeError, ValueError):
                raise RecipeError(f"ranks are those before and after, such as (4, 3), not {ranks!r}") from None
            if self.batch % before:
                raise RecipeError(f"a batch of {self.batch:,} was not shared evenly by {before:,} ranks; say batch=")
            batch = self.batch // before * after
        return RecipeSchedule(self.recipe, self.samples, [*self.changes, (step, batch)])

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(keras.ops.convert_to_tensor(step), tf.int64)
        return tf.gather(tf.constant(self.rates), tf.clip_by_value(step, 0, len(self.rates) - 1))

    def get_config(self) -> dict[str, Any]:
        changes = [list(change) for change in self.changes]
        return {"recipe": self.recipe.as_dict(), "samples": self.samples, "changes": changes}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RecipeSchedule:
        return cls(**{**config, "recipe": Recipe(**config["recipe"])})
