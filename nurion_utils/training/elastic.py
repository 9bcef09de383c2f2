"""Training that goes on when ranks die.

Horovod's elastic mode notices a lost rank, forms a smaller ring and lets training continue from the last
committed state. Its Keras state fails on Keras 3, though; its ``run`` drops every TensorFlow error that it does
not recognise, so that training returns early as if it had ended well; and its launcher wants ssh and a script
that lists hosts. Here are a state, a ``run`` and a launcher without these faults.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from nurion_utils.ranks.launchers.elastic import elastic_launch
from nurion_utils.training.callbacks import broadcast_model
from nurion_utils.training.optimizer import variables_of

__all__ = ["ElasticState", "elastic_launch", "elastic_run"]


class ElasticState(ObjectState):
    """What survives the loss of a rank: weights, optimizer variables and counters of one's own.

    >>> state = ElasticState(model, epoch=0)  # doctest: +SKIP
    >>> state.epoch += 1  # doctest: +SKIP
    >>> state.commit()  # doctest: +SKIP

    The counters, any picklable values, become attributes of the state. ValueError if the model is not built and
    compiled, or a counter has the name of something that the state is or does.
    """

    def __init__(self, model: keras.Model, **counters: Any) -> None:
        for name in counters:
            if name == "model" or hasattr(type(self), name):
                raise ValueError(f"an ElasticState has a {name!r} of its own; name the counter differently")
        if not model.built or getattr(model, "optimizer", None) is None:
            raise ValueError("the model of an ElasticState must be built and compiled")
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self.model = model
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **counters)
        self.save()

    def _variables(self) -> list[keras.Variable]:
        return [*self.model.weights, *variables_of(self.model.optimizer)]

    def save(self) -> None:
        """Remember the present state as the one to return to; `commit` calls it."""
        self._values = [keras.ops.convert_to_numpy(variable) for variable in self._variables()]
        super().save()

    def restore(self) -> None:
        """Return to the state last saved."""
        for variable, value in zip(self._variables(), self._values, strict=True):
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

    The function takes an `ElasticState` first. After each loss it is called anew on the ranks that are left, with the
    state of the last commit. Only a broken connection between ranks is answered with a new start: what else the
    function returns or raises is returned and raised.
    """

    @functools.wraps(function)
    def attempt(state: ElasticState, *args: Any, **kwargs: Any) -> Any:
        with _broken_connection_as_horovod_error():
            return function(state, *args, **kwargs)

    return run_fn(attempt, _join_anew)


@contextlib.contextmanager
def _broken_connection_as_horovod_error() -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        # Horovod's one message for all its operations, whatever they are named, once a connection has broken.
        if "Horovod has been shut down" not in str(error):
            raise
        raise HorovodInternalError(str(error)) from error


def _join_anew() -> None:
    hvd.shutdown()
    hvd.init()
