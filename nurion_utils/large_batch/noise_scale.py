"""How large a batch still pays, while training: the gradient-noise scale.

The gradient of a batch of B samples is the true gradient G plus noise, whose squared length is S / B on average. Up
to the noise scale B_simple = S / |G|^2 a larger batch removes mostly noise, and fewer steps do; beyond it a step
gains little. Ranks measure it at no extra cost: each has the gradient of its own small batch, and that of all.

>>> noise = NoiseScale(batch_per_rank=32)  # doctest: +SKIP
>>> model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1), observer=noise), loss="mse")  # doctest: +SKIP
>>> model.fit(data, epochs=5)  # doctest: +SKIP
>>> noise.table(window=steps_per_epoch)  # doctest: +SKIP

All formulas: McCandlish et al. 2018, "An empirical model of large-batch training" (arXiv 1812.06162).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nurion_utils._checks import whole_number

if TYPE_CHECKING:
    import pandas as pd
    import tensorflow as tf

BLOCKS = 20  # of consecutive steps, whose scatter gives the standard error
HISTORY = 100_000  # steps that are remembered, at 16 bytes each


class NoiseScale:
    """Measures the noise scale while ranks train: ``DistributedOptimizer(optimizer, observer=NoiseScale(32))``.

    The squared length of each rank's gradient is averaged in the gradients' own allreduce, as one number more; no
    step passes through Python, and training takes the same steps as without. Nothing measured is saved with a model.
    `batch_per_rank` samples are in each batch of a rank. All must be full (``drop_remainder=True``), and the loss a
    mean over them, as in Keras. The last `HISTORY` steps are remembered.

    ValueError with fewer than 2 ranks, or in elastic training, where ranks come and go; and, when the training step is
    traced, if a gradient is sparse.

    Notes
    -----
    With ``gradient_accumulation_steps`` the batches that a rank accumulates count as one. Loss scaling is divided
    out first, and steps skipped for an overflow are not counted, so mixed precision works; weights that are float16
    themselves take one message more. What the ranks have in common, such as a regulariser, counts as gradient; what
    each draws for itself, such as dropout, as noise.
    """

    def __init__(self, batch_per_rank: int) -> None:
        import tensorflow as tf

        from nurion_utils.training.communicator import communicator

        self.batch_per_rank = whole_number(batch_per_rank, "batch_per_rank")
        if int(os.environ.get("HOROVOD_ELASTIC", 0)):
            raise ValueError("the noise scale needs the same ranks from start to end; measure it without elastic_run")
        self.ranks = communicator().size
        if self.ranks == 1:
            raise ValueError("the noise scale compares the gradients of ranks, and there is only one; start 2 or more")
        self._batches = 1
        self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        # Of each step |g|^2 averaged over the ranks, and |g|^2 of the average.
        self._history = tf.Variable(tf.zeros((HISTORY, 2), tf.float64), trainable=False)

    def __call__(self, gradients: list, average: Callable[[list], list], batches: int) -> list:
        """What `DistributedOptimizer` calls: average the gradients, and remember their squared lengths."""
        import tensorflow as tf

        if any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
            raise ValueError("the noise scale needs dense gradients, but an Embedding's are sparse: train without it")
        self._batches = batches
        *averages, small_sq = average([*gradients, _squared_length(gradients)])
        row = tf.cast(tf.stack([small_sq, _squared_length(averages)]), tf.float64)
        self._history.scatter_nd_update([[self._steps % self._history.shape[0]]], [row])
        self._steps.assign_add(1)
        return averages

    def table(self, window: int | None = None) -> pd.DataFrame:
        """What was measured so far in windows of steps, the same on all ranks; see `noise_table`."""
        steps, history = int(self._steps), self._history.numpy()
        first = max(0, steps - len(history))
        small_sq, large_sq = history[np.arange(first, steps) % len(history)].T
        small = self.batch_per_rank * self._batches
        table = noise_table(small_sq, large_sq, small, small * self.ranks, window)
        return table.assign(step=table["step"] + first)


def _squared_length(tensors: list[tf.Tensor]) -> tf.Tensor:
    import tensorflow as tf

    # Of the gradients' own type, so that it joins their message; half precision would not hold it.
    dtype = tf.float64 if any(tensor.dtype == tf.float64 for tensor in tensors) else tf.float32
    return 2 * tf.add_n([tf.nn.l2_loss(tf.cast(tensor, dtype)) for tensor in tensors])


def estimate(small_sq: Any, large_sq: Any, small: float, large: float) -> tuple[Any, Any]:
    """Unbiased estimates of |G|^2 and S from the squared lengths of the gradients of two batches, and their samples.

    From E |G_B|^2 = |G|^2 + S / B for both (appendix A.1); that of the small one is best averaged over all parts of the
    large one. Single estimates scatter widely, and |G|^2 may come out negative: average both over steps, and divide
    the averages.
    """
    gradient_sq = (large * large_sq - small * small_sq) / (large - small)
    noise = (small_sq - large_sq) / (1 / small - 1 / large)
    return gradient_sq, noise


def noise_table(
    small_sq: np.ndarray, large_sq: np.ndarray, small: float, large: float, window: int | None = None
) -> pd.DataFrame:
    """The noise scale from the squared lengths of each step's gradients, arrays of shape (steps,); see `estimate`.

    `window` steps in a row are averaged: an epoch's, say. By default all; steps that fill no window are left out. A row
    per window: ``step`` (its last one, counted from 1), ``gradient_sq`` (|G|^2), ``noise`` (S), ``noise_scale``
    (S / |G|^2, in samples; NaN where |G|^2 came out as zero or less: take longer windows) and ``noise_scale_se``, its
    standard error: that of a ratio of means (first order), from the scatter of 20 blocks of consecutive steps, or of
    single steps in a window of fewer; one step has none.
    """
    import pandas as pd

    gradient_sq, noise = estimate(np.asarray(small_sq, float), np.asarray(large_sq, float), small, large)
    steps = len(noise)
    if not steps:
        raise ValueError("no step has been measured yet; train first, with this observer in DistributedOptimizer")
    window = steps if window is None else whole_number(window, "window")
    if window > steps:
        raise ValueError(f"a window of {window} steps is longer than the {steps} steps measured; take a shorter one")
    rows = []
    for start in range(0, steps - window + 1, window):
        part = slice(start, start + window)
        mean_sq, mean_noise = gradient_sq[part].mean(), noise[part].mean()
        scale = mean_noise / mean_sq if mean_sq > 0 else np.nan
        residuals = (noise[part] - scale * gradient_sq[part]) / mean_sq
        blocks = [block.mean() for block in np.array_split(residuals, min(window, BLOCKS))]
        error = np.std(blocks, ddof=1) / len(blocks) ** 0.5 if len(blocks) > 1 else np.nan
        rows.append((start + window, mean_sq, mean_noise, scale, error))
    return pd.DataFrame(rows, columns=["step", "gradient_sq", "noise", "noise_scale", "noise_scale_se"])
