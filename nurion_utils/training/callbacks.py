"""Callbacks for `fit` on several ranks: start equal, decide alike, and notice when ranks drift apart.

They talk over Horovod; over MPI if it cannot be imported, or if the optimizer has a reducer and nobody has called
`hvd.init`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from nurion_utils._checks import whole_number
from nurion_utils.training.communicator import Communicator, communicator, digest, outline, require_alike
from nurion_utils.training.optimizer import variables_of
from nurion_utils.training.reduction import PluggedReduction


def broadcast_model(model: keras.Model, root: int = 0) -> None:
    """Give all ranks the weights and optimizer variables of rank `root`; for a training loop of one's own.

    The states of random generators (dropout, augmentation) are left alone: ranks see different samples and should also
    draw different numbers, so seed each rank differently. ValueError, on all ranks, if the model is not built and
    compiled, or differs between ranks in the name, shape or type of a variable.
    """
    if not model.built or getattr(model, "optimizer", None) is None:
        raise ValueError(
            "before its variables can be broadcast, the model must be compiled, and built: begin it with "
            "keras.Input(shape), or call model.build(shape)"
        )
    ranks = _ranks_of(model)
    whole_number(root, "root", least=0, most=ranks.size - 1)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    slots = variables_of(model.optimizer)
    # Otherwise the others would wait for ever for the variables that a rank does not have.
    require_alike(ranks, outline(model.weights) + _outline_of_slots(slots))
    for variable in [*model.weights, *slots]:
        variable.assign(_broadcast(ranks, variable, root))


class BroadcastCallback(keras.callbacks.Callback):
    """Start training from the same state on all ranks: that of rank `root` (see `broadcast_model`).

    Without it ranks with different seeds average gradients of different models, and no rank learns well.
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
    ever. For the same reason use nothing that stops a single rank, such as `TerminateOnNaN`.

    Exact for means over samples such as losses and accuracies; for others, such as AUC, it is what its name says.
    A metric of several numbers, such as `F1Score` with one for each class, is averaged number by number and becomes
    a NumPy array.

    Parameters
    ----------
    samples, val_samples : float, optional
        This rank's number of training and validation samples, by which metrics are weighted; what a rank without
        samples reports does not count. Leave them out if all ranks have equally many.

    Raises
    ------
    ValueError
        At the end of the epoch, on all ranks, if ranks report different metrics or metrics that cannot be averaged,
        or have no samples.
    """

    def __init__(self, samples: float = 1, val_samples: float = 1) -> None:
        super().__init__()
        self.samples = samples
        self.val_samples = val_samples

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs = {} if logs is None else logs
        mine = keras.tree.map_structure(_as_numbers, dict(logs))
        everyones = _ranks_of(self.model).allgather((mine, self.samples, self.val_samples))
        for rank, (metrics, *_) in enumerate(everyones):
            if metrics.keys() != everyones[0][0].keys():
                raise ValueError(
                    f"all ranks must report the same metrics, but rank {rank} reports {sorted(metrics)} and rank 0 "
                    f"{sorted(everyones[0][0])}"
                )
        weights = np.array([numbers for _, *numbers in everyones], float)
        if not (weights.sum(axis=0) > 0).all() or (weights < 0).any():
            raise ValueError(f"the numbers of samples must be above 0 on some rank, not {weights.tolist()} by rank")
        for name in sorted(logs):
            values = [metrics[name] for metrics, *_ in everyones]
            logs[name] = _average(name, values, weights[:, int(name.startswith("val_"))])


def _as_numbers(value: Any) -> Any:
    """A metric's tensor as an array; what is not numbers stays as it is."""
    try:
        return value if value is None else np.array(keras.ops.convert_to_numpy(value), float)
    except (TypeError, ValueError):
        return value


