# %% [markdown]
# # Burst-buffer staging: when the data cannot keep up
#
# **Goal:** find out why a shared file system gives up long before its bandwidth is used, bring the data next to the ranks so that it can be trusted, and predict for how many nodes and epochs that pays.
#
# **You will be able to:** say how many bytes per second a node needs; recognise the hottest storage target, an overloaded metadata server and a client timeout; stage a data set that survives being killed; read accelerator utilisation; decide whether staging pays; write the job for Nurion without deleting your originals.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb), or at least its idea: ranks read different samples, and meet after every step.
#
# **Minutes:** 45 to read and run; the cells alone take about 1.5 on 2 cores
#
# ## What a node reads
#
# CosmoFlow learns from cubes of dark matter. One sample is 8 MB, and one node of the supercomputer Cori computed on it for 129 ms. A node that is not to wait therefore needs
#
# $$\frac{8\ \text{MB}}{0.129\ \text{s}} = 62\ \text{MB/s}.$$
#
# This is a property of the computation. A faster node needs more: an accelerator of type A100 in the benchmark MLPerf Storage takes 5.51 ms for a sample of 2.83 MB, so 513 MB/s.
#
# Nurion is a supercomputer of 8305 such nodes. Its shared file system, a **Lustre** file system of disks, delivers 300 GB/s to all nodes together. In front of it sits a **burst buffer**, 48 servers with fast flash memory, with 800 GB/s. **Predict:** how many nodes can each of them feed?

# %% tags=["parameters"]
n_ranks: int = 2  # ranks that read and train, 2 or more; on a larger machine as many as it has cores
n_volumes: int = 128  # volumes to train on, a multiple of 16 * n_ranks; 1024 show less of the start of each epoch
volume_size: int = 32  # voxels along an edge; 64 makes the files 8 times as large
reader_counts: list = [1, 2, 4, 8, 16, 32]  # readers that queue at once; 64 and 128 take half a minute more
epochs: int = 7  # of the training from each file system; the first is not counted, and fewer than 7 can never be clear
pipeline_steps: int = 16  # of each setting of the input pipeline; two epochs of the default data
pipeline_repeats: int = 2  # of each setting; 5 narrow the spread

# %%
from nurion_utils import ranks, recordings, sites, staging, style, timing
from nurion_utils.storage import cases

world = ranks.start(n_ranks)

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

style.use()
rows = []
for site in ("nurion", "cori"):
    machine = sites.load(site)
    for name, gb_per_s in {
        "Lustre": machine.file_systems["scratch"].bandwidth_gb_per_s,
        "burst buffer": machine.burst_buffer.bandwidth_gb_per_s,
    }.items():
        fed = cases.node_limit(gb_per_s), cases.node_limit(gb_per_s, node_mb_per_s=513)
        rows.append((machine.name, name, gb_per_s, *fed))
columns = ["machine", "storage", "GB/s", "nodes of CosmoFlow fed", "A100s fed"]
limits = pd.DataFrame(rows, columns=columns).set_index(["machine", "storage"])
limits

# %% [markdown]
# A division, no more: bandwidth over demand. Now look at what was published about CosmoFlow on Cori.

# %%
published = recordings.load("published_io")
cosmoflow = published[published["case"] == "CosmoFlow"].set_index("storage")
cosmoflow[cosmoflow["quantity"].isin(["largest job", "parallel efficiency"])][
    ["machine", "nodes", "quantity", "value", "outcome", "source"]
]

# %% [markdown]
# By division Cori's Lustre feeds 11,290 nodes. The real one could not go past 1024, where the demand is 63.5 GB/s, **9 % of its bandwidth**. The burst buffer carried 8192 nodes, with 77 % of the speed that 8192 single nodes would have. (*Nurion paper* is the report of KISTI, the institute that runs Nurion, on large-scale deep learning there, 2018/19, in Korean.)
#
# So bandwidth is not what ended it, or not in this simple way. Why it ended is not published. To find out what could have happened we need a file system that can be watched while it chokes.
#
# ## A file system that chokes
#
# In a Lustre, a file's bytes lie on one or more **storage targets** (OSTs): disks behind a server. A **metadata server** knows which. To read, a node first opens the file at the metadata server, which is one **metadata operation**, then asks the targets. Each of them serves one request after the other, so a request waits for all that came before it. Requests that wait for too long are given up by the node: a **timeout**, by default 100 s.
#
# `EmulatedFileSystem` plays one on your machine, with real readers that really wait: the bytes come from your disk, but only when their turn has come. Its rates are small enough for a laptop: 4 targets of 30 MB/s, a metadata server that opens 400 files a second, and readers that give up after 2 s. (`stripe_count` says over how many targets a file is spread, `stripe_bytes` in pieces of which size; 1 is the default of a real Lustre, too.)

# %%
import dataclasses

from nurion_utils.storage import EmulatedFileSystem, ParallelFileSystem, Workload, draw, simulate, summarise

lustre = ParallelFileSystem.of_site("local", "shared")
print(f"bandwidth of all targets: {lustre.bandwidth_gb_per_s * 1e3:.0f} MB/s")
dataclasses.asdict(lustre)

# %%
import os
import tempfile
import time
from pathlib import Path

directory = Path(tempfile.mkdtemp(prefix="staging-"))
(directory / "one").mkdir()
(directory / "one" / "sample").write_bytes(os.urandom(3_000_000))

# %% [markdown]
# **Predict:** how long does one reader wait for a file of 3 MB that lies on one target?

# %%
with EmulatedFileSystem(directory / "one", lustre) as running:
    client = running.client()
    begin = time.perf_counter()
    data = client.read("sample")
    alone_s = time.perf_counter() - begin
