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
n_nodes: int = 4  # virtual nodes, an even number from 4 on, one rank each; 2 cores are enough for 4
link_mbit: float = 200.0  # what the link of each node carries each way, in 10^6 bits per second
hidden: int = 384  # units in each of six hidden layers of the network that is trained over the links
repeats: int = 5  # of each timing; more of them make the medians more certain

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
# That program submitted a job, waited for it, and ran on its nodes. From here on we want slow links to look at. So the next cell gives `ranks.start` a speed instead of a site, and it makes a second set of virtual nodes for itself, again called n1, n2 and so on, without a scheduler, one rank on each. `world.run`, `%%px`, progress bars and errors are those of the earlier notebooks.

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
one, many, half = (times[times["step"] == name].sort_values("repeat")["time_ms"].to_numpy() for name in order[1:])
print(
    f"averaging in one message costs {message_ms - alone:.0f} ms; the bytes need at least {link_ms:.0f} ms by the formula"
)
for what, saved in {"buckets": one - many, "half precision": many - half}.items():
    print(
        f"saved by {what}: {sorted(saved)[len(saved) // 2]:.0f} ms, in single repeats {min(saved):.0f} to {max(saved):.0f} ms"
    )
print(f"half of the bytes need {link_ms / 2:.0f} ms less")
median_ms.to_frame().style.format("{:.1f}")

# %% alt="Four groups of circles, the time of one training step on four nodes: alone, without any bytes, lowest; in one message and in buckets above the dashed line of computing plus link; in buckets of half precision lower, above a lower dashed line."
import matplotlib.pyplot as plt

from nurion_utils import style

style.use()
share = {"alone": 0.0, "one message": 1.0, "buckets": 1.0, "buckets, half precision": 0.5}
figure, axis = plt.subplots()
for place, name in enumerate(order):
    own = times[times["step"] == name]["time_ms"]
    axis.plot([place] * len(own), own, "o", alpha=0.6)
    if share[name]:
        expected_ms = alone + share[name] * link_ms
        axis.plot(
            [place - 0.3, place + 0.3], [expected_ms] * 2, "k--", label="computing + link" if place == 1 else None
        )
axis.set_xticks(range(4), ["alone", "one message", "buckets", "buckets,\nhalf precision"])
axis.set_ylabel("time of one step [ms]")
axis.set_ylim(bottom=0)
axis.set_title(f"{n_nodes} nodes on links of {link_mbit:.0f} Mbit/s")
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# Each circle is one repeat. The dashed lines add what you predicted to the median of *alone*, as if nothing were hidden. The circles lie above them: a bound is not a forecast. Start-up times of messages, Horovod's agreement on which tensors are ready (*negotiation*) and processes that take turns on few cores are candidates, which this measurement cannot tell apart.
#
# Buckets can hide no more than the backward pass, and only where a core is free for messages while another computes. Here four nodes share the cores of this machine, and MPI keeps a core busy while it waits for a message. So where the savings of single repeats lie on both sides of 0, you have seen none, and below it buckets cost time, each a message and an agreement more; the README's table has two ranks with a core each and 50 MB of gradients, where buckets do save time. How far half precision stays behind half of the link's time is printed, too; that numbers have to be converted is one candidate. It has a price: 11 bits are left of each gradient, and what is smaller than about 6e-8 becomes 0. And what it saves here says little about another network:

# %%
from nurion_utils import sites

link = sites.load("nurion").fabric.link_gb_per_s
there_us = 1000 * link_ms * (link_mbit / 8000) / link
print(
    f"On Nurion's links of {link} GB/s the same bytes need at least {there_us:.0f} microseconds instead of {link_ms:.0f} ms."
)

