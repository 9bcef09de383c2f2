# %% [markdown]
# # Communication backends: who carries Horovod's bytes
#
# **Goal:** see what happens between a gradient and the wire, and choose the library, and its settings, that carry it fastest.
#
# **You will be able to:** read a Horovod timeline and say which communication a step had to wait for; say what tensor fusion and the cycle time do; compare MPI, Gloo and oneCCL by message size without being misled; predict what a faster library is worth for a whole epoch; set a backend on Nurion; train with Keras 3 where Horovod cannot be built.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb), and [Ring-allreduce](02_ring_allreduce.ipynb) for what an allreduce costs.
#
# **Minutes:** 45 to read and run; the cells alone take about 2 on 2 cores
#
# ## The result this notebook is about
#
# When Nurion, the supercomputer of this course, was opened to deep learning, KISTI's paper about it compared two trainings of ResNet-50 on dummy images: with Horovod as it was, and with Horovod on top of MLSL, a communication library of Intel's. With MLSL an epoch was 1.8 to 2 times as fast. Other models gave other results.
#
# MLSL has since become **oneCCL**. The Horovod of this course was built with three libraries that can carry its bytes, and an environment variable, `HOROVOD_CPU_OPERATIONS`, chooses between them: **MPI** (a standard; here it is the library MPICH), **Gloo** (plain TCP sockets) and **oneCCL**. So the experiment can be repeated here, small, with ranks that talk through the memory of one machine.
#
# **Guess,** and write it down: for a tensor of 4 kB, and for one of 64 MB, how many times as fast as the slowest will the best of the three be? You will know the answer half-way through.

# %% tags=["parameters"]
n_ranks: int = 2  # ranks that are traced and compared; as many as there are cores, at most
turns: int = 5  # how often each backend gets its turn; 15 narrow the spread
sizes: list = [4096, 65536, 1048576, 4194304, 16777216, 67108864]  # bytes of the tensors
image: int = 64  # pixels of ResNet-50's images; 128 takes a minute more, and computes more for the same gradients
epoch_steps: int = 3  # steps of an epoch
live: bool = False  # True: measure here also what is shown from recordings, 20 minutes

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nurion_utils import backends, jobs, models, ranks, recordings, style, timing
from nurion_utils.backends import recording, timeline
from nurion_utils.backends.timeline import draw

style.use()
files = Path(tempfile.mkdtemp())
world = ranks.start(n_ranks)
world.client[:]["folder"] = str(files)  # a variable of this name on every rank

# %% [markdown]
# ## Between the gradient and the wire
#
# When TensorFlow has computed a gradient it does not send it. It hands it to Horovod, and goes on. What then happens, on every rank, in a thread of Horovod's own:
#
# 1. **Queue.** The tensor waits until the thread wakes up. It does so once per *cycle*, every millisecond unless told otherwise.
# 2. **Negotiate.** Ranks finish their gradients at different times and in different orders, but an allreduce needs all of them at once. So each tells rank 0 what it has, and rank 0 says what all of them have. (After the first step each rank sends only one bit per tensor.)
# 3. **Fuse.** Tensors that became ready in the same cycle are copied into one long buffer.
# 4. **Wire.** One allreduce of the buffer, by MPI, Gloo or oneCCL. This is the part that the choice of a backend is about. (Step 2 needs messages too: by MPI when MPI or oneCCL reduces, through sockets when Gloo does.)
# 5. **Unfuse.** The sums are copied back, and TensorFlow hears that they are there.
#
# Horovod can write all this down: its **timeline**. To have something to write about, here is a small network of 24 equal layers whose backward pass is written out, with one allreduce per layer. `tf.timestamp` notes when the computing began and when it ended.

# %%
# %%px --no-stream
import horovod.tensorflow as hvd
import tensorflow as tf
from mpi4py import MPI

from nurion_utils import backends

comm = MPI.COMM_WORLD
tf.random.set_seed(1)
layers = [tf.Variable(tf.random.normal((384, 384), stddev=0.05)) for _ in range(24)]
samples = tf.random.normal((256, 384), seed=comm.rank)


@tf.function
def train_step():
    """One step, its backward pass written out; when its computing began and ended, in seconds since 1970."""
    begin = tf.timestamp()
    with tf.control_dependencies([begin]):
        x = [tf.identity(samples)]
    for weights in layers:
        x.append(tf.nn.relu(x[-1] @ weights))
    slope = x[-1] / 256  # of the loss, half the mean square of the outputs, by the last layer's output
    averages = []
    for i in reversed(range(24)):
        slope = slope * tf.cast(x[i + 1] > 0, tf.float32)  # back through the ReLU
        gradient = tf.matmul(x[i], slope, transpose_a=True)
        averages.append(hvd.allreduce(gradient, op=hvd.Average, name=f"layer_{i:02d}"))
        with tf.control_dependencies([gradient]):  # first this layer's gradient, then on to the layer before
            slope = tf.matmul(slope, layers[i], transpose_b=True)
    with tf.control_dependencies([slope]):
        end = tf.timestamp()
    for weights, average in zip(reversed(layers), averages, strict=True):
        weights.assign_sub(0.001 * average)
    return begin, end


def traced(name, steps=6, **settings):
    """Train with the timeline on; when each rank computed each step, less the first three, which warm up."""
    backends.init("MPI", timeline=f"{folder}/{name}.json", **settings)
    for _ in range(3):
        train_step()
    comm.Barrier()
    rows = []
    for step in range(steps):
        begin, end = map(float, train_step())
        rows.append((comm.rank, step, begin, end - begin))
    backends.shutdown()
    return rows


computed = traced("fused")

# %% [markdown]
# `backends.init` starts Horovod with the settings it is given, and ends one that is running. Rank 0 wrote the file:


