# %% [markdown]
# # On a cluster: the same cells on many nodes
#
# **Goal:** leave the one machine. Ask a queue for nodes, run ranks on them, see what the link between nodes costs, lose a node, outlive the end of a job, and write jobs that a supercomputer will accept.
#
# **You will be able to:** submit, watch and cancel jobs; tell a job that waits from one that will never run; start ranks on the nodes of a job with `ranks.start`; say which link they use and what it costs; let training go on where a job was ended; find out what is wrong with a job script before the queue does.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb) and, for the bytes of an allreduce, [Ring-allreduce](02_ring_allreduce.ipynb).
#
# **Minutes:** 40 to read and run; the cells alone take about 2 on 2 cores
#
# ## What a queue is for
#
# Thousands of people want the nodes of a supercomputer, and most programs want many of them at the same time. So nobody logs in to a compute node and starts something. You describe what you want, so many nodes for so many hours and this command, and hand the description to a **scheduler**. It keeps a queue, decides when and on which nodes your **job** runs, and ends it when its time, the **walltime**, is over. You submit from a **login node**, a machine that everyone logs in to and nobody computes on. Slurm and PBS Pro are the two schedulers that you will most likely meet; KISTI's Nurion runs PBS Pro, its GPU system Neuron runs Slurm.
#
# You do not need a supercomputer to meet one. This notebook makes a small cluster on the machine in front of you: *virtual nodes*, which have a name, a network, processes and folders of their own, and on them, where it is installed, a real Slurm.

# %% tags=["parameters"]
n_nodes: int = 4  # virtual nodes, an even number from 4 on, one rank each; 2 cores keep up with 4
link_mbit: float = 200.0  # what the link of each node carries each way, in 10^6 bits per second
hidden: int = 384  # units in each of six hidden layers of the network that is trained over the links
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
    """What a command prints on the head of the cluster, its login node."""
    if cluster is None:
        return recorded[command]
    ran = cluster.run(["sh", "-c", command], timeout=60)
    return (ran.stdout + ran.stderr).rstrip()


print(f"The commands below are {origin}.")
print(on_head("sinfo"))

# %% [markdown]
# Two **partitions**, Slurm's word for queues: `main` with all nodes, which the star marks as the usual one, and `small`, whose jobs may have one node for five minutes. All nodes are `idle`; node n1 is in both.
#
# ## Submit, watch, cancel
#
# `sbatch` submits a script, or here a single command with `--wrap`, and returns at once with a number. The limit of two minutes, `--time=2`, is their walltime. **Predict:** three jobs, each of which wants half of the nodes and shares them with nobody (`--exclusive`). How many will run, and what becomes of the third?

# %%
queue = "squeue --sort=i --format='%.6j %.9T %.6D %R'"  # name, state, number of nodes, and which or why none


def once_running(job: str, command: str) -> str:
    """What the command prints on the head as soon as the job runs."""
    return on_head(f"until squeue --noheader --states=R --name={job} | grep -q {job}; do sleep 0.2; done; {command}")


for job in ("one", "two", "three"):
    half = f"--nodes={n_nodes // 2} --exclusive --time=2"
    on_head(f"sbatch --job-name={job} {half} --output=/dev/null --wrap='sleep 100'")
first_look = once_running("two", queue)
print(first_look)

# %% [markdown]
# Two run, and `squeue` says on which nodes; the third is pending because too few nodes are free (`Resources`). Waiting is the normal state of a job. Cancel the first one and see who takes its place.

# %%
on_head("scancel --name=one")
second_look = once_running("three", queue)
print(second_look)

# %% [markdown]
# Now a job that wants more than its partition gives to anyone. **Predict:** is it refused?

# %%
on_head("scancel --name=two; scancel --name=three")
print(on_head("sbatch --job-name=never --partition=small --nodes=3 --time=2 --output=/dev/null --wrap=hostname"))
never = on_head(f"sleep 3; {queue} --name=never")  # the scheduler looks at its queue every two seconds
print(never)
_ = on_head("scancel --name=never")

