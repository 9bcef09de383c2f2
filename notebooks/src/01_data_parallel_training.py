# %% [markdown]
# # Data-parallel training: one model, many ranks, the same gradient
#
# **Goal:** train one network on several ranks so that the result is the one a single rank with the large batch would have reached, and find out what it costs.
#
# **You will be able to:** average gradients by hand and with Horovod; prove that your ranks train together; notice when they silently do not; measure scaling and say what eats the efficiency; decide when a model must be split instead.
#
# **Prerequisites:** [First steps](00_first_steps.ipynb); what a gradient is; a little Keras.
#
# **Minutes:** 30 to read and run; the cells alone take about 2 on 2 cores
#
# ## The idea
#
# A training step has three parts. The *forward pass* computes the loss of a batch, the *backward pass* its gradient with respect to every weight, the *update* moves the weights against the gradient.
#
# In **data parallelism** every rank holds the whole model and a different part of the batch. Nurion's answer to "data or model parallelism?" was this one first, because a node has 96 GB of memory and most models fit.

# %% tags=["parameters"]
n_ranks: int = 2  # ranks that train together, 2 or more; on a larger machine as many as it has cores
digit_epochs: int = 12  # passes over the handwritten digits
volume_size: int = 16  # voxels along an edge of a cosmology volume; 32, 64 and 128 (CosmoFlow's size) work too
n_volumes: int = 384  # volumes to train on; 2000 give a much better network
volume_epochs: int = 12  # passes over the volumes
timing_size: int = 32  # voxels along an edge of the volumes in the scaling measurement; 64 is closer to real work
timing_rounds: int = 5  # repetitions of each timing; 20 narrow the spread
failure_labs: bool = False  # True runs the labs on what goes wrong as well (about a minute more)

# %%
from nurion_utils import ranks, sites, style, timing

style.use()
world = ranks.start(n_ranks)

# %% [markdown]
# ## Average a gradient by hand
#
# Start with the smallest model there is, a straight line through noisy points, 32 of them on each rank. The loss is the mean of the squared errors.
#
# **Predict:** each rank computes the gradient over its own points. How must these be combined to give the gradient over all points: add them, average them, or does it take the data of all ranks?

# %%
# %%px
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
rng = np.random.default_rng(seed=0)  # one seed, so all ranks make the same data
x = rng.normal(size=(32 * comm.size, 3))
y = x @ [1.0, -2.0, 0.5] + 0.1 * rng.normal(size=len(x))
mine = slice(32 * comm.rank, 32 * (comm.rank + 1))  # the points of this rank
w = np.zeros(3)  # and one set of weights


def gradient(w, x, y):
    """Gradient of the mean squared error: needs the weights and some points, nothing from anyone else."""
    return 2 * x.T @ (x @ w - y) / len(x)


local = gradient(w, x[mine], y[mine])
averaged = comm.allreduce(local) / comm.size
everything = gradient(w, x, y)
print("my gradient      ", local.round(4))
print("averaged         ", averaged.round(4))
print("over all points  ", everything.round(4))

# %%
by_hand = world.client[:]["float(abs(averaged - everything).max())"]  # the brackets take expressions, too
print(f"largest difference between the averaged and the full gradient: {max(by_hand):.1e}")

# %% [markdown]
# The average it is. The loss is a *mean over samples*, the gradient of a mean is the mean of the gradients, and with equally many points on each rank the mean of the ranks' means is the mean of all.
#
# That also says where ranks must talk. The forward pass needs the weights and this rank's own samples, and both are at hand: **no communication**. The backward pass needs no more than that either, and ends with a gradient that belongs to this rank's samples. The update needs everyone's. Between the two the gradients are averaged: an allreduce of as many numbers as the model has weights, however small or large the batch.
#
# If the weights start equal and every rank applies the same averaged gradient, they stay equal. Once training has begun, weights need not be sent at all.
#
# ## The same with a network and Horovod
#
# Now the digits that scikit-learn ships (1198 training images of 8 by 8 pixels) and a network with two hidden layers. Each rank takes 32 images, and Horovod averages each of the six gradients. Horovod is asynchronous: ranks may be ready with their tensors in different order, so each tensor gets a `name` by which the ranks match it.

# %%
# %%px
import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from nurion_utils import models
from nurion_utils.datasets import digits

hvd.init()
keras.utils.set_random_seed(1)  # the same initial weights on all ranks
x, y, x_test, y_test = digits.load()
network = models.mlp()
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
batch = slice(32 * hvd.rank(), 32 * (hvd.rank() + 1))

with tf.GradientTape() as tape:
    loss = loss_of(y[batch], network(x[batch]))  # forward: no communication
gradients = tape.gradient(loss, network.trainable_weights)  # backward
averaged = [hvd.allreduce(gradient, name=f"gradient{i}") for i, gradient in enumerate(gradients)]

# %%
# %%px --targets 0
# on rank 0 only
for variable, gradient in zip(network.trainable_weights, averaged, strict=True):
    print(f"{variable.path:22} {str(gradient.shape):12} {gradient.dtype.size * tf.size(gradient).numpy():7,} bytes")

# %% [markdown]
# Six tensors, 104 kB together. The loop above sends them one at a time and waits for each. Horovod can do better: it can pack small tensors into one message, and it can send those of the last layers while the backward pass still works on the first ([notebook 03](03_communication_backends.ipynb)).
#
# **Predict:** twice as many images per rank. Which of the numbers above change?
#
# None: a gradient has the shape of its weights. The work per step doubles and the messages stay. This is why large batches make good use of many ranks, and one of the reasons why they are tempting.
#
# ## Equal to one big batch, step after step
#
# Writing the allreduce into every training loop is tedious, so it is wrapped into the optimizer: the `DistributedOptimizer` of this course averages the gradients whenever Keras is about to apply them. `Shard` deals the samples out, a new order each epoch, every sample to exactly one rank. The function below trains the small network in any combination of the two: with or without averaging, on a share of the samples or on all of them. The rest of this notebook asks it for one combination after the other. Its imports stand inside, because the function runs on the ranks. `BroadcastCallback` starts all ranks from rank 0's weights, whatever their seeds.


