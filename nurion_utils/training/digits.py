"""Handwritten digits: 1797 real images of 8 x 8 pixels that scikit-learn ships, so nothing is downloaded."""

from __future__ import annotations

import numpy as np


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

    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, not {test_share}.")
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=test_share, stratify=y, random_state=seed
    )
    return x_train, y_train, x_test, y_test
