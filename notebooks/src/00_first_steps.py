# %% [markdown]
# # First steps: code on several ranks at once
#
# **Goal:** start a few processes that work together, let them compute one sum, and find out whether this environment is fit for the rest of the course.
#
# **You will be able to:** start *ranks* from a notebook, run a function or a cell on all of them, read the error when one of them fails, and stop them.
#
# **Prerequisites:** Python; no experience with supercomputers.
#
# **Minutes:** 5
#
# ## What this course is about
#
# A supercomputer is many computers, called *nodes*, joined by a fast network and sharing large file systems. Nurion, the fifth of the Korea Institute of Science and Technology Information (KISTI), has 8305 nodes with one Intel Xeon Phi processor of 68 cores each (the processor is nicknamed KNL), and 132 of another kind. A paper by KISTI on large-scale deep learning (2018/19, in Korean) names three walls that a scientist runs into there:
#
# | wall | what happens | notebook |
# |---|---|---|
# | communication | nodes wait for results from each other after every training step | 01, 02, 03 |
# | input | nodes wait for data | 04 |
# | large batches | more nodes, but the model learns worse | 05 |
#
# You will meet each wall on the machine in front of you, at a size where you can look at every number.
# Where it can, a section keeps one rhythm: *predict, measure, explain, extrapolate.*

# %% tags=["parameters"]
n_ranks: int = 4  # processes to start, 2 or more; on a machine with more cores, as many as it has

# %% [markdown]
# ## Start ranks
#
# A program that runs on many nodes is many copies of one program. Each copy is called a **rank** and has a number: 0, 1, 2, and so on. Ranks share no memory. They know of each other only what they send in messages, and the library that carries the messages is **MPI**, the Message Passing Interface.
#
# One line starts them. The ranks are separate processes beside this notebook; if there are more of them than processor cores, they take turns.

# %%
from nurion_utils import health, ranks, sites

world = ranks.start(n_ranks)
world

# %% [markdown]
# ## Say hello
#
# `world.run` sends a function to every rank, runs it there, and returns the results as a list: place 0 holds what rank 0 returned.
#
# **Predict:** the function below asks MPI for the rank's number and the operating system for the number of its process. Which of the two will be in order, which will differ from run to run?


# %%
def hello() -> str:
    import os

    from mpi4py import MPI

    comm = MPI.COMM_WORLD  # the group of all ranks, its "communicator"
    return f"rank {comm.rank} of {comm.size}, process {os.getpid()}, on cores {sorted(os.sched_getaffinity(0))}"


greetings = world.run(hello)
greetings

# %% [markdown]
# The ranks come in order because `world.run` sorts by rank. Process numbers are whatever was free. Each rank has been given its own share of the cores, and with more ranks than cores some share one.
#
# There is a second way. A cell that begins with `%%px` runs on the ranks instead of here, and what it defines stays there for the next such cell.

# %%
# %%px
from mpi4py import MPI

comm = MPI.COMM_WORLD
mine = (comm.rank + 1) ** 2
print(f"I hold {mine}")

# %% [markdown]
# ## One sum over all ranks
#
# Rank $r$ now holds $(r+1)^2$. The operation at the heart of distributed training is the **allreduce**: every rank contributes a value, and *every* rank receives the sum.
#
# **Predict:** with four ranks, what number will each print?

# %%
# %%px
total = comm.allreduce(mine)
print(f"the sum is {total}")

# %% [markdown]
# $1 + 4 + 9 + 16 = 30$, on all four. Nobody had to be told to wait: an allreduce is a *collective* operation, it completes when every rank has called it. This is its strength, and the reason why one missing rank can hold up 8000 others. You will see that in a moment.
#
# Deep learning programs seldom call MPI themselves. They use **Horovod**, which averages tensors over the ranks. Its allreduce gives the mean unless asked for the sum.

# %%
# %%px
import horovod.tensorflow as hvd
import tensorflow as tf

hvd.init()  # once per process: Horovod's ranks find each other
mean = float(hvd.allreduce(tf.constant(float(mine)), name="first"))  # ranks match tensors by name

# %% [markdown]
# `world.client[:]` stands for all ranks together; with a name in brackets it fetches that variable from each of them.

# %%
expected_mean = sum((rank + 1) ** 2 for rank in range(n_ranks)) / n_ranks
means = world.client[:]["mean"]
print(f"mean on each rank: {means}, expected {expected_mean}")

# %% [markdown]
# ## When one rank fails
#
# Suppose rank 1 stops with an error while the others have already entered the allreduce. Left alone, they would wait for it for ever. Here a watcher notices within seconds, ends the waiting ranks, and says who failed and where the others were.


# %%
def one_rank_forgets() -> int:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.rank == 1:
        raise FileNotFoundError("part-1.csv")
    return comm.allreduce(1)


try:
    world.run(one_rank_forgets)
except ranks.RankError as error:
    failure = str(error)
    print(failure)