# %%
def averaging(optimizer):
    from nurion_utils.training import DistributedOptimizer

    return DistributedOptimizer(optimizer)


def train_digits(average, sharded: bool, batch_size: int = 32, epochs: int = 3, steps: int | None = None, check=False):
    """Train on every rank; return the weights, and per epoch the loss and the test error in per cent.

    average: a function that wraps the optimizer so that gradients are averaged; None leaves it as it is.
    sharded: each rank takes `batch_size` samples per step of its own; otherwise every rank takes all that the ranks
    would take together. steps: per epoch, if not all. check: compare the ranks' weights after each epoch.
    """
    import horovod.tensorflow as hvd
    import keras

    from nurion_utils import models
    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import BroadcastCallback, SyncCheckCallback

    hvd.init()
    x, y, x_test, y_test = digits.load()
    keras.utils.set_random_seed(1)
    network = models.mlp()
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(
        average(optimizer) if average else optimizer, loss, weighted_metrics=["accuracy"], jit_compile=False
    )
    if sharded:
        shard = Shard(len(x), hvd.size(), hvd.rank(), batch_size, seed=0)
    else:
        shard = Shard(len(x), 1, 0, batch_size * hvd.size(), seed=0)
    history = network.fit(
        shard.dataset(x, y),
        steps_per_epoch=steps or shard.steps,
        epochs=epochs,
        validation_data=(x_test, y_test),
        validation_batch_size=len(x_test),
        callbacks=[BroadcastCallback(), SyncCheckCallback()] if check else [BroadcastCallback()],
        verbose=0,
    )
    errors = [100 * (1 - accuracy) for accuracy in history.history["val_accuracy"]]
    return {"weights": network.get_weights(), "loss": history.history["loss"], "error": errors, "steps": shard.steps}


# %% [markdown]
# The claim to check: $P$ ranks with $B$ samples each take the same steps as one rank with $PB$ samples.

# %%
from functools import partial

together = world.run(partial(train_digits, averaging, sharded=True, epochs=1, steps=10))
alone = world.run(partial(train_digits, None, sharded=False, epochs=1, steps=10))  # every rank does the whole job

# %%
import pandas as pd


def largest_difference(a: dict, b: dict) -> float:
    return max(abs(first - second).max() for first, second in zip(a["weights"], b["weights"], strict=True))


equality = pd.Series(
    {
        "first and last rank, trained together": largest_difference(together[0], together[-1]),
        "trained together and one big batch": largest_difference(together[0], alone[0]),
    },
    name="largest difference of any weight",
)
equality.to_frame().style.format("{:.1e}")

# %% [markdown]
# The ranks agree to the last bit. Against the one big batch a difference of the size of rounding remains: sums were formed in another order.
#
# Two kinds of layers make an exception, because their outputs depend on more than the sample itself. *Batch normalisation* takes its mean and variance over the $B$ samples of a rank, not over all $PB$. *Dropout* draws its random numbers on each rank. Networks with them train well in parallel, but not bit by bit like one rank.
#
# ## The trap: training alone without knowing it
#
# Horovod brings its own *binding* for Keras, the code that connects the two. Its optimizer has the same name as ours, and is called *stock* below. It was written for Keras 2 and hooks into methods that Keras 3 never calls. It can be installed and imported, and it trains, without a word of warning.
#
# **Predict:** the ranks train with it for three epochs, each on its own shard, from equal weights. What will you see in the loss? What in the weights?


# %%
def stock(optimizer):
    import horovod.keras

    return horovod.keras.DistributedOptimizer(optimizer)


trap = {
    "stock": world.run(partial(train_digits, stock, sharded=True)),
    "ours": world.run(partial(train_digits, averaging, sharded=True)),
}

# %%
pd.DataFrame(
    {
        "loss after epoch 1": {name: results[0]["loss"][0] for name, results in trap.items()},
        "loss after epoch 3": {name: results[0]["loss"][-1] for name, results in trap.items()},
        "difference between first and last rank": {
            name: largest_difference(results[0], results[-1]) for name, results in trap.items()
        },
    }
).style.format("{:.3f}")

# %% [markdown]
# The loss falls either way, and nothing looks wrong. But with the stock binding each rank has trained a model of its own on its own shard, and at the end one of them is saved.
#
# For a long run, one more line is worth it. `SyncCheckCallback` compares the weights of all ranks at the end of each epoch.

# %%
caught = ""
try:
    world.run(partial(train_digits, stock, sharded=True, check=True))
except ranks.RankError as error:
    caught = str(error)
    print(caught.splitlines()[0])  # all ranks raised it themselves, so they are still there

# %% [markdown]
# ## Train digits: together, alone, and apart
#
# Three runs from the same initial weights:
#
# 1. *together*: every batch of about 64 images is divided among the ranks, gradients averaged;
# 2. *alone*: no cooperation, every rank takes the same batches of the whole data set (rank 0 is shown);
# 3. *apart*: each rank on its own shard, nothing averaged (what the stock binding does).
#
# **Predict:** which of the three curves of the test error will coincide, and where will the other one lie?