# %%
def read_trace(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The timeline of the training steps just traced, and when each rank computed, on the timeline's clock."""
    table = timeline.read(files / f"{name}.json")
    rows = sum(world.client[:]["computed"], [])
    compute = pd.DataFrame(rows, columns=["rank", "step", "start_s", "duration_s"])
    compute["start_s"] -= table.attrs["epoch_s"]
    return table, compute


fused, compute = read_trace("fused")
print(f"{len(fused)} spans")
one_layer = fused[(fused["tensor"] == "layer_20") & (fused["start_s"] > compute["start_s"].min())]
one_layer.head(6).assign(start_s=one_layer["start_s"].round(5), duration_s=one_layer["duration_s"].round(6))

# %% [markdown]
# One row per *span*: what happened to which tensor, when, and for how long, as rank 0 saw it. `buffer` is the number of the fused buffer that the tensor travelled in. `rank` is of use only where a rank announces a tensor (phase `ready`, in the first steps of a file). `activity` is Horovod's own word, and it names the library: `MPI_ALLREDUCE`. If you ever doubt what your job really runs on, this is where to look.
#
# The last three steps as a picture. The numbers on the wire are those of the buffers.

# %% alt="A Gantt chart of three training steps. Lanes: when each rank computes, negotiation, and copying into buffers, transfer and copying out of them. Each step shows one long bar of computing per rank; towards its end a first transfer begins, which lasts several milliseconds, and a second one follows after the computing."
first_s, last_s = compute[compute["step"] == 3]["start_s"].min(), (fused["start_s"] + fused["duration_s"]).max()
figure = draw.timeline(fused, compute, first_s=first_s, last_s=last_s + 0.001)
plt.show()

# %% [markdown]
# The gradient of the last layer, `layer_23`, is ready first, and travels while others are still being computed: communication that is **hidden**. The rest follows in few buffers, most of it in one at the end. (TensorFlow has one thread here, and hands a gradient over when it finds time.) What goes on after the end of the computing is **exposed**: the step waits for it. *negotiate* lasts from the first tensor that some rank has announced until none waits for another rank.

# %%
drawn = fused[(fused["phase"] == "wire") & (fused["start_s"] >= first_s)].astype({"tensor": str})
drawn.groupby("buffer").agg(
    tensors=("tensor", "nunique"), first=("tensor", "max"), last=("tensor", "min"), ms=("duration_s", "max")
).assign(ms=lambda table: (table["ms"] * 1e3).round(2))

# %% [markdown]
# One row per transfer of the picture: how many gradients travelled in it, from which layer to which, and how long. A transfer that begins while a rank computes may carry one gradient and take longer than the next one with twenty. Not because of its bytes: a rank has one core here, and the thread that communicates hardly gets it while the other one computes. So hidden is not the same as free. What is exposed is the least that communication costs, and all of it only where the thread that communicates has a core of its own.

# %%
steps_fused = timeline.steps(fused, compute)
in_ms = pd.DataFrame(
    {
        "step": steps_fused["step_s"],
        "computing": steps_fused["compute_s"],
        "communication": steps_fused["communication_s"],
        "of it exposed": steps_fused["exposed_s"],
        "neither": steps_fused["step_s"] - steps_fused["compute_s"] - steps_fused["exposed_s"],
    }
)
hidden = 1 - steps_fused["exposed_s"].sum() / steps_fused["communication_s"].sum()
print(f"{hidden:.0%} of the communication was hidden behind computing")
(in_ms * 1e3).round(2).add_suffix(", ms").assign(tensors=steps_fused["tensors"], buffers=steps_fused["buffers"])

# %% [markdown]
# One row per step, as rank 0 saw it. *Communication* is the time in which some tensor was being fused, sent or unfused; *neither* is what is left: the update of the weights, negotiating, and waiting for the next cycle (the last step ends with its communication, since none comes after it). Take the figures as indications only: writing a timeline takes time itself, as you will see.
#
# (The `DistributedOptimizer` of this course goes another way: it reduces all gradients as one group, when the last one is there. Nothing is hidden then, and no transfer gets in the way of computing.)
#
# ## Fusion on and off
#
# `fusion_bytes=0` switches fusion off: each tensor travels alone. **Predict** how the picture changes. Here is the end of one step, enlarged.

# %%
# %%px --no-stream
computed = traced("unfused", fusion_bytes=0)

# %% alt="The end of one training step without fusion: the lanes for copying into and out of buffers are empty, and one transfer follows the other, one per layer, each with the number of a buffer of its own."
unfused, compute_unfused = read_trace("unfused")
end_s = (
    compute_unfused[(compute_unfused["step"] == 4) & (compute_unfused["rank"] == 0)].eval("start_s + duration_s").item()
)
figure = draw.timeline(unfused, compute_unfused, first_s=end_s - 0.002, last_s=end_s + 0.008)
plt.show()

# %%
steps_unfused = timeline.steps(unfused, compute_unfused)
pd.DataFrame(
    {
        name: [table["buffers"].median(), table["tensors_per_buffer"].median(), table["exposed_s"].median() * 1e3]
        for name, table in (("fused", steps_fused), ("not fused", steps_unfused))
    },
    index=["transfers per step", "tensors in each", "exposed, ms"],
).round(2)

# %% [markdown]
# No copying any more, but a transfer, with its start-up, for each of the 24 layers. With 590 kB per layer the two are not far apart: the steps of one run scatter by more than that. The start-ups cost time, and not having to copy saves some. With many *small* gradients it does. MobileNetV2, a network made for mobile phones, and here only a third as wide as usual, has 158 of them in 1.6 MB.
#
# `backends.measure_fusion` computes its gradients and averages them, each submitted when it is ready, under several settings in turn; before each turn it measures what computing takes alone. Besides the longest buffer it varies the **cycle time**, how long Horovod's thread sleeps before it looks for new tensors, and the **compression**: `fp16` halves the bytes. The last bar shows what *writing* a timeline costs.
#
# **Predict** which of the seven settings makes the shortest step, and which the longest.

# %%
settings = [
    {"fusion_bytes": 0},
    {"fusion_bytes": 64 << 10},
    {},  # Horovod's defaults: 128 MiB, 1 ms
    {"cycle_ms": 0.1},
    {"cycle_ms": 5.0},
    {"compression": "fp16"},
    {"timeline": True},
]
labels = ["no fusion", "64 KiB buffers", "defaults", "cycle 0.1 ms", "cycle 5 ms", "float16", "timeline on"]
swept = backends.measure_fusion(world, settings, repeats=turns)
swept["label"] = [labels[number] for number in swept["setting"]]

# %% alt="Horizontal bars of the time that communicating adds to a training step under seven settings, with one dot per turn. It is longest with a timeline, with a cycle of 5 ms and without fusion; with the defaults and with float16 it is among the shortest. The dots of a setting lie one to three milliseconds apart."
swept["added_ms"] = (swept["step_s"] - swept["compute_s"]) * 1e3
medians = swept.groupby("label")["added_ms"].median()[labels]
figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
axis.barh(
    labels, medians, color=[style.BLUE if label == "defaults" else style.GREY for label in labels], ec="black", lw=0.5
)
axis.plot(swept["added_ms"], swept["label"], "k.", ms=4)
compute_ms = swept["compute_s"].median() * 1e3
axis.set(xlabel=f"communicating adds to a step, ms (computing alone takes {compute_ms:.0f} ms)", xlim=(0, None))
axis.invert_yaxis()
plt.show()

# %% [markdown]
# - Shortest are the defaults, float16, the short cycle and mostly also buffers of 64 KiB, in an order that changes with the run; longest are tracing, the long cycle and no fusion.
# - Without fusion every gradient pays the start-up of its own transfer. Buffers of 64 KiB are full after a few gradients, so there are more transfers than with the defaults, yet far fewer than without fusion; that is enough for most of the gain.
# - A longer cycle collects more gradients for a buffer, and lets everything wait. A shorter one lets them wait less, but wakes the thread ten times as often, on the core that computes; which of the two wins changes here from one run to the next.
# - Tracing distorts. Each span is two events, so ten or so per gradient must be written, by a thread on rank 0 that never sleeps: while it has nothing to write it asks again at once, on a core that rank 0 wants for itself. So a timeline shows *what* happens and in which order; how fast a training is must be measured without one.
# - Half as many bytes (`float16`) are of little use where bytes are not what takes the time, and converting costs some itself. On a slow network with large gradients it may pay. Sums in float16 lose digits, and Horovod cannot do them over oneCCL.
#
# ### Let Horovod search
#
# Horovod can look for a cycle time and a buffer by itself while it trains (`HOROVOD_AUTOTUNE=1`): it tries points, scores each in bytes of gradients per time, and lets a Bayesian optimiser say where to try next. It searches only for what has not been set, so it gets fresh ranks here, and the same network. `SEARCH` ends the search after some 15 points of few steps each, a sixth of what Horovod would take; the last point is the best one once more.

# %% alt="Left: the score of each point that Horovod's search tried, in the order of the search, with the best one so far as a line. Right: the points in the plane of cycle time and buffer size, larger dots for higher scores; the large ones have cycle times up to about 10 ms."
SEARCH = {  # read when Horovod is loaded; below the log: points to throw away, steps of a sample, points to try
    "HOROVOD_AUTOTUNE": "1",
    "HOROVOD_AUTOTUNE_LOG": str(files / "search.csv"),
    "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1",
    "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "2",
    "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES": "15",
}


def train_while_searching(steps: int = 200) -> None:
    """On every rank: the steps of the sweep above; rank 0 writes down each point that Horovod has tried."""
    backends.init("MPI", cycle_ms=None, fusion_bytes=None)
    step = backends.steps_of(models.mobilenet)("none")
    for _ in range(steps):
        step()
    backends.shutdown()


with ranks.start(n_ranks, env=SEARCH) as fresh:
    fresh.run(train_while_searching)
search = pd.read_csv(files / "search.csv").rename_axis("point").reset_index()
search = search.rename(columns={"cycle_time_ms": "cycle_ms", "tensor_fusion_threshold": "fusion_mb"})
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained")
left.plot(search["point"], search["score"], "o", color=style.BLUE, label="point")
left.plot(search["point"], search["score"].cummax(), color=style.VERMILION, drawstyle="steps-post", label="best so far")
left.set(xlabel="point of the search", ylabel="score, bytes per µs", ylim=(0, None))
left.xaxis.get_major_locator().set_params(integer=True)
left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)
size = 20 + 180 * search["score"] / search["score"].max()
right.scatter(search["cycle_ms"], search["fusion_mb"], s=size, color=style.SKY, ec="black", lw=0.5)
right.set(xlabel="cycle time, ms", ylabel="longest buffer, MiB", title="larger dot: higher score", xlim=(0, 105))
right.title.set_fontsize(9)
plt.show()
best = search.loc[search["score"].idxmax()]
defaults = swept[swept["label"] == "defaults"]
by_default = (defaults["gradient_bytes"] / defaults["step_s"]).median() / 1e6
print(
    f"best: cycle {best['cycle_ms']:.1f} ms, {best['fusion_mb']:.0f} MiB, {best['score']:.0f} bytes per µs; defaults, measured above: {by_default:.0f}"
)