# %% [markdown]
# The message names the rank and shows its traceback. Then it lists where each of the others was; `In[...]` is a cell of this notebook, and the line is that of the allreduce. The ranks are gone; one call brings fresh ones, with nothing of what the old ones had defined.

# %%
world.restart()
world.run(hello)[0]

# %% [markdown]
# A rank can also be missing without any error: it simply does not make the call. It is the mistake that everyone makes first, and left alone it ends in a cell that runs for ever. *Predict what the next cell says, and after how long.*


# %%
def only_rank_0_calls() -> int:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    return comm.allreduce(1) if comm.rank == 0 else 0


try:
    world.run(only_rank_0_calls)
except ranks.RankError as error:
    missing_call = str(error)
    print(missing_call)
world.restart()

# %% [markdown]
# After ten seconds it names the ranks that have finished and the one that waits for them, with its line. (In a notebook with a reader it tells you so under the cell, and makes an error of it after a minute.) A rank that computes for long while the others have finished is left alone: it is not in a call that waits.

# %% [markdown]
# ## Long work
#
# Wrap what a rank goes through into `ranks.progress`, and while the cell runs you see *one* bar for all ranks. (Where nobody watches, as when this notebook is executed for its web page, there is none.)


# %%
def long_work(items: int) -> int:
    import time

    from nurion_utils.ranks import progress

    for _ in progress(range(items), description="all ranks"):
        time.sleep(0.05)
    return items


done = world.run(long_work, 20)
sum(done)

# %% [markdown]
# ## Is this environment healthy?
#
# The report tries what the rest of the course needs. A line that is not `ok` says what to do about it. One line is often not `ok` on a laptop, and does little harm: cores that are busy with something else make timings noisy.

# %%
report = health.report(world)
report.style.hide(axis="index").set_properties(**{"text-align": "left"})

# %% [markdown]
# ## This machine and Nurion
#
# What a machine consists of stands in a description that all notebooks read. Each figure carries its source.

# %%
import pandas as pd

nurion, local = sites.load("nurion"), sites.load("local")
pd.DataFrame(
    {
        "this machine": [local.node.count, local.node.cores, local.node.memory_gb],
        "Nurion (KNL nodes)": [nurion.node.count, nurion.node.cores, nurion.node.memory_gb],
    },
    index=["nodes", "cores per node", "memory per node, GB"],
)

# %% [markdown]
# Nurion's peak speed follows from its description: nodes times cores times clock rate times operations per cycle, summed over its two kinds of nodes. The paper gives 25.7 PF, that is $25.7 \times 10^{15}$ operations per second.

# %%
for name, node in nurion.partitions.items():
    print(
        f"{name}: {node.count} x {node.cores} cores x {node.clock_ghz} GHz x {node.flop_per_cycle} operations per cycle"
    )
print(f"together {nurion.rpeak_pflops:.2f} PF")

# %% [markdown]
# The full table, with the source of every figure, is one command away: `python -m nurion_utils.sites show nurion`.
#
# ## Exercise
#
# Every rank holds a measurement. Complete the function so that each rank returns how far its own measurement lies from the mean over all ranks. One allreduce is enough.


# %% tags=["exercise"]
def deviation() -> float:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    mine = 10.0 + 3.0 * comm.rank  # the measurement of this rank; the others cannot see it
    result = None
    # --- solution
    result = mine - comm.allreduce(mine) / comm.size
    # --- end solution
    return result


deviations = world.run(deviation)

# %% tags=["check"]
measurements = [10.0 + 3.0 * rank for rank in range(n_ranks)]
wanted = [value - sum(measurements) / n_ranks for value in measurements]


def close_to(expected: list[float]) -> bool:
    return all(abs(a - b) < 1e-9 for a, b in zip(deviations, expected, strict=True))


assert None not in deviations, "The function returns None: put your line in place of the dots."
if not close_to(wanted):
    assert not close_to([value - sum(measurements) for value in measurements]), (
        "You subtracted the sum: divide what the allreduce returns by comm.size."
    )
    assert not close_to([-value for value in wanted]), "The sign is the other way round: own measurement minus mean."
    assert not close_to([0.0] * n_ranks), (
        "All are 0: each rank subtracted its own value; the mean needs comm.allreduce."
    )
    raise AssertionError(f"Expected {wanted}, the ranks returned {deviations}.")
print("Right:", deviations)

# %% [markdown]
# ## Stop
#
# Ranks that nobody stops are stopped when the notebook ends, however it ends. It is good manners to do it yourself.

# %%
world.stop()
world

# %%
assert len(greetings) == n_ranks and greetings[0].startswith("rank 0")
assert means == [expected_mean] * n_ranks
assert done == [20] * n_ranks
assert "rank 1 of" in failure and "FileNotFoundError" in failure
assert "rank 0 waits in allreduce" in missing_call
assert not report.loc[report["check"].str.startswith(("MPI", "Horovod", "ranks", "operation")), "ok"].eq(False).any()
assert abs(nurion.rpeak_pflops / 25.7 - 1) < 0.005

# %% [markdown]
# **Next:** [01 Data-parallel training](01_data_parallel_training.ipynb).
