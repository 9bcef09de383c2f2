"""Training steps on ranks; `World.run` carries `prepare` and `block` out there."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

steps: dict[str, Callable[[], Any]] = {}  # on this rank, by what they are called


def network(size: int | list[int]) -> Any:
    """The Keras model for volumes of ``size``^3, or a perceptron of these widths, all its layers alike."""
    import keras

    from nurion_utils.models import cosmoflow_small

    if isinstance(size, int):
        return cosmoflow_small(size)
    return keras.Sequential([keras.Input((size[0],)), *[keras.layers.Dense(width, "relu") for width in size]])


def samples(model: Any, batch: int, seed: int) -> tuple[Any, Any]:
    """Random ones that fit."""
    import tensorflow as tf

    generator = tf.random.Generator.from_seed(seed)
    return tuple(generator.normal((batch, *shape[1:])) for shape in (model.input_shape, model.output_shape))


def addresses() -> tuple[int, list[str]]:
    """This rank's number, and of each an address with a free port, for a peer's own way to find the others."""
    from mpi4py.MPI import COMM_WORLD as world

    host = "127.0.0.1" if os.environ["GLOO_SOCKET_IFNAME"] == "lo" else socket.gethostbyname(socket.gethostname())
    with socket.socket() as free:
        free.bind((host, 0))
        return world.rank, world.allgather(f"{host}:{free.getsockname()[1]}")


class ByHand:
    """What the optimizer wrapper comes down to: one grouped allreduce, then the plain optimizer."""

    def __init__(self, optimizer: Any):
        self.build, self._apply = optimizer.build, optimizer.apply

    def apply(self, gradients: list, variables: list) -> None:
        import horovod.tensorflow as hvd

        self._apply(hvd.grouped_allreduce(gradients, op=hvd.Average, name="by_hand"), variables)


def prepare(ways: list[str], size: int | list[int], batch: int) -> None:
    """Make a step for each way: "alone", "by hand", or by `DistributedOptimizer` as it is or in two other ways."""
    import horovod.tensorflow as hvd
    import keras

    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    wrap = {
        "alone": lambda plain: plain,
        "by hand": ByHand,
        "distributed": DistributedOptimizer,
        "one message": lambda plain: DistributedOptimizer(plain, bucket_mb=1e6),
        "half precision": lambda plain: DistributedOptimizer(plain, compression=hvd.Compression.fp16),
    }
    for way in ways:
        keras.utils.set_random_seed(0)
        model = network(size)
        optimizer = wrap[way](keras.optimizers.SGD(1e-4, momentum=0.9))
        steps[way] = step_of(model, optimizer, *samples(model, batch, hvd.rank()))


def step_of(model: Any, optimizer: Any, x: Any, y: Any) -> Callable[[], Any]:
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

    step = steps[way]
    float(step())
    MPI.COMM_WORLD.Barrier()
    begin = time.perf_counter()
    for _ in range(count):
        loss = step()
    float(loss)  # wait for the last one
    return MPI.COMM_WORLD.allreduce(time.perf_counter() - begin, op=MPI.MAX)