# %% [markdown]
# The range that it searches, 1 to 100 ms and up to 64 MiB, was made for slower networks and larger models. Here any buffer of 2 MiB holds all gradients, so only the cycle matters: up to about the length of a step, some 10 ms, points may score well, and with longer cycles they score badly, since a step cannot end before the next cycle has begun. What is scored are whole steps, so a setting that slows the computing is found out as well.
#
# Compare the two scores in the last line of the output. If the defaults have the higher one, the search found nothing better, which is no wonder with so few points and such a range. If its best point has the higher one, that may be luck, for a score is noisy: put the point among the settings of the sweep above, where they take turns with the defaults.
#
# ## Three libraries, by message size
#
# Now one allreduce at a time, as a program sees it: from handing a tensor to Horovod until the sum is there. `measure_backends` measures it. Each backend has processes of its own, and they take turns; before that, a timeline confirms which library really ran, and before and after each measurement a sum is compared with the exact one.
#
# `oneCCL ring` is oneCCL with its algorithm set (`CCL_ALLREDUCE=ring`). Why that is needed comes below.
#
# How to compare different sizes and numbers of ranks? Every algorithm must move at least $2N(P-1)/P$ bytes through each rank, as the last notebook showed. Divided by the time, this is the **bus bandwidth**; NVIDIA's nccl-tests report it too.

