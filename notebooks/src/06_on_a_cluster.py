# %% [markdown]
# # On a cluster: the same cells on many nodes
#
# **Goal:** leave the one machine. Ask a queue for nodes, run ranks on several of them, see what the wire between them costs, lose a node, outlive a walltime, and write jobs that a supercomputer will accept.
#
# **You will be able to:** submit, watch and cancel jobs; tell a job that waits from one that will never run; start ranks on the nodes of a job with the line that you know; say which wire they use and what it costs; let training go on where a job was ended; find out what is wrong with a job script before the queue does.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb) and, for the bytes of an allreduce, [Ring-allreduce](02_ring_allreduce.ipynb).
#
# **Minutes:** 40 to read and run; the cells alone take about 1.5 on 2 cores
#
# ## What a queue is for
#
# Thousands of people want the nodes of a supercomputer, and most programs want many of them at the same time. So nobody logs in to a compute node and starts something. You describe what you want, so many nodes for so many hours and this command, and hand the description to a **scheduler**. It keeps a queue, finds a place for your **job** in space and time, gives it nodes that nobody else uses meanwhile, and ends it when its time, the **walltime**, is over. Slurm and PBS Pro are the two schedulers that you will most likely meet; KISTI's Nurion runs PBS Pro, its GPU system Neuron runs Slurm.
#
# You do not need a supercomputer to meet one. This notebook makes a small cluster on the machine in front of you: *virtual nodes*, which have a name, a network, processes and folders of their own, and on them, where it is installed, a real Slurm.

# %% tags=["parameters"]
n_nodes: int = 4  # virtual nodes, 3 or more, one rank each; 2 cores keep up with 4
link_mbit: float = 200.0  # what the link of each node carries each way, in 10^6 bits per second
hidden: int = 512  # units in each of two hidden layers of the network that is trained over the links
repeats: int = 5  # of each timing; more narrow the spread

# %%
from nurion_utils import ranks, recordings
from nurion_utils.cluster import Cluster

cluster, origin = None, "RECORDED on another machine"
try:
    cluster, origin = Cluster(n_nodes), "run here"
except RuntimeError as reason:
    print(reason)
recorded = recordings.load("slurm_session").set_index("command")["output"]


def on_head(command: str) -> str:
    """What a command prints on the head of the cluster, from which jobs are submitted."""
    if cluster is None:
        return recorded[command]
    ran = cluster.run(["sh", "-c", command], timeout=60)
    return (ran.stdout + ran.stderr).rstrip()


print(f"The commands below are {origin}.")
print(on_head("sinfo"))

# %% [markdown]
# Two **partitions**, Slurm's word for queues: `main` with all nodes, and `small`, whose jobs may have one node for five minutes. All nodes are `idle`.
#
# ## Submit, watch, cancel
#
# `sbatch` submits a script, or here a single command with `--wrap`, and returns at once with a number. **Predict:** three jobs, each of which wants two nodes to itself. The cluster of the default parameters has four. What will `squeue` show for each of them?

# %%
for job in ("one", "two", "three"):
    on_head(f"sbatch --job-name={job} --nodes=2 --exclusive --time=2 --output=/dev/null --wrap='sleep 100'")
queue = "squeue --noheader --sort=i --format='%.6j %.8T %.2D %R'"
first_look = on_head(f"until squeue -h -t R -n two | grep -q two; do sleep 0.2; done; {queue}")
print(first_look)

# %% [markdown]
# Two run, and `squeue` says on which nodes; the third is pending for want of `Resources` (Slurm says `Priority` for those that wait behind it). Waiting is the normal state of a job. Cancel the first one and see who takes its place.

# %%
second_look = on_head(f"scancel --name=one; until squeue -h -t R -n three | grep -q three; do sleep 0.2; done; {queue}")
print(second_look)

# %% [markdown]
# Now a job that wants more than its partition gives to anyone. **Predict:** is it refused?

# %%
on_head("scancel --name=two; scancel --name=three")
print(on_head("sbatch --job-name=never --partition=small --nodes=3 --time=2 --output=/dev/null --wrap=hostname"))
never = on_head("sleep 3; squeue --noheader --name=never --format='%.6j %.8T %.2D %R'")
print(never)
on_head("scancel --name=never")

