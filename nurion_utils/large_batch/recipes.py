"""A training run written down once, as data: how large the batch is, and the learning rate at every moment.

>>> recipe = Recipe(batch=8192, base_batch=256, base_rate=0.1, warmup="gradual", warmup_epochs=5, epochs=90)
>>> recipe.peak_rate, recipe.rate(0.0), recipe.rate(5.0)
(3.2, 0.1, 3.2)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from nurion_utils._checks import number, one_of, positive, whole_number

RULES = {"fixed": lambda k: 1.0, "square root": math.sqrt, "linear": float}
WARMUPS = ("none", "constant", "gradual")
DECAYS = ("none", "steps")
OPTIMIZERS = ("sgd", "lars", "lamb")


class RecipeError(ValueError):
    """A recipe that cannot be trained; the message says what would be right."""


@dataclass(frozen=True)
class Recipe:
    """One training run; `RecipeError` if it cannot be one.

    A warm-up is "gradual", from `warmup_from` up to the full rate in a straight line, or "constant": at `warmup_from`,
    then a jump.
    """

    batch: int  # samples per step, of all ranks together
    base_batch: int = 32  # for which the learning rate is known to be good,
    base_rate: float = 0.05  # and that rate
    # How the rate follows k = batch / base_batch: the square root of k or k times as high (Goyal et al. 2017).
    rule: Literal["fixed", "square root", "linear"] = "linear"
    epochs: float = 10  # passes over the data
    warmup: Literal["none", "constant", "gradual"] = "none"
    warmup_epochs: float = 0.0
    warmup_from: float | None = None  # the base rate unless given; LARS and LAMB are usually started from 0
    decay: Literal["none", "steps"] = "steps"  # "steps": the rate falls to a tenth at each milestone,
    milestones: tuple[float, ...] = (1 / 3, 2 / 3, 8 / 9)  # in parts of all epochs
    optimizer: Literal["sgd", "lars", "lamb"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4  # of kernels only, not of biases and batch normalisation
    trust_coefficient: float = 0.1  # of LARS: the share of its own length that a layer may move by at a rate of 1

    def __post_init__(self) -> None:
        checked = {name: whole_number(getattr(self, name), name, error=RecipeError) for name in ("batch", "base_batch")}
        for name in ("base_rate", "epochs", "trust_coefficient"):
            checked[name] = positive(getattr(self, name), name, RecipeError)
        for name in ("warmup_epochs", "warmup_from", "momentum", "weight_decay"):
            if (value := getattr(self, name)) is not None or name != "warmup_from":
                checked[name] = number(value, name, least=0, error=RecipeError)
        checked["milestones"] = tuple(map(float, self.milestones))  # as it comes back from JSON
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, known in {"rule": RULES, "warmup": WARMUPS, "decay": DECAYS, "optimizer": OPTIMIZERS}.items():
            one_of(getattr(self, name), name, known, RecipeError)
        if (self.warmup == "none") != (self.warmup_epochs == 0):
            raise RecipeError("a warm-up needs both its kind and its length: warmup='gradual', warmup_epochs=5")
        if self.warmup_epochs > self.epochs:
            warmup = f"a warm-up of {self.warmup_epochs:g} epochs"
            raise RecipeError(f"{warmup} is longer than the training of {self.epochs:g}; shorten it")
        if self.momentum >= 1:
            raise RecipeError(f"momentum must be below 1, not {self.momentum!r}")
        if any(not 0 < at <= 1 for at in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise RecipeError(f"milestones are parts of the training, in order, as (1/3, 2/3), not {self.milestones}")

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.base_rate * RULES[self.rule](self.batch / self.base_batch)

    def steps_per_epoch(self, samples: int) -> int:
        """Steps that go once through the data, the last one perhaps with fewer samples; `RecipeError` if none fits."""
        if self.batch > samples:
            raise RecipeError(f"a batch of {self.batch:,} is larger than the data, {samples:,} samples; reduce it")
        return -(-samples // self.batch)

    def steps(self, samples: int) -> int:
        """Steps of the whole training; `RecipeError` if there is none."""
        if not (steps := round(self.epochs * self.steps_per_epoch(samples))):
            raise RecipeError(f"{self.epochs:g} epochs of {samples:,} samples are less than a step of {self.batch:,}")
        return steps

    def rate(self, epoch: float | np.ndarray) -> float | np.ndarray:
        """The learning rate at a moment of the training, in epochs from its start."""
        epoch, peak = np.asarray(epoch, float), self.peak_rate
        milestones = np.array(self.milestones if self.decay == "steps" else ()) * self.epochs
        # a milestone counts from the step that begins at it, whatever rounding does to the step's epoch
        rate = peak * 0.1 ** np.searchsorted(milestones, epoch + 1e-9, "right")
        if self.warmup != "none":
            start = self.base_rate if self.warmup_from is None else self.warmup_from
            part = np.clip(epoch / self.warmup_epochs, 0, 1) if self.warmup == "gradual" else 0.0
            warming = start + (peak - start) * part
            rate = np.where(epoch < self.warmup_epochs - 1e-9, warming, rate)
        return rate if rate.ndim else float(rate)

    def rates(self, samples: int) -> np.ndarray:
        """The learning rate of each step, float32, shape (steps,)."""
        at = np.arange(self.steps(samples)) / self.steps_per_epoch(samples)
        return np.asarray(self.rate(at), np.float32)

    def changed(self, **settings: Any) -> Recipe:
        """The same recipe with other settings."""
        return replace(self, **settings)

    def as_dict(self) -> dict[str, Any]:
        """All settings, as JSON can hold them."""
        return {**asdict(self), "milestones": list(self.milestones)}