# %%
names = ["MPI", "Gloo", "oneCCL ring"]
compared = backends.measure_backends(sizes, n_ranks, names, repeats=turns, cycles_ms=(1.0, 0.1))
for backend, why in compared.groupby("backend")["absent"].first().items():
    if why:
        print(f"{backend} is absent: {why}")
times = compared.pivot_table(index=["cycle_ms", "size_bytes"], columns="backend", values="time_s", aggfunc="median")
(times * 1e3).round(2).add_suffix(", ms")

# %% [markdown]
# Look at the small sizes with a cycle of 1 ms first. MPI and oneCCL need the same time for 4 kB and for 256 times as much: one millisecond. That is not the network. It is Horovod's thread, asleep. With a cycle of 0.1 ms the libraries show better, though not alone: of MPI's time for 4 kB up to 0.1 ms may still be the cycle, and the negotiation is in it too. So for small tensors trust the differences more than the ratios. The bands of the figure reach from the fastest to the slowest turn.

# %% alt="Two panels against message size, logarithmic, with a cycle time of 0.1 ms. Left: time; flat for small sizes, rising for large ones; Gloo is highest until MPI meets it at the largest size, MPI is a little below oneCCL's ring up to about a megabyte, then the ring is lower. Right: bus bandwidth, which rises up to about four megabytes and falls beyond for MPI; oneCCL's ring reaches the most. Bands reach from the fastest to the slowest turn."
STYLES = {
    "MPI": dict(color=style.BLUE, marker="o"),
    "Gloo": dict(color=style.GREEN, marker="s"),
    "oneCCL ring": dict(color=style.VERMILION, marker="^"),
    "oneCCL": dict(color=style.ORANGE, marker="v"),
}
quick = compared[compared["cycle_ms"] == 0.1].dropna(subset="time_s")
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for axis, column, label in zip(
    axes, ["time_s", "bus_bandwidth_gb_per_s"], ["time, s", "bus bandwidth, GB/s"], strict=True
):
    for name, rows in quick.groupby("backend"):
        by_size = rows.groupby("size_bytes")[column].quantile([0, 0.5, 1]).unstack()
        axis.fill_between(by_size.index, by_size[0.0], by_size[1.0], color=STYLES[name]["color"], alpha=0.15, lw=0)
        axis.plot(by_size[0.5], label=name, ms=5, lw=1.2, **STYLES[name])
    axis.set(xscale="log", xlabel="size of the tensor, bytes", ylabel=label)
axes[0].set_yscale("log")
axes[0].legend(frameon=False)
plt.show()

# %%
speedups = timing.ratios(compared, "MPI", "backend", by=["cycle_ms", "size_bytes"])
against_mpi = speedups[(speedups["cycle_ms"] == 0.1) & (speedups["backend"] == "oneCCL ring")]
against_mpi[["size_bytes", "speedup", "low", "high", "least", "most", "turns"]].round(2)

# %% [markdown]
# The table gives the speed of oneCCL's ring relative to MPI's, turn by turn: the median, the quartiles, the least and the most. For small tensors the ring takes up to a third longer, which is some 50 µs; with a cycle of 1 ms nobody would notice. At some size below or about a megabyte they meet, and for large tensors the ring wins clearly.
#
# Gloo, which sends everything through TCP even between two processes of one machine, takes three to four times as long as MPI for 4 kB. For 64 MB it takes about as long as MPI does, and the ring is two to three times as fast as either. So the answer to the guess, for the whole way through Horovod: three to four times and two to three times, and between the libraries nothing at all for 4 kB if Horovod wakes up once per millisecond.
#
# ### Why oneCCL needs to be told
#
# Without `CCL_ALLREDUCE` the result is another one. oneCCL runs over MPI here (`CCL_ATL_TRANSPORT=mpi`), and in that case the algorithm that it chooses by itself is called *direct*. Its manual explains: based on `MPI_Iallreduce`, which is MPI's own allreduce, started in the background. **Predict** how it compares with MPI.

# %%
recorded = recording.backends() if live else recordings.load("backends")
origin = "measured here" if live else "recorded"
chosen = recorded[(recorded["ranks"] == 2) & (recorded["cycle_ms"] == 0.1) & (recorded["size_bytes"] >= 2**22)]
took_ms = chosen.pivot_table(index=["memory", "backend"], columns="size_bytes", values="time_s", aggfunc="median") * 1e3
print("measured here" if live else recorded["source"].iloc[0])
shown = {}
for memory in ("freed", "kept"):
    faster = timing.ratios(chosen[chosen["memory"] == memory], "MPI", "backend", by=["size_bytes"]).pivot(
        index="backend", columns="size_bytes", values="speedup"
    )
    for backend in ("MPI", "oneCCL", "oneCCL ring"):
        ratio = [f"  ({faster.loc[backend, size]:.2f} x)" if backend != "MPI" else "" for size in took_ms]
        shown[memory, backend] = [f"{ms:.2f} ms{x}" for ms, x in zip(took_ms.loc[memory, backend], ratio, strict=True)]
pd.DataFrame(shown, index=took_ms.columns).T.rename_axis(index=["memory", "backend"], columns="bytes")

# %% [markdown]
# Left to itself oneCCL hands the allreduce on to MPI: at 64 MB it is as fast as MPI, and for smaller tensors slower, for the detour. Anyone who benchmarks "oneCCL against MPI" and does not look compares MPI with MPI.
#
# (In brackets: how many times as fast as MPI, by turns.) With its ring it wins, and at 64 MB by more where memory is *freed* than where it is *kept*. That part of the advantage has nothing to do with algorithms. MPICH takes a buffer as long as the message for each allreduce and frees it afterwards; the C library gives such a large piece back to Linux, and Linux clears each page of the next one. oneCCL keeps its buffers. Your own comparison above was with memory freed, which is what you get unless you ask: `backends.KEEP_MEMORY` holds settings of the C library that make a process keep what it freed, and with them MPI takes half the time at 64 MB. The averages need new memory as well, over any library, so the ring gains too, at the middle sizes even more than MPI. What remains of the difference is how the library adds and moves the numbers; we did not take that apart.
#
# ### Why this build patches Gloo
#
# You did not see Gloo as it is shipped: that one takes 3 to 6 ms for 4 kB. `perf`, a profiler of Linux, asked what it does all that time, counts 480,000 calls of `epoll_wait` in two seconds of such allreduces, against 12,000 messages that were read.
#
# The reason is two threads on one core, a sender and a watcher. The sender holds a lock on the socket while it sends. The answer is there before the sender has let go, so Linux wakes the watcher. The watcher cannot get the lock, and asks Linux whether there is news (`epoll_wait`); there is, the lock is still taken, and it asks again. With that it keeps the core, and the sender from letting go, until Linux takes the core away from it, milliseconds later. In the Horovod of this course the watcher gives the core up instead, one call of `sched_yield` (`tools/horovod_wheel.py`). `backends.GLOO_AS_SHIPPED` has it poll as before. **Predict** for which sizes it matters, and whether it does on 4 ranks, where each core has two ranks to serve.