def _average(name: str, by_rank: list, weights: np.ndarray) -> Any:
    """The weighted mean of a metric, or of each part of one that has several; None where no rank has a value."""

    def average(*values: Any) -> Any:
        counting = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight > 0]
        numbers = [(value, weight) for value, weight in counting if isinstance(value, np.ndarray)]
        if not numbers and all(value == counting[0][0] for value, _ in counting):
            return counting[0][0]
        if any(value is not None and not isinstance(value, np.ndarray) for value, _ in counting):
            raise ValueError("a value is not a number")
        mean = np.average([value for value, _ in numbers], axis=0, weights=[weight for _, weight in numbers])
        return mean if mean.ndim else float(mean)

    try:
        return keras.tree.map_structure(average, *by_rank, none_is_leaf=True)
    except (TypeError, ValueError):
        raise ValueError(
            f"the metric {name!r} cannot be averaged over the ranks, where it is {', '.join(map(str, by_rank))}; give "
            "all ranks numbers of the same shape"
        ) from None


class SyncCheckCallback(keras.callbacks.Callback):
    """Stop, on all ranks, as soon as trained weights or optimizer variables differ between ranks.

    Weights that are not trained are left out: batch normalisation keeps statistics of each rank's own samples.

    Parameters
    ----------
    every_steps : int, optional
        Check after every so many steps; by default at the end of each epoch.
    tolerance : float
        Greatest absolute difference allowed. Reductions of MPI, oneCCL and Gloo give all ranks the same bits,
        so the default is 0; one's own reduction may need more.

    Raises
    ------
    RuntimeError
        On all ranks. It names the first variable that differs, the ranks that hold another value than most do
        (than rank 0, if there is no majority), and by how much they differ.
    ValueError
        On all ranks, if they do not train the same variables.
    """

    def __init__(self, every_steps: int | None = None, tolerance: float = 0.0) -> None:
        super().__init__()
        self.every_steps = None if every_steps is None else whole_number(every_steps, "every_steps")
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
        weights, slots = self.model.trainable_variables, variables_of(self.model.optimizer)
        variables = [*weights, *slots]
        outlined = outline(weights) + _outline_of_slots(slots)
        mine = [digest(repr(outlined).encode())]
        mine += [digest(keras.ops.convert_to_numpy(variable).tobytes()) for variable in variables]
        everyones = ranks.allgather(mine)
        if any(theirs[0] != everyones[0][0] for theirs in everyones):
            require_alike(ranks, outlined)
        digests = np.array(everyones)[:, 1:]
        for index in np.flatnonzero((digests != digests[0]).any(axis=0)):
            self._compare(ranks, variables[index], digests[:, index], when)

    def _compare(self, ranks: Communicator, variable: keras.Variable, digests: np.ndarray, when: str) -> None:
        values, first, counts = np.unique(digests, return_index=True, return_counts=True)
        most = values[counts == counts.max()]
        usual = digests[0] if digests[0] in most else most[0]
        reference = int(first[values == usual][0])
        value = keras.ops.convert_to_numpy(variable)
        difference = value.astype(float) - _broadcast(ranks, value, reference).astype(float)
        # NaN compares with nothing, but is a difference
        deviations = np.array(ranks.allgather(float(np.abs(difference).max())))
        differing = np.flatnonzero((digests != usual) & ~(deviations <= self.tolerance)).tolist()
        if differing:
            raise RuntimeError(
                f"ranks no longer agree {when}: {variable.path!r} on rank {', '.join(map(str, differing))} differs "
                f"from rank {reference}'s by up to {np.max(deviations[differing]):.3g}; look for an optimizer that was "
                "not made with DistributedOptimizer, or for missing BroadcastCallback()"
            )


def _ranks_of(model: keras.Model) -> Communicator:
    return communicator(isinstance(getattr(model.optimizer, "_reduction", None), PluggedReduction))


def _outline_of_slots(slots: list[keras.Variable]) -> list[str]:
    """Keras makes their names from those of the weights, so only shapes and types tell more."""
    return [f"of the optimizer, of shape {tuple(slot.shape)} and type {slot.dtype}" for slot in slots]


def _broadcast(ranks: Communicator, value: keras.Variable | np.ndarray, root: int) -> np.ndarray:
    copy = np.array(keras.ops.convert_to_numpy(value), order="C")
    ranks.Bcast(copy, root)
    return copy
