"""Batch normalisation in data parallelism: statistics over all ranks, or over groups as each rank alone has them."""

import re
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from nurion_utils._checks import whole_number
from nurion_utils.training.communicator import is_alone

_register = keras.saving.register_keras_serializable("nurion_utils")


@_register
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation with the statistics of all ranks' samples.

    P ranks with B samples each then normalise as one rank with P x B does, also if some have fewer samples, and all
    hold the same moving statistics. Parameters and call are those of `keras.layers.BatchNormalization`, which this
    is on one rank; on several, ValueError if there is a mask in training. (Horovod's layer of this name passes
    ``fused=`` on to Keras, and Keras 3 knows no such argument.)

    Notes
    -----
    The mean is found first and then the mean square about it: two allreduces of as many numbers as there are
    channels, and two more in the backward pass, but no difference of large squares as in E[x^2] - E[x]^2.

    All ranks must call the layer equally often in training. XLA cannot compile it. A layer with a name of its own
    meets that of the same name on the other ranks; layers that Keras named meet in the order in which they are called.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.supports_jit = False

    def _moments(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        import horovod.tensorflow as hvd  # inference does without

        if not hvd.is_initialized():
            hvd.init()
        if is_alone():
            return super()._moments(inputs, mask)
        if mask is not None:
            raise ValueError("SyncBatchNormalization takes no mask in training on several ranks")
        count = tf.fill([inputs.shape[self.axis]], tf.cast(tf.size(inputs) // inputs.shape[self.axis], inputs.dtype))
        local = tf.stack([tf.reduce_sum(inputs, self._reduction_axes), count])
        total, count = tf.unstack(self._sum_over_ranks(local))
        mean = total / count
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        # The sum of differences is zero, so the variance has no derivative by the mean.
        squares = tf.square(inputs - tf.reshape(tf.stop_gradient(mean), shape))
        return mean, self._sum_over_ranks(tf.reduce_sum(squares, self._reduction_axes)) / count

    def _sum_over_ranks(self, values: tf.Tensor) -> tf.Tensor:
        """The sum; its gradient is the sum of the gradients on all ranks, under a name that all ranks share."""
        given = not re.fullmatch(r"sync_batch_normalization(_\d+)?", self.name)
        name = f"batch_norm_{self.name}" if given else "batch_norm"

        @tf.custom_gradient
        def summed(values: tf.Tensor) -> tuple[tf.Tensor, Any]:
            return _allreduce(values, name), lambda upstream: _allreduce(upstream, f"{name}_gradient")

        return summed(values)


def _allreduce(values: tf.Tensor, name: str) -> tf.Tensor:
    import horovod.tensorflow as hvd

    # Horovod matches by name. The names that Keras gives may differ between ranks; the order in which a model is
    # traced does not, and by that TensorFlow numbers names at the root of a graph.
    with tf.name_scope(""):
        return hvd.allreduce(values, op=hvd.Sum, name=name, ignore_name_scope=True)


@_register
class GroupedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation over groups of the batch, each with its own statistics.

    One rank with P groups of B samples then normalises as P ranks with B samples do that do not synchronise: "ghost
    batch normalisation" (Hoffer, Hubara and Soudry 2017, arXiv 1705.08741).  The moving statistics take in the
    average over the groups with the weight that the groups would have one after the other.  So they are as old, in
    samples, whatever the batch: a large batch has too few steps for them to arrive at one step's weight.

    So many samples are normalised together as follow one another in the batch; what remains at its end is a smaller
    group. Further settings are those of `keras.layers.BatchNormalization`, without renorm and synchronized. ValueError
    if there is a mask in training.
    """

    def __init__(self, group: int, **settings: Any):
        if settings.get("renorm") or settings.get("synchronized"):
            raise ValueError("GroupedBatchNormalization keeps statistics per group: no renorm, no synchronized")
        super().__init__(**settings)
        self.group = whole_number(group, "group")

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        if not (training and self.trainable):
            return super().call(inputs, training=False)
        if mask is not None:
            raise ValueError("GroupedBatchNormalization takes no mask in training")
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))  # as Keras does
        size, axes = ops.shape(inputs)[0], [axis + 1 for axis in self._reduction_axes]
        missing = -size % self.group  # known while tracing only if the size of the batch is
        if isinstance(missing, int) and not missing:
            x = ops.reshape(x, (-1, self.group, *ops.shape(inputs)[1:]))
            mean, variance = ops.moments(x, axes, keepdims=True)
        else:
            x = tf.pad(x, [[0, missing], *[[0, 0]] * (len(inputs.shape) - 1)])
            x = ops.reshape(x, (-1, self.group, *ops.shape(inputs)[1:]))
            there = tf.cast(tf.range(size + missing) < size, x.dtype)
            there = tf.reshape(there, (-1, self.group, *[1] * (len(inputs.shape) - 1)))
            mean, variance = tf.nn.weighted_moments(x, axes, there, keepdims=True)
        momentum = self.momentum ** ops.cast(ops.shape(x)[0], self.moving_mean.dtype)
        for moving, found in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average = ops.reshape(ops.mean(found, 0), (-1,))
            moving.assign(moving * momentum + ops.cast(average, moving.dtype) * (1 - momentum))
        x = (x - mean) * ops.rsqrt(variance + self.epsilon)
        shape = [1] * len(x.shape)
        shape[self.axis if self.axis < 0 else self.axis + 1] = -1
        if self.scale:
            x = x * ops.cast(ops.reshape(self.gamma, shape), x.dtype)
        if self.center:
            x = x + ops.cast(ops.reshape(self.beta, shape), x.dtype)
        return ops.cast(ops.reshape(x, (-1, *ops.shape(inputs)[1:]))[:size], self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "group": self.group}
