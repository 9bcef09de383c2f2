"""Training steps on our own ranks; `World.run` carries `prepare` and `block` out there."""

import time
from collections.abc import Callable
from typing import Any

_steps: dict[str, Callable[[], Any]] = {}


class ByHand:
    """What the optimizer wrapper comes down to: one grouped allreduce, then the plain optimizer."""

    def __init__(self, optimizer: Any):
        self.build, self._apply = optimizer.build, optimizer.apply

    def apply(self, gradients: list, variables: list) -> None:
        import horovod.tensorflow as hvd

        self._apply(hvd.grouped_allreduce(gradients, op=hvd.Average, name="by_hand"), variables)


def prepare(ways: list[str], size: int, batch: int) -> None:
    """Make a step for each way: "alone", "distributed" (by `DistributedOptimizer`), "by hand"."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    from nurion_utils.training import DistributedOptimizer
    from nurion_utils.training.models import cosmoflow_small

    hvd.init()
    wrap = {"alone": lambda plain: plain, "distributed": DistributedOptimizer, "by hand": ByHand}
    generator = tf.random.Generator.from_seed(hvd.rank())
    x, y = generator.normal((batch, size, size, size, 1)), generator.normal((batch, 3))
    for way in ways:
        keras.utils.set_random_seed(0)
        _steps[way] = _step(cosmoflow_small(size), wrap[way](keras.optimizers.SGD(1e-4, momentum=0.9)), x, y)


def _step(model: Any, optimizer: Any, x: Any, y: Any) -> Callable[[], Any]:
    import tensorflow as tf

    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return lambda: step(x, y)


def block(way: str, count: int) -> float:
    """Take `count` steps and return their time in seconds on the slowest rank, after one step for warming up."""
    from mpi4py import MPI

    step = _steps[way]
    float(step())
    MPI.COMM_WORLD.Barrier()
    begin = time.perf_counter()
    for _ in range(count):
        loss = step()
    float(loss)  # wait for the last one
    return MPI.COMM_WORLD.allreduce(time.perf_counter() - begin, op=MPI.MAX)
