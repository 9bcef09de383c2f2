# %% [markdown]
# # The whole machine: predict a run before you pay for it
#
# **Goal:** put computing, allreduce, storage, batches and late ranks into one prediction of a step, say how far it can be trusted, and plan a job with it.
#
# **You will be able to:** say where the time of a step goes; calibrate a model on one and two nodes and predict four; read an interval and find the measurement that would narrow it; compare predictions with runs that others published, misses included; find the wall that comes first; choose nodes, hours and queue for a job.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb), and the ideas of [Ring-allreduce](02_ring_allreduce.ipynb), [Burst-buffer staging](04_burst_buffer_staging.ipynb) and [Large-batch tuning](05_large_batch_tuning.ipynb). Jobs are those of [On a cluster](06_on_a_cluster.ipynb).
#
# **Minutes:** 45 to read and run; the cells alone take about 1 on 2 cores
#
# ## Where the time goes on your ranks
#
# A node-hour is paid for whether the node computes or waits. So before you ask for a thousand nodes you want to know what they will wait for. It begins with what you can measure: two ranks that train a small network for volumes (that of notebook 01). **Predict:** which part of their step is the largest?

# %% tags=["parameters"]
n_ranks: int = 2  # ranks that train here, 2 or more; on a larger machine as many as it has cores
n_nodes: int = 4  # virtual nodes whose step is predicted, a power of 2 from 4 on; 2 cores keep up with 4
link_rates: list = [10.0, 40.0]  # of the links of these nodes, in 10^6 bits per second; far faster ones cost core time
batches: list = [4, 16]  # samples per node and step
repeats: int = 4  # of each timing; more show the scatter of runs better

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nurion_utils import allreduce, jobs, large_batch, ranks, recordings, scaling, sites, style, timing
from nurion_utils.training import step_timing

style.use()
world = ranks.start(n_ranks)


def time_steps(batch: int, size: int, rounds: int) -> pd.DataFrame:
    import numpy as np

    from nurion_utils import models
    from nurion_utils.datasets import Shard
    from nurion_utils.training import step_timing

    rng = np.random.default_rng(0)  # random volumes: only the time matters
    x, y = rng.normal(size=(8 * batch, size, size, size, 1)), rng.normal(size=(8 * batch, 3))
    shard = Shard(len(x), 1, 0, batch, seed=0)
    data = x.astype("float32"), y.astype("float32")
    return step_timing.step_times(
        lambda: models.cosmoflow_small(size), lambda: shard.dataset(*data), rounds=rounds, block_s=0.2
    )


parts = step_timing.parts(world.run(time_steps, 4, 32, 5)[0])

# %% alt="Horizontal bars of the time that each part of a training step takes on the ranks of this machine, with quartiles: waiting for input, forward pass, backward pass, update and allreduce. The backward pass is the longest."
figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
middle = parts["time_s"] * 1e3
bars = [middle - parts["low_s"] * 1e3, parts["high_s"] * 1e3 - middle]
axis.barh(parts["part"], middle, xerr=bars, color=style.GREY, capsize=4)
axis.axvline(0, color=style.BLACK, lw=0.8)
axis.set(xlabel="time in a step, ms (median and quartiles)")
axis.invert_yaxis()
plt.show()

# %% [markdown]
# The backward pass. It computes two gradients where the forward pass computes one result, so twice its time is usual. (A part is the difference of two measurements: where others use the cores, a short one can even come out negative, and its neighbour too long.) Input, update and allreduce together are less than the two passes here. On many nodes it is they that grow.
#
# ## A step on P nodes, on one page
#
# $$T(P) = \underbrace{t_0 + b\,t_1}_{\text{computing}} + \underbrace{c + \max\!\left(e\,A(P),\; A(P) - \tfrac{2}{3}(t_0 + b\,t_1)\right)}_{\text{exposed communication}} + \underbrace{w\,(t_0 + b\,t_1)(H_P - 1)}_{\text{waiting}} + \text{input}$$
#
# - *Computing*: a time $t_0$ for each step, and $t_1$ for each of the $b$ samples of a rank.
# - *Exposed communication*: what the ranks see of it. The allreduce of notebook 02 takes $A(P)$ from the messages and bytes of its algorithm. At best the backward pass, two thirds of the computing, hides it; what is longer than that shows, and a part $e$ always does. Copies into and out of buffers take $c$.
# - *Waiting*: all wait for the last one. If ranks are late by random times (exponentially distributed, with mean $w$ times the computing), the last of $P$ is late by $H_P = 1 + \frac12 + \dots + \frac1P$ of the mean. One of these means is in the computing already (one rank waits for nobody), hence the $-1$. It grows like a logarithm: by as much from 1000 to 2000 nodes as from 100 to 200.
# - *Input*: what the hottest storage target of notebook 04 takes longer than all this.
#
# An epoch is its steps, and a time $l$ for each sample of the epoch that *every* rank spends, however many ranks there are: $T_\text{epoch} = \text{steps} \cdot T(P) + \text{samples} \cdot l$. We call the latter *listing*, because listing and shuffling the files of an epoch is of that kind. The model is `nurion_utils/scaling/terms.py`, 150 lines.
#
# The sizes come from the network. Here are those of CosmoFlow in full size, read off its Keras model on a rank (so that this process does not need TensorFlow). Its authors gave 28.15 MB and, as far as we remember, 69.33 Gflop; we count multiplications and additions of the layers only, and do not know what else they counted:


