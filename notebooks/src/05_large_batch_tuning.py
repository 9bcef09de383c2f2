# %% [markdown]
# # Large batches: more nodes, and the network still has to learn
#
# **Goal:** raise the batch with the number of ranks without spoiling what is learned, find out where that ends, and say what it costs.
#
# **You will be able to:** scale a learning rate to a batch and warm it up; recognise the three ways in which large batches fail; treat batch normalisation rightly on many ranks; measure the gradient-noise scale while training; use LARS where the rules fail; search for settings on all ranks; choose the batch that reaches a goal for the fewest node-hours.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb): P ranks with B samples each take the same steps as one rank with P x B.
#
# **Minutes:** 45 to read and run; the cells alone take about 1.5 on 2 cores
#
# ## Why more nodes mean a larger batch
#
# Nurion, the supercomputer of this course, has more than eight thousand nodes of one kind. In data parallelism each rank computes the gradient of its own samples, and all of them together take *one* step. To keep a rank busy it needs enough samples, say 32. Then the batch of all ranks grows with their number, and the number of steps in an epoch shrinks with it. For the 1.28 million images of ImageNet:

# %% tags=["parameters"]
n_ranks: int = 2  # ranks that train, sweep and search, 2 or more; on a larger machine as many as it has cores
n_seeds: int = 3  # trainings of each setting; 10 narrow the intervals
live_batches: list = [512, 2048]  # batches that are trained here; [512, 1024, 2048, 4096, 8192] takes 2 minutes more
search_batch: int = 8192  # where the rules fail; 4096 takes as long
search_trials: int = 16  # trainings of the search, 2 seeds each; 60 take 2 minutes more and find a little more
noise_epochs: int = 3  # of the training in which the noise scale is measured; 10 narrow its error
records: str = ""  # a folder that keeps trainings of sweeps and search: run again, the notebook does not repeat them
full: bool = False  # True: ten seeds, five batches, 60 trials, 10 epochs; an estimated 6 minutes on 2 cores

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nurion_utils import allreduce, large_batch, ranks, recordings, sites, style
from nurion_utils.large_batch import DigitsTask, Recipe, draw, experiment, sweep

if full:
    n_seeds, live_batches, search_trials, noise_epochs = 10, [512, 1024, 2048, 4096, 8192], 60, 10
sweeps, trials = (Path(records, name) if records else None for name in ("sweeps", "trials"))
style.use()
world = ranks.start(n_ranks)
nurion = sites.load("nurion")
nodes = np.array([8, 256, 1024, nurion.node.count])
pd.DataFrame(
    {"nodes": nodes, "batch at 32 per node": 32 * nodes, "steps in an epoch": (1_281_167 / (32 * nodes)).round(1)}
)

# %% [markdown]
# With all its nodes a training of 90 epochs is some 430 steps. Whatever is to be learned must be learned in them. The rest of this notebook is about how far a step can go.
#
# ## A task that shows it
#
# ImageNet does not fit into a notebook. What follows uses the 1797 handwritten digits that scikit-learn ships, made many by turning, shifting, scaling and bending them, 12 by 12 pixels, and made hard by noise. A network of four layers with batch normalisation learns them from 32,768 images in 10 epochs. The images for choosing settings (*validation*) and for reporting (*test*) are made from other originals.

# %% alt="Two rows of twelve small noisy images of handwritten digits, turned and bent in various ways; most can be read, some hardly."
task = DigitsTask()
data = task.load()
figure, axes = plt.subplots(2, 12, figsize=(9, 1.9), layout="constrained")
for axis, image, digit in zip(axes.flat, data.x, data.y, strict=False):
    axis.imshow(image.reshape(12, 12), cmap="gray")
    axis.set_title(digit, fontsize=8, pad=1)
    axis.axis("off")
plt.show()

# %% [markdown]
# A training is written down once, as data: a **recipe**. Its fields:
#
# | field | meaning |
# |---|---|
# | `batch` | samples per step, of all ranks together |
# | `base_batch`, `base_rate` | a batch for which the learning rate is known to be good, and that rate |
# | `rule` | how the rate follows the batch: `"fixed"`, `"square root"`, `"linear"` |
# | `warmup`, `warmup_epochs`, `warmup_from` | `"gradual"` or `"constant"`, for how long, and from which rate (the base rate unless given) |
# | `decay`, `milestones` | the rate falls to a tenth after these parts of the training |
# | `optimizer`, `momentum`, `weight_decay`, `trust_coefficient` | `"sgd"`, `"lars"` or `"lamb"`, and their settings |
#
# What cannot be trained, such as a warm-up that is longer than the training, is refused with a `RecipeError`. With 32 samples a step, a rate of 0.05 is good here. The network's batch normalisation always works on groups of 32 samples, as 64 ranks with 32 each would do for a batch of 2048; more on that below.

