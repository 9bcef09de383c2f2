"""What is trained, and how it is spread over nodes: a plan that knows no machine."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nurion_utils._checks import number, one_of, positive, whole_number
from nurion_utils.scaling.terms import ALGORITHMS
from nurion_utils.training.memory import FUSION_BUFFER_BYTES, footprint, layers_of

if TYPE_CHECKING:
    import keras

# From the strongest to the weakest; of the inputs of a prediction the weakest counts.
STATUSES = ("measured", "read", "derived", "summary", "remembered", "chosen")


@dataclass(frozen=True)
class Workload:
    """Data-parallel training of one network; ValueError if it cannot be one.

    Either `batch` or `global_batch` is given: samples per rank and step, which make weak scaling, or samples of all
    ranks together, which make strong scaling. `samples` are those of an epoch, or of an epoch and node where
    `samples_per_node` says so.
    """

    name: str
    gradient_bytes: float  # of all gradients together, as they travel
    batch: float | None = None
    global_batch: float | None = None
    tensors: int = 1  # that the gradients consist of
    operations: float | None = None  # of training on one sample, forward and backward
    sample_bytes: float = 0.0  # that are read for one sample
    activation_bytes: float = 0.0  # that one sample leaves for the backward pass
    samples: float | None = None
    samples_per_node: bool = False
    ranks_per_node: int = 1
    algorithm: Literal["naive", "tree", "ring", "recursive_doubling", "rabenseifner"] = "rabenseifner"
    fusion_bytes: float = FUSION_BUFFER_BYTES  # of gradients that are reduced together; 0: each by itself
    storage: str | None = None  # the site's file system that is read, or "burst_buffer"; None: input costs nothing
    status: str = "chosen"  # the weakest of these figures'
    source: str = ""

    def __post_init__(self) -> None:
        if (self.batch is None) == (self.global_batch is None):
            raise ValueError(f"{self.name!r} needs either batch (per rank) or global_batch, and not both")
        for name in ("batch", "global_batch", "operations", "samples"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), name)
        for name in ("gradient_bytes", "sample_bytes", "activation_bytes", "fusion_bytes"):
            number(getattr(self, name), name, least=0)
        for name in ("tensors", "ranks_per_node"):
            whole_number(getattr(self, name), name)
        one_of(self.algorithm, "algorithm", ALGORITHMS)
        one_of(self.status, "status", STATUSES)

    @property
    def buffers(self) -> int:
        """In how many allreduces the gradients of a step travel."""
        full = -(-self.gradient_bytes // self.fusion_bytes) if self.fusion_bytes else self.tensors
        return int(min(self.tensors, max(1, full)))

    def batches(self, nodes: np.ndarray) -> np.ndarray:
        """Samples per rank and step on so many nodes; ValueError where a rank would have less than one."""
        if self.batch is not None:
            return np.full(len(nodes), float(self.batch))
        batch = self.global_batch / (nodes * self.ranks_per_node)
        if (batch < 1).any():
            raise ValueError(
                f"a batch of {self.global_batch:,g} has less than one sample for each of "
                f"{int(nodes.max()) * self.ranks_per_node:,} ranks: take at most "
                f"{int(self.global_batch // self.ranks_per_node):,} nodes"
            )
        return batch

    def steps(self, nodes: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Steps of an epoch; ValueError if its samples are not known."""
        return np.ceil(self.all_samples(nodes) / (nodes * self.ranks_per_node * batch))

    def all_samples(self, nodes: np.ndarray) -> np.ndarray:
        """Samples of an epoch on so many nodes; ValueError if they are not known."""
        if self.samples is None:
            raise ValueError(f"the samples of an epoch of {self.name!r} are not known: give samples")
        return self.samples * (nodes if self.samples_per_node else np.ones(len(nodes)))


def workload(model: keras.Model, batch: int, samples: int, optimizer: str = "adam", **others: Any) -> Workload:
    """Training of a Keras model with `batch` samples per rank and step, and `samples` in an epoch.

    Operations are those of the layers' matrix products, a multiplication and an addition each: a weight of a dense or
    convolutional layer has one for each position of the output, and the backward pass takes twice what the forward
    pass does. A sample is read as float32. `others` are further settings of `Workload`. ValueError for a model
    without shapes.
    """
    needed = footprint(model, optimizer)
    return Workload(
        model.name,
        needed.weight_bytes,
        batch=whole_number(batch, "batch"),
        tensors=len(model.trainable_weights),
        operations=3 * sum(map(_forward, layers_of(model))),
        sample_bytes=4 * prod(model.input_shape[1:]),
        activation_bytes=needed.activation_bytes,
        samples=whole_number(samples, "samples"),
        **{"status": "derived", "source": "read off the model"} | others,
    )


def _forward(layer: keras.Layer) -> int:
    """Operations of a layer on one sample."""
    kernels = [weight for weight in layer.trainable_weights if len(weight.shape) > 1 and "embed" not in weight.path]
    return 2 * sum(prod(kernel.shape) for kernel in kernels) * prod(layer.output.shape[1:-1]) if kernels else 0


_PAPER = "Mathuriya et al., CosmoFlow, arXiv 1808.04728"
_BENCHMARK = "sparticlesteve/cosmoflow-benchmark: 4 channels of 16 bits; 8.9 million weights"
_HEP = "Nurion's HEP-CNN, arXiv 2207.11710: 9.15 million weights, about 758,420 events, 60 % training, 20 % validation"
PUBLISHED = {
    each.name: each
    for each in (
        Workload(
            "CosmoFlow", 28.15e6, batch=1, tensors=20, operations=69.33e9, sample_bytes=128**3 * 4, samples=2**18,
            status="remembered", source=_PAPER,
        ),
        Workload(
            "cosmoflow-benchmark", 35.6e6, batch=1, tensors=16, sample_bytes=128**3 * 4 * 2, samples=2**18,
            status="remembered", source=_BENCHMARK,
        ),
        Workload(
            "HEP-CNN", 36.6e6, batch=8, tensors=20, sample_bytes=64**2 * 3 * 4, samples=455_052,
            status="derived", source=_HEP,
        ),
        Workload(
            "HEP-CNN, large kernels", 412e6, batch=8, tensors=20, sample_bytes=224**2 * 3 * 4, samples=455_052,
            status="chosen", source=f"{_HEP}; gradients as of the default at 224 pixels",
        ),
        Workload(
            "ResNet-50", 102.2e6, batch=32, tensors=161, operations=24.6e9, sample_bytes=92e3, samples=1_281_167,
            status="remembered", source="He et al. 2016: 25.6 million weights, 4.1 G multiply-adds forward",
        ),
        Workload(
            "DeepCAM", 226e6, batch=2, tensors=300, sample_bytes=768 * 1152 * 16 * 4, samples=121_266,
            status="remembered", source="MLPerf HPC's DeepCAM: 56 million weights, 16 channels",
        ),
        Workload("OPT-350M", 1.32e9, global_batch=1024, tensors=388, status="remembered", source="331 million weights"),
        Workload(
            "DLRM", 10e6, global_batch=32_768, tensors=16, samples=4.2e9,
            status="remembered", source="MLPerf's DLRM: dense layers only; the embeddings' exchange is not in it",
        ),
    )
}  # fmt: skip