print(f"{len(data) / 1e6:.0f} MB in {alone_s * 1e3:.0f} ms: {len(data) / alone_s / 1e6:.0f} MB/s")

# %% [markdown]
# 1/400 s to open it, then 3 MB at the 30 MB/s of one target: 102.5 ms. That there are three more targets does not help a single file on a single target.
#
# Now 16 readers, each with a file of its own of 1 MB, on targets at random. On average each target has four files to deliver, 133 ms of work. **Predict:** when does the last reader get its file?

# %%
burst = Workload(readers=16, steps=1, files_per_step=1, file_bytes=10**6, compute_s=0.0)
with EmulatedFileSystem(directory / "one", lustre) as running:
    waited = running.run(burst, world)
    log = running.log()
files_on_target = log[log["target"] >= 0].groupby("target").size()
print(f"files on the four targets: {files_on_target.tolist()}")
print(f"the last reader has its file after {waited['ready_s'].max() * 1e3:.0f} ms")

# %% alt="Five panels over time: the metadata server and the four storage targets. At the metadata server sixteen short requests are served one after the other within 40 milliseconds. Each target serves its files one after the other, pale bars of waiting growing longer from request to request; the target with the most files is busy longest, others fall idle early."
figure = draw.queues(log)

# %% [markdown]
# Pale is waiting, dark is being served. The last reader has to wait for the target that happened to get the most files, while others are idle already. In training all ranks meet after every step, so **the hottest target sets the pace** of all.
#
# How hot is it? Deal $N$ files out to $K$ targets at random and a target gets $x = N/K$ on average, give or take $\sqrt{x}$. Of $K$ such numbers the largest is about
#
# $$x + \sqrt{2\,x \ln K},$$
#
# an estimate from above that is good for many targets. A training has thousands of steps, each with a new draw, so what counts is the average. Compare:

# %%
rows = []
for n, k in ((16, 4), (1024, 64), (1024, 248), (8192, 248)):
    dealt = np.random.default_rng(0).multinomial(n, [1 / k] * k, size=1000).max(axis=1)
    rows.append((n, k, n / k, dealt.mean(), n / k + np.sqrt(2 * n / k * np.log(k))))
pd.DataFrame(rows, columns=["files", "targets", "mean", "hottest, 1000 draws", "hottest, formula"]).round(1)

# %% [markdown]
# With many files per target the hottest is little above the mean; with few it is two or three times the mean. A thousand nodes that read one file per step from 248 targets have few.
#
# ### More readers
#
# **Predict:** twice as many readers, each with a file of 1 MB per step: how does the throughput of all together grow? And where will it end, by the formula?

# %%
load = timing.OtherLoad()
rows = []
with EmulatedFileSystem(directory / "one", lustre) as running:
    for readers in reader_counts:
        for seed in range(2):
            workload = Workload(readers, steps=3, files_per_step=1, file_bytes=10**6, compute_s=0.0, seed=seed)
            for kind, table in (("measured", running.run(workload, world)), ("simulated", simulate(lustre, workload))):
                rows.append((readers, seed, kind, summarise(table, workload)["throughput_gb_per_s"]))
choking = pd.DataFrame(rows, columns=["readers", "seed", "kind", "throughput_gb_per_s"])
choking_others = load.cores()

# %% alt="Throughput against the number of readers, on a logarithmic axis. Measured and simulated points lie on each other: they rise from somewhat below 30 megabytes per second with one reader, quickly at first and then little, and stay well below the dotted ceiling of 120 megabytes per second."
figure = draw.throughput(choking, lustre)

# %% [markdown]
# (Points are medians of two draws of targets, bars their range.) The full 120 MB/s is not reached, because some target has nothing to do while another is still busy. It would be for very many readers, when the hottest target has little more than the others. Until then, doubling the readers mostly doubles everyone's waiting.
#
# The second curve is from `simulate`: the same queues, worked out instead of waited for. It takes milliseconds where the readers take seconds, and it may have 8192 readers. How far does it agree with the readers that really waited?

# %%
both = choking.pivot(index=["readers", "seed"], columns="kind", values="throughput_gb_per_s")
deviation = both["simulated"] / both["measured"] - 1
print(
    f"simulated against measured: {100 * deviation.median():+.1f} % in the median, {100 * deviation.abs().max():.1f} % at most"
)
print(f"(other programs took {choking_others:.1f} of this machine's cores meanwhile, and delayed readers)")

# %% [markdown]
# Within a few per cent, if other programs leave the cores alone. That says that `simulate` does its sums right, no more: both follow the same picture of a Lustre, and whether a real one follows it is another question, to which we come with the published figures.
#
# ### Timeouts
#
# 64 readers at once, 4 MB each. Our readers give up when a request has waited for 2 s. **Predict:** does the job survive?

# %%
too_much = Workload(readers=64, steps=1, files_per_step=1, file_bytes=4 * 10**6, compute_s=0.0)
with EmulatedFileSystem(directory / "one", lustre) as running:
    gave_up = running.run(too_much, world)
first = gave_up[gave_up["failed"]].iloc[0]
print(f"after {first['end_s']:.2f} s reader {first['reader']:.0f} gives up waiting for target {first['target']:.0f}")
print(f"files on each target: {np.bincount(too_much.first_targets(lustre).ravel()).tolist()}")

# %% [markdown]
# 64 MB for an average target are 2.1 s of work, more than 2 s for the last in the queue. (The clock of a request starts when its file has been opened, hence a little more than 2 s in all.) One request whose turn comes too late, and with it the whole job: a parallel program in which one rank has failed ends for all. What the program sees is an ordinary read error. Here each rank asks for one and the same file, on target 0, 40 times at once:


# %%
def read_all(client, files: list) -> int:
    """Read files in as many threads, as a loader with a deep queue does."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(files)) as pool:
        return sum(map(len, pool.map(client.read, files)))


with EmulatedFileSystem(directory / "one", lustre) as running:
    running.place({"sample": 0})
    try:
        world.run(read_all, running.client(), ["sample"] * 40)
    except ranks.RankError as error:
        read_error = str(error).splitlines()[0]
        print(read_error)

# %% [markdown]
# (Error number 5 is `EIO`, input/output error, which is also what a real Lustre hands to a program that it cannot serve.)
#
# So there are three ways to give up without using the bandwidth: a **hot target** (remedy: spread large files over more targets), a queue of **opens** that is too long (remedy: fewer, larger files), and a **burst** for which someone cannot wait (remedy: read a little all the time, instead of much at once). One remedy helps against all three: do not read from there.
#
# ## Stage, so that it can be trusted
#
# **Staging** copies the data to a faster place first: to the burst buffer, or to a disk in each node. It is a copy, and copies go wrong: a job is killed half-way, a disk fills up, a file changes meanwhile. If the training then reads half a file, it may not even notice.
#
# Data first. `volumes` makes cubes of dark matter (see [notebook 01](01_data_parallel_training.ipynb)), once one per file, once 16 per file.


# %%
def write_volumes(directory: str, samples: int, size: int) -> None:
    from mpi4py import MPI

    from nurion_utils.datasets import volumes

    layouts = {0: ("many", 1), 1: ("few", 16)}
    if MPI.COMM_WORLD.rank in layouts:
        name, per_file = layouts[MPI.COMM_WORLD.rank]
        volumes.write(f"{directory}/{name}", samples, size, volumes_per_file=per_file)


data_set = directory / "scratch" / "volumes"
world.run(write_volumes, str(data_set), n_volumes, volume_size)
for name in ("many", "few"):
    files = list((data_set / name).glob("*.tfrecord"))
    print(f"{name}: {len(files)} files of {files[0].stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# The plan comes first, as data: which rank reads which files. The shares are equal in bytes, where each file counts 64 KiB more than it has, for the time that opening it takes. (Two further files are the indices of the volumes.)

# %%
plan = staging.plan(data_set, directory / "buffer" / "volumes", ranks=n_ranks)
print(plan)

# %% [markdown]
# A burst buffer is shared, so each file has to be copied once. Disks inside the nodes are not: every node needs everything. **Predict:** 1024 nodes, a data set of 1 TB, Lustre at 300 GB/s, network links of 12.3 GB/s (both are Nurion's), disks that write 2 GB/s. How long does it take if every node reads everything from Lustre? And if each reads a 1024th part and passes it on to its neighbour?

# %%
terabyte = staging.StagePlan.of_sizes([250_000_000] * 4000, ranks=1024, replicate=True)
nurion = sites.load("nurion")
lustre_gb_per_s, link_gb_per_s = nurion.file_systems["scratch"].bandwidth_gb_per_s, nurion.fabric.link_gb_per_s
everyone_reads_s = 1024 * terabyte.bytes / 1e9 / lustre_gb_per_s
passed_on_s = terabyte.time(lustre_gb_per_s, link_gb_per_s, destination_gb_per_s_per_rank=2.0)
print(f"everyone reads everything: {everyone_reads_s / 60:.0f} min; passed on: {passed_on_s / 60:.1f} min")
terabyte.table().head(3)

# %% [markdown]
# Passing on is the allgather of [notebook 02](02_ring_allreduce.ipynb), round the same ring. Lustre delivers each byte once, and the disks, not Lustre, set the time.
#
# Now carry the plan out, on the ranks:

# %%
report = staging.stage(data_set, directory / "buffer" / "volumes", world)
print(report)

# %% [markdown]
# What makes a copy trustworthy is the order of its last steps, for every file:
#
# 1. write it under a **temporary name**, hashing every block on the way;
# 2. see that the source still is what it was when the copy began;
# 3. **record** the name, size, time and hash in a journal;
# 4. **rename** it to its own name, which happens at once or not at all.
#
# So a file that can be seen under its name is whole, and its hash is known. **Predict:** what is left if the copy is killed in each of these steps? And why is the record made *before* the file can be seen?
#
# Try it. Some 300 MB in 1500 files are staged by a process of its own, and as soon as the first files can be seen, it is killed with SIGKILL, which no program can catch.

# %%
import signal
import subprocess
import sys

source, copy = directory / "scratch" / "large", directory / "buffer" / "large"
source.mkdir()
rng = np.random.default_rng(0)
for i in range(1500):
    (source / f"{i:04}.bin").write_bytes(rng.bytes(200_000))


def seen() -> list:
    """Files that a training job would find in the copy."""
    return sorted(copy.glob("*.bin")) if copy.exists() else []


process = subprocess.Popen([sys.executable, "-m", "nurion_utils.staging", str(source), str(copy)])
while len(seen()) < 100 and process.poll() is None:
    time.sleep(0.001)
process.send_signal(signal.SIGKILL)
process.wait()
time.sleep(0.5)  # its helpers end a moment after it
whole = sum(path.read_bytes() == (source / path.name).read_bytes() for path in seen())
unfinished = len(list(copy.glob(".nurion-part-*")))
print(f"{len(seen())} of 1500 files can be seen, {whole} of them are whole; {unfinished} temporary files are left over")

# %%
resumed = staging.stage(source, copy, world)
print(resumed)

# %% [markdown]
# The second run removed the temporary files and copied only what was missing. By step:
#
# | killed | what is left | the next run |
# |---|---|---|
# | while writing, or before the record | a temporary file | removes it, copies the file |
# | between record and rename | a temporary file, and a record of a file that is not there | the same; a record alone counts for nothing |
# | after the rename | the file, with its hash on record | has nothing to do |
#
# Were the record made after the rename, a kill between the two would leave a whole file of which nobody knows the hash.
#
# ### Trust, but verify
#
# A disk can also lose a bit later on. Here one bit changes, while size and time stay as they were. An ordinary run looks at these two only, and `verify` reads everything again:

# %%
victim = copy / "0007.bin"
before = victim.stat()
with open(victim, "r+b") as file:
    file.seek(1000)
    byte = file.read(1)
    file.seek(1000)
    file.write(bytes([byte[0] ^ 1]))
os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))

print(
    "without verify:",
    staging.stage(source, copy).copied_files,
    "files copied; still damaged:",
    victim.read_bytes() != (source / victim.name).read_bytes(),
)
verified = staging.stage(source, copy, world, verify=True)
print("with verify:   ", verified)
assert verified.mended_files == 1 and victim.read_bytes() == (source / victim.name).read_bytes()

# %% [markdown]
# And what could not end well is refused before it begins, in one sentence:

# %%
(source / "loop").symlink_to("/etc")
refusals = []
for a, b in ((source, source / "copy"), (source, copy), (directory / "nowhere", copy)):
    try:
        staging.stage(a, b)
    except staging.StageError as error:
        refusals.append(str(error).replace(str(directory), "..."))
        print("-", refusals[-1])
(source / "loop").unlink()

# %% [markdown]
# ## Train from both
#
# The same volumes lie on the "Lustre" and, staged, in a "burst buffer", emulated too. As on Nurion it has 8/3 of the bandwidth, and it spreads every file over all its servers.

# %%
buffer = ParallelFileSystem.of_site("local", "burst_buffer")
print(
    f"Lustre:       {lustre.targets} targets, together {lustre.bandwidth_gb_per_s * 1e3:.0f} MB/s, a file on {lustre.stripe_count}"
)
print(
    f"burst buffer: {buffer.targets} servers, together {buffer.bandwidth_gb_per_s * 1e3:.0f} MB/s, a file on {buffer.stripe_count}"
)

# %% [markdown]
# `pipeline.dataset` reads with `tf.data`; each file is opened when its turn has come. Two networks that are equal at the start are trained, one from each, an epoch of one and an epoch of the other in turn: so both meet the same machine, whatever else it has to do. **Predict:** what will differ between the two, the time of an epoch, the loss, or both?


# %%
def train(sources: dict, size: int, epochs: int) -> list:
    """Train CosmoFlow's small sister from each source in turn; a row for each epoch and source."""
    import time

    import horovod.tensorflow as hvd
    import keras

    from nurion_utils import models, timing
    from nurion_utils.datasets import pipeline
    from nurion_utils.training import DistributedOptimizer

    hvd.init()
    networks, data, steps, rows = {}, {}, {}, []
    for name, (files, client) in sources.items():
        keras.utils.set_random_seed(0)  # so that the networks begin alike, on all ranks too
        mine = files[hvd.rank() :: hvd.size()]
        data[name], steps[name] = iter(pipeline.dataset(mine, client, batch_size=4, epochs=None)), 16 * len(mine) // 4
        networks[name] = models.cosmoflow_small(size)
        networks[name].compile(DistributedOptimizer(keras.optimizers.Adam(1e-3)), "mse", jit_compile=False)
    for epoch, name in timing.turns(list(sources), epochs):
        networks[name].reset_metrics()
        begin, wait_s = time.perf_counter(), 0.0
        for _ in range(steps[name]):
            asked = time.perf_counter()
            batch = next(data[name])
            wait_s += time.perf_counter() - asked
            loss = networks[name].train_on_batch(*batch)
        time_s = time.perf_counter() - begin
        rows.append({"epoch": epoch, "storage": name, "loss": float(loss), "wait_s": wait_s, "time_s": time_s})
    return rows


