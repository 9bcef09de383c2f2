"""Many small trainings at once, in one compiled step: replicas that differ in seed, learning rate or weight decay.

A small network leaves a core waiting most of the time: for Python between the steps, for memory between matrices
that are too small to be worth the call. Replicas of equal shape share both. All that a replica does is Keras' own:
the layers of the task's model through ``stateless_call``, the optimizer through its ``update_step``. So a replica
ends with the same result as ``fit`` with the same seed, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nurion_utils.datasets import Shard
from nurion_utils.large_batch.optimizers import make_optimizer
from nurion_utils.large_batch.recipes import Recipe, RecipeError
from nurion_utils.large_batch.tasks import DigitsTask

# What replicas of one step may differ in: settings of the recipe and, under the same name, of its optimizer.
PER_REPLICA = ("momentum", "weight_decay", "trust_coefficient")


def train(
    task: DigitsTask, runs: Sequence[tuple[Recipe, int]], on_epoch: Callable[[int, np.ndarray], None] = lambda *_: None
) -> list[dict[str, Any]]:
    """Train several recipes side by side, each with a seed: of its initial weights and of the order of its samples.

    The recipes have the same batch, number of epochs and optimizer. `on_epoch` is called after each epoch with its
    number from 1 and the validation error of each run, in per cent. Returns for each run: validation_error (of each
    epoch, in %), test_error (in %), loss (of the last step), diverged (whether it is not a number), steps, time_s (its
    part of the time).
    """
    recipes, seeds = zip(*runs, strict=True)
    if len({(r.batch, r.epochs, r.optimizer) for r in recipes}) > 1:
        raise RecipeError("recipes trained side by side must have the same batch, epochs and optimizer")
    began = time.perf_counter()
    data, recipe = task.load(), recipes[0]
    samples = len(data.x)
    trained = _replicas(task, recipe.optimizer, len(runs))
    rates = np.stack([r.rates(samples) for r in recipes], axis=1)
    settings = {name: np.array([getattr(r, name) for r in recipes], np.float32) for name in PER_REPLICA}
    shards = [Shard(samples, 1, 0, recipe.batch, seed) for seed in seeds]
    state = trained.begin(seeds)
    errors, at, loss = [], 0, np.full(len(runs), np.nan)
    while at < len(rates):
        plans = [shard.epoch(len(errors)) for shard in shards]
        indices, weights = (np.stack(part, axis=1)[: len(rates) - at] for part in zip(*plans, strict=True))
        count = len(indices)
        state, loss = trained.steps(state, rates[at : at + count], settings, indices.astype(np.int32), weights)
        at += count
        errors.append(trained.error(state, data.x_validation, data.y_validation))
        on_epoch(len(errors), errors[-1])
    test = trained.error(state, data.x_test, data.y_test)
    time_s = (time.perf_counter() - began) / len(runs)
    of_runs = (np.transpose(errors).tolist(), test.tolist(), np.asarray(loss).tolist())
    results = []
    for course, error, last in zip(*of_runs, strict=True):
        result = {"validation_error": course, "test_error": error, "loss": last, "diverged": not np.isfinite(last)}
        results.append({**result, "steps": at, "time_s": time_s})
    return results


@lru_cache(maxsize=2)
def _training_data(task: DigitsTask) -> tuple[tf.Tensor, tf.Tensor]:
    data = task.load()
    return tf.constant(data.x), tf.constant(data.y)


class _Replicas:
    """A model and an optimizer whose variables exist once for each replica, and the compiled step."""

    def __init__(self, task: DigitsTask, optimizer: str, count: int):
        self.task, self.count = task, count
        self.x, self.y = _training_data(task)
        self.model = task.build()
        self.optimizer = make_optimizer(Recipe(1, optimizer=optimizer), len(self.x))  # only its kind matters here
        self.optimizer.build(self.model.trainable_variables)
        self._let_the_optimizer_work_in_a_scope()
        self.steps = tf.function(self._all_steps, jit_compile=True)
        self._predict = tf.function(self._all_predictions, jit_compile=True)

    def _let_the_optimizer_work_in_a_scope(self) -> None:
        """Keras' TensorFlow optimizers write to tf.Variables, past the scope in which a replica keeps its values."""
        place = {id(variable): i for i, variable in enumerate(self.model.trainable_variables)}
        instead = {
            "assign": lambda variable, value: variable.assign(value),
            "assign_add": lambda variable, value: variable.assign(variable + value),
            "assign_sub": lambda variable, value: variable.assign(variable - value),
            "_get_variable_index": lambda variable: place[id(variable)],
        }
        for name, function in instead.items():
            object.__setattr__(self.optimizer, name, function)

    def begin(self, seeds: Sequence[int]) -> tuple[list[tf.Tensor], ...]:
        """The state before the first step: trainable variables, others, those of the optimizer."""
        replicas = []
        for seed in seeds:
            keras.utils.set_random_seed(seed)
            model = self.task.build()
            kinds = (model.trainable_variables, model.non_trainable_variables)
            replicas.append([[v.numpy() for v in variables] for variables in kinds])
        trainable, others = ([np.stack(vs) for vs in zip(*part, strict=True)] for part in zip(*replicas, strict=True))
        slots = [np.stack([v.numpy()] * len(seeds)) for v in self.optimizer.variables]
        return tuple([tf.constant(v) for v in part] for part in (trainable, others, slots))

    def _all_steps(self, state: Any, rates: Any, settings: Any, indices: Any, weights: Any) -> tuple[Any, Any]:
        loss = tf.zeros([self.count])
        for i in tf.range(indices.shape[0]):
            elements = (state, rates[i], settings, indices[i], weights[i])
            state, loss = tf.vectorized_map(self._one_step, elements)
        return state, loss

    def _one_step(self, elements: tuple) -> tuple[Any, Any]:
        (trainable, others, slots), rate, settings, indices, weights = elements
        model, optimizer = self.model, self.optimizer
        with tf.GradientTape() as tape:
            tape.watch(trainable)
            output, others = model.stateless_call(trainable, others, tf.gather(self.x, indices), training=True)
            loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            loss = loss_of(tf.gather(self.y, indices), output, sample_weight=weights)
        gradients = tape.gradient(loss, trainable)
        variables = [*model.trainable_variables, *optimizer.variables]
        for name in PER_REPLICA:
            if hasattr(optimizer, name):
                object.__setattr__(optimizer, name, settings[name])
        object.__setattr__(optimizer, "_get_current_learning_rate", lambda: rate)
        before = [*trainable, *slots]
        # what the loss does not depend on is left alone, as Keras does
        pairs = [pair for pair in zip(gradients, model.trainable_variables, strict=True) if pair[0] is not None]
        with keras.StatelessScope(list(zip(variables, before, strict=True))) as scope:
            optimizer._apply_weight_decay([variable for _, variable in pairs])
            for gradient, variable in pairs:
                optimizer.update_step(gradient, variable, rate)
            optimizer.iterations.assign(optimizer.iterations + 1)
        after = [scope.get_current_value(variable) for variable in variables]
        after = [tf.convert_to_tensor(old if new is None else new) for old, new in zip(before, after, strict=True)]
        state = (after[: len(trainable)], [tf.convert_to_tensor(value) for value in others], after[len(trainable) :])
        return state, loss

    def error(self, state: tuple, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Share of wrong answers of each replica, in per cent."""
        wrong = self._predict(state[:2], tf.constant(x)).numpy() != y
        return 100 * wrong.mean(axis=1)

    def _all_predictions(self, state: tuple, x: tf.Tensor) -> tf.Tensor:
        def predict(of_replica: tuple) -> tf.Tensor:
            return tf.argmax(self.model.stateless_call(*of_replica, x, training=False)[0], axis=-1)

        return tf.vectorized_map(predict, state)


_replicas = cache(_Replicas)  # tracing and compiling take longer than many a training
