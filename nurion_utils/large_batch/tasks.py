"""What is to be learned in a sweep: data, and the network that learns it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nurion_utils.datasets import digits

if TYPE_CHECKING:
    import keras


class Data(NamedTuple):
    """Inputs and classes to train on, to choose settings by, and to report."""

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class DigitsTask:
    """Distorted digits, on which batches up to some thousand can be told apart in seconds.

    Validation and test images are made from originals that no training image was made from.
    """

    samples: int = 32_768  # to train on; 2,000 for validation and 4,000 for the test come on top
    split: int = 0  # seed of the division of the originals and of the distortion
    group: int = 32  # samples that share the statistics of batch normalisation, as those of one rank do

    @lru_cache(maxsize=2)  # noqa: B019 - the task is a value
    def load(self) -> Data:
        x, y, x_held, y_held = digits.load(seed=self.split)
        rng = np.random.default_rng([self.split, 12])
        half = len(x_held) // 3
        parts = [(x, y, self.samples), (x_held[:half], y_held[:half], 2000), (x_held[half:], y_held[half:], 4000)]
        made = []
        for images, classes, samples in parts:
            distorted, original = digits.distort(images, samples, rng)
            made += [distorted, classes[original]]
        return Data(*made)

    def build(self) -> keras.Model:
        """A new network of logits; its initial weights follow Keras' random seed."""
        import keras

        from nurion_utils.training import GroupedBatchNormalization

        layers: list[keras.Layer] = [keras.Input((144,))]
        for _ in range(4):
            layers.append(keras.layers.Dense(64, use_bias=False, kernel_initializer="he_normal"))
            layers += [GroupedBatchNormalization(self.group), keras.layers.ReLU()]
        last = keras.initializers.RandomNormal(stddev=0.01)
        return keras.Sequential([*layers, keras.layers.Dense(10, kernel_initializer=last)])