# %%
modes = {"together": (averaging, True), "alone": (None, False), "apart": (None, True)}
batch_size = max(1, 64 // n_ranks)
errors = {
    mode: world.run(train_digits, average, sharded, batch_size, digit_epochs)[0]["error"]
    for mode, (average, sharded) in modes.items()
}

# %% alt="Test error in per cent against epoch for three runs. The curves of together and alone coincide; the curve of apart is another one."
import matplotlib.pyplot as plt

styles = {
    "together": dict(color=style.BLUE, lw=4, alpha=0.5),
    "alone": dict(color=style.BLACK, lw=1, marker="o", ms=4),
    "apart": dict(color=style.VERMILION, lw=1.5, ls="--", marker="s", ms=4),
}
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for mode, values in errors.items():
    axis.plot(range(1, digit_epochs + 1), values, label=mode, **styles[mode])
axis.set(xlabel="epoch", ylabel="test error, %", ylim=(0, None))
axis.legend()
plt.show()

# %% [markdown]
# *Together* lies on *alone*: it is the same training, done by more hands. *Apart* is another training: in each epoch a rank sees only $1/P$ of the samples, in batches of $64/P$, and learns nothing from what the others saw. Digits are so easy that it does not end far off, and its curve falls like any other, which is exactly why nobody notices.
#
# ## Train on volumes
#
# CosmoFlow, a network that ran on 8192 nodes of the supercomputer Cori, looks at a cube of the universe filled with dark matter and predicts three numbers that govern it: $\Omega_m$ (how much matter there is), $\sigma_8$ (how lumpy it is) and $n_s$ (how the lumps divide into large and small).
#
# Its simulations are too large to ship. Here the cubes are drawn at random from the theory: a lognormal density (always positive, with a few strong peaks) whose *power spectrum*, the strength of lumps of each size, is the one that the three numbers prescribe. The wave number $k$ below is $2\pi$ divided by the size of a lump. Any rank can make sample number $i$, and it is the same everywhere. Lengths are in Mpc/h, the unit of cosmologists: a megaparsec is 3.3 million light years, and h is about 0.7.

# %%
import numpy as np

from nurion_utils.datasets import volumes

# Omega_m, sigma_8 and n_s; 32 voxels (pixels in three dimensions) along an edge of 256 Mpc/h
extremes = {f"$\\sigma_8$ = {s8}": np.array([0.3, s8, 0.95]) for s8 in (0.78, 0.95)}
fields = {name: volumes.lognormal(32, p, np.random.default_rng(5)) for name, p in extremes.items()}

# %% alt="Two slices through density volumes made from the same random numbers; with the larger sigma 8 the bright lumps are stronger. Beside them the power spectrum measured from a volume follows the theory curve."
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", width_ratios=[1, 1, 1.3])
for axis, (name, field) in zip((left, middle), fields.items(), strict=True):
    image = axis.imshow(field[0], cmap="magma", vmin=0, vmax=4, extent=(0, 256, 0, 256))
    axis.set(title=name, xlabel="Mpc/h", ylabel="Mpc/h", xticks=(0, 256), yticks=(0, 256))
figure.colorbar(image, ax=(left, middle), label="density / mean", shrink=0.8, extend="max")
spectrum = volumes.power_spectrum(fields["$\\sigma_8$ = 0.95"])
right.loglog(spectrum["k_h_per_mpc"], spectrum["power_mpc3_per_h3"], "o", ms=4, color=style.BLUE, label="measured")
wave_numbers = np.geomspace(spectrum["k_h_per_mpc"].min(), spectrum["k_h_per_mpc"].max(), 100)
curve = volumes.theory(wave_numbers, extremes["$\\sigma_8$ = 0.95"])
right.loglog(wave_numbers, curve, color=style.BLACK, lw=1, label="theory")
right.set(xlabel="wave number k, h/Mpc", ylabel="power, (Mpc/h)$^3$", title="one volume, $\\sigma_8$ = 0.95")
right.xaxis.set_major_locator(plt.FixedLocator([0.03, 0.1, 0.3]))
right.xaxis.set_major_formatter("{x:g}")
right.xaxis.set_minor_formatter("")
right.legend()
plt.show()

# %% [markdown]
# On a supercomputer the volumes lie in files. Rank 0 writes them as TFRecord files, TensorFlow's containers of many samples, with a table of where each sample begins; in training every rank reads the samples of its shard by their number, batch after batch. A volume of CosmoFlow's full size, $128^3$ values of four bytes, takes 8.4 MB; these here are much smaller.

# %%
import tempfile
from pathlib import Path

directory = Path(tempfile.mkdtemp(prefix="volumes-"))


def write_volumes(directory: str, samples: int, size: int, seed: int) -> None:
    from mpi4py import MPI

    from nurion_utils.datasets import volumes

    if MPI.COMM_WORLD.rank == 0:
        volumes.write(directory, samples, size, seed=seed, volumes_per_file=96)


world.run(write_volumes, str(directory / "train"), n_volumes, volume_size, 0)
world.run(write_volumes, str(directory / "validation"), 96, volume_size, 1)
index = pd.read_csv(directory / "train" / "index.csv")
print(f"{len(index)} volumes in {index['file'].nunique()} files, {index['length'].sum() / 1e6:.1f} MB")
index.head(3)

# %% [markdown]
# Now train on them: 16 volumes in each step, shared among the ranks.


# %%
def train_volumes(directory: str, size: int, epochs: int) -> dict:
    """Train a small version of CosmoFlow together; return the history, and predictions for the validation volumes."""
    from pathlib import Path

    import horovod.tensorflow as hvd
    import keras

    from nurion_utils import models
    from nurion_utils.datasets import Shard, volumes
    from nurion_utils.training import BroadcastCallback, DistributedOptimizer

    hvd.init()
    reader = volumes.Volumes(Path(directory) / "train")
    validation = volumes.Volumes(Path(directory) / "validation")
    x, y = validation.read(range(len(validation)))
    shard = Shard(len(reader), hvd.size(), hvd.rank(), max(1, 16 // hvd.size()), seed=0)
    keras.utils.set_random_seed(0)
    network = models.cosmoflow_small(size)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, shard.steps * epochs)
    network.compile(DistributedOptimizer(keras.optimizers.Adam(rate)), "mse")
    history = network.fit(
        shard.dataset(reader),
        steps_per_epoch=shard.steps,
        epochs=epochs,
        validation_data=(x, y),
        callbacks=[BroadcastCallback()],
        verbose=0,
    )
    return {"loss": history.history["val_loss"], "predicted": network.predict(x, verbose=0), "true": y}


trained = world.run(train_volumes, str(directory), volume_size, volume_epochs)[0]

# %% alt="Left: validation error per epoch, beside the dashed line of always guessing the mean. Right: predicted against true sigma 8 for the validation volumes, with the diagonal on which perfect predictions would lie."
guess_error = float(np.mean((trained["true"] - trained["true"].mean(axis=0)) ** 2))
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(range(1, volume_epochs + 1), trained["loss"], color=style.BLUE, marker="o", ms=4, label="network")
left.axhline(guess_error, color=style.BLACK, ls="--", lw=1, label="always the mean")
left.set(xlabel="epoch", ylabel="validation error (mean square)", ylim=(0, None))
left.legend()
true, predicted = volumes.parameters_of(trained["true"]), volumes.parameters_of(trained["predicted"])
right.plot(true[:, 1], predicted[:, 1], "o", ms=3, color=style.BLUE)
right.plot([0.78, 0.95], [0.78, 0.95], color=style.BLACK, lw=1)
right.set(xlabel="true $\\sigma_8$", ylabel="predicted $\\sigma_8$", aspect="equal")
plt.show()

# %%
error_of = np.sqrt(((trained["true"] - trained["predicted"]) ** 2).mean(axis=0))
spread = trained["true"].std(axis=0)
learned = pd.DataFrame({"error / spread": error_of / spread}, index=["Omega_m", "sigma_8", "n_s"])
learned.style.format("{:.2f}")

# %% [markdown]
# A value of 1 means no better than always saying the mean. $\sigma_8$ sets the height of the whole spectrum and is the easiest of the three here; $\Omega_m$ and $n_s$ tilt it, which small and coarse volumes hardly show. More and finer volumes are what CosmoFlow took a supercomputer for.
#
# ## Does it scale?
#
# Two questions are called scaling:
#
# - **Weak scaling:** every rank keeps its batch, so more ranks do more work per step. Ideal: samples per second grow with the number of ranks.
# - **Strong scaling:** the whole batch stays, so each rank's share of it shrinks. Ideal: the step takes $1/P$ of the time.
#
# Here weak scaling takes 4 volumes on each rank, and strong scaling as many in all as the ranks of weak scaling take together. In both, **parallel efficiency** is the rate of $P$ ranks in samples per second, divided by $P$ times the rate of one. For a fair comparison the single rank gets as many cores as each of the many.
#
# A step is timed at four stages: the forward pass alone; with the backward pass (`gradient`); with the update; with the allreduce, which in training comes before the update. Blocks of steps alternate between the stages, and what a stage adds to the one before is the time of that part. Such a difference inherits the noise of both, so a short part can even come out negative.
#
# **Predict:** which of the two efficiencies will be lower? Which part of the step is to blame?


# %%
def time_steps(batch_per_rank: int, size: int, rounds: int, stages: tuple) -> "pd.DataFrame":
    from mpi4py import MPI

    from nurion_utils import models
    from nurion_utils.datasets import Shard
    from nurion_utils.training import step_timing

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)  # each rank its own random volumes: only the time matters
    x = rng.normal(size=(8 * batch_per_rank, size, size, size, 1)).astype("float32")
    y = rng.normal(size=(8 * batch_per_rank, 3)).astype("float32")
    shard = Shard(len(x), 1, 0, batch_per_rank, seed=comm.rank)
    return step_timing.step_times(
        lambda: models.cosmoflow_small(size), lambda: shard.dataset(x, y), rounds=rounds, stages=stages, block_s=0.3
    )


# %%
load = timing.OtherLoad()  # what other programs take of the cores meanwhile
batch = 4
counts = sorted({1, n_ranks} | {2**i for i in range(10) if 2**i < n_ranks})  # 1, 2, 4, ... n_ranks
cores_per_rank = max(1, sites.load("local").node.cores // n_ranks)
tables = []
world.stop()
for count in counts:
    world = ranks.start(count, cores_per_rank=cores_per_rank)
    stages = ("forward", "gradient", "update", "allreduce") if count == n_ranks else ("allreduce",)
    weak = world.run(time_steps, batch, timing_size, timing_rounds, stages)[0]
    if count < n_ranks:
        strong = world.run(time_steps, batch * n_ranks // count, timing_size, timing_rounds, stages)[0]
        world.stop()
    else:
        strong = weak  # at full size the two are one and the same
    tables += [weak.assign(scaling="weak"), strong.assign(scaling="strong")]
times = pd.concat(tables, ignore_index=True)
others_cores = load.cores()

# %%
full_steps = times[times["stage"] == "allreduce"]
one_rank = full_steps[full_steps["ranks"] == 1].groupby("scaling")["samples_per_s"].median()
ideal = full_steps["ranks"] * full_steps["scaling"].map(one_rank)
efficiency = full_steps.assign(efficiency=full_steps["samples_per_s"] / ideal)
quartiles = efficiency.groupby(["scaling", "ranks"])["efficiency"].quantile([0.25, 0.5, 0.75]).unstack()
quartiles.columns = ["lower quartile", "median", "upper quartile"]
rates = efficiency.groupby(["scaling", "ranks"])[["batch_per_rank", "step_s", "samples_per_s"]].median()
scaling_table = rates.join(quartiles.add_prefix("efficiency, "))
scaling_table.style.format("{:.2f}").format({"batch_per_rank": "{:.0f}", "step_s": "{:.3f}"})

# %% alt="Left: parallel efficiency against the number of ranks for weak and strong scaling, with bars from the lower to the upper quartile. Right: horizontal bars of how long each part of a training step takes, with quartiles."
from nurion_utils.training import step_timing

part_times = step_timing.parts(times[(times["ranks"] == n_ranks) & (times["scaling"] == "weak")])
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for scaling, color, marker in (("weak", style.BLUE, "o"), ("strong", style.VERMILION, "s")):
    low, middle, high = quartiles.loc[scaling].to_numpy().T
    bars = [middle - low, high - middle]
    left.errorbar(counts, middle, yerr=bars, color=color, marker=marker, capsize=4, label=scaling)
left.axhline(1, color=style.BLACK, lw=0.8, ls=":")
left.set(xlabel="ranks", ylabel="parallel efficiency", ylim=(0, 1.25), xticks=counts)
left.legend()
middle = part_times["time_s"] * 1e3
bars = [middle - part_times["low_s"] * 1e3, part_times["high_s"] * 1e3 - middle]
right.barh(part_times["part"], middle, xerr=bars, color=style.GREY, capsize=4)
right.axvline(0, color=style.BLACK, lw=0.8)
right.invert_yaxis()
right.set(xlabel="time per step, ms")
plt.show()

# %%
passes = part_times.set_index("part")["time_s"][["forward pass", "backward pass"]].sum()
whole_step = part_times["time_s"].sum()
print(f"forward and backward pass: {passes / whole_step:.0%} of the step")
strong_1, strong_p = scaling_table.loc[("strong", 1)], scaling_table.loc[("strong", n_ranks)]
print(
    f"one rank, batch {strong_1['batch_per_rank']:.0f}: {strong_1['step_s'] / strong_1['batch_per_rank'] * 1e3:.1f} ms per sample"
)
print(
    f"each of {n_ranks}, batch {strong_p['batch_per_rank']:.0f}: {strong_p['step_s'] / strong_p['batch_per_rank'] * 1e3:.1f} ms per sample"
)

# %% [markdown]
# Three things can eat efficiency, and the figures tell them apart only as far as their bars allow:
#
# - *The allreduce*: on one machine its messages stay in memory, and its bar in the right figure should be short beside the two passes. It also holds the time in which a rank waits for the slowest one: all wait for it at every step, so a disturbance of one is a disturbance of all.
# - *The shrinking batch* of strong scaling: a core does fewer samples per step, and the fixed cost of a step is spread over fewer. Compare the times per sample above. On so small a machine weak and strong may well be equal within their bars.
# - *What the ranks share*: memory bandwidth, caches, and on a laptop this notebook and the browser.
#
# The numbers of ranks were measured one after the other, a few seconds apart, and machines are not equally fast all the time. An efficiency above 1 is no miracle then: something else held up the single rank. Run the cells again before you believe a surprising value, and narrow the bars with a larger `timing_rounds`.
#
# ### Extrapolate
#
# On a large machine the allreduce grows. The next notebook builds the *ring-allreduce* and derives its time: $2(P-1)\alpha + 2\frac{P-1}{P}N\beta$ for $P$ ranks and $N$ bytes, where the *latency* $\alpha$ is the time a message takes however short it is, and $\beta$, one over the bandwidth, the time per byte.
#
# CosmoFlow has 7.04 million weights, so 28.2 MB of gradients, and computed 129 ms per step on one node. Take $\alpha = 2$ µs and 8 GB/s, plausible values for such a network, not measured ones.
#
# **Predict:** does the efficiency at 8192 nodes suffer from the size of the gradients or from the number of messages?

# %%
from nurion_utils import models

alpha_s, bandwidth, compute_s = 2e-6, 8e9, 0.129
gradient_bytes = 4 * models.COSMOFLOW_WEIGHTS
nodes = np.array([2, 64, 512, 1024, 8192])
latency_s = 2 * (nodes - 1) * alpha_s
transfer_s = 2 * (nodes - 1) / nodes * gradient_bytes / bandwidth
predicted_efficiency = compute_s / (compute_s + latency_s + transfer_s)
pd.DataFrame(
    {
        "nodes": nodes,
        "latency, ms": latency_s * 1e3,
        "transfer, ms": transfer_s * 1e3,
        "efficiency": predicted_efficiency,
    }
).style.hide(axis="index").format("{:.1f}", subset=["latency, ms", "transfer, ms"]).format(
    "{:.2f}", subset=["efficiency"]
)

# %% [markdown]
# From 64 nodes on the transfer hardly changes; the latency grows with the number of messages, and at 8192 nodes it is most of the allreduce. The published efficiency of CosmoFlow at 8192 nodes is 77 % (Mathuriya and others, 2018). That the formula comes so close should not impress too much: it sends nothing during the backward pass, knows no slow nodes, and the values of $\alpha$ and the bandwidth were assumed. It shows which of the terms to watch.
#
# ## The other way: split the model
#
# Data parallelism needs the whole model on each rank. Does it fit? Training keeps more than the weights: gradients, the optimizer's own state, Horovod's buffer, and above all the *activations*, the outputs of every layer, which the backward pass needs again. They grow with the batch. The calculator below counts the output of every layer once and leaves out temporary memory, so take it as an estimate.
#
# **Predict:** for ResNet-50 it counts 148 MB of activations per image. Of the 96 GB of a Nurion node, 82 are left to a job. Does a batch of 512 images per node fit? And 1024?


# %%
def footprints() -> dict:
    """What some models take in training; built on a rank, where TensorFlow is loaded."""
    from nurion_utils import models
    from nurion_utils.training import memory

    return {
        "CosmoFlow, 128^3 volumes": memory.footprint(models.cosmoflow(), "adam"),
        "ResNet-50": memory.footprint(models.resnet50(), "momentum"),
        # 32 layers of a transformer keep 34 bytes per token and channel in half precision, its attention maps left
        # out (Korthikanti and others, 2022); a sample has 2048 tokens of 4096 channels
        "language model, 7 billion weights": memory.Footprint(
            weight_bytes=4 * 7_000_000_000, activation_bytes=32 * 34 * 2048 * 4096, optimizer="adam"
        ),
    }


footprint = world.run(footprints)[0]
nurion = sites.load("nurion")
memory_table = pd.DataFrame(
    {
        "model": name,
        "batch per node": batch_size,
        "GB": takes.size_bytes(batch_size) / 1e9,
        "fits a Nurion node": takes.fits(nurion, batch_size),
        "largest batch that fits": takes.largest_batch(nurion),
    }
    for (name, takes), batches in zip(footprint.items(), ([1, 8], [512, 1024], [1]), strict=True)
    for batch_size in batches
)
memory_table.style.hide(axis="index").format({"GB": "{:.1f}"})

# %% alt="Bars of the memory that ResNet-50 takes with 512 images on a node, by component; the activations take nearly all of it, the limit of 82 GB is marked."
components = footprint["ResNet-50"].table(512)
figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
bars = axis.barh(components["component"], components["size_bytes"] / 1e9, color=style.BLUE)
axis.bar_label(bars, fmt="{:.2f}", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=3)
axis.axvline(nurion.node.memory_usable_gb, color=style.BLACK, ls="--", lw=1)
axis.text(nurion.node.memory_usable_gb - 1, 0, "a Nurion node", ha="right", va="center")
axis.set(xlabel="memory for ResNet-50 with 512 images per node, GB", xlim=(0, 90))
axis.invert_yaxis()
plt.show()

# %% [markdown]
# That is consistent with the experiment in KISTI's paper: on 512 nodes a batch of 512 images per node ran, and 1024 did not fit. Image networks are *activation-heavy*. The remedy is a smaller batch per node, and data parallelism still works.
#
# A language model with seven billion weights is another matter. Its weights, gradients and Adam's two averages take 16 bytes per weight, 112 GB before the first sample, and no batch is small enough. The model itself must be divided in some way: its state over the ranks (as ZeRO does), each layer over the ranks (tensor parallelism), or, the easiest to understand, groups of layers one after the other (a *pipeline*).
#
# Rank 0 gets the first layer of a network of dense layers and rank 1 the others; further ranks only look on. Both also compute the whole network, only to compare. `Send` and `Recv` move one array between two ranks.

# %%
# %%px
import keras
import numpy as np
import tensorflow as tf
from mpi4py import MPI

from nurion_utils import models
from nurion_utils.datasets import digits

comm = MPI.COMM_WORLD
x, y, _, _ = digits.load()
x, y = x[:128], y[:128]
keras.utils.set_random_seed(3)  # the same weights on both
whole = models.mlp((64, 256, 256, 10))
front, back = keras.Sequential(whole.layers[:1]), keras.Sequential(whole.layers[1:])
loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
with tf.GradientTape() as tape:
    loss = loss_of(y, whole(x))
unsplit = tape.gradient(loss, whole.trainable_weights)

# %% [markdown]
# Forward, the activations travel from rank 0 to rank 1.

# %%
# %%px
if comm.rank == 0:
    with tf.GradientTape() as tape:
        activations = front(x)
    comm.Send(activations.numpy(), dest=1)
if comm.rank == 1:
    received = np.empty((len(x), 256), "float32")
    comm.Recv(received, source=0)
    activations = tf.constant(received)
    with tf.GradientTape() as tape:
        tape.watch(activations)  # rank 0 will need the gradient with respect to them
        loss = loss_of(y, back(activations))

# %% [markdown]
# Backward, rank 1 sends the gradient of the loss with respect to the activations, and rank 0 continues the chain rule from there (`output_gradients`). Each rank ends with the gradient of its own weights.

# %%
# %%px
split, reference = [], []
if comm.rank == 1:
    *split, downwards = tape.gradient(loss, [*back.trainable_weights, activations])
    comm.Send(downwards.numpy(), dest=0)
    reference = unsplit[2:]
if comm.rank == 0:
    from_above = np.empty(activations.shape, "float32")
    comm.Recv(from_above, source=1)
    split = tape.gradient(activations, front.trainable_weights, output_gradients=tf.constant(from_above))
    reference = unsplit[:2]
weights_here = sum(int(tf.size(gradient)) for gradient in split)
largest = max((float(tf.reduce_max(abs(a - b))) for a, b in zip(split, reference, strict=True)), default=0.0)

# %%
pair = world.client[:2]
split_table = pd.DataFrame(
    {
        "weights here": pair["weights_here"],
        "bytes sent": pair["activations.numpy().nbytes"],
        "largest difference to the whole network": pair["largest"],
    }
).rename_axis("rank")
split_table.style.format(
    {"largest difference to the whole network": "{:.1e}", "weights here": "{:,}", "bytes sent": "{:,}"}
)

# %% [markdown]
# The gradients are those of the whole network. Note what has changed:
#
# - the messages are as large as the *activations* where the network was cut: they grow with the batch and with the width of that layer;
# - each rank holds only its share of the weights;
# - while one rank computes, the other waits. Real systems cut the batch into pieces and keep the pipeline filled.
#
# Data parallelism asks less of the programmer: no cut to choose, no waiting halves, any network as it is. So it comes first, and splitting is for what does not fit. Large systems do both.
#
# ## Failure labs
#
# Three ways in which runs go wrong, each to be provoked once, so that you recognise it. Set `failure_labs = True` in the parameters and run the notebook again from the top.
#
# **Lab 1, unsharded data.** A frequent bug: every rank loads *all* the data, in the same order. Everything runs, gradients are averaged, the loss falls. But all ranks compute the same gradient.

# %%
if failure_labs:
    each = 32 // n_ranks  # sharded=False multiplies it by the number of ranks
    buggy = world.run(partial(train_digits, averaging, sharded=False, batch_size=each, epochs=2))[0]
    right = world.run(partial(train_digits, averaging, sharded=True, batch_size=each * n_ranks, epochs=2))[0]
    with ranks.start(1) as single:
        one_rank = single.run(partial(train_digits, None, sharded=True, batch_size=each * n_ranks, epochs=2))[0]
    print(f"difference to one rank alone: {largest_difference(buggy, one_rank):.1e}")
    print(f"steps per epoch: {buggy['steps'] / right['steps']:.2f} times as many as with shards")
    assert largest_difference(buggy, one_rank) < 1e-5

# %% [markdown]
# The result of one rank, at the cost of all. To notice it in real life: an epoch does not get faster with more ranks, so compare the samples read per epoch with the size of the data set.
#
# **Lab 2, too many threads.** A thread is a strand of work that can keep one core busy. TensorFlow likes to start one per core of the machine, and with several ranks on it each does so. `ranks.start` therefore gives each rank cores of its own and as many threads; here each rank has eight times as many instead, on the same cores. They can only take turns, and every turn costs something. How much, differs between machines: look at the three ratios, not at one.

# %%
if failure_labs:
    too_many = str(8 * cores_per_rank)
    crowded = {name: too_many for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
    with ranks.start(n_ranks) as fair, ranks.start(n_ranks, env=crowded) as crowd:
        rates = {"fair": [], "crowd": []}
        for _ in range(3):  # in turns, so that both see the same disturbances
            for name, lab in (("fair", fair), ("crowd", crowd)):
                table = lab.run(time_steps, batch, timing_size, 3, ("update",))[0]
                rates[name].append(table["samples_per_s"].median())
    ratios = np.array(rates["crowd"]) / np.array(rates["fair"])
    print(f"samples/s with eight times as many threads, relative to a fair share: {ratios.round(2).tolist()}")

# %% [markdown]
# **Lab 3, a rank dies.** Out of memory, a broken node, an impatient colleague: on thousands of nodes one of them fails every day. First an ordinary run.


# %%
def rank_1_is_killed() -> None:
    import os
    import signal

    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    if hvd.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    hvd.allreduce(tf.ones(1000), name="lab")


if failure_labs:
    try:
        world.run(rank_1_is_killed)
    except ranks.RankError as error:
        print(error)
        assert "rank 1 was ended by SIGKILL" in str(error)

# %% [markdown]
# The run is lost, and what remains is the last *checkpoint*, a copy of the weights on disk. **Elastic** training loses less: each rank keeps a copy in memory as well (`state.commit()`). When a rank disappears, the others go back to that copy and go on without it. They take fewer samples per step then; a careful program adapts its learning rate. `elastic_launch` starts ranks of its own, and Horovod on them.


# %%
def train_elastically(epochs: int) -> tuple[int, float]:
    """Return how many ranks finished and their test accuracy; rank 1 kills itself in the third epoch."""
    import os
    import signal

    import horovod.tensorflow as hvd
    import keras

    from nurion_utils import models
    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import DistributedOptimizer, ElasticState, elastic_run

    x, y, x_test, y_test = digits.load()
    keras.utils.set_random_seed(1)
    network = models.mlp()
    network.compile(
        DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )

    class Accident(keras.callbacks.Callback):
        def on_train_batch_end(self, step: int, logs: dict | None = None) -> None:
            if state.epoch == 2 and step == 3 and hvd.size() == 3 and hvd.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    @elastic_run
    def train(state):
        while state.epoch < epochs:
            shard = Shard(len(x), hvd.size(), hvd.rank(), 16, seed=0)  # the ranks there are now
            data = shard.dataset(x, y, start_epoch=state.epoch)
            network.fit(data, steps_per_epoch=shard.steps, callbacks=[Accident()], verbose=0)
            state.epoch += 1
            state.commit()

    state = ElasticState(network, epoch=0)
    train(state)
    return hvd.size(), network.evaluate(x_test, y_test, verbose=0)[1]


if failure_labs:
    from nurion_utils.training import elastic_launch

    survivors = elastic_launch(train_elastically, 8, ranks=3, min_ranks=2, timeout_s=180)
    print(f"{len(survivors)} of 3 ranks finished; test accuracy {survivors[0][1]:.3f}")
    assert [size for size, _ in survivors] == [2, 2]

# %% [markdown]
# ## Exercises
#
# **1. Deal out every sample.** Write the share of one rank so that over all ranks every sample appears exactly once, for any number of samples and ranks, and no rank has more than one sample more than another.


# %% tags=["exercise"]
def my_samples(n_samples: int, n_ranks: int, rank: int) -> list[int]:
    indices = []
    # --- solution
    indices = list(range(rank, n_samples, n_ranks))
    # --- end solution
    return indices


# %% tags=["check"]
for n_samples, size in ((8, 2), (10, 4), (3, 5), (1198, 7)):
    shares = [my_samples(n_samples, size, rank) for rank in range(size)]
    dealt = sorted(index for share in shares for index in share)
    left_out = sorted(set(range(n_samples)) - set(dealt))
    case = f"{n_samples} samples over {size} ranks"
    assert dealt, "No rank gets anything: put your line in place of the dots."
    assert set(dealt) <= set(range(n_samples)), f"{case}: indices run from 0 to {n_samples - 1}, you deal {dealt[-1]}."
    assert not left_out, f"{case}: samples {left_out} are left out. What about the remainder?"
    assert len(dealt) == n_samples, f"{case}: some sample is dealt twice."
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1, f"{case}: shares of {lengths} are uneven."
print("Right.")

# %% [markdown]
# **2. How much must be sent?** In the ring-allreduce, the algorithm of the next notebook, each of $P$ ranks sends $2N(P-1)/P$ bytes to reduce $N$ bytes. ResNet-50 has 25.6 million weights of 4 bytes. How many megabytes (millions of bytes) does each of 8 ranks send per step? And how many if the batch per rank is doubled?

# %% tags=["exercise"]
megabytes = None
megabytes_double_batch = None
# --- solution
megabytes = 2 * 25.6 * 4 * 7 / 8
megabytes_double_batch = megabytes
# --- end solution

# %% tags=["check"]
assert megabytes is not None and megabytes_double_batch is not None, "Put your numbers in place of the dots."
assert abs(megabytes - 102.4) > 5, "That is N: the ring sends almost every byte twice, to add it up and to hand it out."
assert abs(megabytes - 204.8) > 5, "Almost: with P = 8, the factor (P - 1)/P is 7/8."
assert abs(megabytes / 179.2 - 1) < 0.01, "N is 25.6 million weights of 4 bytes, 102.4 MB; put it into the formula."
assert abs(megabytes_double_batch / megabytes - 1) < 0.01, (
    "A gradient has the shape of its weights, whatever the batch."
)
print(f"Right: {megabytes:.1f} MB, for any batch.")

# %% [markdown]
# **3. Predict an efficiency.** On some machine the backward and forward pass of a batch of 32 take 90 ms and the allreduce, which nothing hides, takes 30 ms. What is the weak-scaling efficiency, as a fraction of 1? What would it be with a batch of 128 per rank, if computing time grows in proportion?

# %% tags=["exercise"]
efficiency_32 = None
efficiency_128 = None
# --- solution
efficiency_32 = 90 / (90 + 30)
efficiency_128 = 4 * 90 / (4 * 90 + 30)
# --- end solution

# %% tags=["check"]
assert efficiency_32 is not None and efficiency_128 is not None, "Put your numbers in place of the dots."
assert max(efficiency_32, efficiency_128) <= 1, "Give a fraction of 1, not per cent."
assert abs(efficiency_32 - 0.75) < 0.01, "One rank needs 90 ms per step, many ranks 120 ms for the same work per rank."
assert efficiency_128 > efficiency_32, "Computing grows with the batch, the allreduce does not: the efficiency rises."
assert abs(efficiency_128 - 360 / 390) < 0.01, "360 ms of computing, and still 30 ms of allreduce."
print("Right. This is the case for large batches; notebook 05 is about the case against them.")

# %%
world.stop()

# %%
import shutil

shutil.rmtree(directory)
# what this notebook has claimed
assert max(by_hand) < 1e-12
assert equality.iloc[0] == 0 and equality.iloc[1] < 1e-6
assert largest_difference(trap["stock"][0], trap["stock"][-1]) > 1e-3, "the stock binding reduces after all"
assert largest_difference(trap["ours"][0], trap["ours"][-1]) == 0
assert all(result["loss"][-1] < result["loss"][0] for results in trap.values() for result in results)
assert "no longer agree" in caught
assert abs(errors["together"][-1] - errors["alone"][-1]) < 1.0 and errors["together"][-1] < 8
assert trained["loss"][-1] < 0.85 * guess_error, "the network did not learn"
assert error_of[1] / spread[1] < 0.8, "sigma_8 should be clearly better than the mean"
assert (split_table["largest difference to the whole network"] < 1e-6).all()
if others_cores < 0.5:
    assert passes > 0.5 * whole_step, "the two passes should take most of a step"
else:
    print(
        f"too noisy to tell whether the two passes take most of a step: {others_cores:.1f} cores were taken by others"
    )
assert latency_s[-1] > transfer_s[-1] and abs(predicted_efficiency[-1] - 0.77) < 0.05
assert memory_table.set_index(["model", "batch per node"])["fits a Nurion node"]["ResNet-50"].to_dict() == {
    512: True,
    1024: False,
}

# %% [markdown]
# ## What to take along
#
# - Every rank computes with its own samples and the whole model; one average per step keeps the models equal.
# - $P$ ranks with batch $B$ take the steps of one rank with batch $PB$, batch normalisation and dropout excepted. Whether ranks still agree, a check of the weights tells.
# - The message is as large as the model and independent of the batch; the time it takes must be small against the computing time of a step.
# - A model that does not fit a node must be divided too. Cut between layers, its messages are as large as the activations at the cut.
#
# **Next:** [how an allreduce works inside, and why a ring](02_ring_allreduce.ipynb).