# %% [markdown]
# It was accepted, and would wait for ever: only the reason in brackets tells. PBS Pro does the same and says `Can Never Run` in a comment that you see if you ask for it. This costs people days. `ranks.start` and `nurion_utils.jobs` look at the reason and turn it into an error within seconds.
#
# ## Ranks on four nodes
#
# In a job of a scheduler the line that you know starts ranks on the job's nodes: `ranks.start(16)`. From a login node it submits a job first: `ranks.start(16, site="slurm", nodes=4, minutes=30)`. The same line with a speed for the links puts each rank on a virtual node of this machine, which is what we do here. `world.run`, `%%px`, progress bars and errors are those of the earlier notebooks.

# %%
try:
    world = ranks.start(n_nodes, rate_mbit=link_mbit)
except ranks.NodesError as reason:
    print(reason, "- the ranks share this machine, and its memory is their wire")
    world = ranks.start(n_nodes)


def who() -> str:
    import socket

    import horovod.tensorflow as hvd

    hvd.init()
    return f"rank {hvd.rank()} on {socket.gethostname()}: {hvd.local_size()} rank(s) on this node, {hvd.cross_size()} node(s)"


places = world.run(who)
print(*places, sep="\n")

# %% [markdown]
# Horovod tells ranks of the same node (*local*) from those across nodes (*cross*), since it may combine gradients within a node first. Four ranks on one machine and one rank on each of four are different worlds.
#
# On many nodes more can be wrong: a launcher that crowds ranks on one node, different installations, a folder that not all nodes see, clocks apart, traffic on the slow interface. `health.report` checks these as well; so does `python -m nurion_utils.health --site slurm --nodes 4` before a long run.

# %%
from nurion_utils import health

report = health.report(world)
of_nodes = report[report["check"].str.contains("node|bytes|clocks")]
of_nodes.style.hide(axis="index")

# %% [markdown]
# ## What the wire costs
#
# The network of notebook 01, somewhat wider, has as many gradients as parameters. An allreduce over $P$ ranks sends at least $2\frac{P-1}{P}$ times their bytes through each link. **Predict** from the next cell's numbers: how long does one training step wait for the wire? Half precision halves the bytes; what is the most that can save?

# %%
import itertools

widths = (64, hidden, hidden, 10)
gradient_bytes = 4 * sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
wire_bytes = 2 * (n_nodes - 1) / n_nodes * gradient_bytes
wire_s = 8 * wire_bytes / (link_mbit * 1e6)
print(
    f"{gradient_bytes / 1e6:.1f} MB of gradients: {wire_bytes / 1e6:.1f} MB through each link, {1000 * wire_s:.0f} ms"
)