folders = {"Lustre": data_set, "burst buffer": directory / "buffer" / "volumes"}
load = timing.OtherLoad()
with EmulatedFileSystem(folders["Lustre"], lustre) as slow, EmulatedFileSystem(folders["burst buffer"], buffer) as fast:
    readers = {
        name: (sorted(map(str, (folders[name] / "few").glob("*.tfrecord"))), emulated.client())
        for name, emulated in {"Lustre": slow, "burst buffer": fast}.items()
    }
    of_ranks = world.run(train, readers, volume_size, epochs)
trained = pd.DataFrame([row for rows in of_ranks for row in rows]).groupby(["epoch", "storage"]).mean()
counted = trained.drop(index=0).unstack()  # the first epoch has TensorFlow's start in it
waits = timing.Comparison(tuple(counted["wait_s"]["Lustre"] / counted["wait_s"]["burst buffer"]), load.cores())
result = pd.DataFrame(
    {
        "loss of the last epoch": counted["loss"].iloc[-1],
        "waited for input in an epoch, s": counted["wait_s"].median(),
        "time of an epoch, s": counted["time_s"].median(),
    }
)
print(f"waiting for Lustre over waiting for the burst buffer: {waits}")
result.style.format("{:.3f}")

# %% [markdown]
# The same numbers were learned from, in the same order: the loss is the same to the last digit shown, and only the time differs. That is what staging has to be: invisible but for the clock. (The ratio above is of neighbouring epochs. Where other programs keep the cores busy it may be too noisy to tell, and then says so.)
#
# ## How well is the accelerator used?
#
# The benchmark MLPerf Storage asks one number of a storage system: **accelerator utilisation**, the time spent computing over the total time. A storage system passes with CosmoFlow from 70 % on. It does not train a network, it waits as long as one would take: what is measured is the storage, and no accelerator is needed. `pipeline.measure_pipeline` does so on your ranks, which meet after every step.
#
# What can be done in the pipeline before anyone buys a burst buffer: read **ahead** while training computes (prefetch), read **several files at once** (interleave), **keep** the data in memory after the first epoch, pack volumes into **fewer files**. **Predict** for each of these: will it help on Lustre, and will it help with many small files?