# %%
base = Recipe(batch=32, base_batch=32, base_rate=0.05, epochs=10)
base

# %% [markdown]
# `sweep` trains recipes with several seeds, spread over the ranks. A small network leaves a core idle most of the time, so each rank trains up to eight at once, side by side in one compiled step; each gives the same result as Keras' `fit` with the same seed.

# %%
base_runs = sweep({"base": base}, range(n_seeds), world, task, sweeps)
base_error = base_runs["test_error"].mean()
print(f"batch 32: test error {base_error:.1f} %, {base_runs['steps'].iloc[0]:,} steps")
base_runs[["seed", "test_error", "validation_error", "time_s"]].round(2)

# %% [markdown]
# ## Break it: a large batch, the same rate
#
# Now as 64 ranks with 32 samples each would train it: a batch of 2048. The data, the epochs and the learning rate stay. **Predict:** does the network learn as well? Each gradient is an average over 64 times as many samples, so it is *better*.

# %%
rules = {(name, batch): recipe for batch in live_batches for name, recipe in experiment.by_rule(batch).items()}

live = sweep(rules, range(n_seeds), world, task, sweeps)
live["method"] = [name for name, _ in live["name"]]
live.loc[live["method"] == "fixed", ["batch", "seed", "test_error", "steps"]].round(2)

# %% [markdown]
# Much worse, and the number of steps says why: they are better steps, but 64 times fewer, and no longer than before. The network has not come far.
#
# ## The linear rule
#
# **Predict** the right rate for a batch that is $k$ times as large. Two arguments give two answers.
#
# *As far as the small steps would come.* Take $k$ steps of rate $\eta$ with small batches. If the gradient hardly changes on the way, they lead to
#
# $$w - \eta \sum_{j=1}^{k} g_j = w - (k\eta)\,\bar g, \qquad \bar g = \frac{1}{k}\sum_j g_j ,$$
#
# and $\bar g$ is just the gradient of the large batch. So one large step should have the rate $k\eta$: the **linear rule** (Goyal et al. 2017).
#
# *As noisy as the small steps are.* The gradient of $B$ samples has a noise of variance $\propto 1/B$. To keep the variance of a step, $\eta^2/B$, as it was, the rate should grow as $\sqrt{k}$: the **square-root rule**.
#
# (The second compares one large step with *one* small step. The $k$ small steps that it replaces add up to a variance of $k\eta^2/B$, and a step of rate $k\eta$ on $kB$ samples has just that.)
#
# Both were trained above, beside the fixed rate:


# %%
def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and half of its 95 % interval, as text."""
    summary = experiment.summarise(table)
    summary["test error, %"] = summary["mean"].map("{:.1f} ± ".format) + summary["half_interval"].map("{:.1f}".format)
    return (
        summary.pivot(index="method", columns="batch", values="test error, %")
        .reindex(summary["method"].unique())
        .fillna("")
    )


intervals(pd.concat([base_runs.assign(method="base"), live]))

# %% alt="Test error against batch for the four rules, trained here. At 512 and at 2048 the fixed rate lies far above the others; the square root lies between it and the linear rule, which comes close to the error at a batch of 32."
figure = draw.errors(live, base_error)

# %% [markdown]
# (The ± is the 95 % interval of the mean, over the seeds; *base* is the batch of 32.) The linear rule repairs most of the damage, more than the square root does. At 512 its error is close to that of the base; at 2048 something is still missing.
#
# ## The first epochs
#
# The argument for the linear rule had an *if*: if the gradient hardly changes on the way. When is that least true? At the beginning, when everything is still wrong. So the rate should be small there and grow: **warm-up**. In the last row above it rises from the base rate to its full value within two epochs.
#
# Three seeds cannot tell the last two rows apart at 2048; more can, below. One step further it is a matter of life and death. Here are twelve trainings each at a batch of 4096, from a larger experiment that was recorded: the same network on *four times as many images*, 131,072, so that there are 320 steps in the ten epochs. **Predict:** will trainings that begin badly recover when the rate falls, after a third of the epochs?

# %% alt="Validation error after each of ten epochs at a batch of 4096, twelve trainings with warm-up and twelve without. With warm-up all fall quickly below 20 per cent. Without it nearly all stay between 60 and 90 per cent to the end; the fall of the rate after the third epoch helps them little."
recorded = recordings.load("large_batch_digits")
report = recorded[recorded["part"] == "report"]
figure = draw.courses(report[report["method"].isin(["linear", "linear, warm-up"])], 4096)

# %% [markdown]
# Without warm-up the first steps are far too long, and throw the network somewhere from where it does not come back, not even with small steps later: none of the twelve ends below 60 %. With warm-up the same rate, 6.4, is tolerated from the end of the second epoch on, with some swaying.
#
# There is also a **constant** warm-up, at the base rate and then a jump: `Recipe(..., warmup="constant", warmup_epochs=2)`. We have not tried it here. One more detail for those who write their own: in Keras the momentum holds old steps *with the rates they had*. When the rate jumps they are too long or too short. `CorrectedSGD` keeps the rate out of the momentum; that is Goyal's *momentum correction*.
#
# ### The whole picture
#
# The whole of that experiment takes about a quarter of an hour (`data/large_batch_digits.csv`): five batches, twelve seeds. Here it is beside what Goyal et al. published for ImageNet. The rates of the last three methods are tuned for each batch on validation images; their turn comes below. **Predict:** where does the linear rule end *with* warm-up?

# %% alt="Left: test error against batch from 512 to 16384 for seven methods on digits, error on a logarithmic axis. The fixed rate rises at once, the square root slowly; the linear rule follows the base error up to 2048 and leaps to 80 per cent and more at 4096, with warm-up at 8192. Tuned SGD, LAMB and, lowest, LARS rise slowly. Right: Goyal's published ImageNet errors, flat up to 8192 with linear rule and warm-up, then rising; at 8192 single points for the fixed rate, the square root and other warm-ups lie above."
recorded_base = report.loc[report["method"] == "base", "test_error"].mean()
figure, (ours, theirs) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
draw.errors(report[report["method"] != "base"], recorded_base, ours)
ours.set_title("digits, recorded", fontsize=10)
goyal = (
    recordings.load("published_large_batch")
    .query("study == 'Goyal'")
    .assign(value=lambda t: t["value"].astype(float), batch=lambda t: t["batch"].astype(int))
)
curve = goyal[goyal["setting"] == "linear, gradual warm-up"]
theirs.semilogx(curve["batch"], curve["value"], color=style.BLUE, marker="o", ms=5, label="linear, gradual warm-up")
markers = {
    "fixed": (style.VERMILION, "s"),
    "square root": (style.ORANGE, "v"),
    "linear, no warm-up": (style.SKY, "^"),
    "linear, constant warm-up": (style.BLACK, "x"),
}
for setting, (colour, marker) in markers.items():
    theirs.plot(
        8192,
        goyal.loc[goyal["setting"] == setting, "value"].item(),
        ls="",
        color=colour,
        marker=marker,
        ms=7,
        label=setting,
    )
draw.batch_axis(theirs, curve["batch"])
theirs.set(ylabel="top-1 error, %", ylim=(0, 45), title="ImageNet, ResNet-50: published (Goyal et al. 2017)")
theirs.title.set_fontsize(10)
theirs.legend(fontsize=8, loc="lower left")
plt.show()

# %% [markdown]
# (The recorded errors are lower than the live ones because there are four times as many steps. The left axis is logarithmic.) Read it from left to right. At 512 everything but the fixed rate works. At 2048 the four rules stand in the order that Goyal et al. report for 8192, each apart from the next: fixed, square root, linear without warm-up, linear with it. At 4096 the linear rule needs its warm-up to survive at all: its rate is 6.4 there. At 8192 it breaks with warm-up too. The square root's rate is still tolerated, and too small.
#
# On ImageNet the break, or **elbow**, comes beyond 8192. Where it comes depends on data and network; that it comes does not.
#
# So a large batch fails in three ways:
#
# 1. *It does not come far.* Few steps at the old rate. Cure: scale the rate.
# 2. *It is thrown off at the start.* Full rate from the first step. Cure: warm up.
# 3. *It does not tolerate the rate at all.* Beyond the elbow. Cures: a rate for every layer, or a search, both below; or fewer nodes.
#
# ## Batch normalisation on many ranks
#
# Batch normalisation subtracts the mean of *the batch* and divides by its deviation. Which batch, when there are many ranks? **Predict:** each of two ranks normalises its own 16 samples. Do they together do what one rank does with 32?


# %%
def normalise(samples: int) -> dict:
    """This rank's part of a batch through a layer of each kind, and how far that is from the whole batch on one rank."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np

    from nurion_utils.training import SyncBatchNormalization

    hvd.init()
    x = np.random.default_rng(0).normal(size=(samples, 4)).astype("float32")
    mine = np.array_split(x, hvd.size())[hvd.rank()]
    whole = (mine - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-3)
    layers = {"per rank": keras.layers.BatchNormalization(), "synchronised": SyncBatchNormalization()}
    return {name: float(np.abs(layer(mine, training=True) - whole).max()) for name, layer in layers.items()}


