"""How much memory data-parallel training takes on a node, which holds the whole model, and whether it has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from nurion_utils._checks import one_of

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from nurion_utils.sites import Site

# Numbers that an optimizer keeps beside each weight.
OPTIMIZER_SLOTS = {"sgd": 0, "momentum": 1, "lars": 1, "adam": 2, "lamb": 2}
# Horovod 0.28 packs gradients into one buffer of this size before it reduces them (its operations.cc; its prose says
# 64 MiB). HOROVOD_FUSION_THRESHOLD changes it.
FUSION_BUFFER_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Footprint:
    """What training a model takes on one node; `footprint` reads it off a Keras model."""

    weight_bytes: int  # weights that are trained
    activation_bytes: int  # activations that one sample leaves for the backward pass
    optimizer: str  # one of `OPTIMIZER_SLOTS`
    state_bytes: int = 0  # weights that are not trained, such as the running means of batch normalisation

    def __post_init__(self) -> None:
        one_of(self.optimizer, "optimizer", OPTIMIZER_SLOTS)

    def table(self, batch_size: int) -> pd.DataFrame:
        """Memory by component for a batch per node: columns component and size_bytes."""
        import pandas as pd

        sizes = {
            "weights": self.weight_bytes + self.state_bytes,
            "gradients": self.weight_bytes,
            "optimizer": OPTIMIZER_SLOTS[self.optimizer] * self.weight_bytes,
            "communication": FUSION_BUFFER_BYTES,
            "activations": self.activation_bytes * batch_size,
        }
        return pd.DataFrame({"component": list(sizes), "size_bytes": list(sizes.values())})

    def size_bytes(self, batch_size: int) -> int:
        """Memory in all for a batch per node."""
        return int(self.table(batch_size)["size_bytes"].sum())

    def fits(self, site: Site, batch_size: int) -> bool:
        """Whether a node of the site has the memory."""
        return self.size_bytes(batch_size) <= site.node.memory_usable_gb * 1e9

    def largest_batch(self, site: Site) -> int:
        """The largest batch that fits a node of the site; 0 says that the model itself does not."""
        spare = site.node.memory_usable_gb * 1e9 - self.size_bytes(0)
        return max(0, int(spare // self.activation_bytes))


def layers_of(model: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a model, and of the models in it."""
    import keras

    for layer in model.layers:
        yield from layers_of(layer) if isinstance(layer, keras.Model) else (layer,)


def footprint(model: keras.Model, optimizer: str = "adam") -> Footprint:
    """What a Keras model takes in training.

    Weights and gradients are exact. The activations are an estimate: the output of every layer is kept once.
    Scratch space of the kernels is not in it, nor what a framework saves by fusing layers or overwriting one.
    """
    import keras
    import tensorflow as tf

    def size_bytes(shape: tuple[int, ...], dtype: str) -> int:
        return prod(shape) * tf.as_dtype(dtype).size

    if not model.built:
        raise ValueError(f"model {model.name!r} has no shapes yet: give it an Input, or build it")
    activations = 0
    for layer in layers_of(model):
        # These hand their input on and keep nothing.
        if isinstance(layer, keras.layers.InputLayer | keras.layers.Flatten | keras.layers.Reshape):
            continue
        shape = layer.output.shape[1:]
        if None in shape:
            raise ValueError(f"layer {layer.name!r} has an output of unknown size: give the Input a fixed shape")
        activations += size_bytes(shape, layer.compute_dtype)
    weights, state = (
        sum(size_bytes(weight.shape, weight.dtype) for weight in some)
        for some in (model.trainable_weights, model.non_trainable_weights)
    )
    return Footprint(weights, activations, optimizer, state)