# %%
from nurion_utils.datasets import pipeline
from nurion_utils.datasets.pipeline import Source

settings = {
    "on demand": {"batch_size": 8},
    "2 batches ahead": {"batch_size": 8, "prefetch": 2},
    "+ 4 files at once": {"batch_size": 8, "prefetch": 2, "cycle_length": 4},
    "+ kept in memory": {"batch_size": 8, "prefetch": 2, "cycle_length": 4, "cache": True},
}
load = timing.OtherLoad()
with EmulatedFileSystem(folders["Lustre"], lustre) as slow, EmulatedFileSystem(folders["burst buffer"], buffer) as fast:
    sources = {
        f"{name}, {layout} files": Source(folders[name] / layout, emulated.client())
        for name, emulated in {"Lustre": slow, "burst buffer": fast}.items()
        for layout in ("many", "few")
    }
    observed = pipeline.measure_pipeline(
        world, sources, settings, pipeline_steps, compute_s=0.03, repeats=pipeline_repeats, caches=["warm"]
    )
pipeline_others = load.cores()
utilisation = pipeline.accelerator_utilisation(observed)
utilisation.groupby(["source", "setting"], sort=False)["accelerator_utilisation"].median().unstack().style.format(
    "{:.0%}"
)

# %% alt="Bars of accelerator utilisation for four sources and four settings of the input pipeline, with a dashed line at the 70 per cent of MLPerf Storage. Lustre is lowest on demand and stays below the burst buffer in every setting with few large files. With many small files the two storages come close to each other once several files are read at once."
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
looks = {"on demand": (style.GREY, ""), "2 batches ahead": (style.SKY, "//")}
looks |= {"+ 4 files at once": (style.BLUE, ""), "+ kept in memory": (style.ORANGE, "xx")}
values = utilisation.groupby(["source", "setting"])["accelerator_utilisation"].agg(["median", "min", "max"]) * 100
for i, (setting, (colour, hatch)) in enumerate(looks.items()):
    of_setting = values.xs(setting, level="setting").loc[list(sources)]
    spread = [of_setting["median"] - of_setting["min"], of_setting["max"] - of_setting["median"]]
    at = np.arange(len(sources)) + 0.2 * (i - 1.5)
    axis.bar(
        at,
        of_setting["median"],
        0.19,
        yerr=spread,
        color=colour,
        hatch=hatch,
        ec="black",
        lw=0.6,
        capsize=2,
        label=setting,
    )
least = 100 * pipeline.MINIMUM_UTILISATION["CosmoFlow"]
axis.axhline(least, color="black", ls="--", lw=1)
axis.annotate("CosmoFlow passes", (0, least + 1), xycoords=("axes fraction", "data"), fontsize=8)
axis.set_xticks(range(len(sources)), sources)
axis.set(ylabel="accelerator utilisation, %", ylim=(0, 100))
style.legend_above(figure, 4)
plt.show()

# %% [markdown]
# With **few large files** the bandwidth decides, and the burst buffer is ahead. With **many small ones** both storages answer no more than 400 opens a second, and a faster disk does not open files any faster: once several files are read at once, they are alike, and what limits both is the metadata server.
#
# Reading **ahead** hides the wait as long as it is shorter than the computation; it cannot make a storage deliver more. Reading **several files at once** keeps several targets busy, which is what many small files need. With few large files it gains nothing and can even lose: the first batch now waits for four large files instead of one. **Keeping** the data helps from the second epoch on, and the run above has two; how far memory goes is another matter: Nurion's nodes have 82 GB for a job, and 1024 of them together 84 TB, if each keeps only its own share.
#
# ### A trap: the page cache
#
# All of these had been told to wait. A *real* disk has a trick of its own: what was read lately stays in the memory of the operating system, the **page cache**. If you measure a loader twice, you measure the disk once, and memory after that. So `measure_pipeline` knows both states, and its column `resident` says which part of the files was in memory when the run began. (`wait_s` is per step.)

# %%
plain = {"local disk": Source(folders["burst buffer"] / "few")}
local = pipeline.measure_pipeline(world, plain, {"on demand": {"batch_size": 8}}, 8, compute_s=0.0, repeats=3)
local.groupby("cache")[["resident", "wait_s", "samples_per_s"]].median().style.format("{:.3g}")

# %% [markdown]
# If `resident` is 0 for cold, the files had to come from the disk, or from what stands behind it. (A file system that lives in memory cannot forget; then it is 1 in both rows, and they are alike.) How much slower cold is depends on your disk; decoding a volume costs the same in both.
#
# ## To 8192 nodes
#
# Now the real machine. CosmoFlow on Cori: one file of 8 MB per node and step, 129 ms of computing, one step read ahead. The Lustre has 248 targets, together 700 GB/s, so 2.8 GB/s each. Two things are not known. It is *remembered*, but published nowhere that we know, that the data lay on only 64 targets. And late in its life all targets together were *measured* at 364 GB/s, 1.5 GB/s each; how fast they were on that day nobody wrote down. So all four combinations are drawn, beside the burst buffer with its 262 servers.
#
# **Predict:** in which order do the curves leave the ideal one, on which twice the nodes take half the time?

# %%
cori = cases.cori()
node_counts = [2**k for k in range(6, 14)]
begin = time.perf_counter()
scaling = cases.scaling(cori, node_counts)
print(f"{len(scaling)} simulated epochs in {time.perf_counter() - begin:.1f} s")
scaling[scaling["nodes"].isin([1024, 8192])].round(3)

