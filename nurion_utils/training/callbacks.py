"""Callbacks for `fit` on several ranks: start equal, decide alike, and notice when ranks drift apart.

They talk over Horovod; over MPI if it cannot be imported, or if the optimizer has a reducer and nobody has called
`hvd.init`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import keras
import numpy as np

from nurion_utils.training.communicator import communicator
from nurion_utils.training.optimizer import _PluggedReduction


def broadcast_model(model: keras.Model, root: int = 0) -> None:
    """Give all ranks the weights and optimizer variables of one; for a training loop of one's own.

    The states of random generators (dropout, augmentation) are left alone: ranks see different samples and
    should also draw different numbers, so seed each rank differently.

    Parameters
    ----------
    model : keras.Model
        Built, and compiled with its optimizer.
    root : int
        The rank to copy from.

    Raises
    ------
    ValueError
        On all ranks, if the model is not ready or differs between ranks in the shape or type of a variable.
    """
    if not model.built or getattr(model, "optimizer", None) is None:
        raise ValueError(
            "Before its variables can be broadcast, the model must be compiled, and built: begin it with "
            "keras.Input(shape), or call model.build(shape)."
        )
    ranks = _ranks_of(model)
    if not 0 <= root < ranks.size:
        raise ValueError(f"root must be a rank from 0 to {ranks.size - 1}, not {root}.")
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = [*model.weights, *model.optimizer.variables]
    # The others would wait for ever for the variables that a rank does not have.
    outline = repr([(tuple(v.shape), v.dtype) for v in variables])
    outlines = np.array(ranks.allgather((len(variables), _digest(outline.encode()))))
    differing = np.flatnonzero((outlines != outlines[root]).any(axis=1)).tolist()
    if differing:
        raise ValueError(
            f"All ranks must build the same model, but that of rank {differing[0]}, with its optimizer, has "
            f"{outlines[differing[0], 0]} variables and that of rank {root} has {outlines[root, 0]}, or shapes differ."
        )
    for variable in variables:
        variable.assign(_broadcast(ranks, variable, root))


class BroadcastCallback(keras.callbacks.Callback):
    """Start training from the same state on all ranks: that of rank `root` (see `broadcast_model`).

    Without it ranks with different seeds average gradients of different models, and none of them learns well.

    Parameters
    ----------
    root : int
    """

    def __init__(self, root: int = 0) -> None:
        super().__init__()
        self.root = root

    def on_train_begin(self, logs: dict | None = None) -> None:
        broadcast_model(self.model, self.root)


class MetricAverageCallback(keras.callbacks.Callback):
    """Replace each epoch's metrics by their average over the ranks.

    Place it *before* callbacks that decide by metrics (`EarlyStopping`, `ReduceLROnPlateau`, `ModelCheckpoint`):
    they see the averages of those before them only, and ranks that decide differently wait for each other for
    ever.  For the same reason use nothing that stops a single rank, such as `TerminateOnNaN`.

    Exact for means over samples such as losses and accuracies; for others, such as AUC, it is what its name says.

    Parameters
    ----------
    samples, val_samples : float, optional
        This rank's number of training and validation samples, by which metrics are weighted.  Leave them out if
        all ranks have equally many.

    Raises
    ------
    ValueError
        At the end of the epoch, on all ranks, if ranks report different metrics or have no samples.
    """

    def __init__(self, samples: float = 1, val_samples: float = 1) -> None:
        super().__init__()
        self.samples = samples
        self.val_samples = val_samples

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        ranks = _ranks_of(self.model)
        everyones = ranks.allgather((logs, self.samples, self.val_samples))
        names = sorted(logs)
        for rank, (metrics, *_) in enumerate(everyones):
            if sorted(metrics) != names:
                raise ValueError(f"Rank {rank} reports {sorted(metrics)}, rank {ranks.rank} reports {names}.")
        weights = np.array([numbers for _, *numbers in everyones], float)
        if not (weights.sum(axis=0) > 0).all() or (weights < 0).any():
            raise ValueError(f"The numbers of samples must be positive, not {weights.tolist()} by rank.")
        for name in names:
            values = [metrics[name] for metrics, *_ in everyones]
            logs[name] = float(np.average(values, weights=weights[:, int(name.startswith("val_"))]))


class SyncCheckCallback(keras.callbacks.Callback):
    """Stop, on all ranks, as soon as trained weights or optimizer variables differ between ranks.

    Weights that are not trained are left out: batch normalisation keeps statistics of each rank's own samples.

    Parameters
    ----------
    every_steps : int, optional
        Check after every so many steps; by default at the end of each epoch.
    tolerance : float
        Greatest absolute difference allowed.  Reductions of MPI, oneCCL and Gloo give all ranks the same bits,
        so the default is 0; one's own reduction may need more.

    Raises
    ------
    RuntimeError
        On all ranks.  It names the first variable that differs, the ranks that hold another value than most do
        (than rank 0, if there is no majority), and by how much they differ.
    """

    def __init__(self, every_steps: int | None = None, tolerance: float = 0.0) -> None:
        super().__init__()
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps must be 1 or more, not {every_steps}.")
        self.every_steps = every_steps
        self.tolerance = tolerance
        self._checked_at = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._checked_at = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        # Keras reports only the last of `steps_per_execution` batches.
        if self.every_steps and batch + 1 - self._checked_at >= self.every_steps:
            self._checked_at = batch + 1
            self._check(f"after step {batch + 1} of this epoch")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if not self.every_steps:
            self._check(f"after epoch {epoch + 1}")

    def _check(self, when: str) -> None:
        ranks = _ranks_of(self.model)
        variables = [*self.model.trainable_variables, *_optimizer_variables(self.model.optimizer)]
        digests = np.array(ranks.allgather([_digest(keras.ops.convert_to_numpy(v).tobytes()) for v in variables]))
        for index in np.flatnonzero((digests != digests[0]).any(axis=0)):
            values, first, counts = np.unique(digests[:, index], return_index=True, return_counts=True)
            most = values[counts == counts.max()]
            usual = digests[0, index] if digests[0, index] in most else most[0]
            reference = int(first[values == usual][0])
            value = keras.ops.convert_to_numpy(variables[index])
            difference = value.astype(float) - _broadcast(ranks, value, reference).astype(float)
            # NaN compares with nothing, but is a difference
            deviations = np.array(ranks.allgather(float(np.abs(difference).max())))
            differing = np.flatnonzero((digests[:, index] != usual) & ~(deviations <= self.tolerance)).tolist()
            if differing:
                raise RuntimeError(
                    f"Ranks no longer agree {when}: {variables[index].path!r} on rank "
                    f"{', '.join(map(str, differing))} differs from rank {reference}'s by up to "
                    f"{np.max(deviations[differing]):.3g}; look for an optimizer that was not made with "
                    "DistributedOptimizer, or for missing BroadcastCallback()."
                )


def _ranks_of(model: keras.Model) -> Any:
    return communicator(isinstance(getattr(model.optimizer, "_reduction", None), _PluggedReduction))


def _optimizer_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Horovod's own wrapper replaces `variables` by one that fails on Keras 3, and must still be found out."""
    if type(optimizer).__module__.startswith("horovod."):
        return keras.optimizers.Optimizer.variables.fget(optimizer)
    return optimizer.variables


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _broadcast(ranks: Any, value: keras.Variable | np.ndarray, root: int) -> np.ndarray:
    copy = np.array(keras.ops.convert_to_numpy(value), order="C")
    ranks.Bcast(copy.reshape(-1).view(np.uint8), root)  # bytes: neither Horovod nor MPI knows bfloat16
    return copy