apart = world.run(normalise, 16 * n_ranks)
differences = pd.DataFrame(apart).rename_axis("rank").rename(columns="{} statistics".format)
differences.style.format("{:.1e}").set_caption("largest difference from the whole batch on one rank")

# %% [markdown]
# They do not. Each rank has statistics of its own, noisier ones. `SyncBatchNormalization` adds an allreduce of the statistics to every layer and is equal to the whole batch.
#
# Which is better? Goyal et al. kept 32 samples per rank and *per-rank* statistics: then what the network computes for an image depends on 31 companions, however many ranks there are, and the same loss is minimised on any number of them. That is what the network above does at every batch (`GroupedBatchNormalization(32)`). Synchronise when a rank has only a few samples, as with large three-dimensional images.
#
# Two more of Goyal's points, for networks with residual blocks such as ResNet-50. The gain $\gamma$ of the *last* normalisation in each residual block begins at zero, so that at first every block does nothing and the network is shallow (`BatchNormalization(gamma_initializer="zeros")` there; worth 0.4 points at a batch of 8192). And weight decay is for the kernels, not for $\gamma$, $\beta$ and biases.
#
# ## How large a batch is worth it? Ask the gradients
#
# A larger batch makes the gradient less noisy. Once the noise is smaller than the gradient itself, more samples improve little. The **noise scale**
#
# $$B_\text{simple} = \frac{\text{variance of a single sample's gradient, all weights together}}{|\text{gradient}|^2}$$
#
# is the batch at which both are equal (McCandlish et al. 2018). And ranks measure it at no extra cost: each has the gradient of *its* samples, and after the allreduce that of all. If $g$ is a gradient over $b$ samples, then on average $|g|^2 = |G|^2 + S/b$. Two batch sizes, two equations, two unknowns: the true gradient's $|G|^2$ and the noise $S$.
#
# Below, `make_optimizer` makes a Keras optimizer of a recipe, with its rates as a schedule (`RecipeSchedule`) that is saved and loaded with the model.
#
# **Predict:** does the noise scale grow or shrink during training? (What becomes of the average gradient near a minimum?)