# %%
gloo = recorded[
    (recorded["cycle_ms"] == 0.1) & (recorded["memory"] == "freed") & recorded["backend"].str.startswith("Gloo")
]
took_ms = gloo.pivot_table(index="size_bytes", columns=["ranks", "backend"], values="time_s", aggfunc="median") * 1e3
mended = timing.ratios(gloo, "Gloo as shipped", "backend", by=["ranks", "size_bytes"]).pivot(
    index="size_bytes", columns="ranks", values="speedup"
)
print(f"{origin}; the last column of each is the median over the turns")
pd.DataFrame(
    {
        (f"{n} ranks", label): values
        for n in (2, 4)
        for label, values in (
            ("shipped, ms", took_ms[n, "Gloo as shipped"]),
            ("mended, ms", took_ms[n, "Gloo"]),
            ("saved, ms", took_ms[n, "Gloo as shipped"] - took_ms[n, "Gloo"]),
            ("times as fast", mended[n]),
        )
    }
).round(2)

# %% [markdown]
# Some three to four and a half milliseconds are saved per allreduce up to some megabytes, on 2 ranks and on 4 alike. On 2 ranks that is most of the time of the small ones; on 4 it is a smaller part, since there the mended Gloo needs 2 ms itself, with two ranks on each core. More is saved for the large ones, which travel in many pieces, but it is a smaller part of their time. A rank that has a core for each of its threads should see nothing of this. Where a node runs as many ranks as it has cores, as here, it matters.
#
# So there are four questions to ask of any such comparison. Which library and which algorithm really ran? Was it the network that was timed, or Horovod's cycle? Did both sides pay the same for their memory? And did a rank's threads have a core each?
#
# ## An epoch of ResNet-50
#
# The paper's figure: ResNet-50, dummy data, time of one epoch. Here an epoch has few steps, the images are small and a rank sees 4 of them per step, but the network is the real one with its 25.6 million weights: 102 MB of gradients per step, in 161 tensors, reduced as one group.
#
# **Predict:** at 64 MB the ring was more than twice as fast as MPI. Will the epoch be?

# %%
resnet = backends.measure_epochs(["MPI", "oneCCL ring"], n_ranks, image=image, steps=epoch_steps, repeats=turns)
shares = resnet.groupby("backend")[["epoch_s", "communication_s", "communication_share", "images_per_s"]].median()
shares.round(3)


# %%
def gains(table: pd.DataFrame) -> pd.DataFrame:
    """How many times as fast as over MPI an epoch is, by turns; the share and the speedup of its communication."""
    gained = timing.ratios(table, "MPI", "backend", value="epoch_s").set_index("backend")
    median = table.groupby("backend")[["epoch_s", "communication_s"]].median()
    share = median.loc["MPI", "communication_s"] / median.loc["MPI", "epoch_s"]
    return gained.assign(share=share, communication=median.loc["MPI", "communication_s"] / median["communication_s"])


gain = gains(resnet).loc["oneCCL ring"]
share, faster = gain["share"], gain["communication"]
predicted = 1 / ((1 - share) + share / faster)
rest_ms = (shares["epoch_s"] - shares["communication_s"]) * 1e3
print(f"communication {faster:.2f} times as fast, {share:.0%} of an epoch over MPI")
print(f"the rest: {rest_ms['MPI']:.0f} ms over MPI, {rest_ms['oneCCL ring']:.0f} ms over oneCCL")
print(
    f"epoch {gain['speedup']:.2f} times as fast ({gain['low']:.2f} to {gain['high']:.2f}); from share and ratio: {predicted:.2f}"
)

# %% [markdown]
# Two things lie between the ratio of a single allreduce and that of an epoch.
#
# What we time as communication reaches from a rank's last gradient to its last average. It also holds the wait for a slower rank, Horovod's copying of 102 MB into its buffer and out of it, and new memory for the averages. No library speeds that up, so communication as a whole gains less than the allreduce in it.
#
# And communication, as far as the training waits for it (here all of it, since nothing is hidden), is only a part $f$ of the epoch. If that part becomes $s$ times as fast and the rest stays as it is, the epoch becomes
#
# $$\frac{1}{(1-f) + f/s}$$
#
# times as fast (Amdahl's law). Where the measured gain differs from this, the rest has not stayed as it was; the second line of the output says by how much. The gain is the median over the turns, in each of which both libraries trained; the brackets hold its quartiles, and so it may differ a little from the ratio of the medians in the table. On another day, or with other neighbours on the machine, the same cell gives another gain.
#
# So a gain depends on the model: one with fewer weights per computation has a smaller $f$, and the same library gives it less. That would explain why other models gave other results.

# %% alt="Left: bars of the speedup of an epoch: measured here for ResNet-50, and, hatched and labelled published, 1.8 to 2 on Nurion and 2.15 by Intel and Amazon. Right: curves of the speedup of an epoch against the share of communication for communication 1.5, 2 and 4 times as fast and for communication that takes no time, with the point measured here and the published band of 1.8 to 2, which the last curve enters at a share of 44 per cent, that of four times as fast at 59 per cent and that of twice as fast at 89 per cent."
published = recordings.load("published_backends").set_index("study")
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained", width_ratios=[1, 1.3])
error = [[gain["speedup"] - gain["low"]], [gain["high"] - gain["speedup"]]]
left.bar(
    [f"here,\n{n_ranks} ranks"], [gain["speedup"]], yerr=error, color=style.VERMILION, ec="black", lw=0.6, capsize=4
)
for study, label in (("Nurion", "Nurion,\npublished"), ("Intel and Amazon", "Intel, Amazon,\npublished")):
    low, high = published.loc[study, ["speedup_low", "speedup_high"]]
    left.bar(
        [label], [(low + high) / 2], yerr=(high - low) / 2, color="white", hatch="///", ec="black", lw=0.6, capsize=4
    )