# %% alt="Time of an epoch against nodes, both logarithmic, simulated for Cori's Lustre with 248 and with 64 targets, each as described and as measured later, and for its burst buffer. All lie on one falling line up to about 1000 nodes; then the Lustres with 64 targets flatten, first the slower one; with 248 slower targets the line flattens at 4096, and the burst buffer goes on to 8192. A vertical dotted line marks the 1024 nodes that Lustre could not pass; a star marks the published step time at 8192 nodes, above the burst buffer's curve because it includes communication."
figure = draw.epochs(scaling, published)

# %% [markdown]
# (An epoch here has 262,144 samples, so that 8192 nodes take 32 steps.) On 64 targets, the curves stop falling between about 900 and 2000 nodes: more nodes gain nothing. Nothing *fails* in this model; "could not go further" may have meant either. The node counts at which the input takes as long as the computation, beside the two rules of thumb:

# %%
ends = pd.DataFrame(
    {
        name: {
            "bandwidth / demand": cases.node_limit(each.bandwidth_gb_per_s),
            "hottest target, formula": cases.hottest_target_limit(each),
            "simulated": cases.simulated_limit(each),
        }
        for name, each in cori.items()
    }
).T
ends

# %% [markdown]
# Read the table as a reckoning. By the mean bandwidth of all targets Lustre feeds 11,290 nodes, eleven times the 1024 of the real job. Three things bring that down: that the data lie on a quarter of the targets (a factor of 3.9), that the targets are slower than described (1.9), and that the hottest of them sets the pace (1.4 to 1.7). Together they come to 915, and without the second to 2047: both within a factor of two of 1024. The first is remembered, the second was measured at another time, the third follows from chance. So this is a **hypothesis that the simulation supports**, no more; what ended the real job is not published.
#
# At 8192 nodes the burst buffer gives 30 % of its bandwidth. The published efficiency of 77 % there is below the simulated 100 % because the nodes also have to talk to each other, which is not in this model.
#
# ### Nurion's own test
#
# KISTI trained on the images of ImageNet-11k with 512 nodes, and varied the batch per node. From Lustre and burst buffer alike up to 128 images; **from 256 on the job on Lustre died**; the burst buffer went on to 512; 1024 did not fit into the nodes' memory.
#
# **Predict** from what you know now: is it bandwidth? 512 nodes, about 60 images per second each (remembered, for such a node), 92 kB an image.

# %%
sweep = cases.batch_sweep(cases.nurion())
one = sweep.iloc[0]
print(
    f"mean demand: {one['demand_gb_per_s']:.1f} GB/s, {100 * one['demand_over_peak']:.1f} % of Lustre's bandwidth, whatever the batch"
)

# %% alt="For each batch per node from 16 to 1024, a marker says what becomes of the job: three rows modelled, two published. Modelled Lustre as described runs up to 512; Lustre with 1000 opens per second dies from 256 on, where the published job died; the burst buffer runs to 512 in both. At 1024 the model says out of memory, as published for the burst buffer."
figure = draw.batches(sweep, published)

# %% [markdown]
# It is not bandwidth: 1 % of it is wanted, and the batch does not even change that. With the 46,580 opens a second of our description the modelled Lustre lives on (first row). But the batch sets the size of a **burst**: 512 nodes that open 256 images each at the same moment are 131,072 opens. If the metadata server managed only 1000 of them in a second, because others use it too, the last would have to wait for 131 s, longer than the timeout of 100 s. At 128 images it is 66 s (second row). The 1000 is chosen to make it so, and nobody knows the real number.
#
# How special is that choice? This map asks, for each setting, what becomes of batch 128 and batch 256. Only in the hatched band does the smaller live and the larger die.

# %% alt="Three panels for timeouts of 20, 100 and 300 seconds; in each, opens per second against the number of batches opened at once. A diagonal hatched band, a factor of two wide, separates the settings in which both batches run, above, from those in which both fail, below."
settings_map = cases.timeout_map()
figure = draw.timeouts(settings_map)

# %% [markdown]
# The band is a factor of two wide everywhere, because the batches differ by a factor of two. So bursts, opens and a timeout *can* reproduce what was seen, and need one particular ratio for it. With the full 46,580 opens a second, for example, a loader that opens 64 batches at once would do it. **Why the job died is not published**; this is one explanation that is consistent with it, and mean bandwidth is not one.
#
# And a batch of 1024? 512 images fit into the 82 GB of a node and 1024 do not, so one image takes 80 to 160 MB of activations. No storage helps there. (On Lustre that job is reported as dead, too; in our model it does not come so far.)
#
# ## When does staging pay?
#
# Staging costs time before the first step. If an epoch is $\Delta t$ shorter for it, it has paid after $t_\text{stage} / \Delta t$ epochs. Both grow with the data in proportion, so the amount of data cancels out; what remains is the number of nodes. **Predict:** more nodes, does staging pay sooner or later? Take the most pessimistic of the Lustres above, 64 targets as measured, with 94 GB/s, from which staging reads as well.

# %%
pays = cases.break_even(cori["Lustre, 64 targets as measured"], cori["burst buffer"], [512, 1024, 2048, 8192], [1, 10])
pays.round(2)

# %% alt="Four panels for 512, 1024, 2048 and 8192 nodes: time against epochs, dashed from the shared file system, solid staged first. At 512 nodes the lines are parallel and staging never pays; at 1024 they cross after 15 epochs; at 2048 after 2.4; at 8192 after 1.2."
figure = draw.break_even(pays, epochs=20)

# %% [markdown]
# (The titles round up to whole epochs.) As long as Lustre keeps up there is nothing to win. From there on each further node leaves Lustre's epoch as long as it was, and shortens the staged one. A training of 80 epochs at 8192 nodes:

