"""How large a batch still pays: the gradient-noise scale while training, and the critical batch from finished runs.

The gradient of a batch of B samples is the true gradient G plus noise, whose squared length is S / B on average.  Up
to the noise scale B_simple = S / |G|^2 a larger batch removes mostly noise, and fewer steps do; beyond it a step
gains little.  Ranks measure it for nothing: each has the gradient of its own small batch, and that of all.

>>> noise = NoiseScale(batch_per_rank=32)
>>> model.compile(DistributedOptimizer(keras.optimizers.SGD(0.1), observer=noise), loss="mse")
>>> model.fit(data, epochs=5)
>>> noise.table(window=steps_per_epoch)

All formulas: McCandlish et al. 2018, "An empirical model of large-batch training" (arXiv 1812.06162).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nurion_utils._checks import positive, require_columns, whole_number

if TYPE_CHECKING:
    import pandas as pd
    import tensorflow as tf

BLOCKS = 20  # of consecutive steps, whose scatter gives the standard error


class Noise(NamedTuple):
    """Estimates of |G|^2, of S (the trace of the covariance of one sample's gradient) and of S / |G|^2 in samples."""

    gradient_sq: float
    noise: float
    noise_scale: float


def estimate(small_sq: Any, large_sq: Any, small: float, large: float) -> tuple[Any, Any]:
    """Unbiased estimates of |G|^2 and S from the squared lengths of gradients of two batches.

    From E |G_B|^2 = |G|^2 + S / B for both batches (arXiv 1812.06162, appendix A.1).  Single estimates scatter widely,
    and |G|^2 may come out negative: average both over steps, and divide the averages.

    Parameters
    ----------
    small_sq, large_sq : float or numpy.ndarray
        |g|^2 of the small batch, best averaged over all parts of the large one, and of the large batch.
    small, large : float
        Samples in them.

    Returns
    -------
    gradient_sq, noise
        |G|^2 and S.
    """
    if not 0 < small < large:
        raise ValueError(f"two batches are compared, the small one first, not {small!r} and {large!r} samples")
    gradient_sq = (large * large_sq - small * small_sq) / (large - small)
    noise = (small_sq - large_sq) / (1 / small - 1 / large)
    return gradient_sq, noise


def split_noise_scale(gradients: Sequence, batch: int) -> Noise:
    """The noise scale from the gradients of the parts of one batch, without ranks.

    Parameters
    ----------
    gradients : sequence
        For each part the mean gradient of its samples: an array, or a list of arrays (one per variable).
    batch : int
        Samples in a part.

    Returns
    -------
    Noise
        Of this one step.  For several, average ``gradient_sq`` and ``noise``, and divide the averages.
    """
    batch = whole_number(batch, "batch")
    listed = [part if isinstance(part, list | tuple) else [part] for part in gradients]
    parts = [np.concatenate([np.ravel(array) for array in arrays]).astype(float) for arrays in listed]
    if len(parts) < 2:
        raise ValueError(f"noise shows between the gradients of at least 2 parts, not {len(parts)}")
    small_sq = np.mean([part @ part for part in parts])
    mean = np.mean(parts, axis=0)
    return _divide(*estimate(small_sq, mean @ mean, batch, batch * len(parts)))


def noise_table(
    small_sq: np.ndarray, large_sq: np.ndarray, small: float, large: float, window: int | None = None
) -> pd.DataFrame:
    """The noise scale in windows of steps, from the squared lengths of each step's gradients.

    Parameters
    ----------
    small_sq, large_sq : numpy.ndarray, shape (steps,)
        See `estimate`.
    small, large : float
        Samples in the batches.
    window : int, optional
        Steps that are averaged in a row: an epoch's, say.  By default all; steps that fill no window are left out.

    Returns
    -------
    pandas.DataFrame
        One row per window: ``step`` (the last one of the window, counted from 1), ``gradient_sq`` (|G|^2), ``noise``
        (S), ``noise_scale`` (S / |G|^2, in samples; NaN where |G|^2 came out as zero or less: take longer windows) and
        ``noise_scale_se``, its standard error.

    Notes
    -----
    The standard error is that of a ratio of means (first order), from the scatter of 20 blocks of consecutive steps,
    or of single steps in a window of fewer; one step has none.
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
        mean = _divide(gradient_sq[part].mean(), noise[part].mean())
        residuals = (noise[part] - mean.noise_scale * gradient_sq[part]) / mean.gradient_sq
        blocks = [block.mean() for block in np.array_split(residuals, min(window, BLOCKS))]
        error = np.std(blocks, ddof=1) / len(blocks) ** 0.5 if len(blocks) > 1 else np.nan
        rows.append((start + window, *mean, error))
    return pd.DataFrame(rows, columns=["step", *Noise._fields, "noise_scale_se"])


def _divide(gradient_sq: float, noise: float) -> Noise:
    return Noise(float(gradient_sq), float(noise), float(noise / gradient_sq) if gradient_sq > 0 else np.nan)


class NoiseScale:
    """Measures the noise scale while ranks train: ``DistributedOptimizer(optimizer, observer=NoiseScale(32))``.

    The squared length of each rank's gradient is averaged in the gradients' own allreduce, as one number more; no
    step passes through Python, and training takes the same steps as without.  The optimizer neither tracks nor saves
    what is measured.

    Parameters
    ----------
    batch_per_rank : int
        Samples in each batch of a rank.  All must be full (``drop_remainder=True``), and the loss a mean over them,
        as in Keras.
    ranks : int, optional
        Horovod's world size unless given; needed with a `reducer` of your own.
    history : int
        Steps remembered, the last ones, at 16 bytes each.

    Raises
    ------
    ValueError
        With fewer than 2 ranks, or in elastic training, where ranks come and go.  When the training step is traced:
        if a gradient is sparse.

    Notes
    -----
    With ``gradient_accumulation_steps`` the batches that a rank accumulates count as one.  Loss scaling is divided
    out first, and steps skipped for an overflow are not counted, so mixed precision works; weights that are float16
    themselves take one message more.  What the ranks have in common, such as a regulariser, counts as gradient; what
    each draws for itself, such as dropout, as noise.
    """

    def __init__(self, batch_per_rank: int, ranks: int | None = None, history: int = 100_000) -> None:
        import tensorflow as tf

        self.batch_per_rank = whole_number(batch_per_rank, "batch_per_rank")
        if int(os.environ.get("HOROVOD_ELASTIC", 0)):
            raise ValueError("the noise scale needs the same ranks from start to end; measure it without elastic_run")
        if ranks is None:
            import horovod.tensorflow as hvd

            hvd.init()
            ranks = hvd.size()
        if ranks == 1:
            raise ValueError("the noise scale compares the gradients of ranks, and there is only one; start 2 or more")
        self.ranks = whole_number(ranks, "ranks", 2)
        self._batches = 1
        self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        # Of each step |g|^2 averaged over the ranks, and |g|^2 of the average.
        self._history = tf.Variable(tf.zeros((whole_number(history, "history"), 2), tf.float64), trainable=False)

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
        """What was measured so far, the same on all ranks; see `noise_table`."""
        steps, history = int(self._steps), self._history.numpy()
        first = max(0, steps - len(history))
        if first and window is not None and whole_number(window, "window") <= len(history):
            first = -(-first // window) * window  # windows begin where they would, had nothing been forgotten
        small_sq, large_sq = history[np.arange(first, steps) % len(history)].T
        small = self.batch_per_rank * self._batches
        table = noise_table(small_sq, large_sq, small, small * self.ranks, window)
        table["step"] += first
        return table


def _squared_length(tensors: list[tf.Tensor]) -> tf.Tensor:
    import tensorflow as tf

    # Of the gradients' own type, so that it joins their message; half precision would not hold it.
    dtype = tf.float64 if any(tensor.dtype == tf.float64 for tensor in tensors) else tf.float32
    return 2 * tf.add_n([tf.nn.l2_loss(tf.cast(tensor, dtype)) for tensor in tensors])


@dataclass(frozen=True)
class CriticalBatch:
    """A fit of (S / S_min - 1)(E / E_min - 1) = 1, with standard errors.

    Attributes
    ----------
    steps_min
        S_min: steps that not even the largest batch can save.
    samples_min
        E_min: samples that even the smallest batch needs.
    batch
        E_min / S_min, the critical batch: it takes twice as many steps and twice as many samples as must be.
    steps_min_se, samples_min_se, batch_se
        Standard errors, from the scatter of the measurements about the fit.
    """

    steps_min: float
    samples_min: float
    batch: float
    steps_min_se: float
    samples_min_se: float
    batch_se: float


def critical_batch(table: pd.DataFrame) -> CriticalBatch:
    """Fit the trade-off between steps and samples to runs that reached the same target with different batches.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per run: ``batch``, ``steps`` and ``samples`` until the target was reached.

    Returns
    -------
    CriticalBatch

    Raises
    ------
    ValueError
        If the runs cannot tell: fewer than 3 batches, or all on one side of the critical batch.

    Notes
    -----
    As E = S x batch, the law (S / S_min - 1)(E / E_min - 1) = 1 (arXiv 1812.06162) says S = S_min + E_min / batch.
    It is fitted by least squares in the logarithm of S: runs scatter by factors.
    """
    from scipy.optimize import curve_fit, nnls

    require_columns(table, ["batch", "steps", "samples"])
    batch, steps, samples = (np.array(table[name], float) for name in ("batch", "steps", "samples"))
    for name, values in {"batch": batch, "steps": steps, "samples": samples}.items():
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"the column {name} must hold numbers above 0: leave out runs that missed the target")
    if len(np.unique(batch)) < 3:
        raise ValueError(f"the law has 2 unknowns: measure at least 3 batches, not {len(np.unique(batch))}")
    batch = samples / steps  # where an epoch's last batch is small, that is what a step took on average

    def log_steps(batch: np.ndarray, log_steps_min: float, log_samples_min: float) -> np.ndarray:
        return np.logaddexp(log_steps_min, log_samples_min - np.log(batch))

    # A first fit, of relative errors, cannot fail, and says whether both unknowns show in the data at all.
    start, _ = nnls(np.stack([1 / steps, 1 / samples], axis=1), np.ones(len(steps)))
    _require_both_sides(batch, start)
    logarithms, covariance = curve_fit(log_steps, batch, np.log(steps), np.log(start))
    steps_min, samples_min = found = np.exp(logarithms)
    _require_both_sides(batch, found)
    log_errors = np.sqrt([covariance[0, 0], covariance[1, 1], np.array([-1, 1]) @ covariance @ [-1, 1]])
    values = np.array([steps_min, samples_min, samples_min / steps_min])
    return CriticalBatch(*map(float, [*values, *values * log_errors]))


def _require_both_sides(batch: np.ndarray, found: np.ndarray) -> None:
    steps_min, samples_min = found
    if samples_min >= batch.max() * steps_min:
        side, other = "below", "larger"
    elif samples_min <= batch.min() * steps_min:
        side, other = "above", "smaller"
    else:
        return
    raise ValueError(f"all batches lie {side} the critical one, which so remains unknown: measure {other} ones too")


def tradeoff(batch: Sequence[float], steps_min: float, samples_min: float) -> pd.DataFrame:
    """Steps and samples to the target at each batch, by the law that `critical_batch` fits.

    Returns
    -------
    pandas.DataFrame
        One row per batch: ``batch``, ``steps`` and ``samples``.
    """
    import pandas as pd

    steps_min, samples_min = positive(steps_min, "steps_min"), positive(samples_min, "samples_min")
    batch = np.array([positive(each, "batch") for each in batch])
    steps = steps_min + samples_min / batch
    return pd.DataFrame({"batch": batch, "steps": steps, "samples": steps * batch})
