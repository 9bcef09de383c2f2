"""The peer: tf.distribute's MultiWorkerMirroredStrategy, with its training loop written by hand.

`fit` fails there with Keras 3 ("Attempt to convert a value (PerReplica...").
"""

import json
import os
from typing import Any

import rank_side


def prepare(ways: list[str], network: Any, batch: int) -> None:
    """Make the one step "tensorflow"."""
    rank, addresses = rank_side.addresses()
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    import keras
    import tensorflow as tf

    how = tf.distribute.experimental
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=how.CommunicationOptions(implementation=how.CommunicationImplementation.RING)
    )
    with strategy.scope():
        model = rank_side.network(network)
        x, y = rank_side.samples(model, batch, rank)
        optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
        variables = model.trainable_variables
        optimizer.build(variables)

    def replica_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y)) / strategy.num_replicas_in_sync
        optimizer.apply(tape.gradient(loss, variables), variables)  # Keras sums over the replicas
        return loss

    @tf.function(autograph=False)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica_step, args=(x, y))

    rank_side.steps["tensorflow"] = lambda: step(x, y)
