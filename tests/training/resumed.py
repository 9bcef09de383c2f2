"""What a job runs in the tests of resuming: a small network with all that makes resuming hard."""

import json
import os
import sys
import time
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from nurion_utils.datasets import Shard
from nurion_utils.training import BroadcastCallback, DistributedOptimizer, MetricAverageCallback, ResumeCallback

SAMPLES, BATCH, EPOCHS = 211, 4, 3  # the last step of an epoch is uneven, on one, two and three ranks


class Note(layers.Layer):
    """Takes the number of each sample away and, where TensorFlow runs eagerly, notes it down."""

    def call(self, x, training=False):
        if training and tf.executing_eagerly() and hasattr(x, "numpy"):
            noted.append(x[:, 0].numpy().astype(int).tolist())
        return x[:, 1:]


class Log(keras.callbacks.Callback):
    """Writes down who trains, what a step has trained on, and after how many samples of the epoch."""

    has_begun = False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.seen = epoch, None

    def on_train_batch_end(self, batch, logs=None):
        if logs and not self.has_begun:
            self.has_begun = True
            with open(folder / "pids", "a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(float(os.environ.get("SLOW_S", 0)))
        if noted:
            begin = position()[1] if self.seen is None else self.seen
            self.seen = min(SAMPLES, begin + hvd.size() * BATCH)
            line = {"job": int(os.environ["JOB"]), "epoch": self.epoch, "seen": self.seen, "samples": noted.pop()}
            with open(folder / "seen", "a") as file:
                file.write(json.dumps(line) + "\n")


folder, noted = Path(sys.argv[1]), []
hvd.init()
keras.utils.set_random_seed(1 + hvd.rank())
rng = np.random.default_rng(0)
x, y = rng.normal(size=(SAMPLES, 7)).astype("float32"), rng.normal(size=(SAMPLES, 3)).astype("float32")
x[:, 0] = np.arange(SAMPLES)
middle = [layers.BatchNormalization(), layers.Dropout(0.3), layers.GaussianNoise(0.1)]
model = keras.Sequential([keras.Input((7,)), Note(), layers.Dense(8, "tanh"), *middle, layers.Dense(3)])
optimizer = DistributedOptimizer(keras.optimizers.Adam(0.01))
model.compile(optimizer, "mse", weighted_metrics=["mae"], run_eagerly="JOB" in os.environ)
shard = Shard(SAMPLES, hvd.size(), hvd.rank(), BATCH, seed=3)
resume = ResumeCallback(folder / "kept", every_steps=3, margin_s=float(os.environ.get("MARGIN_S", 120)))
position = resume.follow(shard)
history = model.fit(
    shard.dataset(x, y, resume=resume),
    steps_per_epoch=shard.steps,
    epochs=EPOCHS,
    verbose=0,
    validation_data=(x, y),
    callbacks=[BroadcastCallback(), MetricAverageCallback(), Log(), resume],
).history
variables = [keras.ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]
np.savez(folder / f"end{hvd.rank()}.npz", *variables, **{name: of_epochs[-1] for name, of_epochs in history.items()})
sys.exit(resume.exit_code)
