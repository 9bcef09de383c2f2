"""Training that goes on when ranks die.

Horovod's elastic mode notices a lost rank, forms a smaller ring and lets training continue from the last committed
state. But its Keras state fails on Keras 3, its ``run`` drops TensorFlow errors that it does not recognise, so that
training returns early as if it had ended well, and its launcher wants ssh and a script that lists hosts. Here are a
state, a ``run`` and a launcher without these faults.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.elastic import _reset as reset

from nurion_utils.ranks.launchers.elastic import elastic_launch as elastic_launch
from nurion_utils.training.callbacks import all_variables, broadcast_model


class ElasticState(ObjectState):
    """What survives the loss of a rank: weights, optimizer variables and counters of one's own; see `elastic_run`.

    The counters, any picklable values, become attributes of the state. ValueError if the model is not built and
    compiled, or a counter has the name of something that the state is or does.
    """

    def __init__(self, model: keras.Model, **counters: Any) -> None:
        for name in counters:
            if name == "model" or hasattr(type(self), name):
                raise ValueError(f"an ElasticState has a {name!r} of its own; name the counter differently")
        all_variables(model)  # refuses a model that is not built and compiled
        self.model = model
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **counters)
        self.save()

    def save(self) -> None:
        """Remember the present state as the one to return to; `commit` calls it."""
        self._values = [keras.ops.convert_to_numpy(variable) for variable in all_variables(self.model)]
        super().save()

    def restore(self) -> None:
        """Return to the state last saved."""
        for variable, value in zip(all_variables(self.model), self._values, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """Give all ranks the state of rank 0, which is always one that was there before."""
        with _broken_connection_as_horovod_error():
            broadcast_model(self.model)
            self.save()
            super().sync()


def elastic_run(function: Callable) -> Callable:
    """Let a training function start again from the last commit whenever ranks are lost.

    >>> @elastic_run  # doctest: +SKIP
    ... def train(state):
    ...    while state.epoch < 10:
    ...        model.fit(...)  # on the share of the data that hvd.rank() of hvd.size() has now
    ...        state.epoch += 1
    ...        state.commit()
    >>> train(ElasticState(model, epoch=0))  # doctest: +SKIP

    The function takes an `ElasticState` first. After each loss it is called anew on the ranks that are left, with the
    state of the last commit. Only a broken connection between ranks is answered with a new start: what else the
    function returns or raises is returned and raised.
    """

    @functools.wraps(function)
    def attempt(state: ElasticState, *args: Any, **kwargs: Any) -> Any:
        with _broken_connection_as_horovod_error():
            return function(state, *args, **kwargs)

    return run_fn(attempt, reset)


@contextlib.contextmanager
def _broken_connection_as_horovod_error() -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        # Horovod's one message for all its operations, whatever they are named, once a connection has broken.
        if "Horovod has been shut down" not in str(error):
            raise
        raise HorovodInternalError(str(error)) from error