# %%
at_8192 = pays[(pays["nodes"] == 8192) & (pays["data_tb"] == 10)].iloc[0]
direct_h = 80 * at_8192["epoch_slow_s"] / 3600
staged_h = (at_8192["stage_s"] + 80 * at_8192["epoch_fast_s"]) / 3600
print(f"80 epochs of 10 TB on 8192 nodes: {direct_h:.1f} h from Lustre, {staged_h:.1f} h staged")

# %% [markdown]
# ## The same on Nurion
#
# On Nurion the burst buffer is a DDN **IME**. It shows the files of `/scratch` a second time, under `/scratch_ime`, and `ime-ctl` moves their data: `-i` in, `-r` back out, and `-p` purges, which frees the buffer. A job asks for it in its script. Yours, with your own folder (change the folder, the command, the nodes and hours; the application after `-A` must be one that Nurion knows, so for PyTorch add `options={"-A": "pytorch"}`):

# %%
from nurion_utils import jobs

job = jobs.Job('python train.py "$DATA" "$RESULTS"', "nurion", nodes=512, hours=2, data="/scratch/$USER/imagenet")
print(jobs.script(job))

# %% [markdown]
# (If the time runs out, the batch system ends the job before it has written back: ask for more hours than you need.)
#
# `jobs.explain(job)` writes the same script with a comment above each line: why it is there, and who says so. A job that breaks a rule of the site is refused before it is submitted, and `jobs.lint` names all of its faults at once, with the source and the date of each rule. **Predict:** this one asks for the whole of Nurion for two days and a half. What is wrong with it?

# %%
too_large = jobs.Job("python train.py", "nurion", nodes=nurion.node.count, hours=60)
findings = jobs.lint(too_large)
for finding in findings:
    print("-", finding.sentence)
assert {finding.rule for finding in findings} == {"queues.normal.most_hours", "queues.normal.most_nodes"}

# %% [markdown]
# By that rule all of Nurion is nobody's job, so what is extrapolated to 8305 nodes in these notebooks cannot be tried by a reader. A notebook is a job as well: `python -m nurion_utils.jobs notebooks/01_data_parallel_training.ipynb --site nurion --nodes 16 --dry-run` prints the script that runs it.
#
# **The trap.** After the training the burst buffer should be freed, and out of habit one types `rm -r`. But `/scratch_ime/you/imagenet` and `/scratch/you/imagenet` are two views of one file, of which the buffer may hold a second set of bytes. `rm` in either view **deletes the file, the original**. To drop only the buffer's bytes, write back what has changed with `ime-ctl -r --block`, then purge with `ime-ctl -p`, as the script does.
#
# Do not mix that up with `staging.purge`, which removes the copies that `stage` has made elsewhere. The functions of this package refuse to write or remove anything under `/scratch_ime`, also when it is reached through a link. (Programs of your own can ask, too: `jobs.guard(path)` raises a `BurstBufferError` for such a path.) Your shell does not refuse.

# %%
(directory / "my-buffer").symlink_to("/scratch_ime/you")
guarded = []
for path in ("/scratch_ime/you/imagenet", directory / "my-buffer" / "imagenet"):
    try:
        staging.purge(path)
    except staging.StageError as error:
        guarded.append(str(error).replace(str(directory), "..."))
        print("-", guarded[-1])

# %% [markdown]
# Other machines make a burst buffer for a job and copy into it before it starts: the same job with `site="cori"` has the directives of a Cray DataWarp, with `site="elcapitan"` those of a Rabbit. For a plain disk in each node, `stage(..., world, replicate=True)` inside the job does it, or `mpiexec -n 4 -ppn 1 python -m nurion_utils.staging --replicate SRC DST`: each file is read once, all nodes have the same in the end, and when a node is lost, what the others have on their disks stays there for the next run. (Ranks that share a node need places of their own: write `DST/{rank}`.)
#
# ## Exercises
#
# **1. What gives out first?** Nodes train ResNet-50 at 60 images per second each. The images are 92 kB, each in a file of its own, on a Lustre with 300 GB/s and 46,580 opens per second. How many nodes can it feed by its bandwidth, how many by its opens? And by its opens, if 1000 images are packed into a file? Round down to whole nodes.

# %% tags=["exercise"]
by_bandwidth, by_opens, by_opens_packed = None, None, None  # three whole numbers
# --- solution
by_bandwidth = int(300e9 / (60 * 92e3))
by_opens = int(46_580 / 60)
by_opens_packed = int(46_580 / (60 / 1000))
# --- end solution

# %% tags=["check"]
assert None not in (by_bandwidth, by_opens, by_opens_packed), "Put three numbers in place of the dots."
assert by_bandwidth != 300_000 // 92, "That is images per second in thousands: how many of them does a node take?"
assert all(isinstance(n, int) for n in (by_bandwidth, by_opens, by_opens_packed)), (
    "Round down to whole nodes, as int(...) does."
)
assert abs(by_bandwidth - 54_347) <= 1, "A node needs 60 x 92 kB = 5.52 MB/s; how often does that go into 300 GB/s?"
assert abs(by_opens - 776) <= 1, "A node opens 60 files per second; how often does that go into 46,580?"
assert abs(by_opens_packed - 776_333) <= 1, "With 1000 images to a file a node opens 0.06 files per second."
print("Right: 776 nodes with small files, and bandwidth for 54,347. Packed, opens are no longer the limit.")

# %% [markdown]
# **2. Never half a file.** `publish(path, data)` should write `data` to `path` so that a reader never finds a part of it, not even if the writer is killed. The check kills it. (`os.replace` renames a file at once or not at all. The check runs your function in a process of its own.)

# %% tags=["exercise"]
import os


def publish(path: str, data: bytes) -> None:
    # --- solution
    temporary = f"{path}.part"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
    # --- end solution


# %% tags=["check"]
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cloudpickle