# %%
def train_and_listen(task, recipe, epochs: int) -> "pd.DataFrame":
    """Ordinary data-parallel training, with an ear on the gradients."""
    import horovod.tensorflow as hvd
    import keras

    from nurion_utils.datasets import Shard
    from nurion_utils.large_batch import NoiseScale, make_optimizer
    from nurion_utils.training import BroadcastCallback, DistributedOptimizer

    hvd.init()
    data = task.load()
    shard = Shard(len(data.x), hvd.size(), hvd.rank(), recipe.batch // hvd.size(), seed=0)
    noise = NoiseScale(batch_per_rank=shard.batch_size)
    keras.utils.set_random_seed(0)
    model = task.build()
    optimizer = DistributedOptimizer(make_optimizer(recipe, len(data.x)), observer=noise)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(
        shard.dataset(data.x, data.y),
        steps_per_epoch=shard.steps,
        epochs=epochs,
        callbacks=[BroadcastCallback()],
        verbose=0,
    )
    return noise.table(window=shard.steps // 2)


listen = Recipe(batch=32 * n_ranks, epochs=noise_epochs, decay="none")
heard = world.run(train_and_listen, task, listen, noise_epochs)[0]
heard[["step", "gradient_sq", "noise", "noise_scale", "noise_scale_se"]].round(3)

# %% [markdown]
# The noise scale grows: as the network learns, the gradient that all samples agree on becomes small (`gradient_sq`), and what remains is their disagreement. Here it rises from some 600 samples in the first half epoch to more than 1000. That is a reason to begin with small batches, or small rates; and a **prediction**: well below a thousand samples a larger batch pays in full, and from about a thousand on much of it is wasted. (`noise_scale_se` is the standard error, from the scatter between blocks of steps.)
#
# Now look. The recorded experiment also has trainings whose rate does not fall, with several rates for each batch: how many steps does the fastest of them need to come to a validation error of 20 %, and how many samples? The two are tied by a simple law,
#
# $$\left(\frac{S}{S_\text{min}} - 1\right)\left(\frac{E}{E_\text{min}} - 1\right) = 1,$$
#
# with $S$ steps and $E = SB$ samples; which is the same as $S = S_\text{min} + E_\text{min}/B$ (`large_batch.tradeoff`). At the **critical batch** $E_\text{min}/S_\text{min}$ it takes twice the least possible number of steps, and twice the least possible number of samples.

# %%
reached = experiment.steps_to(recorded, error=20)
fitted = large_batch.critical_batch(reached)
print(
    f"critical batch {fitted.batch:,.0f} ± {fitted.batch_se:,.0f}: at least {fitted.steps_min:.0f} steps, at least {fitted.samples_min:,.0f} samples"
)
reached.round(2)

# %% alt="Two panels against the batch, both logarithmic. Steps to the target error fall in proportion to the batch at first and then flatten; samples are constant at first and then rise in proportion. A dotted line in both marks the critical batch, where the curves bend."
curve = large_batch.tradeoff(
    np.geomspace(reached["batch"].min(), reached["batch"].max(), 50), fitted.steps_min, fitted.samples_min
)
figure = draw.tradeoff(reached, curve, fitted.batch)

# %% [markdown]
# (Steps are not whole because the moment of the target is interpolated between two epochs. The rates do not fall here, so others are best than with decay.) Up to 512 a larger batch costs next to nothing, and at 2048 a fifth more samples than at 32 (the fitted curve says two fifths; it is not perfect). Around 5000 the curves bend. At 16,384 it takes more than four times the samples of the batch of 32, and 10 steps less than at 8192.
#
# The prediction was too low, by a factor of about 4. Two reasons are visible. The noise scale was measured in the first epochs of a training on a quarter of the images, and it was still growing. And all these trainings have an epoch of warm-up, which for a batch of 32 is more than half of the way to the target; that makes small batches look more expensive, and the critical batch smaller than it would be found without. In published cases the two are apart as well, there with the noise scale the *larger*: 900 against 200 for MNIST, 2000 against 900 for CIFAR-10, 30,000 against 15,000 for ImageNet. So the noise scale is good for an order of magnitude, before anyone has tried a large batch, and no more. The harder the task, the larger the batch that is worth it.
#
# ## LARS: a rate for every layer
#
# Why does the linear rule end? You et al. (2017) found that the ratio of the size of a layer's weights to that of its gradient differs between layers by orders of magnitude, most of all at the beginning. A rate that suits one layer throws another off. Their **LARS** gives each layer a rate in proportion to the size of its weights: with rate $\eta$, trust coefficient $\tau$, momentum $m$ and weight decay $\lambda$,
#
# $$v \leftarrow m\,v + \eta\,\frac{\tau\,|w|}{|g| + \lambda |w|}\,(g + \lambda w), \qquad w \leftarrow w - v .$$
#
# Whatever the length of its gradient, a layer moves by the share $\eta\tau$ of its own length. In numpy:


# %%
def lars_step(w, g, v, rate, trust=0.1, momentum=0.9, weight_decay=1e-4):
    """One step of LARS for one layer; returns the new weights and momentum."""
    length = trust * np.linalg.norm(w) / (np.linalg.norm(g) + weight_decay * np.linalg.norm(w))
    v = momentum * v + rate * length * (g + weight_decay * w)
    return w - v, v


rng = np.random.default_rng(0)
w, v = rng.normal(size=(6, 4)), np.zeros((6, 4))
for scale in (1e-3, 1.0, 1e3):
    moved = np.linalg.norm(lars_step(w, scale * rng.normal(size=w.shape), v, rate=1.0)[0] - w) / np.linalg.norm(w)
    print(f"gradient times {scale:g}: the layer moves by {100 * moved:.1f} % of its length")

# %% [markdown]
# (Where the gradient is tiny, the weight decay has its say.) From here on we use the package's `LARS`, a Keras optimizer. (Keras itself has LAMB, which does for Adam what LARS does for SGD.) It leaves biases and batch normalisation at the raw rate. The same ten steps by both:


# %%
def ten_steps(w, gradients):
    """The weights after ten steps of the package's LARS."""
    import keras

    from nurion_utils.large_batch import LARS

    variable = keras.Variable(w, dtype="float64")
    optimizer = LARS(1.0, momentum=0.9, weight_decay=1e-4, trust_coefficient=0.1)
    for g in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(g, "float64")], [variable])
    return variable.numpy()