# %%
def read_off() -> scaling.Workload:
    from nurion_utils import models, scaling

    return scaling.workload(models.cosmoflow(), batch=1, samples=2**18)


own = world.run(read_off)[0]
world.stop()
print(f"{own.gradient_bytes / 1e6:.2f} MB of gradients in {own.tensors} tensors")
print(f"{own.operations / 1e9:.1f} Gflop and {own.sample_bytes / 1e6:.2f} MB for each sample")

# %% [markdown]
# The other figures, $t_0, t_1, e, w$ and so on, differ between machines. `calibrate` finds them from a few runs. Few runs do not settle so many figures, and that is not hidden: before any run each of them has a range in which it is believed to lie (a *prior*), runs narrow it, and what remains uncertain makes the interval of every prediction.
#
# ## Held to account: four nodes from one and two
#
# Now the model has to stand a test in front of you. Virtual nodes with slow links, as in notebook 06. Four nodes share your cores, and four networks that really train would fight for them, which is nothing that real nodes do. So the computing is **emulated**: each node sleeps for the time that an accelerator would need, 20 ms and 10 ms for each sample. The allreduces are real, over real (slow) links. As Horovod does, a step sends the first half of its gradients while the second half is still "computed".


# %%
def emulated_steps(n: int, batches: list, gradient_bytes: int) -> list[dict]:
    """A step with each batch on the first n nodes, the same rows on all of them; the other nodes rest."""
    import time
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    import numpy as np
    from mpi4py import MPI

    from nurion_utils import timing

    if MPI.COMM_WORLD.rank >= n:
        return []
    comm = MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.group.Incl(range(n)))
    halves = np.zeros((2, gradient_bytes // 8), np.float32)

    def step(batch: int) -> None:
        compute_s = 0.02 + 0.01 * batch
        time.sleep(compute_s / 3)  # the forward pass
        travelling = []
        for half in halves:
            time.sleep(compute_s / 3)  # half of the backward pass
            travelling.append(wire.submit(comm.Allreduce, MPI.IN_PLACE, half))
        for each in travelling:
            each.result()

    with ThreadPoolExecutor(1) as wire:
        timing.block(comm, int)  # opens the connections
        times = [timing.block(comm, partial(step, batch)) for batch in batches]
    comm.Free()
    return [{"nodes": n, "batch_per_rank": b, "step_s": time_s} for b, time_s in zip(batches, times, strict=True)]


load = timing.OtherLoad()
gradient_bytes, rows = 400_000, []
for rate in link_rates:
    try:
        world = ranks.start(n_nodes, rate_mbit=rate)
    except ranks.NodesError as reason:
        print(reason, "- the ranks share this machine, and its memory is their wire, at every rate")
        world = ranks.start(n_nodes)
    on_nodes = world.rate_mbit is not None
    for repeat, n in timing.turns([1, 2, n_nodes], repeats):  # in turn, so that all see the same disturbances
        found = world.run(emulated_steps, n, batches, gradient_bytes)[0]
        rows += [{"rate_mbit": rate, "repeat": repeat} | row for row in found]
    world.stop()
measured = pd.DataFrame(rows)
others_cores = load.cores()

# %% [markdown]
# The times of one and two nodes go into the calibration; those of more stay out of it. Repetitions are not new evidence about the model, so it gets the median of each setting: four numbers for each speed of the links.

# %%
small = measured[measured["nodes"] <= 2].groupby(["rate_mbit", "nodes", "batch_per_rank"])["step_s"].median()
small = small.reset_index()
(1e3 * small.pivot(index=["rate_mbit", "batch_per_rank"], columns="nodes", values="step_s")).round(1)

# %% [markdown]
# (Milliseconds.) **Predict** with a pencil before the model does: $2\frac{P-1}{P}$ times the bytes, here 400 kB, go through each link, so four nodes send half as much again as two. How long will a step take on four, with the slow links and the small batch? What does the larger batch hide?

# %%
held = []
for rate, runs in small.groupby("rate_mbit"):
    link = allreduce.Link(1e-4, 8e-6 / rate) if on_nodes else allreduce.Link(2e-6, 2e-10)
    for batch in batches:
        emulated = scaling.Workload("emulated", gradient_bytes, batch, tensors=2, fusion_bytes=gradient_bytes / 2)
        calibrated = scaling.calibrate(runs, link, emulated)
        row = scaling.predict(None, emulated, n_nodes, calibrated).iloc[0]
        held.append(
            {"rate_mbit": rate, "batch_per_rank": batch} | row[["step_low_s", "step_s", "step_high_s"]].to_dict()
        )
held = pd.DataFrame(held).set_index(["rate_mbit", "batch_per_rank"])
(1e3 * held).round(0)

# %% [markdown]
# The link is given with its speed (a latency of 0.1 ms is a guess, and hardly counts beside 100 ms of transfer). `step_low_s` to `step_high_s` should hold 95 % of runs. Now the four nodes:

# %% alt="For each of four settings, two speeds of the links and two batches, a bar from the lower to the upper end of the predicted interval with the prediction as a dash, and circles for the measured steps of four nodes, which lie within the bars or close to them."
large = measured[measured["nodes"] == n_nodes].set_index(["rate_mbit", "batch_per_rank"])["step_s"]
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for place, setting in enumerate(held.index):
    low, middle, high = 1e3 * held.loc[setting]
    axis.bar(
        place, high - low, bottom=low, width=0.5, color=style.SKY, alpha=0.5, label="" if place else "predicted, 95 %"
    )
    axis.hlines(middle, place - 0.25, place + 0.25, color=style.BLUE)
    runs = 1e3 * large.loc[[setting]]
    axis.plot([place] * len(runs), runs, "o", color=style.VERMILION, mfc="none", label="" if place else "measured")
axis.set_xticks(range(len(held)), [f"{rate:g} Mbit/s,\nbatch {batch}" for rate, batch in held.index])
axis.set(ylabel="time of a step, ms", ylim=(0, None), title=f"{n_nodes} nodes, predicted from 1 and 2")
axis.legend()
plt.show()

# %%
held["measured_s"] = large.groupby(level=[0, 1]).median()
held["error, %"] = 100 * (held["step_s"] / held["measured_s"] - 1)
held["within"] = held["measured_s"].between(held["step_low_s"], held["step_high_s"])
lower, upper = (held[name].reindex(large.index) for name in ("step_low_s", "step_high_s"))
runs_within = large.between(lower, upper).mean()
print(f"{held['within'].sum()} of {len(held)} medians, and {runs_within:.0%} of single runs, lie in their intervals")
print(f"(other programs took {others_cores:.1f} of this machine's cores meanwhile)")
held.round(3)

# %% [markdown]
# How wrong it was is in the column of errors; above 0 the prediction was too long. Not all of an error is chance. The formula hides an allreduce behind two thirds of the computing, while here the first half of the gradients leaves when only a third is still to come. And four processes that take turns on few cores pay for each message with a wait that two do not see; the model knows networks, and nothing of shared cores. We tried it where that should hurt, on a busy machine (not shown here): with links ten times as fast, so that messages are short, predictions were 8 to 28 % too short, and eight nodes on two cores took 4 to 26 % longer than predicted, with one of four medians inside. An interval holds what the model knows to be uncertain. It cannot hold what the model leaves out.
#
# ## Nurion predicts Nurion
#
# Nurion is a supercomputer of 8305 nodes. Its users trained HEP-CNN on it, a network that sorts collisions of particles, with Horovod, eight images a node and step, and published the time of an epoch (arXiv 2207.11710). Here is one of their series, of which we look at the small runs only:

# %%
published = recordings.load("published_scaling")
series = published[published["id"] == "N5"].rename(columns={"value": "epoch_s"})
seen = series[series["use"] == "calibrate"]
seen[["system", "nodes", "batch_per_rank", "epoch_s", "scatter_percent"]]

# %% [markdown]
# Three single runs that scatter by an estimated 12 % each. **Predict:** how long is an epoch on 256 nodes? And on all 8305? With eight images a node, what will limit it there?

# %%
hep = scaling.PUBLISHED["HEP-CNN"]
known = scaling.calibrate(seen, "nurion", hep)
nodes = [2**i for i in range(14)] + [sites.load("nurion").node.count]
whole = scaling.predict("nurion", hep, nodes, known)
whole["epoch_efficiency"] = whole["epoch_s"].iloc[0] / (whole["nodes"] * whole["epoch_s"])
columns = ["nodes", "epoch_low_s", "epoch_s", "epoch_high_s", "epoch_efficiency", "limits", "narrows", "narrows_share"]
whole.loc[whole["nodes"].isin([1, 16, 256, 1024, nodes[-1]]), columns].round(2)

# %% alt="Time of an epoch of HEP-CNN against the number of nodes, from 1 to 8305, both axes logarithmic. The prediction falls almost in proportion to the nodes at first and flattens beyond a thousand; its shaded interval is narrow up to 64 nodes and spans more than a factor of ten at 8305. Three filled squares at 4 to 16 nodes are the runs it was calibrated on."
figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
axis.fill_between(whole["nodes"], whole["epoch_low_s"], whole["epoch_high_s"], color=style.SKY, alpha=0.4, label="95 %")
axis.plot(whole["nodes"], whole["epoch_s"], color=style.BLUE, label="predicted")
axis.plot(seen["nodes"], seen["epoch_s"], "s", color=style.BLACK, label="calibrated on")
style.log2_axis(axis, nodes[:12:2] + nodes[-1:])
axis.set(yscale="log", xlabel="nodes of Nurion", ylabel="time of an epoch, s")
axis.legend()
plt.show()

# %% [markdown]
# `limits` names the largest part besides computing, `narrows` the one figure whose measurement would narrow the interval most, and `narrows_share` how much of the variance is due to it. On few nodes the runs' own scatter is the doubt. On thousands it is a time that three small runs say next to nothing about: what every rank does for all samples of an epoch, which disappears beside an epoch of 800 s and is most of one of 10 s. So the band opens. A line without a band would have hidden that.
#
# ### What they measured
#
# `scaling.fidelity` has every published figure that we know of beside ours. For it the series of one machine lend each other a part of what their small runs have shown, so its values differ from those above. `passes` says whether an error is at most 15 %, or twice the scatter of the source; whether the published value is inside the interval is another question. These are the runs on 64 and more nodes that no calibration has seen, of three series: two campaigns of the network, and a variant with larger images and kernels.

# %%
table = scaling.fidelity()
shown = ["id", "nodes", "published", "low", "ours", "high", "error_percent", "passes"]
weak = table[table["id"].isin(["N1", "N2", "N5"])]
unseen = weak[weak["use"] == "test"]
unseen[shown].round(1)

# %% alt="Three panels, the series N1, N2 and N5: time of an epoch against nodes, logarithmic. Black squares at 4, 8 and 16 nodes were used for the calibration. Vermilion circles at 64 nodes, in N5 also at 128 and 256, were not; they lie inside the shaded intervals, near the predicted line or somewhat above it."
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
for axis, (name, rows) in zip(axes, weak.groupby("id"), strict=True):
    axis.fill_between(rows["nodes"], rows["low"], rows["high"], color=style.SKY, alpha=0.4, label="95 %")
    axis.plot(rows["nodes"], rows["ours"], color=style.BLUE, label="predicted")
    for use, marker, colour in (("calibrate", "s", style.BLACK), ("test", "o", style.VERMILION)):
        points = rows[rows["use"] == use]
        axis.plot(points["nodes"], points["published"], marker, color=colour, mfc="none", label=f"published ({use})")
    style.log2_axis(axis, rows["nodes"])
    axis.set(yscale="log", title=name, xlabel="nodes")
axes[0].set_ylabel("time of an epoch, s")
style.legend_above(figure, 4, handles=axes[0].get_legend_handles_labels()[0])
plt.show()

# %%
inside = unseen["published"].between(unseen["low"], unseen["high"])
below = (unseen["ours"] < unseen["published"]).sum()
print(f"{inside.sum()} of {len(unseen)} inside; errors of {unseen['error_percent'].abs().median():.0f} % in the median")
print(f"{below} of {len(unseen)} predictions are too fast")
lent, alone = unseen.iloc[-1], whole.loc[whole["nodes"] == 256, "epoch_s"].item()
print(
    f"N5 on 256 nodes: {alone:.0f} s by itself, {lent['ours']:.0f} s with what is lent, {lent['published']:.0f} s published"
)

# %% [markdown]
# Inside, and nearly all to the same side: the real machine loses somewhat more on many nodes than three small runs tell. (By its own three runs alone N5 would have missed the tolerance on 256 nodes.) With single runs that scatter by 12 % nobody can say which term is to blame.
#
# ## Why the strong run stops gaining
#
# In another series of theirs, N4, the batch of *all* nodes together is fixed at 32,768 (*strong scaling*): on 64 nodes each has 512 images a step, on 1024 only 32. An epoch is always 14 steps.

# %%
strong = table[table["id"] == "N4"]
strong[[*shown, "use"]].round(1)

# %% [markdown]
# From 512 to 1024 nodes the published epoch does not get any shorter. **Predict** which it is: the allreduce, batches too small to keep a node busy, the storage, the validation that is part of the epoch, or something that does not shrink with the nodes?

# %% alt="What an epoch of the strong-scaling run consists of against the number of nodes from 64 to 4096, as stacked shares. Computing is most of it on 64 nodes and little on 1024; listing, the time each rank spends for all samples of the epoch, takes its place. Communication is a thin line, input is absent."
from dataclasses import replace

fixed_batch = replace(hep, batch=None, global_batch=32_768, storage="scratch")
runs = published[(published["id"] == "N4") & (published["use"] == "calibrate")].rename(columns={"value": "epoch_s"})
known_strong = scaling.calibrate(runs, "nurion", fixed_batch, beside=[known])
predicted = scaling.predict("nurion", fixed_batch, [2**i for i in range(6, 13)], known_strong)
figure = scaling.draw_shares(predicted)

# %% [markdown]
# What the model says, from the runs on 64 and 128 nodes and from N5:
#
# - *Not the allreduce.* 36.6 MB, 14 times in an epoch, are below a tenth of a second.
# - *Not the storage*, as far as its bandwidth goes: an image has 49,152 bytes, so all nodes together read 1.6 GB a step; 300 GB/s deliver that in 5 ms.
# - *Tiny batches, hardly.* See below: what a step costs beside its images is a small part of it.
# - *Something that does not shrink with the nodes.* From 64 to 128 nodes the time fell by a third and not by half. The model has a single term of that kind, listing, and gives it the blame.
#
# What about the validation? By their logs it goes through a third as many images as the training does. If every node went through all of them by itself, that would not shrink with the nodes either:

# %%
figures = known_strong.values()
at_1024 = predicted[predicted["nodes"] == 1024].iloc[0]
forward_s = figures["sample_s"] / 3  # a third of forward and backward pass together
all_by_each_s = forward_s * hep.samples / 3
print(
    f"a step on 1024 nodes: {at_1024['compute_s']:.3f} s of computing, {figures['step_s']:.3f} s of them for no image"
)
print(
    f"validation on all images by each node: {all_by_each_s:.0f} s; published epoch: {strong['published'].min():.0f} s"
)

# %% [markdown]
# That is ruled out: it would take many times longer than the epoch. Shared out among the nodes, validation shrinks as the training does.
#
# Now look at the last rows of the table. The published time *rises* from 512 to 1024 nodes; nothing in the model rises, and its prediction for 1024 is too short by

# %%
miss = strong[strong["nodes"] == 1024].iloc[0]
print(
    f"{-miss['error_percent']:.0f} % ({miss['ours']:.0f} s for {miss['published']:.0f} s; interval to {miss['high']:.0f} s)"
)
print(f"the reason, as the table has it: {miss['reason'] or '-'}")
first, second = strong["published"].iloc[:2]
per_share = (first - second) / (1 / 64 - 1 / 128)
pencil = ", ".join(f"{first - per_share * (1 / 64 - 1 / n):.1f}" for n in (256, 512, 1024))
print(f"a constant plus a share of the nodes, through the runs on 64 and 128: {pencil} s on 256, 512 and 1024")

# %% [markdown]
# The pencil comes nearer than the model, which believes before any run that listing is short, and gives it up only as far as two runs make it. So what stops it? A time that does not shrink is most of the answer; what it is made of, and why it grows in the end, is **not known**: opening one HDF5 file on a thousand nodes at once, starting an epoch's workers, and a single unlucky run (they scatter by 10 to 15 %) would all look like this. One measurement would tell: the time from the beginning of an epoch to its first step.
#
# ## Which wall comes first, and what moves it
#
# Take CosmoFlow, one sample of 8 MB a node and step, on all of Nurion. We know the time that one node of Cori needs for a sample, 129 ms; its processor is nearly that of Nurion. (How late ranks are, and the rest, as HEP-CNN has shown.) Begin with everything done in the simplest way: from the Lustre file system, a ring, every gradient tensor by itself. **Predict:** what limits, and in which order do the walls come as you move them?

# %%
from nurion_utils.storage import cases

simplest = replace(scaling.PUBLISHED["CosmoFlow"], storage="scratch", algorithm="ring", fusion_bytes=0)
one_node = pd.DataFrame({"nodes": [1], "step_s": [cases.COMPUTE_S]})
moves = {
    "simplest": {},
    "+ tensors fused": {"fusion_bytes": hep.fusion_bytes},
    "+ burst buffer": {"storage": "burst_buffer"},
    "+ Rabenseifner": {"algorithm": "rabenseifner"},
}
workload, rows = simplest, []
for move, change in moves.items():
    workload = replace(workload, **change)
    calibrated = scaling.calibrate(one_node, "nurion", workload, beside=[known])
    rows.append(scaling.predict("nurion", workload, nodes[-1], calibrated).assign(move=move))
walls = pd.concat(rows).set_index("move")
in_ms = ["compute_s", "communication_s", "waiting_s", "input_s", "step_low_s", "step_s", "step_high_s"]
(1e3 * walls[in_ms]).round(0).rename(columns=lambda name: name.replace("_s", ", ms"))

# %% alt="Four horizontal bars of the time of a step of CosmoFlow on 8305 nodes, stacked from computing, communication, waiting and input. The first, with unfused tensors on a ring, is more than a second, nearly all communication. Fused it is a third of a second, much of it input. With the burst buffer it is about 0.2 seconds, and with Rabenseifner's algorithm slightly less: computing and waiting remain."
names = {"compute": style.BLUE, "communication": style.VERMILION, "waiting": style.ORANGE, "input": style.GREEN}
figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
left = np.zeros(len(walls))
for (name, colour), hatch in zip(names.items(), ("", "//", "..", "xx"), strict=True):
    part = 1e3 * walls[f"{name}_s"].to_numpy()
    axis.barh(walls.index, part, left=left, color=colour, hatch=hatch, edgecolor="white", label=name)
    left += part
axis.set(xlabel="time of a step, ms (median of what is possible)")
axis.invert_yaxis()
style.legend_above(figure, 4)
plt.show()

# %% [markdown]
# First the latency of messages: a ring of 8305 needs 16,608 of them one after the other, for each tensor. *Fusion* removes that wall. Then the storage; the *burst buffer* moves it beyond the machine. A better *algorithm* is worth little then, because one allreduce of 28 MB hides behind the backward pass. What remains is waiting for the slowest, and no option of a library removes that. The intervals in the table are wide, and overlap; but what is uncertain is mostly common to all rows. (`step` is the median of what is possible, and the parts are scaled so as to add up to it; that is why the computing is not 129 ms everywhere.)
#
# Three walls are not in these bars. One is *listing*, which is a time of the epoch: with some 30 steps in an epoch it is not small. The second is **placement**, for which the model has no term: its links are never shared. The simulator of notebook 02 says what is at stake, for 1024 nodes and these 28 MB:

# %%
tree, ranks_there = allreduce.FatTree.of(sites.load("nurion")), 1024
rows = {}
for name in ("ring", "rabenseifner"):
    schedule = allreduce.ALGORITHMS[name](ranks_there)
    for where, places in (("in order", None), ("at random", tree.random(ranks_there, seed=0))):
        steps = allreduce.simulate(schedule, simplest.gradient_bytes, tree, places)
        rows[name, where] = 1e3 * steps["time_s"].sum()
placed = pd.Series(rows).unstack()
placed.round(1).style.format("{:.1f} ms")

# %% [markdown]
# With ranks placed at random links are shared, and the allreduce takes so many times longer. As long as it stays shorter than the backward pass (86 ms here) that is hidden; with ten times the gradients it would not be.
#
# The third is the **batch**, and it is a wall in learning, not in time. Eight images a node, and a batch that must not exceed some size: then there are only so many nodes that help. For ImageNet the linear rule with warm-up holds up to about 8192, and LARS up to 32,768 (notebook 05; another network has limits of its own, which you have to find). **Predict:** with how many nodes does HEP-CNN train fastest, if these were its limits?

# %%
rows = []
for method, most in (("linear rule, warm-up", 8192), ("LARS", 32_768), ("no limit", None)):
    fastest = scaling.plan(hep, "nurion", epochs=100, calibration=known, most_batch=most)["fastest"]
    rows.append((method, most, fastest.nodes, fastest.hours, fastest.node_hours))
limits = pd.DataFrame(rows, columns=["method", "largest batch", "nodes", "hours", "node-hours"]).set_index("method")
limits.round(2)

# %% [markdown]
# Four times the nodes are worth about a factor of two here, and cost twice the node-hours. The wall behind the batch is listing. (4741 nodes, although a job may have 4970: with either, an epoch has 12 steps of 8 images a node.) Do not trust the long end of this table: it rests on three runs on up to 16 nodes, and in the strong series above nothing was gained beyond 512.
#
# ## How good are these predictions? The whole table
#
# Every published figure that was kept out of the calibration, on three machines, as predicted over published: a point on the line is right, the grey bar is what we allow ourselves (15 %, or twice the scatter that the source has), and a cross is a miss. K1 and K2 are CosmoFlow's benchmark on KNL nodes of Cori, with real and with dummy data; H2 and H3 the same on GPUs of Summit; N1 to N5 you know, but for N3, the strong scaling of the larger network.

# %% alt="One line for each published figure that was not used for the calibration: predicted over published with its 95 per cent interval, on a logarithmic axis from a half to two. Most points are circles within the grey tolerance around 1; a few crosses, the series N4 on many nodes among them, lie to the left of it."
figure = scaling.draw_fidelity(table)
score = scaling.score(table)
tested = table[table["use"] == "test"].groupby("system").size()
print(f"{score['rows']} figures: " + ", ".join(f"{count} of {system}" for system, count in tested.items()))
print(
    f"error of {score['median_error_percent']:.1f} % in the median, {score['within_tolerance']:.0%} within tolerance,"
)
facts = table[table["use"] == "fact"]
print(
    f"{score['within_interval']:.0%} in their 95 % intervals; of {len(facts)} single facts {facts['passes'].sum()} hold"
)

# %% [markdown]
# And what it misses, among these and among single facts (a fact has no calibration of its own):

# %%
misses = table[~table["passes"]]
columns = ["id", "quantity", "nodes", "published", "ours", "reason"]
misses[columns].style.hide(axis="index").format("{:.4g}", subset=["nodes", "published", "ours"], na_rep="-")

# %% [markdown]
# What this table does not show: systems that nobody here has looked at, and machines other than those three. Intervals that hold everything are, if anything, too wide; on faster links and more nodes, as told above, the same model was too sure.
#
# ## Neuron, or Hangang?
#
# KISTI has two younger machines with GPUs, Neuron and Hangang. A prediction needs figures of the machine. What does our description of each have?

# %%
rows = []
for name in ("nurion", "neuron", "hangang"):
    there = sites.load(name)
    node, fabric = (there.node if there.partitions else None), there.fabric
    needed = {
        "number of nodes": node and node.count,
        "cores of a node": node and node.cores,
        "rate of a link": fabric and fabric.link_gb_per_s,
        "file systems": there.file_systems,
        "most hours of a job": there.scheduler.most_hours or any(q.most_hours for q in there.queues.values()),
    }
    rows.append({"machine": name} | {figure: "known" if value else "-" for figure, value in needed.items()})
pd.DataFrame(rows).set_index("machine")

# %%
refused = []
for name in ("neuron", "hangang"):
    try:
        scaling.predict(name, own, 4)
    except sites.SiteError as error:
        refused.append(f"{name}: {error}")
print(*refused, sep="\n")

# %% [markdown]
# So nothing is predicted for them, and an error is the right answer: of Neuron some rules for jobs are known, of Hangang next to nothing, and of neither the nodes and links. It takes little to change that. Write the missing figures into a description of your own (`~/.config/nurion/sites`), run your network on one, two and four nodes, and calibrate: the cells above do the rest. On GPUs the computing shrinks and the bytes do not, so expect communication and input to come first.
#
# ## Plan your own job
#
# For a network that has never run on the machine, `calibrate(None, ...)` takes a usual share of the node's peak. **Predict:** how uncertain is the time of a step on one node?

# %%
guess = scaling.predict("nurion", own, 1).iloc[0]
print(
    f"{guess['step_low_s']:.2f} to {guess['step_high_s']:.2f} s; weakest input: {guess['status']} (a node of Cori: {cases.COMPUTE_S} s)"
)
print(f"to be measured first: {guess['narrows']} ({guess['narrows_share']:.0%} of the doubt)")

# %% [markdown]
# (*chosen* is the weakest status that a figure can have: somebody's judgement, and nobody's measurement.) So the first job is a small one: ten minutes on 1, 2 and 4 nodes, in the debug queue. For HEP-CNN we have the three runs. A hundred epochs, and a batch of 8192 at most:

# %%
plans = scaling.plan(hep, "nurion", epochs=100, calibration=known, most_batch=8192)
columns = ["queue", "nodes", "global_batch", "hours", "walltime_hours", "node_hours"]
pd.DataFrame({name: {column: getattr(plan, column) for column in columns} for name, plan in plans.items()})

# %% [markdown]
# The *cheapest* has as few nodes as the hours of the long queue allow, for few wait little, and the *fastest* as many as the batch allows. The walltime to ask for is the upper end of the interval, not its middle: a job that is ended a minute too early has cost everything. What lies between the two is your choice, and it depends on how long each waits in the queue, of which we know nothing.
#
# Should its data be staged? And which learning rate goes with the batch, if 0.001 is good for 32 images?

# %%
chosen = plans["fastest"]
from_lustre = replace(hep, storage="scratch")
reading = scaling.predict("nurion", from_lustre, chosen.nodes, scaling.calibrate(seen, "nurion", from_lustre)).iloc[0]
recipe = large_batch.Recipe(int(chosen.global_batch), base_rate=1e-3, epochs=100, warmup="gradual", warmup_epochs=5)
print(f"waiting for input from Lustre: {reading['input_share']:.0%} of an epoch")
print(f"learning rate by the linear rule: {recipe.peak_rate:.3f}, after a warm-up of {recipe.warmup_epochs:g} epochs")

# %% [markdown]
# No staging, then. (Try the rate before you trust it: the rule is for plain SGD, their runs used Adam, and its limit for this network is not known.) The plan makes the job, and `lint` holds it against the site's rules:

# %%
job = chosen.job("python train.py", python="/scratch/me/venv/bin/python", requeue=True, options={"-A": "pytorch"})
findings = jobs.lint(job)
print(jobs.explain(job).split("\n\n")[0])
print(f"\n{len(findings)} findings of lint")

# %% [markdown]
# ## Exercises
#
# **1. What limits?** A training has one sample a node. Its step takes 0.30 s on one node, 0.36 s on 16 and 0.42 s on 256. With dummy data in place of files it takes as long, with a tenth of the weights (and the same operations) too. What makes it slower? **a** the allreduce, **b** the input, **c** waiting for the slowest rank, **d** small batches.

# %% tags=["exercise"]
limit = "..."
# --- solution
limit = "c"
# --- end solution

# %% tags=["check"]
explanations = {
    "a": "A tenth of the gradients would take about a tenth of the time, and the step did not change.",
    "b": "Dummy data need no input, and the step did not change.",
    "c": "",
    "d": "Each node has one sample on any number of nodes: its computing takes as long on 256 as on one.",
}
assert limit in explanations, "Put a, b, c or d in place of the dots."
assert limit == "c", explanations[limit]
print("Right: and it grows as waiting does, by about as much for each factor of 16 in nodes.")

# %% [markdown]
# **2. How long on 1024 nodes?** The same training, if waiting is all: computing takes 0.30 s, and the last of $P$ ranks is late by $w \cdot 0.30\,\text{s} \cdot (H_P - 1)$ with $H_P = 1 + \frac12 + \dots + \frac1P$. Find $w$ from the step on 16 nodes, and from it the step on 1024, in seconds.

# %% tags=["exercise"]
step_1024_s = ...
# --- solution
harmonic = {nodes: sum(1 / k for k in range(1, nodes + 1)) for nodes in (16, 1024)}
w = (0.36 - 0.30) / (0.30 * (harmonic[16] - 1))
step_1024_s = 0.30 * (1 + w * (harmonic[1024] - 1))
# --- end solution

# %% tags=["check"]
assert step_1024_s is not ..., "Put a number of seconds in place of the dots."
assert not 4 < step_1024_s < 5, "That grows in proportion to the nodes; the last of many is late by a sum of 1/k."
assert not 0.445 < step_1024_s < 0.455, (
    "That grows as log2 of the nodes: close, but H of 16 and of 1024 are 3.38 and 7.51."
)
assert round(step_1024_s, 2) not in (0.43, 0.49), (
    "The 1 has to be taken off H on both numbers of nodes: one rank waits for nobody."
)
assert abs(step_1024_s - 0.464) < 0.003, (
    "w is 0.06 s / (0.30 s x 2.38); with H - 1 = 6.51 on 1024 nodes the step follows."
)
print("Right: 64 times the nodes, and the step is 0.10 s longer.")

# %% [markdown]
# **3. Nodes for a batch.** ResNet-50 with 32 images a node is to be trained on Nurion for 90 epochs. How many nodes can it use at most with the linear rule and warm-up, which hold to a batch of 8192? And with LARS, to 32,768? And if LARS held to any batch, in one ordinary job?

# %% tags=["exercise"]
nodes_linear, nodes_lars, nodes_any = ..., ..., ...
# --- solution
nodes_linear, nodes_lars, nodes_any = 256, 1024, 4970
# --- end solution

# %% tags=["check"]
from nurion_utils import sites

answers = nodes_linear, nodes_lars, nodes_any
most = sites.load("nurion").queues["normal"].most_nodes
assert ... not in answers, "Put three numbers in place of the dots."
assert nodes_linear != 8192, "8192 is the batch of all nodes together, and each node has 32 images of it."
assert (nodes_linear, nodes_lars) == (256, 1024), "Divide the batch of all nodes by the 32 images of one."
assert nodes_any != 8305, "Nurion has as many nodes, but gives them to nobody: what may an ordinary job have?"
assert nodes_any == most, f"One ordinary job could have {most} nodes (`python -m nurion_utils.sites show nurion`)."
print("Right: what limits the nodes is the batch first, and then a rule of the site.")


# %%
# What the text claims is checked here.
def hold_unless_busy(holds: bool, claim: str) -> None:
    """Claims about times need a machine that is ours: where it was not and they do not hold, that is said."""
    if others_cores > 0.5 and not holds:
        print(f"too noisy to tell whether {claim}, because {others_cores:.1f} cores were taken by others")
    else:
        assert holds, claim


by_part = parts.set_index("part")["time_s"]
hold_unless_busy(by_part.idxmax() == "backward pass", "the backward pass takes longest")
passes = by_part[["forward pass", "backward pass"]].sum()
hold_unless_busy(by_part.sum() < 2 * passes, "the two passes are more than all the rest")
assert abs(own.gradient_bytes / scaling.PUBLISHED["CosmoFlow"].gradient_bytes - 1) < 0.01
hold_unless_busy(held["within"].sum() >= len(held) - 1, "all predictions of the live runs but one hold")
assert (whole["epoch_low_s"] < whole["epoch_s"]).all() and (whole["epoch_s"] < whole["epoch_high_s"]).all()
width = (whole["epoch_high_s"] / whole["epoch_low_s"]).to_numpy()
assert width[-1] > 3 * width[4] and whole["limits"].iloc[-1] == "listing"
assert inside.all() and below > len(unseen) / 2
assert (
    at_1024["communication_s"] * at_1024["steps"] < 0.1
    and at_1024["input_share"] == 0
    and at_1024["limits"] == "listing"
)
assert figures["step_s"] < 0.2 * at_1024["compute_s"] and all_by_each_s > 3 * strong["published"].min()
assert miss["error_percent"] < 0
assert walls["limits"].tolist()[0] == "communication" and walls["step_s"].is_monotonic_decreasing
assert walls["input_s"].iloc[1] > 0.05 and walls["input_s"].iloc[2] == 0
assert (placed["at random"] > 1.5 * placed["in order"]).all()
assert limits["nodes"].tolist()[:2] == [1024, 4096] and limits["hours"].iloc[0] < 3 * limits["hours"].iloc[1]
assert score["within_interval"] >= 0.9 and (misses["reason"] != "").all()
assert len(refused) == 2 and not findings
assert guess["step_high_s"] > 3 * guess["step_low_s"] and guess["step_low_s"] < cases.COMPUTE_S < guess["step_high_s"]
assert plans["cheapest"].node_hours < plans["fastest"].node_hours and plans["fastest"].nodes == 1024

# %% [markdown]
# ## What to take along
#
# - A step is computing, exposed communication, waiting for the slowest, and input; an epoch also has what every rank does for all samples. Each grows in its own way with the nodes.
# - Calibrate on a few small runs, predict the large one, and write the prediction down before you look.
# - A prediction is an interval. Ask which measurement would narrow it; that is the next small job.
# - An interval does not hold what the model leaves out. Keep the misses in the table, and "not known" where it is not known.
# - Fusion, burst buffer, algorithm, placement and batch each move one wall; look which one you stand at.
# - Ask for the upper end of the hours, and for the nodes that your batch can use.