left.axhline(1, color="black", lw=0.6, ls=":")
left.set(ylabel="speedup by the other library", ylim=(0, 2.5))
left.tick_params(axis="x", labelsize=8)
f = np.linspace(0, 1, 101)
for s, dashes in ((1.5, ":"), (2, "--"), (4, "-.")):
    right.plot(f, 1 / ((1 - f) + f / s), dashes, color="black", lw=1, label=f"communication {s:g} times as fast")
right.plot(f[:-1], 1 / (1 - f[:-1]), "-", color="black", lw=1, label="communication takes no time")
right.axhspan(1.8, 2.0, color=style.GREY, alpha=0.6, lw=0, label="Nurion, published")
right.plot(share, gain["speedup"], "^", color=style.VERMILION, ms=9, label="here")
right.set(xlabel="share of communication in an epoch over MPI", ylabel="epoch: times as fast", ylim=(0.9, 3))
right.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The first bar is oneCCL's ring against MPI, the second Nurion's MLSL against plain Horovod, for an epoch of ResNet-50; the third, by Intel and Amazon, is the ratio of two published parallel efficiencies, 98 % with MLSL and 45.5 % with Open MPI, both under MXNet on Ethernet of 25 Gbit/s. The mark on the first bar is the quartiles of the turns, that on the second the published range.
#
# What the right panel says about Nurion: if computing took as long with MLSL as without, then to gain 1.8 over a whole epoch the training must have waited for communication for at least 44 % of it, however fast MLSL made that, and for 89 % if MLSL made it twice as fast. That is plausible on its processors, Intel's Knights Landing (KNL): with 68 slow cores, computing is spread over many, and plain MPI drives the network from one core. MLSL put cores aside for communication. (If it also got less in the way of computing, a smaller share is enough.) The paper does not say how its time was divided, so this is a reading, not a result.
#
# With other images, or another network between the ranks, the gain is another one, or there is none:

# %%
runs = recording.resnet_epochs() if live else recordings.load("resnet_epochs")
rows = []
for (image_size, rate), group in runs.groupby(["image", runs["rate_mbit"].fillna(0)]):
    waited_s = group.groupby("backend")["communication_s"].median()
    for row in gains(group).itertuples():
        f, s = row.share, row.communication
        wire = backends.GRADIENT_BYTES * 8 / (rate * 1e6) / waited_s[row.Index] if rate else np.nan
        where = f"links of {rate:g} Mbit/s" if rate else "through memory"
        rows.append((where, image_size, row.Index, f, s, 1 / ((1 - f) + f / s), row.speedup, row.low, row.high, wire))
columns = ["network", "image", "backend", "share", "communication", "by Amdahl", "epoch", "low", "high", "wire used"]
elsewhere = pd.DataFrame(rows, columns=columns)
elsewhere.round(2)

# %% [markdown]
# (Recorded like the table before, 2 ranks; the second row is the case above, on another day. `share` is that of communication over MPI. `communication` and `epoch` say how many times as fast as over MPI they are, the epoch with its quartiles; `by Amdahl` is what share and communication let expect. The links are those of the network lab of the last notebook, where MPI, and oneCCL on top of it, speak TCP as well; `wire used` is the part of the communication that the bytes of the gradients alone would take on such a link.)
#
# - Larger images mean more computing for the same gradients. Share and gain are smaller.
# - Over Gloo the communication takes a little less time than over MPI, and yet the epoch takes more: the computing is slower. Horovod's ranks ask each other in every cycle whether there is something to reduce, also while they compute, and over sockets that takes more of the one core. (Measured apart, a rank that only computes keeps 96 % of its speed while Horovod waits over MPI, 87 % while it waits over Gloo, and again 96 % with a cycle of 5 ms.)
# - On links of 200 Mbit/s all three use nearly the whole wire, and so nothing can be gained: it takes the time that its bytes need, whoever feeds it.
# - On links of 1000 Mbit/s two cores can hardly feed the wire, and how they do it decides: Gloo's plain sockets use four fifths of it, the ring, winner elsewhere, two fifths. Why it does so badly there we do not know. These epochs scatter widely, and do not follow the law closely.
#
# A ratio belongs to a model, a network and a machine, not to a library.
#
# ## More ranks than cores
#
# Gloo is not the only one with a second thread. oneCCL communicates in a *worker thread* of each rank, beside Horovod's own. **Predict:** with 4 ranks on 2 cores, each core has two ranks to serve, each with a thread that computes, one of Horovod and one of oneCCL. Against MPI on the same ranks, will oneCCL do worse than it did on two ranks? And would it be better without the worker (`CCL_WORKER_OFFLOAD=0`)?

