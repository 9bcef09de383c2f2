"""Handwritten digits: 1797 real images of 8 x 8 pixels that scikit-learn ships, so nothing is downloaded."""

from __future__ import annotations

import numpy as np

from nurion_utils._checks import number


def load(seed: int = 0, test_share: float = 1 / 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The digits, divided once into a training and a test set that hold each digit equally often.

    Parameters
    ----------
    seed : int
        Seed of the division; give all ranks the same.
    test_share : float
        Share of the images in the test set, between 0 and 1.

    Returns
    -------
    x_train, y_train, x_test, y_test : numpy.ndarray
        Images as float32 in 0 to 1, shape (n, 64), and their digits as int64, shape (n,).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 0 < number(test_share, "test_share") < 1:
        raise ValueError(f"test_share must be between 0 and 1, not {test_share}")
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=test_share, stratify=y, random_state=seed
    )
    return x_train, y_train, x_test, y_test


def distort(
    images: np.ndarray, samples: int, rng: np.random.Generator, size: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Many new images from few: each one turned, shifted, scaled, bent and made noisy.

    So that a set is large enough for large batches. Images of different sets must come from different originals.

    Parameters
    ----------
    images : numpy.ndarray
        As `load` returns them, shape (n, 64).
    samples : int
        How many to make; the originals are taken in turn.
    size : int
        Pixels along an edge of the new images.

    Returns
    -------
    made : numpy.ndarray, float32, shape (samples, size * size)
    original : numpy.ndarray, int64, shape (samples,)
        Which of `images` each one was made from.
    """
    from scipy.ndimage import map_coordinates, zoom

    original = np.arange(samples) % len(images)
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