# %% [markdown]
# For this network hardly anything is left to save there; a hundred times its gradients would need a hundred times as long. Measure before you compress.
#
# ## A node loses its power
#
# Nodes fail. If each lasts 25 years on average, one of Nurion's 8305 fails about every day. **Predict:** one node loses its power while all ranks are in an allreduce. What do the others notice by themselves?


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
# By themselves, nothing: they stood in the allreduce, and would have waited, for a lost rank looks like a slow one. What watches every call from outside, in the notebook's process, names it with its node, and says where the others were. The world is over. (Elastic training, in notebook 01, goes on because Horovod does without MPI there.) So work that is worth something has to be on disk.
#
# ## Walltime, checkpoint, resume
#
# One failure is certain, and you know when: the end of the walltime. A job that needs longer is several jobs, each of which goes on where the last one ended. `ResumeCallback` saves what training depends on: weights, the optimizer's variables, the position in the data, and the state of random generators. It saves every ten minutes, at the end of each epoch, and two minutes before the job's time is up. Then it stops training. It knows the time from the job script, which notes when the job will end (`NURION_ENDS_AT`): PBS Pro warns nobody before its walltime is over. Slurm can, with a signal (`sbatch --signal=TERM@300` sends SIGTERM, a request to end, five minutes before), and the callback listens for that, too.
#
# Now we play the worst scheduler, on two ranks of this machine: SIGKILL, an end that no program can catch, at step 28, which is in the middle of the second epoch. Here a checkpoint is written after every 5 steps of an epoch, and an epoch has 19 steps. **Predict:** how many steps are done a second time, when the training is started again and runs to its end? And how far are its weights from those of training that nobody disturbed?


# %%
def train(folder: str, ends_at_step: int | None) -> tuple[int, int, bytes]:
    """Four epochs on the digits; the steps counted at the beginning and at the end, and a fingerprint of the weights.

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
    begun = []
    note = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: begun.append(int(model.optimizer.iterations)))
    # Walltime comes first: it strikes before the step could be saved.
    model.fit(data, steps_per_epoch=shard.steps, epochs=4, callbacks=[Walltime(), resume, note], verbose=0)
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    return begun[0], int(model.optimizer.iterations), hashlib.sha256(weights).digest()


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
print(f"undisturbed: from step {undisturbed[0]} to step {undisturbed[1]}")
print(f"second job: from step {resumed[0]} to step {resumed[1]}")
print("same weights, bit for bit:", resumed[2] == undisturbed[2])

# %% [markdown]
# Bit for bit the same. The names of the files, of which the two newest are kept, say how far training was and end with a checksum. They count epochs from 0: the last one was written after 5 steps of the second epoch, 5 steps of 32 samples on each of 2 ranks. So the second job began at step 19 + 5 = 24, and 4 steps were done again. On another number of ranks each sample of the epoch would still be trained on exactly once (not shown here), but with another global batch it is other training.
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
# `python` is that of an environment *there*, which you have set up with the site's MPI. Between head and command the script loads the site's modules, notes when the job will end, and sees to it that the log ends with what the job cost in node-hours, nodes times hours; `print(jobs.script(job))` shows it all.
#
# `requeue=True` has the job submit itself again, as long as there is more to do. Its training says so with its exit code: `train.py` ends with `sys.exit(resume.exit_code)`, which is 75 ("saved, but not done") when `ResumeCallback` has stopped it, and 0 at its end. **Predict:** which jobs must not be submitted again, if nobody is to find a thousand of them in the queue on Monday?
#
# | the command ended | submitted again? |
# |---|---|
# | with 0 | no: all is done |
# | with 75 | yes |
# | otherwise, in the last three minutes of the walltime | yes: the scheduler has ended it |
# | otherwise, before | no: an error would come again; so after the loss of a node, look first, then submit it yourself, and it goes on from its checkpoint |
# | whatever it was, when two jobs in a row have saved nothing new | no: it would be so for ever |
# | whatever it was, after `jobs.cancel(...)`, with the number of any job of the chain | no |
#
# The next job begins only when this one has ended, so that two never write into the same folder. (`print(jobs.explain(job))` shows the lines that do this.) A notebook goes through all its cells again; its long steps go on from what they saved, and `sys.exit(75)` in a cell says that there is more to do.
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
# Nothing here asks for GPUs: how that is done is not in this description of Neuron. What the guide says goes into the `options`, too.
#
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
print(
    f"Right: 8 nodes are busy for {needed:.1f} hours, {8 * needed:.0f} node-hours; 16 would need {40 * 6 / 0.70:.0f}."
)

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
assert resumed[1:] == undisturbed[1:] and resumed[0] == 24 and len(kept) == 2
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
# **Next:** [the whole machine](07_the_whole_machine.ipynb), with computing, links, storage, batches and queues in one prediction.
