"""Handwritten digits: 1797 real images of 8 x 8 pixels that scikit-learn ships, so nothing is downloaded."""

from __future__ import annotations

import numpy as np


def load(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The digits, two thirds to train on and one third to test, with the same share of each digit in both.

    `seed` is that of the division; give all ranks the same. Returns x_train, y_train, x_test, y_test: images as float32
    in 0 to 1, shape (n, 64), and their digits as int64, shape (n,).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=1 / 3, stratify=y, random_state=seed
    )
    return x_train, y_train, x_test, y_test


def distort(images: np.ndarray, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Many new images from few: each one turned, shifted, scaled, bent and made noisy.

    So that a set is large enough for large batches. Images of different sets must come from different originals.
    `images`, of shape (n, 64), are as `load` returns them, and taken in turn. Returns `samples` images of 12 x 12
    pixels, float32 of shape (samples, 144), and of which original each was made, int64 of shape (samples,).
    """
    from scipy.ndimage import map_coordinates, zoom

    size, original = 12, np.arange(samples) % len(images)
    turn, scale = rng.uniform(-np.pi / 6, np.pi / 6, samples), np.exp(rng.uniform(-0.2, 0.2, samples))
    shift = rng.uniform(-1, 1, (2, samples, 1, 1))
    bend = zoom(rng.normal(0, 0.5, (2, samples, 4, 4)), (1, 1, size / 4, size / 4), order=1)
    at = np.linspace(-4, 4, size)  # from the middle of an image of 8 pixels
    y, x = np.meshgrid(at, at, indexing="ij")
    cos, sin = (f(turn)[:, None, None] / scale[:, None, None] for f in (np.cos, np.sin))
    rows = cos * y - sin * x + shift[0] + bend[0] + 3.5
    columns = sin * y + cos * x + shift[1] + bend[1] + 3.5
    which = np.broadcast_to(original[:, None, None], rows.shape)
    made = map_coordinates(images.reshape(-1, 8, 8), [which, rows, columns], order=1, prefilter=False)
    made += rng.normal(0, 0.15, made.shape)
    return made.reshape(samples, -1).astype(np.float32), original