# %%
def time_steps(widths: tuple, repeats: int) -> list[dict]:
    """A training step without any averaging, and with it in single and in half precision, in turn."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf
    from mpi4py import MPI

    from nurion_utils import timing
    from nurion_utils.datasets import digits
    from nurion_utils.training import models

    hvd.init()
    x, y, *_ = digits.load()
    batch = tf.constant(x[:32]), tf.constant(y[:32])
    model, loss = models.mlp(widths), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)

    def step_with(average):
        @tf.function
        def step():
            with tf.GradientTape() as tape:
                value = loss(batch[1], model(batch[0], training=True))
            gradients = average(tape.gradient(value, model.trainable_variables))
            optimizer.apply(gradients)

        return step

    steps = {
        "alone": step_with(lambda gradients: gradients),
        "single precision": step_with(lambda gradients: hvd.grouped_allreduce(gradients, name="single")),
        "half precision": step_with(
            lambda gradients: hvd.grouped_allreduce(gradients, name="half", compression=hvd.Compression.fp16)
        ),
    }
    for step in steps.values():
        step()
    return [
        {"step": name, "repeat": repeat, "time_ms": 1000 * timing.block(MPI.COMM_WORLD, steps[name], 3)}
        for repeat, name in timing.turns(list(steps), repeats)
    ]


import pandas as pd

times = pd.DataFrame(world.run(time_steps, widths, repeats)[0])
median_ms = times.groupby("step")["time_ms"].median()
median_ms.round(1).to_frame().style.format("{:.1f}")

# %% alt="Three groups of points, the time of one training step on four nodes: alone a few milliseconds, in single precision above the dashed line of computing plus wire, in half precision above its own, lower line, with half the wire."
import matplotlib.pyplot as plt

from nurion_utils import style

style.use()
order = ["alone", "half precision", "single precision"]
share = {"alone": 0.0, "half precision": 0.5, "single precision": 1.0}
figure, axis = plt.subplots()
for place, name in enumerate(order):
    own = times[times["step"] == name]["time_ms"]
    axis.plot([place] * len(own), own, "o", alpha=0.6)
    expected_ms = median_ms["alone"] + share[name] * 1000 * wire_s
    axis.plot([place - 0.3, place + 0.3], [expected_ms] * 2, "k--", label="computing + wire" if place == 0 else None)
axis.set_xticks(range(3), order)
axis.set_ylabel("time of one step [ms]")
axis.set_ylim(bottom=0)
axis.set_title(f"{n_nodes} nodes on links of {link_mbit:.0f} Mbit/s")
axis.legend()
plt.show()

# %% [markdown]
# The dashes are what you predicted: computing, which is the same for all, plus the bytes over the link. What lies above them is latency, negotiation, and processes that take turns on few cores. On a slow wire a step is nearly all wire, and half precision saves nearly half of it. That is worth remembering for what it does *not* say: on Nurion's links the same gradients take

# %%
from nurion_utils import sites

link = sites.load("nurion").fabric.link_gb_per_s
print(f"{1e6 * wire_bytes / (link * 1e9):.0f} microseconds at {link} GB/s instead of {1000 * wire_s:.0f} ms here")

# %% [markdown]
# and latency decides, which no compression touches. Measure before you compress.
#
# ## A node is unplugged
#
# Nodes fail. With 8305 of them some node fails every few days even if each one lasts for decades. **Predict:** one node loses its power while all ranks are in an allreduce. What do the others notice by themselves?


# %%
def sum_for_ever() -> None:
    from mpi4py import MPI

    while True:
        MPI.COMM_WORLD.allreduce(1)


import threading

on_nodes = world.rate_mbit is not None
if on_nodes:
    threading.Timer(2, world.unplug, ["n2"]).start()
    try:
        world.run(sum_for_ever)
    except ranks.RankError as error:
        loss = str(error)
        print(loss)
else:
    loss = "rank 1 was lost with its node n2 (not seen here: there are no virtual nodes on this machine)"

# %% [markdown]
# Nothing: to them the lost rank looks like a slow one, and they would wait. The watcher names it with its node and says where the others stood. The world is over, as an MPI world always is when a rank is gone. So work that is worth something has to be on disk.
#
# ## Walltime, checkpoint, resume
#
# The most certain failure has a date: the walltime. A job that needs longer is several jobs, each of which goes on where the last one ended. `ResumeCallback` saves what training depends on: weights, the optimizer's variables, the position in the data, and the state of random generators. It saves every few minutes, and when the job's time is nearly up. Slurm can say so with a signal (`sbatch --signal=TERM@300`: SIGTERM five minutes before the end); PBS Pro says nothing beforehand, so a job keeps its own clock (`NURION_ENDS_AT`, which the scripts below set).
#
# Here the end comes without a word, in the middle of the second epoch, and the last checkpoint is a few steps old. **Predict:** the training is started again and runs to its end. How far are its weights from those of training that nobody disturbed?


# %%
def train(folder: str, ends_at_step: int | None) -> tuple[int, bytes]:
    """Four epochs on the digits; how many steps the optimizer has counted in all, and a fingerprint of all weights."""
    import hashlib
    import os
    import signal

    import horovod.tensorflow as hvd
    import keras

    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import DistributedOptimizer, ResumeCallback, models

    class Walltime(keras.callbacks.Callback):
        """What a scheduler does at the end of the walltime, if nobody has listened before."""

        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == ends_at_step:
                os.kill(os.getpid(), signal.SIGKILL)

    hvd.init()
    keras.utils.set_random_seed(7)
    x, y, *_ = digits.load()
    shard = Shard(len(x), hvd.size(), hvd.rank(), batch_size=32, seed=1)
    model, resume = models.mlp(), ResumeCallback(folder, every_steps=5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(DistributedOptimizer(keras.optimizers.Adam(1e-3)), loss, jit_compile=False)
    data = shard.dataset(x, y, resume=resume)
    model.fit(data, steps_per_epoch=shard.steps, epochs=4, callbacks=[Walltime(), resume], verbose=0)
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    return int(model.optimizer.iterations), hashlib.sha256(weights).digest()


import tempfile
from pathlib import Path

world.stop()
world = ranks.start(2)
with tempfile.TemporaryDirectory(dir=".") as folder:
    undisturbed = world.run(train, f"{folder}/a", None)[0]
    try:
        world.run(train, f"{folder}/b", 28)
    except ranks.RankError as error:
        print("first job:", str(error).splitlines()[0])
    kept = sorted(path.name for path in Path(folder, "b").iterdir())
    world.restart()  # the first job is over; its ranks and all they knew are gone
    resumed = world.run(train, f"{folder}/b", None)[0]
print("kept by the first job:", *kept, sep="\n  ")
print("second job: same weights as undisturbed training, bit for bit:", resumed[1] == undisturbed[1])

# %% [markdown]
# Not far: bit for bit the same, in the middle of an epoch, on as many ranks as before. On another number of ranks the sums are taken in another order and the last bits differ; what still holds is that each sample of the epoch is trained on exactly once.
#
# ## Your job for Nurion and for Neuron
#
# A job is written down once, as data. Functions read it: `script` writes what the scheduler takes, `explain` adds to each line why it is there and who says so, `lint` holds it against the site's rules, `submit` hands it over.

# %%
from nurion_utils import jobs

job = jobs.Job("python train.py", "nurion", nodes=16, hours=4)
print(jobs.explain(job))

# %% [markdown]
# The rules of a site are in its description, each with its source and the date at which it was read, for they change: `python -m nurion_utils.sites show neuron`. So a mistake can be found here instead of in the queue:

# %%
for finding in jobs.lint(jobs.Job("python train.py", "nurion", nodes=6000, hours=72)):
    print("-", finding.sentence)

# %% [markdown]
# For Neuron the same plan becomes a script for Slurm, with what that site wants.

# %%
comment = "field=ai;appl=tensorflow"
for_neuron = jobs.Job(
    "python train.py", "neuron", nodes=2, hours=4, queue="amd_a100nv_8", options={"--comment": comment}
)
print(jobs.script(for_neuron).split("\n\n")[0])

# %% [markdown]
# A whole notebook is sent in the same way, with its parameters, and comes back executed, with a log and what it cost in node-hours:
#
# ```bash
# python -m nurion_utils.jobs 01_data_parallel_training.ipynb --site nurion --nodes 16 --hours 4 -p volume_epochs 30 --explain
# ```
#
# ## Exercises
#
# **1. Refused.** A colleague wants to submit this to Neuron:
#
# ```bash
# #SBATCH --partition=amd_a100nv_8
# #SBATCH --nodes=2
# #SBATCH --time=60:00:00
# #SBATCH --mem=400G
# srun python train.py
# ```
#
# Three options are the reason why it will not run: two that are there, one that is missing. Which? (The rules: `python -m nurion_utils.sites show neuron`.)

# %% tags=["exercise"]
options_at_fault = {...}
# --- solution
options_at_fault = {"--time", "--mem", "--comment"}
# --- end solution

# %% tags=["check"]
from nurion_utils import jobs

colleagues = jobs.Job("python train.py", "neuron", nodes=2, hours=60, queue="amd_a100nv_8", options={"--mem": "400G"})
reasons = dict(
    zip(["--time", "--comment", "--mem"], [finding.sentence for finding in jobs.lint(colleagues)], strict=True)
)
assert ... not in options_at_fault, "Put three names of options in place of the dots, as '--nodes'."
assert not (wrong := {*options_at_fault} - {*reasons}), f"{sorted(wrong)[0]} is as Neuron wants it."
assert {*options_at_fault} == {*reasons}, (
    f"{len(options_at_fault)} of 3: look for what is too long, forbidden, and missing."
)
print(*reasons.values(), sep="\n")

# %% [markdown]
# **2. How many nodes?** Forty epochs are to be trained. One node takes 6 hours for an epoch, and you have measured this parallel efficiency:
#
# | nodes | 2 | 4 | 8 | 16 |
# |---|--:|--:|--:|--:|
# | efficiency | 0.97 | 0.93 | 0.85 | 0.70 |
#
# The queue allows 48 hours. Choose the number of nodes that needs the fewest node-hours and still fits into one job, and the hours to ask for: what is computed, rounded up to whole hours.

# %% tags=["exercise"]
nodes, hours = ..., ...
# --- solution
nodes, hours = 8, 36
# --- end solution

# %% tags=["check"]
assert ... not in (nodes, hours), "Put two numbers in place of the dots."
efficiency = {2: 0.97, 4: 0.93, 8: 0.85, 16: 0.70}
assert nodes in efficiency, f"There is no measurement for {nodes} nodes."
needed = 40 * 6 / (nodes * efficiency[nodes])
assert needed <= 48, f"{nodes} nodes need {needed:.1f} hours, more than the queue allows."
assert nodes == 8, (
    f"{nodes} nodes fit, but fewer would, too, and cost fewer node-hours: efficiency falls with each doubling."
)
assert needed <= hours < needed + 1, f"8 nodes need {needed:.1f} hours: ask for the next whole hour, not for {hours}."
print(f"Right: 8 nodes for {hours} hours cost {8 * needed:.0f} node-hours; 16 nodes would cost {40 * 6 / 0.70:.0f}.")

# %% [markdown]
# **3. Four worlds.** A job on four nodes prints
#
# ```
# I am rank 0 of 1
# I am rank 0 of 1
# I am rank 0 of 1
# I am rank 0 of 1
# ```
#
# and learns as fast as on one node. What has happened? **a** Three nodes are down. **b** The launcher and the MPI library do not understand each other: it started four programs, each of which takes itself for alone. **c** The program forgot to call `hvd.init()`.

# %% tags=["exercise"]
diagnosis = "..."
# --- solution
diagnosis = "b"
# --- end solution

# %% tags=["check"]
explanations = {
    "a": "Then there would be fewer lines: four processes have printed something.",
    "b": "",
    "c": "Then Horovod would have refused to answer; and hvd.init() cannot repair what the launcher has not told.",
}
assert diagnosis in explanations, "Put a, b or c in place of the dots."
assert diagnosis == "b", explanations[diagnosis]
print(
    "Right. Ask for another process manager (srun --mpi=pmi2, mpiexec); ranks.start checks this before anything runs."
)

# %%
world.stop()
if cluster is not None:
    cluster.close()

assert first_look.count("RUNNING") == 2 and first_look.count("PENDING") == 1
assert second_look.count("RUNNING") == 2 and "PENDING" in never and "Partition" in never
assert len({place.split(":")[0].split(" on ")[1] for place in places}) == (n_nodes if on_nodes else 1)
assert report.loc[report["check"] == "MPI adds up the rank numbers", "ok"].all()
assert loss.startswith("rank 1 was lost with its node n2")
assert not on_nodes or median_ms["single precision"] > median_ms["alone"] + 0.9 * 1000 * wire_s
assert resumed == undisturbed and 1 <= len(kept) <= 2
assert not jobs.lint(job) and not jobs.lint(for_neuron)

# %% [markdown]
# ## What to take along
#
# - A job waits; look at the reason. Some reasons never pass.
# - The line that starts ranks is the same on one machine, on virtual nodes and in a job. Check first that there is one world, on the nodes that you think, over the wire that you think.
# - On a slow wire a step is the bytes of the gradients over the link; on a fast one it is latency.
# - A lost node looks like a slow one to all others. What is not on disk is gone.
# - Know when your job ends, save before, and go on. It can be bit for bit.
# - Rules of a site have dates. Hold a job against them before the queue does.
#
# **Next:** with storage, wires, batches and queues in hand: what would the whole machine do?