# %% [markdown]
# This Slurm accepted it, as is the default (other sites refuse such jobs at once), and it would wait for ever: only the reason in brackets tells. PBS Pro accepts it, too, and says `Can Never Run` in the comment that `qstat -f` shows. This costs people days. `ranks.start` and `nurion_utils.jobs` look at the reason and turn it into an error within seconds.
#
# ## Ranks on several nodes
#
# In a job, `ranks.start(16)` starts ranks on the job's nodes. On a login node it submits a job first, waits until that runs, and cancels it at the end, however the notebook ends. Here is a program that does so, run on the head of the cluster.

# %%
import sys

PROGRAM = """
from nurion_utils import ranks

def where():
    import socket
    from mpi4py import MPI
    return f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {socket.gethostname()}"

with ranks.start(%d, site="slurm", minutes=5) as world:
    print(*world.run(where), sep="\\n")
"""


def run_program(program: str) -> str:
    if cluster is None:
        return recorded["ranks.start"]
    ran = cluster.run([sys.executable, "-c", program], timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.rstrip()


in_a_job = run_program(PROGRAM % n_nodes)
print(in_a_job)

# %% [markdown]
# The same ranks, but in a notebook you want to talk with them, and we want slow links to look at. So the next cell gives `ranks.start` a speed, and it makes nodes for itself: *other* virtual nodes, again called n1, n2 and so on, without a scheduler, one rank on each. `world.run`, `%%px`, progress bars and errors are those of the earlier notebooks.

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
# Horovod distinguishes ranks of the same node (*local*) from those across nodes (*cross*), since it may combine gradients within a node first.
#
# On many nodes more can be wrong. The command that starts the ranks, the **launcher** (`mpiexec`, `mpirun`, `srun`), may crowd them on one node; if it and the MPI library do not match, each process even becomes a world of its own, rank 0 of 1. Nodes may see different installations or folders, have clocks that disagree, or send by a slow interface. `health.report` checks for all of these; so does `python -m nurion_utils.health --site slurm --nodes 4` before a long run. (`eth0` is a node's link here, and some megabytes went over it in the test.)

# %%
from nurion_utils import health

report = health.report(world)
of_nodes = report[report["check"].str.contains("node|bytes|clocks")]
of_nodes.style.hide(axis="index")

# %% [markdown]
# ## What the link costs
#
# The network for the digits of notebook 01, wider and deeper, has one gradient value for each of its weights, 4 bytes each in *single precision*. An allreduce over $P$ ranks sends at least $2\frac{P-1}{P}$ times their bytes through each link. **Predict** from what the next cell prints: by how many milliseconds, at least, does averaging lengthen a training step, if all gradients travel in one message at its end?

# %%
import itertools

widths = (64, *[hidden] * 6, 10)
gradient_bytes = 4 * sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
print(f"{gradient_bytes / 1e6:.1f} MB of gradients, {n_nodes} nodes, links of {link_mbit:.0f} Mbit/s")

# %% [markdown]
# The backward pass computes the gradients of the last layer first. They need not wait for those of the first: `DistributedOptimizer` sends **buckets** of gradients as soon as they are known, of 8 MB each unless told otherwise, while the layers before are still being computed. Here they are smaller, because the network is. And gradients can be **compressed**: Horovod rounds them to *half precision*, 2 bytes per number, while they travel. **Predict:** how many milliseconds can half precision save? And can buckets save more than the backward pass takes?


# %%
def time_steps(widths: tuple, repeats: int) -> list[dict]:
    """A training step without any averaging, and with it in three ways, in turn."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf
    from mpi4py import MPI

    from nurion_utils import models, timing
    from nurion_utils.datasets import digits
    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    x, y, *_ = digits.load()
    batch = tf.constant(x[:256]), tf.constant(y[:256])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step_with(distribute):
        model = models.mlp(widths)
        optimizer = distribute(keras.optimizers.SGD(0.01))
        optimizer.build(model.trainable_variables)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                value = loss(batch[1], model(batch[0], training=True))
            optimizer.apply(tape.gradient(value, model.trainable_variables))

        step()
        return step

    half = {"bucket_mb": 0.5, "compression": hvd.Compression.fp16}
    steps = {
        "alone": step_with(lambda optimizer: optimizer),
        "one message": step_with(lambda optimizer: DistributedOptimizer(optimizer, bucket_mb=1e6)),
        "buckets": step_with(lambda optimizer: DistributedOptimizer(optimizer, bucket_mb=0.5)),
        "buckets, half precision": step_with(lambda optimizer: DistributedOptimizer(optimizer, **half)),
    }
    # In turn, so that all see the same disturbances; each time is that of the slowest rank, the mean of 3 steps.
    return [
        {"step": name, "repeat": repeat, "time_ms": 1000 * timing.block(MPI.COMM_WORLD, steps[name], 3)}
        for repeat, name in timing.turns(list(steps), repeats)
    ]


import pandas as pd

times = pd.DataFrame(world.run(time_steps, widths, repeats)[0])
order = ["alone", "one message", "buckets", "buckets, half precision"]
median_ms = times.groupby("step")["time_ms"].median()[order]
link_ms = 1000 * 8 * 2 * (n_nodes - 1) / n_nodes * gradient_bytes / (link_mbit * 1e6)
alone, message_ms, buckets_ms, half_ms = median_ms
print(f"averaging in one message costs {message_ms - alone:.0f} ms, of which {link_ms:.0f} ms are bytes on the link")
print(f"buckets save {message_ms - buckets_ms:.0f} ms, half precision {buckets_ms - half_ms:.0f} ms more")
median_ms.to_frame().style.format("{:.1f}")

# %% alt="Four groups of points, the time of one training step on four nodes: alone, without any bytes, lowest; in one message above the dashed line of computing plus link; in buckets, and in buckets of half precision, lower, each with a dotted line for what the link alone takes."
import matplotlib.pyplot as plt

from nurion_utils import style

style.use()
share = {"alone": 0.0, "one message": 1.0, "buckets": 1.0, "buckets, half precision": 0.5}
figure, axis = plt.subplots()
for place, name in enumerate(order):
    own = times[times["step"] == name]["time_ms"]
    axis.plot([place] * len(own), own, "o", alpha=0.6)
    first = place == 1
    ends = [place - 0.3, place + 0.3]
    axis.plot(ends, [alone + share[name] * link_ms] * 2, "k--", label="computing + link" if first else None)
    axis.plot(ends, [max(alone, share[name] * link_ms)] * 2, "k:", label="the longer of the two" if first else None)
axis.set_xticks(range(4), ["alone", "one message", "buckets", "buckets,\nhalf precision"])
axis.set_ylabel("time of one step [ms]")
axis.set_ylim(bottom=0)
axis.set_title(f"{n_nodes} nodes on links of {link_mbit:.0f} Mbit/s")
axis.legend()
plt.show()

# %% [markdown]
# The dashes add what you predicted to the measured time of *alone*: nothing is hidden. The dots are for a link that works all the time while the ranks compute. The points lie above the dashes: a bound is not a forecast. Start-up times of messages, Horovod's agreement on which tensors are ready (*negotiation*) and processes that take turns on few cores are candidates, which this measurement cannot tell apart.
#
# Buckets can hide no more than the backward pass, and only where a core is free for messages while another computes. Here four nodes share the cores of this machine, and MPI keeps a core busy while it waits for a message. So do not be surprised if buckets save nothing here; two ranks with a core each and 50 MB of gradients are in the README's table, where they do. What half precision saves says little about another network:

# %%
from nurion_utils import sites

link = sites.load("nurion").fabric.link_gb_per_s
there_us = 1000 * link_ms * (link_mbit / 8000) / link
print(f"On Nurion's links of {link} GB/s the same bytes take {there_us:.0f} microseconds instead of {link_ms:.0f} ms.")

# %% [markdown]
# There hardly anything is left for half precision to save. Measure before you compress.
#
# ## A node loses its power
#
# Nodes fail. If each lasts 25 years on average, one of 8305 fails about every day. **Predict:** one node loses its power while all ranks are in an allreduce. What do the others notice by themselves?


# %%
def sum_for_ever() -> None:
    from mpi4py import MPI

    while True:
        MPI.COMM_WORLD.allreduce(1)


import threading

on_nodes = world.rate_mbit is not None
if on_nodes:
    threading.Timer(2, world.unplug, ["n2"]).start()  # in 2 s node n2 vanishes, with all its processes
    try:
        world.run(sum_for_ever)
    except ranks.RankError as error:
        loss = str(error)
        print(loss)
else:
    loss = "rank 1 was lost with its node n2 (not seen here: there are no virtual nodes on this machine)"

# %% [markdown]
# By themselves, nothing: they stood in the allreduce, and would have waited, for a lost rank looks like a slow one. The watcher names it with its node, and says where the others were. The world is over. (Elastic training, in notebook 01, goes on because Horovod does without MPI there.) So work that is worth something has to be on disk.
#
# ## Walltime, checkpoint, resume
#
# One failure is certain, and you know when: the end of the walltime. A job that needs longer is several jobs, each of which goes on where the last one ended. `ResumeCallback` saves what training depends on: weights, the optimizer's variables, the position in the data, and the state of random generators. It saves every ten minutes, at the end of each epoch, and two minutes before the job's time is up. Slurm can warn a job with a signal (`sbatch --signal=TERM@300` sends SIGTERM, a request to end, five minutes before the end); PBS Pro warns nobody, so a job keeps its own clock (`NURION_ENDS_AT`, which the scripts below set).
#
# Now we play the worst scheduler, on two ranks of this machine: SIGKILL, an end that no program can catch, at step 28, which is in the middle of the second epoch. Here a checkpoint is written every 5 steps. **Predict:** the training is started again and runs to its end. How far are its weights from those of training that nobody disturbed?


# %%
def train(folder: str, ends_at_step: int | None) -> tuple[int, bytes]:
    """Four epochs on the digits; how many steps the optimizer has counted, and a fingerprint of all weights.

    If `ends_at_step` is not None, all ranks are killed at that step.
    """
    import hashlib
    import os
    import signal

    import horovod.tensorflow as hvd
    import keras

    from nurion_utils import models
    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import DistributedOptimizer, ResumeCallback

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
    # Walltime comes first: it strikes before the step could be saved.
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
print(f"second job: {resumed[0]} steps in all, of {undisturbed[0]}")
print("same weights as undisturbed training, bit for bit:", resumed[1] == undisturbed[1])

# %% [markdown]
# Bit for bit the same. (All ranks were killed; the first one that was noticed is named.) An epoch has 19 steps here, and files count epochs from 0: the last one was written after 5 steps, 320 samples, of the second epoch, so 4 steps were done again. On another number of ranks sums are taken in another order and the last bits differ; each sample of the epoch is still trained on exactly once (not shown here).
#
# ## Your job for Nurion and for Neuron
#
# A job is written down once, as data. Functions read it: `script` writes what the scheduler takes, `explain` gives the reason and the source of each line, `lint`, which runs nothing, lists where the job breaks the site's rules, `submit` hands it over. Here is the head of a script for Nurion: what PBS Pro reads. (The source is in brackets; "guide" is the site's user guide, with the month in which it was read.)

# %%
from nurion_utils import jobs

job = jobs.Job("python train.py", "nurion", nodes=16, hours=4, python="/scratch/me/venv/bin/python", requeue=True)
print(jobs.explain(job).split("\n\n")[0])
print("\n...\n", jobs.script(job).splitlines()[-2])

# %% [markdown]
# `python` is that of an environment *there*, which you have set up with the site's MPI. Between head and command the script loads the site's modules, sets the clock, and sees to it that the log ends with what the job cost in node-hours, nodes times hours; `print(jobs.script(job))` shows it all.
#
# `requeue=True` has the job submit itself again, as long as there is more to do. Its training says so with `sys.exit(resume.exit_code)`, which is 75 ("saved, but not done") when `ResumeCallback` has stopped it, and 0 at its end. **Predict:** which jobs must not be submitted again, if nobody is to find a thousand of them in the queue on Monday? This is what the script does at its end:

# %%
print(jobs.explain(job).split("again() {\n")[1].split("\n}\n")[0])

# %% [markdown]
# Those that are done, those that failed by an error, those that were cancelled, and those that get no further: two jobs in a row in which nothing was saved. The next one begins only when this one has ended, so that two never write into the same folder. A notebook goes through all its cells again; its long steps go on from what they saved, and `sys.exit(75)` in a cell says that there is more to do.
#
# The rules of a site are in its description, each with its source and the date at which it was read, for they change: `python -m nurion_utils.sites show neuron`. So a mistake can be found here instead of in the queue:

# %%
for finding in jobs.lint(jobs.Job("python train.py", "nurion", nodes=6000, hours=72)):
    print("-", finding.sentence)

# %% [markdown]
# A job for Neuron, which runs Slurm, is described in the same way. The `--comment` that the site demands of everyone is one of the `options`; without it `lint` complains.

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
# python -m nurion_utils.jobs 01_data_parallel_training.ipynb --site nurion --nodes 16 --hours 4 -p volume_epochs 30 --wait
# ```
#
# (With `--explain` in place of `--wait` it prints the script and submits nothing.)
#
# ## Exercises
#
# **1. Refused.** A colleague wants to submit this to Neuron:
#
# ```bash
# #SBATCH --partition=amd_a100nv_8
# #SBATCH --nodes=2
# #SBATCH --exclusive
# #SBATCH --time=60:00:00
# #SBATCH --mem=400G
# srun python train.py
# ```
#
# Three options are the reason why it will not run: two that are there, and one that is always needed and missing. Which? Give their names as a set of strings, such as `{"--nodes", "--ntasks"}`. (The rules: `python -m nurion_utils.sites show neuron`.)

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
# The global batch stays the same (strong scaling), and the queue allows 48 hours. Choose the number of nodes that needs the fewest node-hours and still fits into one job, and the hours to ask for: the computed time, rounded up. (In real life leave a margin, or resume.)

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
# (`hvd.rank()` of `hvd.size()`), and an epoch takes as long as on one node. What has happened? **a** Three nodes are down. **b** The launcher and the MPI library do not understand each other: four programs run, each of which believes that it is alone. **c** The program forgot to call `hvd.init()`.

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
print("Right. The launcher must speak the protocol of the MPI library: its own mpiexec does, or srun --mpi=pmi2.")
print("ranks.start checks this before anything of yours runs.")

# %%
world.stop()
if cluster is not None:
    cluster.close()

assert in_a_job.count(f"of {n_nodes} on n") == n_nodes or cluster is None
assert first_look.count("RUNNING") == 2 and first_look.count("PENDING") == 1
assert second_look.count("RUNNING") == 2 and "PENDING" in never and "Partition" in never
assert len({place.split(":")[0].split(" on ")[1] for place in places}) == (n_nodes if on_nodes else 1)
assert report.loc[report["check"] == "MPI adds up the rank numbers", "ok"].all()
assert loss.startswith("rank 1 was lost with its node n2")
assert not on_nodes or times.loc[times["step"] == "one message", "time_ms"].min() > 0.9 * link_ms
assert resumed == undisturbed and 1 <= len(kept) <= 2
assert "qsub -W depend=afterany" in jobs.script(job)
assert not jobs.lint(job) and not jobs.lint(for_neuron)

# %% [markdown]
# ## What to take along
#
# - A job waits; look at the reason. Some reasons never pass.
# - `ranks.start` is the same on one machine, on virtual nodes and in a job. Check first that there is one world, on the nodes and over the link that you think.
# - On a slow link the bytes of the gradients dominate a step; on a fast one they may vanish beside the computing.
# - A lost node looks like a slow one to all others. What is not on disk is gone.
# - Know when your job ends, save before, and go on. The result can be the same bit for bit. A job can submit itself again; it must also know when not to.
# - Rules of a site have dates. Hold a job against them before the queue does.
#
# **Next:** what the whole machine would do, with storage, links, batches and queues in one prediction (in preparation).
