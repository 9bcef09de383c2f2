"""Callbacks for `fit` on several ranks: start equal, decide alike, and notice when ranks drift apart.

They talk over Horovod; over MPI if it cannot be imported, or if the optimizer has a reducer and nobody has called
`hvd.init`.
"""

from collections import Counter

import keras
import numpy as np

from nurion_utils.training.communicator import Communicator, communicator, digest, outline, require_alike
from nurion_utils.training.optimizer import variables_of
from nurion_utils.training.reduction import PluggedReduction


def broadcast_model(model: keras.Model) -> None:
    """Give all ranks the weights and optimizer variables of rank 0; for a training loop of one's own.

    The states of random generators (dropout, augmentation) are left alone: ranks see different samples and should also
    draw different numbers, so seed each rank differently. ValueError, on all ranks, if the model is not built and
    compiled, or differs between ranks in the name, shape or type of a variable.
    """
    variables = all_variables(model)
    ranks = ranks_of(model)
    # Otherwise the others would wait for ever for the variables that a rank does not have.
    require_alike(ranks, outline(model.weights) + outline_of_slots(variables[len(model.weights) :]))
    for variable in variables:
        variable.assign(_broadcast(ranks, variable, 0))


def all_variables(model: keras.Model) -> list[keras.Variable]:
    """The weights of a model and the variables of its optimizer; ValueError if it is not built and compiled."""
    if not model.built or getattr(model, "optimizer", None) is None:
        raise ValueError(
            "the model must be built and compiled before ranks share its variables: begin it with keras.Input(shape), "
            "or call model.build(shape), and compile it"
        )
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return [*model.weights, *variables_of(model.optimizer)]


class BroadcastCallback(keras.callbacks.Callback):
    """Start training from the same state on all ranks: that of rank 0 (see `broadcast_model`).

    Without it ranks with different seeds average gradients of different models, and no rank learns well.
    """

    def on_train_begin(self, logs: dict | None = None) -> None:
        broadcast_model(self.model)


class MetricAverageCallback(keras.callbacks.Callback):
    """Replace each epoch's metrics by their average over the ranks.

    Place it *before* callbacks that decide by metrics (`EarlyStopping`, `ReduceLROnPlateau`, `ModelCheckpoint`):
    they see the averages of those before them only, and ranks that decide differently wait for each other for
    ever. For the same reason use nothing that stops a single rank, such as `TerminateOnNaN`.

    Exact for means over samples, such as losses and accuracies, where all ranks have equally many; for others, such as
    AUC, it is what its name says. A metric of several numbers, such as `F1Score` with one for each class, is averaged
    number by number and becomes a NumPy array. A rank whose value is None does not count. ValueError at the end of the
    epoch, on all ranks, if ranks report different metrics or metrics that cannot be averaged.
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        logs = {} if logs is None else logs
        mine = {name: value if value is None else keras.ops.convert_to_numpy(value) for name, value in logs.items()}
        everyones = ranks_of(self.model).allgather(mine)
        for rank, metrics in enumerate(everyones):
            if metrics.keys() != everyones[0].keys():
                raise ValueError(
                    f"all ranks must report the same metrics, but rank {rank} reports {sorted(metrics)} and rank 0 "
                    f"{sorted(everyones[0])}"
                )
        for name in sorted(logs):
            logs[name] = _average(name, [metrics[name] for metrics in everyones])


def _average(name: str, by_rank: list) -> float | np.ndarray | None:
    """The mean of a metric, or of each of its numbers; None where no rank has a value."""
    if not (values := [value for value in by_rank if value is not None]):
        return None
    try:
        mean = np.mean(np.array(values, float), axis=0)
    except (TypeError, ValueError):
        raise ValueError(
            f"the metric {name!r} cannot be averaged over the ranks, where it is {', '.join(map(str, by_rank))}; give "
            "all ranks numbers of the same shape"
        ) from None
    return mean if mean.ndim else float(mean)


class SyncCheckCallback(keras.callbacks.Callback):
    """Stop at the end of an epoch, on all ranks, if trained weights or optimizer variables differ between ranks.

    They must be equal exactly, as averages over Horovod are. Weights that are not trained are left out: batch
    normalisation keeps statistics of each rank's own samples. The RuntimeError, on all ranks, names the first variable
    that differs, the ranks that hold another value than most do (than rank 0, if there is no majority), and by how much
    they differ. ValueError, on all ranks, if they do not train the same variables.
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        ranks = ranks_of(self.model)
        weights, slots = self.model.trainable_variables, variables_of(self.model.optimizer)
        require_alike(ranks, outline(weights) + outline_of_slots(slots))
        variables = [*weights, *slots]
        mine = [digest(keras.ops.convert_to_numpy(variable).tobytes()) for variable in variables]
        digests = np.array(ranks.allgather(mine))
        for index in np.flatnonzero((digests != digests[0]).any(axis=0)):
            _require_equal(ranks, variables[index], digests[:, index], epoch)


def _require_equal(ranks: Communicator, variable: keras.Variable, digests: np.ndarray, epoch: int) -> None:
    usual = Counter(digests.tolist()).most_common(1)[0][0]  # of equally frequent ones the first
    reference = digests.tolist().index(usual)
    value = keras.ops.convert_to_numpy(variable)
    difference = value.astype(float) - _broadcast(ranks, value, reference).astype(float)
    deviations = np.array(ranks.allgather(float(np.abs(difference).max())))
    # 0 and -0 are equal, and NaN is a difference
    if (differing := np.flatnonzero((digests != usual) & (deviations != 0))).size:
        apart, named = deviations[differing].max(), ", ".join(map(str, differing))
        raise RuntimeError(
            f"ranks no longer agree after epoch {epoch + 1}: {variable.path!r} on rank {named} differs from rank "
            f"{reference}'s by up to {apart:.3g}; look for an optimizer that was not made with DistributedOptimizer, "
            "or for missing BroadcastCallback()"
        )


def ranks_of(model: keras.Model) -> Communicator:
    """All ranks that train this model together."""
    return communicator(isinstance(getattr(model.optimizer, "_reduction", None), PluggedReduction))


def outline_of_slots(slots: list[keras.Variable]) -> list[str]:
    """Keras makes their names from those of the weights, so only shapes and types tell more."""
    return [f"of the optimizer, of shape {tuple(slot.shape)} and type {slot.dtype}" for slot in slots]


def _broadcast(ranks: Communicator, value: keras.Variable | np.ndarray, root: int) -> np.ndarray:
    copy = np.array(keras.ops.convert_to_numpy(value), order="C")
    ranks.Bcast(copy, root)
    return copy
