"""The peer: tf.distribute's MultiWorkerMirroredStrategy, with its training loop written by hand.

`fit` fails there with Keras 3 ("Attempt to convert a value (PerReplica...").
"""

import json
import os
from collections.abc import Callable
from pathlib import Path


def prepare(rank: int, directory: Path, size: int, batch: int) -> Callable[[], float]:
    """Return a function that takes one training step together with the other rank."""
    ports = json.loads((directory / "ports").read_text())
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})
    import keras
    import tensorflow as tf

    from nurion_utils.training.models import cosmoflow_small

    how = tf.distribute.experimental
    strategy = tf.distribute.MultiWorkerMirroredStrategy(
        communication_options=how.CommunicationOptions(implementation=how.CommunicationImplementation.RING)
    )
    generator = tf.random.Generator.from_seed(rank)
    x, y = generator.normal((batch, size, size, size, 1)), generator.normal((batch, 3))
    with strategy.scope():
        model = cosmoflow_small(size)
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

    return lambda: step(x, y)