gradients = rng.normal(size=(10, 6, 4))
by_hand, momentum = w, v
for g in gradients:
    by_hand, momentum = lars_step(by_hand, g, momentum, rate=1.0)
lars_difference = float(np.abs(by_hand - world.run(ten_steps, w, gradients)[0]).max())
print(f"largest difference after ten steps: {lars_difference:.1e}")

# %% [markdown]
# What it does for us stands in the recorded figure above. In numbers, with the rate that was chosen for each batch on validation images, for SGD as for LARS and LAMB, so that none has an advantage that the others had not:

# %%
rates = experiment.best_rates(recorded)
chosen = pd.Series(rates).rename_axis(["method", "batch"]).unstack()
intervals(report[~report["method"].isin(["fixed", "square root"])])

# %%
chosen.style.format("{:g}").set_caption("tuned rates")

# %% [markdown]
# Say a batch is *usable* if its error is within 3 points of the one at 32. Then the linear rule alone is usable up to 2048, with warm-up up to 4096, and so are tuned SGD and LAMB. LARS is usable, just, up to 8192: four times as far as the bare linear rule, twice as far as the one with warm-up. Where SGD is tuned as carefully, LARS still has 0.9 points less error at 4096 and 2.6 less at 8192; so its gain is more than tuning. LAMB is no better than tuned SGD here. (The rates that were tried are in the recorded table; none of the chosen ones lies at an end of its grid.) At 16,384 nothing is usable: 80 steps are too few for any of them.
#
# ## Where the rules fail: search
#
# Beyond the elbow no rule says what to set; it is a search over rate, warm-up, weight decay and optimizer. `search` puts all ranks on one study of the library Optuna: each takes a trial and reports its result until there are as many as asked for, and bad trials are ended early. With `path=` the study is kept in a folder, so that it can be stopped and resumed.

# %%
space = {
    "base_rate": (0.02, 4.0),
    "warmup_epochs": (0.5, 5.0),
    "weight_decay": (1e-5, 1e-3),
    "optimizer": ["sgd", "lars"],
}
start = Recipe(search_batch, base_batch=search_batch, warmup_from=0.0)
study = large_batch.search(start, space, world, search_trials, task=task, path=trials)
ruled = sweep({"linear, warm-up": experiment.by_rule(search_batch)["linear, warm-up"]}, range(2), world, task, sweeps)
print(
    f"batch {search_batch}: linear rule with warm-up {ruled['validation_error'].mean():.1f} %, best of the search {study['validation_error'].iloc[0]:.1f} %"
)
study.drop(columns="rank").head(5).style.format(precision=3).format("{:.0e}", subset="weight_decay")

# %% [markdown]
# (Validation errors, in per cent; for a report, train the winner with new seeds and look at the test images once.) The search brings it from guessing to something that has learned, and still far from the base: the live task has 40 steps at this batch, and no setting makes 40 steps enough. It has also cost 16 times two trainings. That is the price of a batch beyond the elbow. KISTI's paper on Nurion says the same: the rule is good up to a batch of about 8000 on ImageNet, and what comes after resembles a search for hyper-parameters.
#
# ## What it costs in node-hours
#
# More nodes with 32 samples each make a larger batch and fewer steps: time falls with $S$. Node-hours are nodes times time, so they grow with $E$. For a picture of the cost, take the *steps* of our digits and the *seconds* of a ResNet-50 on Nurion: 32 images at about 60 per second and node, plus an allreduce of its 102 MB of gradients by Rabenseifner's algorithm on Nurion's links ([notebook 02](02_ring_allreduce.ipynb)), some 0.02 s:

# %%
link = allreduce.Link.of(nurion)
rows = []
for row in large_batch.tradeoff([32 * 2**k for k in range(1, 11)], fitted.steps_min, fitted.samples_min).itertuples():
    n = int(row.batch // 32)
    step_s = 32 / 60 + allreduce.time(allreduce.rabenseifner(n), 102e6, link)
    rows.append((n, int(row.batch), row.steps, row.steps * step_s / 60, n * row.steps * step_s / 3600))
columns = ["nodes", "batch", "steps", "minutes", "node_hours"]
cost = pd.DataFrame(rows, columns=columns)
cost["efficiency"] = cost["node_hours"].iloc[0] / cost["node_hours"]
cost.style.format({"steps": "{:,.0f}", "minutes": "{:.1f}", "node_hours": "{:.1f}", "efficiency": "{:.0%}"})

# %% alt="Node-hours against minutes to the target, one point per number of nodes, joined by a line. From 2 to some 32 nodes time falls and node-hours hardly rise; beyond some 128, node-hours rise steeply while time hardly falls."
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
axis.loglog(cost["minutes"], cost["node_hours"], color=style.BLUE, marker="o", ms=5)
for row in cost.itertuples():
    axis.annotate(f" {row.nodes}", (row.minutes, row.node_hours), fontsize=8, va="bottom")
axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50], [0.5, 1, 2, 5, 10, 20, 50])
axis.set_yticks([1, 2, 5, 10], [1, 2, 5, 10])
axis.minorticks_off()
axis.set(xlabel="minutes to a validation error of 20 %", ylabel="node-hours", title="numbers of nodes along the line")
axis.title.set_fontsize(10)
plt.show()

# %% [markdown]
# Well below the critical batch more nodes are nearly free: half the time for the same bill. At the critical batch, about 150 nodes, the bill has doubled. Beyond it each further node is paid for and saves little. This is a limit of *learning*: it would be there on a network of infinite speed. (For a task like these digits. On ImageNet, with a critical batch of 15,000, it is reached with some 470 nodes.)
#
# ## Exercises
#
# **1. Scale a recipe.** A ResNet-50 is trained well with a batch of 256 at a rate of 0.1, for 90 epochs, with decay at a third, two thirds and eight ninths. Write the recipe for 128 nodes with 32 images each, by Goyal's rules, with a gradual warm-up of 5 epochs.

# %% tags=["exercise"]
from nurion_utils.large_batch import Recipe

scaled = None  # a Recipe(...)
# --- solution
scaled = Recipe(
    batch=128 * 32, base_batch=256, base_rate=0.1, epochs=90, rule="linear", warmup="gradual", warmup_epochs=5
)
# --- end solution

# %% tags=["check"]
assert isinstance(scaled, Recipe), "Put a Recipe(...) in place of the dots."
assert scaled.batch == 4096, f"128 nodes with 32 images each are a batch of 4096, not {scaled.batch}."
assert scaled.epochs == 90, f"It is to be trained for 90 epochs, not {scaled.epochs:g}."
assert abs(scaled.peak_rate - 1.6) < 1e-9, (
    f"4096 is 16 times 256, so by the linear rule the rate is 1.6; yours is {scaled.peak_rate:g}."
)
assert abs(scaled.rate(0.0) - 0.1) < 1e-9, (
    f"A gradual warm-up begins at the base rate, 0.1; yours begins at {scaled.rate(0.0):g}."
)
assert abs(scaled.rate(2.5) - 0.85) < 1e-9, (
    f"Half-way through 5 epochs of warm-up the rate is 0.85; yours is {scaled.rate(2.5):g}."
)
assert abs(scaled.rate(31) - 0.16) < 1e-9, (
    f"After a third of the epochs the rate is a tenth, 0.16; yours is {scaled.rate(31):g}."
)
print("Right: rate 0.1 at first, 1.6 from epoch 5, 0.16 from 30, 0.016 from 60, 0.0016 from 80.")

# %% [markdown]
# **2. Repair a run.** This one ends with an error of about 90 %: it guesses. Change what you like but the batch and the epochs, and bring the validation error below 40 %. (`broken.changed(name=value)` makes a new recipe; the check trains it.)

# %% tags=["exercise"]
from nurion_utils.large_batch import Recipe

broken = Recipe(batch=1024, base_batch=32, base_rate=1.0, rule="linear", epochs=10)
repaired = None
# --- solution
repaired = broken.changed(base_rate=0.05, warmup="gradual", warmup_epochs=2)
# --- end solution

# %% tags=["check"]
from nurion_utils.large_batch import DigitsTask, sweep