# %% alt="Two panels, two ranks and four ranks on two cores: speed relative to MPI against the size of the tensor, for oneCCL's ring with its worker thread and without. On two ranks the ring is somewhat slower than MPI for small tensors, with the worker thread a little more so than without; both win for large ones. On four ranks the ring with its worker behaves much the same, and without it it is many times slower than MPI."
quickly = recorded[(recorded["cycle_ms"] == 0.1) & (recorded["memory"] == "freed")]
worker = timing.ratios(quickly, "MPI", "backend", by=["ranks", "size_bytes"])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", sharey=True)
LOOKS = {
    "oneCCL ring": ("with worker thread", style.VERMILION, "^", "-"),
    "oneCCL ring, no worker": ("without", style.BLUE, "o", "--"),
}
for axis, n in zip(axes, (2, 4), strict=True):
    for backend, (label, colour, marker, dashes) in LOOKS.items():
        rows = worker[(worker["backend"] == backend) & (worker["ranks"] == n)]
        axis.fill_between(rows["size_bytes"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
        axis.plot(rows["size_bytes"], rows["speedup"], color=colour, marker=marker, ls=dashes, ms=5, label=label)
    axis.axhline(1, color="black", lw=0.6, ls=":")
    axis.set(xscale="log", yscale="log", xlabel="size of the tensor, bytes", title=f"{n} ranks on 2 cores, {origin}")
    axis.title.set_fontsize(9)
axes[0].set_ylabel("oneCCL's ring: times as fast as MPI")
axes[0].set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# (The bands are the quartiles of the turns.) With a core per rank, a part of oneCCL's loss on small tensors is the worker's doing, since work must be handed to it and it must be woken:

# %%
small = quickly[(quickly["ranks"] == 2) & (quickly["size_bytes"] <= 2**20)]
took_us = small.pivot_table(index="backend", columns="size_bytes", values="time_s", aggfunc="median") * 1e6
took_us.loc[["MPI", "oneCCL ring", "oneCCL ring, no worker"]].round(0).add_suffix(" bytes, µs")

# %% [markdown]
# With two ranks per core the ring with its worker fares against MPI as before, worse for small tensors and better for large ones. It is the rank *without* a worker that collapses, for all but the largest tensors. Its thread polls without ever giving up the core, which is the core that the rank it waits for needs in order to send. The worker sleeps when there is nothing to do.
#
# What the manual advises is a core for each worker that nobody else uses. We had none to give, so how much that gains is not shown here. On a KNL it costs one core of 68, 1.5 % of the computing, and a second one if Horovod's thread gets its own as well.
#
# ## Choose and set a backend on Nurion
#
# | you have | choose | because |
# |---|---|---|
# | large gradients | oneCCL with an algorithm of its own, if a measurement says so | it won here above a megabyte |
# | many small tensors | MPI; look at cycle time and fusion first | MPI won here below a megabyte, by less than a cycle |
# | ranks that share cores | MPI, or oneCCL with its worker, never without | the last figure |
# | no MPI, or ranks that may be lost while others go on | Gloo, with a core for its watcher | it needs TCP only; Horovod's elastic mode is built on it |
#
# `backends.settings` gives the environment variables that `init` sets: they are what a job script has to export. Here is a job over oneCCL on top of MPI, with one rank per node. The last core of each node is for oneCCL's worker thread, and one is left free for Horovod's own; with several ranks per node divide the threads, and name a worker's core for each rank. Never leave the algorithm to "direct".

# %%
from nurion_utils import sites

cores = sites.load("nurion").node.cores
oneccl = {
    "CCL_ATL_TRANSPORT": "mpi",
    "CCL_ALLREDUCE": "rabenseifner:0-1048576;ring:1048577-max",
    "CCL_WORKER_COUNT": "1",
    "CCL_WORKER_AFFINITY": str(cores - 1),
}
environment = backends.settings(backends.Backend("CCL", oneccl)) | {"OMP_NUM_THREADS": str(cores - 2)}
print(jobs.script(jobs.Job("python train.py", "nurion", nodes=4, environment=environment)))

# %% [markdown]
# Over MPI alone the same job exports less. Intel MPI and MVAPICH2, the MPI libraries on Nurion, have the same binary interface as MPICH, so a Horovod that was built with MPICH should run on either (not tried on Nurion, see below); MVAPICH2 must be told not to tie all threads of a rank to one core:

# %%
backends.settings("MPI") | {"MV2_ENABLE_AFFINITY": "0"}

# %% [markdown]
# For Gloo start with `horovodrun --gloo`, and name the fast network, as with `HOROVOD_GLOO_IFACE=ib0`; else the host's name decides which one is used.
#
# We had no access to Nurion when this was written: the names of modules are from its guide, the settings from the manuals of the libraries, and the combination has not been run there. The algorithms and the size between them (Rabenseifner's for fewer steps, see the last notebook) are a starting point, not measured here; `measure_backends` and twenty minutes of a debug queue give you your own. Then train two steps with `HOROVOD_TIMELINE` set, read the file with `timeline.read`, and look at `activity`.
#
# One trap: `HOROVOD_CPU_OPERATIONS=GLOO` in a job that was started by `mpiexec` crashes unless `HOROVOD_CONTROLLER=gloo` and the addresses that `horovodrun` would set are there too. `backends.init("Gloo")` sets them. Where a backend cannot run it raises a `BackendError`, on all ranks alike, which says why.
#
# ## Without Horovod
#
# Sometimes Horovod cannot be built at all: another compiler, another TensorFlow, no time. All that data-parallel training needs of it is an average, and `mpi4py` has one. The optimizer of [notebook 01](01_data_parallel_training.ipynb) takes any function that averages an array in place:


# %%
def trained(how: str) -> list:
    """The weights after 20 steps on this rank's share of the digits."""
    import keras
    from mpi4py import MPI

    from nurion_utils import models
    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import DistributedOptimizer

    comm = MPI.COMM_WORLD

    def average(array):
        comm.Allreduce(MPI.IN_PLACE, array)
        array /= comm.size

    keras.utils.set_random_seed(1)
    network = models.mlp()
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer = DistributedOptimizer(sgd, reducer=average) if how == "mpi4py" else DistributedOptimizer(sgd)
    x, y, _, _ = digits.load()
    shard = Shard(len(x), comm.size, comm.rank, batch_size=16, seed=0)
    network.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(shard.dataset(x, y), steps_per_epoch=20, verbose=0)
    return network.get_weights()


by_mpi4py, by_horovod = world.run(trained, "mpi4py"), world.run(trained, "horovod")
difference = max(abs(a - b).max() for a, b in zip(by_mpi4py[0], by_horovod[0], strict=True))
between = max(abs(a - b).max() for a, b in zip(by_mpi4py[0], by_mpi4py[1], strict=True))
print(f"largest difference of a weight from Horovod's: {difference:.1g}; between ranks: {between:.1g}")

# %% [markdown]
# The same training. Nothing of Horovod is needed on this path, so it works where there is none (the package's tests run it on ranks that cannot import Horovod). What you give up is the choice of a library, the timeline, and compression; what you keep is one allreduce of one flat array after the last gradient. `average`, in the cell above, is all that you need to bring.
#
# ## Exercises
#
# **1. Bus bandwidth.** A colleague's allreduce of 100 MB takes 20 ms on 2 ranks, and 35 ms on 64. On which is the network used better? Write the function, in GB/s (10^9 bytes).


# %% tags=["exercise"]
def bus_bandwidth(size_bytes: float, time_s: float, n_ranks: int) -> float:
    result = None
    # --- solution
    result = 2 * (n_ranks - 1) / n_ranks * size_bytes / time_s / 1e9
    # --- end solution
    return result


better_used_on = None  # 2 or 64
# --- solution
better_used_on = 64  # 5.6 GB/s against 5.0
# --- end solution

# %% tags=["check"]
assert bus_bandwidth(1e8, 0.02, 2) is not None, "Nothing is computed yet: put the formula in place of the dots."
assert abs(bus_bandwidth(1e9, 1.0, 2) - 1) < 1e-9, "Two ranks, 1 GB in 1 s: 2 (P-1)/P is 1, so it should be 1 GB/s."
assert abs(bus_bandwidth(1e8, 0.035, 64) - 5.625) < 1e-9, (
    "Each of 64 ranks must move 2 * 63/64 of the array; and GB are 10^9 bytes."
)
assert better_used_on in (2, 64), "Put 2 or 64 in place of the dots."
assert better_used_on == 64, f"Compare {bus_bandwidth(1e8, 0.02, 2):.2f} with {bus_bandwidth(1e8, 0.035, 64):.2f} GB/s."
print("Right: the time grew, but so did what had to be moved, nearly twofold.")

# %% [markdown]
# **2. Who is late?** The first step of a timeline has rows of phase `ready`: one per tensor and rank, when that rank had it. Here are such rows of four ranks and twelve tensors. For each tensor three ranks wait for the fourth, and mostly it is the same one. Which is it, and how long does a tensor wait on average, from the first rank that has it to the last?

# %% tags=["exercise"]
import numpy as np
import pandas as pd

random = np.random.default_rng(3)
late = np.where(np.arange(12) % 4, random.integers(4), random.integers(4, size=12))
ready = pd.DataFrame(
    [
        (f"tensor_{i:02d}", "ready", rank, 0.1 * i + 0.001 * random.random() + 0.004 * (rank == late[i]))
        for i in range(12)
        for rank in range(4)
    ],
    columns=["tensor", "phase", "rank", "start_s"],
)
late_rank, mean_wait_s = None, None
# --- solution
last = ready.loc[ready.groupby("tensor")["start_s"].idxmax()]
late_rank = int(last["rank"].mode()[0])
mean_wait_s = float(ready.groupby("tensor")["start_s"].agg(lambda times: times.max() - times.min()).mean())
# --- end solution

# %% tags=["check"]
assert late_rank is not None and mean_wait_s is not None, "Put your two answers in place of the dots."
assert late_rank in range(4), "The ranks are numbered from 0 to 3."
times = ready.pivot(index="tensor", columns="rank", values="start_s")
assert late_rank == times.idxmax(axis=1).mode()[0], (
    "Find the row with the largest start_s of each tensor, and count its ranks."
)
waits = times.max(axis=1) - times.min(axis=1)
assert abs(mean_wait_s - waits.mean()) < 1e-6, (
    "Of each tensor the largest start_s less the smallest; then the mean, in seconds."
)
print(
    f"Right: rank {late_rank}, and {mean_wait_s * 1e3:.1f} ms. A faster library would not help: look at what that rank does."
)

# %% [markdown]
# **3. What is it worth?** oneCCL makes your communication 1.9 times as fast. How many times as fast is an epoch of which communication is 20 %, and one of which it is 80 %? And which share would give 1.8?

# %% tags=["exercise"]
at_20_percent, at_80_percent, share_for_1_8 = None, None, None
# --- solution
at_20_percent, at_80_percent = 1 / (0.8 + 0.2 / 1.9), 1 / (0.2 + 0.8 / 1.9)
share_for_1_8 = (1 - 1 / 1.8) / (1 - 1 / 1.9)
# --- end solution

# %% tags=["check"]
answers = (at_20_percent, at_80_percent, share_for_1_8)
assert None not in answers, "Put your three answers in place of the dots."
assert abs(at_20_percent - 1.105) < 0.01, "80 % stay as they are, 20 % take 1/1.9 of the time: one over the sum."
assert abs(at_80_percent - 1.610) < 0.01, "20 % stay as they are, 80 % take 1/1.9 of the time: one over the sum."
assert abs(share_for_1_8 - 0.938) < 0.01, "Solve 1 / ((1 - f) + f / 1.9) = 1.8 for f; it is a number from 0 to 1."
print("Right: with this library, 1.8 over a whole epoch would mean that it was nearly all communication.")

# %%
world.stop()

# %%
import shutil

shutil.rmtree(files)
assert set(fused.loc[fused["phase"] == "wire", "activity"]) == {"MPI_ALLREDUCE"}
assert (steps_fused["tensors"] == 24).all() and (steps_unfused["tensors"] == 24).all()
assert (steps_unfused["tensors_per_buffer"] == 1).all() and steps_fused["buffers"].median() < 24
assert (steps_fused["exposed_s"] <= steps_fused["communication_s"]).all()
assert difference < 1e-5 and between == 0
assert resnet["communication_share"].between(0, 1, inclusive="neither").all()

# %% [markdown]
# ## What to take along
#
# - A gradient waits for Horovod's clock, for the other ranks and for its place in a buffer before a library sees it. Small tensors are a matter of clock and buffers, large ones of the library.
# - Exposed communication costs its time; hidden communication is free only where it has a core of its own. The timeline shows both, and distorts while it does.
# - A comparison of libraries is worth what its questions are: what really ran, by which clock, with whose memory, on which cores. oneCCL over MPI runs MPI's own allreduce unless you choose an algorithm.
# - A faster library speeds up an epoch by the share of it that is communication. To gain 1.8 over all, as on Nurion, at least 44 % of it must have been, unless computing became faster as well.
#
# **Next:** [Burst-buffer staging](04_burst_buffer_staging.ipynb), the second wall: input.