with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as pickled:
    target = Path(folder) / "data"
    publish(str(target), b"x" * 10)
    assert target.exists(), "Nothing was written to the path: put your lines in place of the dots."
    assert target.read_bytes() == b"x" * 10, "What was written is not what was to be written."
    assert os.listdir(folder) == ["data"], f"Something is left behind beside the file: {sorted(os.listdir(folder))}."
    target.unlink()
    pickled.write(cloudpickle.dumps(publish))
    pickled.flush()
    program = f"import pickle; pickle.load(open({pickled.name!r}, 'rb'))({str(target)!r}, bytes(200_000_000))"
    alone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert alone.returncode == 0, f"In a process of its own it fails: {alone.stderr.strip().splitlines()[-1]}"
    target.unlink()
    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", program])
        while not os.listdir(folder) and writer.poll() is None:
            time.sleep(0.0005)
        time.sleep(0.004 * attempt)
        writer.kill()
        writer.wait()
        size = target.stat().st_size if target.exists() else 0
        assert size in (0, 200_000_000), (
            f"Killed half-way, a reader finds {size:,} of 200,000,000 bytes: write elsewhere first."
        )
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
print("Right: under its name the file is whole, or not there.")

# %% [markdown]
# **3. To stage or not to stage?** On this machine data is staged at 100 GB/s. Three jobs, each with 20 TB. An epoch from the shared file system and one from the burst buffer take:
#
# | job | epoch from Lustre | epoch from the burst buffer | epochs |
# |---|--:|--:|--:|
# | a | 300 s | 290 s | 15 |
# | b | 900 s | 120 s | 1 |
# | c | 240 s | 240 s | 200 |
#
# Answer True for those that should stage first.

# %% tags=["exercise"]
stage_first = {"a": None, "b": None, "c": None}
# --- solution
stage_first = {"a": False, "b": True, "c": False}
# --- end solution

# %% tags=["check"]
from nurion_utils.storage import cases

three_jobs = {"a": (300, 290, 15), "b": (900, 120, 1), "c": (240, 240, 200)}
assert all(answer is not None for answer in stage_first.values()), (
    "Put True or False in place of the dots for each job."
)
for job, (slow_s, fast_s, epochs_planned) in three_jobs.items():
    needed = cases.break_even_epochs(20_000 / 100, slow_s, fast_s)
    after = f"after {needed:.3g} epochs" if needed < float("inf") else "never"
    pays_off = f"Staging takes 200 s and saves {slow_s - fast_s} s an epoch: it pays {after}, and job {job} has {epochs_planned}."
    assert stage_first[job] == (needed < epochs_planned), pays_off
print("Right: what counts is what an epoch saves, not how fast the burst buffer is.")

# %%
import shutil

world.stop()
shutil.rmtree(directory)


# %%
def hold_unless_busy(holds: bool, others_cores: float, claim: str) -> None:
    """Claims about times need a machine that is ours: where it was not and they do not hold, that is said."""
    if others_cores > 0.5 and not holds:
        print(f"too noisy to tell whether {claim}, because {others_cores:.1f} cores were taken by others")
    else:
        assert holds, claim


assert limits.loc[("nurion", "Lustre"), "nodes of CosmoFlow fed"] == 4838
assert limits.loc[("nurion", "burst buffer"), "nodes of CosmoFlow fed"] == 12903
assert waited["ready_s"].max() > 1.2 * 16e6 / (lustre.bandwidth_gb_per_s * 1e9)  # the hottest target, not the mean
assert both["measured"].max() < 1.05 * lustre.bandwidth_gb_per_s
hold_unless_busy(abs(deviation.median()) < 0.15, choking_others, "simulated and measured throughput agree")
assert gave_up["failed"].any() and "did not answer within 2 s" in read_error
assert whole > 0 and resumed.files == 1500 and verified.verified
assert len(refusals) == 3 and len(guarded) == 2
assert np.ptp(counted["loss"].iloc[-1]) < 1e-5
assert waits.median > 1 or not waits.clear
median = utilisation.groupby(["source", "setting"])["accelerator_utilisation"].median()
few, many = median["burst buffer, few files"], median["burst buffer, many files"]
faster = few["on demand"] > median["Lustre, few files", "on demand"]
hold_unless_busy(faster, pipeline_others, "on demand, few files are read faster from the burst buffer")
fewer = few["2 batches ahead"] > many["2 batches ahead"]
hold_unless_busy(fewer, pipeline_others, "few files are read faster than many")
assert 512 <= ends.loc["Lustre, 64 targets as measured", "simulated"] <= 2048
assert scaling.set_index(["storage", "nodes"]).loc[("burst buffer", 8192), "efficiency"] > 0.99
outcome = sweep.set_index(["storage", "batch_per_node"])["outcome"]
assert outcome["Lustre, 1000 opens/s", 128] == "runs" and outcome["Lustre, 1000 opens/s", 256] == "read timed out"
assert outcome["Lustre", 256] == "runs" and outcome["burst buffer", 1024] == "out of memory"

# %% [markdown]
# ## What to take along
#
# - A node needs the bytes of a sample over the seconds it computes on it. Bandwidth over that is an upper limit to the number of nodes, and a bad prediction.
# - In a synchronous job the hottest target, the queue of opens and the first timeout decide, all of which can happen at a few per cent of the bandwidth.
# - First look what limits: opens want fewer files or several read at once, bandwidth wants reading ahead and then a faster storage.
# - A staged copy can be trusted if every file is hashed, recorded and renamed in this order; then it may be killed at any moment.
# - Staging pays from the number of nodes at which the shared file system no longer keeps up, and then soon.
# - On an IME, purge. Never `rm`.
#
# **Next:** the third wall, after communication and input: more nodes mean a larger batch, and what that does to learning.