assert isinstance(repaired, Recipe), "Put a Recipe, such as broken.changed(...), in place of the dots."
assert (repaired.batch, repaired.epochs) == (1024, 10), "Batch and epochs are to stay 1024 and 10."
result = sweep({"yours": repaired}, [0, 1], world, DigitsTask(samples=16_384))
assert result["error"].isna().all(), f"It could not be trained: {result['error'].iloc[0]}."
error, steady = result["validation_error"].mean(), repaired.peak_rate
assert error < 40, (
    f"The validation error is {error:.0f} %. Its rate after the warm-up is {steady:g}; at a batch of 32 a rate of 0.05 is good. "
    "What does the linear rule make of that, and how does it begin?"
)
print(f"Right: {error:.1f} %.")

# %% [markdown]
# **3. The cheapest in time.** A training needs at least 6000 steps and at least 12 million samples, by the law above. A step takes 0.5 s whatever the number of nodes, each node has 32 samples, and the result must be there in 2 hours. How many nodes do it for the fewest node-hours: 32, 64, 128 or 256?

# %% tags=["exercise"]
cheapest = None  # a number of nodes
# --- solution
from nurion_utils.large_batch import tradeoff

table = tradeoff([32 * nodes for nodes in (32, 64, 128, 256)], 6000, 12e6)
in_time = table[table["steps"] * 0.5 <= 2 * 3600]
cheapest = int(in_time["batch"].iloc[0] // 32)  # node-hours grow with the batch
# --- end solution

# %% tags=["check"]
assert cheapest is not None, "Put a number of nodes in place of the dots."
assert cheapest in (32, 64, 128, 256), f"Choose from 32, 64, 128 and 256, not {cheapest}."
steps = 6000 + 12e6 / (32 * cheapest)
hours = steps * 0.5 / 3600
assert hours <= 2, f"{cheapest} nodes need {steps:,.0f} steps, {hours:.2f} hours: too long."
assert cheapest == 64, (
    f"{cheapest} nodes are done in {hours:.2f} hours, but half as many are in time too, and cost less."
)
print(f"Right: {hours:.2f} hours, {64 * hours:.0f} node-hours.")

# %%
world.stop()

# %%
summary = experiment.summarise(report).set_index(["method", "batch"])
order = [summary.loc[(method, 2048)] for method in ("fixed", "square root", "linear", "linear, warm-up")]
for worse, better in zip(order, order[1:], strict=False):
    assert worse["mean"] - worse["half_interval"] > better["mean"] + better["half_interval"]
usable = summary[summary["mean"] < recorded_base + 3].reset_index().groupby("method")["batch"].max()
assert (
    usable["linear"] == 2048
    and usable["linear, warm-up"] == usable["SGD, tuned"] == usable["LAMB"] == 4096
    and usable["LARS"] == 8192
)
for batch in (4096, 8192):
    lars, sgd = summary.loc[("LARS", batch)], summary.loc[("SGD, tuned", batch)]
    assert lars["mean"] + lars["half_interval"] < sgd["mean"] - sgd["half_interval"]
here = live.groupby(["method", "batch"])["test_error"].mean()
assert (
    here["fixed", max(live_batches)] > 2 * base_error
    and here["linear, warm-up", max(live_batches)] < here["fixed", max(live_batches)] / 2
)
assert max(of["synchronised"] for of in apart) < 1e-5 and max(of["per rank"] for of in apart) > 0.1
assert heard["noise_scale"].iloc[-1] > heard["noise_scale"].iloc[0] > 0
assert lars_difference < 1e-12
last = [
    float(course.split()[-1])
    for course in report.loc[(report["method"] == "linear") & (report["batch"] == 4096), "validation_errors"]
]
assert len(last) == 12 and min(last) > 60
assert 1000 < fitted.batch < 20_000
assert len(study) == search_trials and study["validation_error"].iloc[0] < ruled["validation_error"].mean()
assert cost["minutes"].is_monotonic_decreasing and cost["node_hours"].is_monotonic_increasing

# %% [markdown]
# ## What to take along
#
# - More nodes make a larger batch and fewer steps. At a fixed rate the network does not come far.
# - Linear rule with gradual warm-up first: it needs no tuning and holds up to an elbow. Beyond it there is LARS, tuned, or a search; then the number of steps itself is the limit.
# - Batch normalisation per rank keeps the loss the same on any number of ranks; synchronise where a rank has few samples.
# - The noise scale can be measured while training, and gives an order of magnitude. The critical batch says from where on more nodes cost more than they save.
#
# **Next:** the whole machine, where the three walls, communication, input and large batches, stand together.
