# %% [markdown]
# # Ring-allreduce: build it, prove it, carry it to 8305 nodes
#
# **Goal:** write the ring-allreduce on real ranks, verify by counting that it sends as few bytes as any algorithm can, and find out where it is nevertheless the wrong choice.
#
# **You will be able to:** say how many messages and bytes an allreduce costs; write one and check it without running it; measure latency and bandwidth and predict times from them; choose an algorithm for a message and a number of nodes; say what a bad placement of ranks costs.
#
# **Prerequisites:** [Data-parallel training](01_data_parallel_training.ipynb), or at least its idea: every step ends with an average over all ranks.
#
# **Minutes:** 40 to read and run; the cells alone take about 1 on 2 cores
#
# ## The task
#
# Each of $P$ ranks holds an array of $N$ bytes. Afterwards each rank shall hold the sum of all $P$ arrays, element by element. For a network with 7 million weights $N$ is 28 MB, and it happens in every training step.
#
# **Predict** before you read on, and write your answers down:
#
# - Rank 0 collects all arrays, adds them up and sends the sum back. How many bytes pass through its network link, with 4 ranks and with 8305?
# - Is there a way in which no rank sends more than, say, $3N$ bytes, however many ranks there are?

# %% tags=["parameters"]
n_ranks: int = 4  # ranks that run the schedules, 3 to 8; the prints are made for 4
timing_repeats: int = 5  # repetitions of each timing; 20 narrow the spread
lab_ranks: list = [2, 4]  # hosts in the network lab; [2, 4, 8] takes half a minute more
lab_rate_mbit: float = 200.0  # speed of the links in the lab, in 10^6 bits per second
lab_sizes: list = [1024, 16384, 262144, 2097152]  # bytes; 16000000 shows the last few per cent

# %%
from nurion_utils import allreduce, ranks, sites

nurion = sites.load("nurion")
world = ranks.start(n_ranks)

# %% [markdown]
# ## Naive, by hand
#
# The obvious way first. Each rank's numbers are a power of ten, so that a sum shows who is in it: 1111 is the contribution of ranks 0 to 3, once each.

# %%
# %%px --no-stream
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, P = comm.rank, comm.size


def naive_allreduce(array):
    """Rank 0 takes all arrays, adds them up, and sends the sum back to one rank after the other."""
    if rank == 0:
        received = np.empty_like(array)
        for source in range(1, P):
            comm.Recv(received, source)
            array += received
        for destination in range(1, P):
            comm.Send(array, destination)
    else:
        comm.Send(array, 0)
        comm.Recv(array, 0)


array = np.full(6, 10**rank)
naive_allreduce(array)
print(array)

# %% [markdown]
# Right on all ranks. But rank 0 received $(P-1)N$ bytes and sent as many, while the others' links were idle most of the time. What does that mean for the 28 MB of CosmoFlow's gradient on all of Nurion's nodes?

# %%
from nurion_utils import models

link = allreduce.Link.of(nurion)
gradient_bytes = 4 * models.COSMOFLOW_WEIGHTS  # float32
naive_s = allreduce.time(allreduce.naive(nurion.node.count), gradient_bytes, link)
print(
    f"{nurion.node.count} nodes: {(nurion.node.count - 1) * gradient_bytes / 1e9:.0f} GB in, as much out: {naive_s:.0f} s"
)

# %% [markdown]
# So many seconds for every training step.
#
# On your machine you would hardly notice: its ranks talk through memory, and rank 0 has no link that could clog. So here is a small network. In this **lab** each rank sits on a virtual node: it has a host name, processes and a network of its own (Linux calls them namespaces), and a cable to a switch whose rate is limited. Where a machine does not permit this, the cell says why, and goes on with measurements that were recorded elsewhere.

# %%
import pandas as pd

from nurion_utils import recordings
from nurion_utils.allreduce import ALGORITHMS


def contenders(n: int) -> dict:
    """A schedule of each algorithm for n ranks, and None for MPI's own allreduce."""
    return {name: algorithm(n) for name, algorithm in ALGORITHMS.items()} | {"native": None}


lab_tables, lab_origin = [], "measured here"
try:
    for n in lab_ranks:
        with ranks.start(n, rate_mbit=lab_rate_mbit) as hosts:
            lab_tables.append(allreduce.measure_allreduce(hosts, contenders(n), lab_sizes, repeats=3))
    lab_table = pd.concat(lab_tables)
except ranks.NodesError as error:
    lab_table, lab_origin = recordings.load("network_lab"), "RECORDED on another machine"
    print(str(error).splitlines()[0])
largest = lab_table["size_bytes"].max()
print(f"{len(lab_table)} observations, {lab_origin}")

# %% [markdown]
# The table also holds the ring, which you will build in a moment, and other algorithms that come later. *Theory* in the figure is the number of bytes that must pass through the busiest link, by its rate. **Predict:** from 2 to 4 hosts, by what factor does the time of the naive way grow?

# %% alt="Time of an allreduce of the largest array against the number of hosts in the network lab. Naive rises in proportion to the number of hosts less one, the ring stays below twice the time of sending the array once; dashed lines show the theory for both and lie just below the measurements."
import matplotlib.pyplot as plt
import numpy as np

from nurion_utils import style, timing

style.use()
colours = {"naive": style.VERMILION, "tree": style.ORANGE, "ring": style.BLUE, "recursive_doubling": style.GREEN}
colours |= {"rabenseifner": style.PINK, "native": style.BLACK}
STYLES = {
    name: dict(color=colours.get(name, style.GREY), marker=marker)
    for name, marker in zip(contenders(2), "svo^Dx<>", strict=False)
}
big = lab_table[lab_table["size_bytes"] == largest].groupby(["contender", "ranks"])[["time_s", "theory_s"]].median()
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name in ("naive", "ring"):
    axis.plot(big.loc[name, "time_s"], label=f"{name}, {lab_origin}", **STYLES[name])
    axis.plot(big.loc[name, "theory_s"], "--", color=STYLES[name]["color"], lw=1, label=f"{name}, theory")
axis.set(xlabel="hosts", ylabel=f"time of an allreduce of {largest / 1e6:.1f} MB, s", ylim=(0, None))
axis.set_xticks(sorted(lab_table["ranks"].unique()))
axis.legend(frameon=False)
plt.show()

# %%
above_theory = (big["time_s"] / big["theory_s"]).dropna().unstack().round(2)
above_theory.loc[["naive", "ring"]].rename_axis(index="measured / theory", columns="hosts")

# %% [markdown]
# The time of the naive way follows the theory, $2(P-1)N$ bytes through the link of rank 0. Something else is possible.
#
# ## The ring, step by step
#
# Cut the array into $P$ chunks. In every step each rank sends one chunk to its right neighbour and receives another one from its left. All links work all the time, in both directions at once, and each carries only a $P$-th of the array per step.
#
# Two words for what happens to a chunk that arrives: it is **reduced**, that is added to the receiver's own, or it is **copied** over it. And why `Sendrecv`, which does both at once? If every rank first called `Send`, each might wait for its neighbour to receive, for ever.
#
# One number per chunk will do to watch it. Again every rank brings its power of ten.

# %%
# %%px --no-stream
chunks = np.full(P, 10**rank)
right, left = (rank + 1) % P, (rank - 1) % P
print(f"rank {rank}: {chunks}")


def step_of_the_ring(step, reduce):
    """Send chunk (rank - step) to the right; add what comes from the left to my own, or take it as it is."""
    out, into = (rank - step) % P, (rank - step - 1) % P
    received = np.empty(1, dtype=int)
    comm.Sendrecv(chunks[out : out + 1], right, recvbuf=received, source=left)
    chunks[into] = chunks[into] + received[0] if reduce else received[0]


# %% [markdown]
# **Predict:** in step 0 rank $r$ sends its chunk number $r$. Which chunk of rank 2 holds two contributions afterwards, and whose?

# %%
# %%px --no-stream
step_of_the_ring(0, reduce=True)
print(f"rank {rank}: {chunks}")

# %% [markdown]
# Rank 2 received chunk 1 from rank 1, so its chunk 1 reads 110. In the next step rank 2 passes on just this chunk, which then collects rank 3's contribution, and so on. Each chunk travels round the ring and grows.

# %%
# %%px --no-stream
for step in range(1, P - 1):
    step_of_the_ring(step, reduce=True)
    print(f"after step {step}: {chunks}")

# %% [markdown]
# After $P-1$ steps every chunk is complete, 1111, on exactly one rank. This half is called **reduce-scatter**: the sum is there, scattered over the ranks. The second half, the **allgather**, hands the complete chunks round. It is the same motion: the same neighbours, the same chunk numbers counting on. Only now what comes is copied instead of added.

# %%
# %%px --no-stream
for step in range(P - 1, 2 * (P - 1)):
    step_of_the_ring(step, reduce=False)
    print(f"after step {step}: {chunks}")
assert (chunks == sum(10**r for r in range(P))).all()

# %% [markdown]
# ## Verify it by counting
#
# The same for arrays of any length, with a count of what is sent. `np.array_split` cuts into nearly equal parts; they are views, so the array changes in place.


# %%
# %%px --no-stream
def ring_allreduce(array):
    """Sum over all ranks, in place; returns the messages and bytes that this rank sent."""
    parts, messages, bytes_sent = np.array_split(array, P), 0, 0
    for step in range(2 * (P - 1)):
        out, into = parts[(rank - step) % P], parts[(rank - step - 1) % P]
        received = np.empty_like(into)
        comm.Sendrecv(out, right, recvbuf=received, source=left)
        into[:] = into + received if step < P - 1 else received
        messages, bytes_sent = messages + 1, bytes_sent + out.nbytes
    return messages, bytes_sent


counts = {}
for n in (1, 1000, 12345):
    array = np.arange(n) * (rank + 1)
    counts[n] = ring_allreduce(array)
    assert (array == np.arange(n) * P * (P + 1) // 2).all()
print({n: f"{messages} messages, {bytes_sent} bytes" for n, (messages, bytes_sent) in counts.items()})

# %% [markdown]
# **Check it against the claim:** each rank sends $2(P-1)$ messages, whatever the length. The bytes of all ranks together are $2(P-1)N$, so each sends
#
# $$\frac{2N(P-1)}{P}$$
#
# on average. Where $N$ cannot be divided by $P$, chunks differ by an element, and so do the ranks.

# %%
P = n_ranks
counted = world.client[:]["counts"]
for n in (1, 1000, 12345):
    messages, bytes_sent = zip(*(of_rank[n] for of_rank in counted), strict=True)
    assert set(messages) == {2 * (P - 1)}
    assert sum(bytes_sent) == 2 * (P - 1) * 8 * n
print(f"{2 * (P - 1)} messages per rank and {2 * (P - 1) / P:g} N bytes on average: verified on {P} ranks")

# %% [markdown]
# So your second prediction has its answer: for any number of ranks a rank sends *less than 2N bytes*. All ranks together send $2(P-1)N$, no less than in the naive way; but there rank 0 carries half of it, and here everyone carries a $P$-th. Patarasuk and Yuan (2009) showed that the busiest rank of any algorithm must send $2N(P-1)/P$ bytes (unless the network itself adds up). The ring is **bandwidth-optimal**.
#
# ## The plan as data
#
# What you have written is a plan buried in a loop: to see what rank 3 does in step 5 you must run it, or think. Written out as data it can be looked at, counted and checked before anything runs. A `Transfer` says who sends which chunk to whom, and whether it is reduced there (the default) or copied. A `Step` is what happens at the same time, a `Schedule` all steps. In print, `0 +> 1 [3]` means that rank 0 sends chunk 3 to rank 1, where it is reduced; with `=>` it is copied.

# %%
from nurion_utils.allreduce import Schedule, Step, Transfer

steps = [
    Step.of([Transfer(r, (r + 1) % P, chunk=(r - step) % P, reduce=step < P - 1) for r in range(P)])
    for step in range(2 * (P - 1))
]
my_ring = Schedule("my ring", ranks=P, chunks=P, steps=tuple(steps))
print(my_ring)

# %% [markdown]
# Compare this with your loop: the same formula, once for all ranks. And it is what the package has; from here on we use that one.

# %%
assert my_ring == allreduce.ring(P)

# %% alt="One panel before and one after each step of the ring; rows are ranks, columns chunks, and each cell says how many contributions are in it. In the reduce-scatter the complete chunks appear along a diagonal, in the allgather they spread to all ranks. Curved arrows mark transfers from each rank to the next."
figure = allreduce.draw(my_ring)

# %% [markdown]
# The same as a moving picture:

# %% alt="An animation of the same panels, one step per second."
allreduce.animate(my_ring)

# %% [markdown]
# ### Right or wrong, without running
#
# `check` follows every rank's contribution to every chunk through the steps. Suppose someone has mistyped one of the chunks. On ranks you would get a wrong sum, and no error.

# %%
steps = [list(step) for step in my_ring.steps]
steps[1][0] = steps[1][0]._replace(chunk=0)
mistyped = Schedule("mistyped ring", P, P, tuple(Step.of(step) for step in steps))
try:
    allreduce.check(mistyped)
except allreduce.ScheduleError as error:
    found = str(error)
    print(found)

# %% [markdown]
# It also finds contributions that never arrive, and ranks that would wait for ever, such as the second of two that send to the same rank in one step. `run` checks first, so a broken schedule never reaches the network.
#
# ### On the ranks
#
# `allreduce.run(schedule, comm, array)` carries a schedule out: one `Sendrecv` and one addition per step, as you have written it. `CountingComm` counts at MPI's calls. The algorithms that you have met in the lab's table:
#
# - **naive**: to rank 0 and back, one rank after the other;
# - **tree**: in each step half of those who still hold a sum hand it to a neighbour, until rank 0 has it all; then back the same way. $2\log_2 P$ steps, whole arrays;
# - **recursive doubling**: partners at distance 1, 2, 4, ... swap whole arrays and add. $\log_2 P$ steps;
# - **Rabenseifner**: partners swap *halves*, then quarters, and so on, until each has a complete chunk; then the same backwards to hand the chunks out. $2\log_2 P$ steps;
# - **ring**: $2(P-1)$ steps, a $P$-th of the array each.
#
# **Predict:** which of them sends the most messages from one rank, and which the most bytes?


# %%
def count(schedule: Schedule, n: int) -> tuple[int, int]:
    """What this rank really sends in an allreduce of n float32: messages, bytes."""
    import numpy as np
    from mpi4py import MPI

    from nurion_utils import allreduce

    comm = allreduce.CountingComm(MPI.COMM_WORLD)
    allreduce.run(schedule, comm, np.ones(n, "float32"))
    return comm.messages, comm.bytes_sent


rows = []
for name, schedule in contenders(P).items():
    if schedule is not None:
        sent = world.run(count, schedule, 100_000)
        said = [(schedule.messages(r), schedule.bytes_sent(r, 400_000, itemsize=4)) for r in range(P)]
        assert sent == said
        messages, bytes_sent = zip(*sent, strict=True)
        rows.append((name, len(schedule.steps), max(messages), max(bytes_sent) / 4e5, sum(bytes_sent) / 4e5))
columns = ["algorithm", "steps", "messages of the busiest rank", "N sent by the busiest rank", "N sent by all"]
volume = pd.DataFrame(rows, columns=columns).set_index("algorithm")
volume.style.format("{:g}")

# %% [markdown]
# What was counted at the calls is what the schedules say, to the byte. Over the wires of the lab it was the same plus the headers of the network's packets:

# %%
wire = lab_table[(lab_table["size_bytes"] == largest) & lab_table["theory_s"].notna()]
headers = ((wire["wire_bytes"] / wire["bytes_sent"] - 1) * 100).groupby(wire["contender"]).median()
print(f"bytes on the wire beyond those of the schedule ({lab_origin}):")
print(headers.map("{:.1f} %".format).to_string())

# %% [markdown]
# Where does the time go? A run can keep a trace. Here is the ring with 8 MB on your ranks. Most of it is sending, receiving and waiting; adding up is a small part. Where there are more ranks than cores, a long grey bar is a rank that waits for a neighbour who has no core just now, or has none itself.


# %% alt="A bar per rank over time. Grey stretches with the number of the step are sending and receiving, hatched blue stretches in the first half are reductions. Single grey stretches can be much longer than the others: there a rank waited for a core."
def traced(n: int) -> list[dict]:
    import numpy as np
    from mpi4py import MPI

    from nurion_utils import allreduce

    ring, array = allreduce.ring(MPI.COMM_WORLD.size), np.ones(n, "float32")
    for _ in range(3):  # the last one counts: memory is warm then
        trace = []
        allreduce.run(ring, MPI.COMM_WORLD, array, op="mean", trace=trace)
    return trace


trace = pd.DataFrame([row for rows in world.run(traced, 2_000_000) for row in rows])
figure = allreduce.draw_trace(trace)

# %% [markdown]
# ## Time against size
#
# A message costs a start-up time $\alpha$, however short it is, and $\beta$ seconds per byte. The ring with its $2(P-1)$ messages then takes
#
# $$t = 2(P-1)\,\alpha + \frac{2N(P-1)}{P}\,\beta$$
#
# (adding up costs something as well, usually called $\gamma$; here it is counted in $\beta$). `allreduce.time` works this out for any schedule.
#
# **Predict:** for which sizes will the ring lose against algorithms with fewer steps?

# %%
sizes = [2**k for k in range(10, 23)]
times = allreduce.measure_allreduce(world, contenders(P), sizes, timing_repeats)
times.groupby(["size_bytes", "contender"])["time_s"].median().unstack().mul(1e6).round(0).astype(int).iloc[::3]

# %% [markdown]
# (Microseconds.) From every other size we fit $\alpha$ and $\beta$, and predict the sizes in between, which the fit has not seen. Links in a network would have one $\alpha$ and one $\beta$ for all algorithms. Ranks that share memory and cores do not: how many of them copy at the same time makes a difference. So each algorithm gets its own two numbers, and MPI's, of which we do not know the steps, counts as one step.

# %%
fitted = allreduce.fit(times[times["size_bytes"].isin(sizes[::2])], contenders(P))
held_out = times[times["size_bytes"].isin(sizes[1::2])].groupby(["contender", "size_bytes"])["time_s"].median()
held_out = held_out.reset_index()
held_out["predicted_s"] = [
    allreduce.time(contenders(P)[row.contender], row.size_bytes, fitted[row.contender]) for row in held_out.itertuples()
]
held_out["error_percent"] = 100 * (held_out["predicted_s"] / held_out["time_s"] - 1).abs()
median_error = held_out["error_percent"].median()
table = pd.DataFrame({"alpha, us": {name: link.alpha_s * 1e6 for name, link in fitted.items()}})
table["beta, ns/byte"] = [link.beta_s_per_byte * 1e9 for link in fitted.values()]
table["median error of held-out sizes, %"] = held_out.groupby("contender")["error_percent"].median()
print(f"median error over all held-out sizes: {median_error:.0f} %")
table.style.format("{:.3g}")

# %% alt="Time against size of the array in logarithmic axes for five algorithms and MPI's own. Points are measurements, lines the fitted model. All are flat up to some ten kilobytes, where latency rules, and rise in proportion to the size above."
figure, (left_axis, right_axis) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
medians = times.groupby(["contender", "size_bytes"])["time_s"].median()
for name, schedule in contenders(P).items():
    look = STYLES[name]
    left_axis.loglog(medians[name] * 1e6, ls="", ms=4, label=name, **look)
    curve = [allreduce.time(schedule, size, fitted[name]) * 1e6 for size in sizes]
    left_axis.loglog(sizes, curve, color=look["color"], lw=1)
    if name != "native":
        right_axis.semilogx(medians[name] / medians["native"], lw=1, ms=4, **look)
left_axis.set(xlabel="size of the array, bytes", ylabel="time, µs", title="points measured, lines fitted")
right_axis.axhline(1, color="black", lw=0.8)
right_axis.set(xlabel="size of the array, bytes", ylabel="time / time of native MPI", ylim=(0, None))
left_axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Two regimes meet: below some ten kilobytes **latency** rules, and a doubled message costs little; from some hundred kilobytes on, **bandwidth** does. Between them the straight line can miss by a third or more, because MPI changes its protocol there, and caches fill; the median error above says how good it is as a whole.
#
# From about a megabyte on, a loop in Python is on a par with a library in C: the time goes into copying and adding, which numpy and MPI do for us. For small arrays it takes up to about four times as long, for every message passes through the interpreter, and the ranks first make sure that they agree on length, type and schedule.
#
# (With more ranks than cores, $\alpha$ is mostly the time that the operating system takes to give ranks their turn. On a real network it is that of the network.)
#
# Back to the lab, whose links are slow against everything else:

# %% alt="Time against size in the network lab at the largest number of hosts, logarithmic axes. For the smallest arrays the algorithms differ little and not in the order of their bytes. For large ones the ring, Rabenseifner and native MPI are fastest; recursive doubling, the tree and naive follow, naive slower than the ring by a factor of four with four hosts."
n = lab_table["ranks"].max()
here = lab_table[lab_table["ranks"] == n].groupby(["contender", "size_bytes"])["time_s"].median()
figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for name in here.index.unique("contender"):
    axis.loglog(here[name] * 1e3, label=name, lw=1, ms=5, **STYLES[name])
axis.set(xlabel="size of the array, bytes", ylabel="time, ms", title=f"{n} hosts in the lab, {lab_origin}")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# For large arrays the order is that of the bytes through the busiest link: ring, Rabenseifner and native alike, then recursive doubling with whole arrays in every step, then the tree, then naive. For the smallest ones the bytes do not matter; steps do, and on few cores also whose turn it is, so that neighbouring algorithms may change places between runs.
#
# ## Several ranks on a node: shared memory
#
# Between two ranks of one node no wire is needed, and yet MPI copies every message twice: the sender into memory that MPI shares with the receiver, the receiver out of it. If the *arrays themselves* lay in shared memory, a rank could add its neighbour's chunk straight from where it is, and need not be sent anything, only be told that the chunk is ready. `SharedArray` is such an array, and `shared.allreduce(schedule)` reads the same schedule as `run`.
#
# **Predict:** the ring with 4 MB per rank, through messages, through shared memory, and MPI's own allreduce. Which is the fastest, and by what factor? And is the result the same to the last bit?


# %%
def three_ways(size_bytes: int, repeats: int) -> list[dict]:
    """Times of an allreduce by messages, in shared memory and by MPI itself; all ranks give the same rows."""
    import numpy as np
    from mpi4py import MPI

    from nurion_utils import allreduce, timing

    comm, ring = MPI.COMM_WORLD, allreduce.ring(MPI.COMM_WORLD.size)
    mine, total = timing.exact_arrays(size_bytes, comm.rank, comm.size)
    array = mine.copy()
    with allreduce.SharedArray(comm, len(mine), "float32") as shared:
        ways = {
            "ring, messages": lambda: allreduce.run(ring, comm, array),
            "ring, shared memory": lambda: shared.allreduce(ring),
            "native": lambda: comm.Allreduce(MPI.IN_PLACE, array),
        }
        shared.array[:] = mine
        ways["ring, shared memory"](), ways["ring, messages"]()
        assert np.array_equal(shared.array, total) and np.array_equal(array, total)
        array[:] = shared.array[:] = 0
        calls = {name: timing.calls_in(comm, way, 0.02, 300) for name, way in ways.items()}
        return [
            {"way": name, "repeat": repeat, "time_s": timing.block(comm, ways[name], calls[name])}
            for repeat, name in timing.turns(list(ways), repeats)
        ]


shared_times = pd.DataFrame(world.run(three_ways, 2**22, max(timing_repeats, 6))[0])
shared_speedup = timing.ratios(shared_times, of="ring, messages", contender="way").set_index("way")
shared_speedup[["speedup", "low", "high"]].round(2)

# %% [markdown]
# (Times as fast as the ring through messages: the median of ratios of neighbouring turns, with its quartiles.) The sums were the same on both ways, to the last bit: it is one plan, with the same additions in the same order. Shared memory saves one of the two copies of each byte, so it should come out ahead for arrays that are larger than what a core's cache holds. How far ahead depends on the memory of your machine, and on who else uses it; where ranks outnumber cores, a rank that waits for its turn hides the difference. The next cell says what can be said from this run.

# %%
shared_row = shared_speedup.loc["ring, shared memory"]
if shared_row["low"] > 1:
    print(f"Shared memory was faster than messages, {shared_row['speedup']:.1f} times in the median.")
elif shared_row["high"] < 1:
    print("Messages were faster on this machine: its MPI moves large messages in a single copy, or memory is scarce.")
else:
    print("Too noisy to tell: the quartiles lie on both sides of 1, as they do where others use the cores.")

# %% [markdown]
# What follows from it for many nodes with several ranks each? Only one rank per node need talk to the others. `hierarchical` does so: up a tree inside each node, once around a ring of the nodes' first ranks, and down the trees again. Here are eight ranks on four nodes. **Predict:** how many of the arrows below join two nodes?

# %% alt="Nine panels of eight ranks and four chunks: first odd ranks hand everything to even ones; then the even ranks pass chunks round a ring for six steps; at the end the even ranks hand the results to the odd ones."
by_node = allreduce.hierarchical(8, ranks_per_node=2)
figure = allreduce.draw(by_node)

# %%
rows = []
for per_node in (1, 2, 4, 16):
    n_nodes, tree_of_nodes = 64, allreduce.FatTree.of(nurion)
    n = n_nodes * per_node
    nodes = tree_of_nodes.in_order(n, ranks_per_node=per_node)
    for name, schedule in {"ring": allreduce.ring(n), "hierarchical": allreduce.hierarchical(n, per_node)}.items():
        leaving = sum(int((nodes[step.source] != nodes[step.destination]).sum()) for step in schedule.steps)
        small, large = (
            allreduce.simulate(schedule, size, tree_of_nodes, nodes).time_s.sum() for size in (1024, gradient_bytes)
        )
        rows.append((per_node, name, leaving // n_nodes, small * 1e3, large * 1e3))
columns = ["ranks per node", "algorithm", "messages that leave each node", "1 kB, ms", "28 MB, ms"]
layered = pd.DataFrame(rows, columns=columns).set_index(["ranks per node", "algorithm"])
layered.round(2)

# %% [markdown]
# (64 nodes of Nurion, predicted by the simulation of a fat tree that the last section explains.) With one rank per node the two are the same ring. With more, the plain ring crosses each node's link once in every one of its $2(P-1)$ steps; the layered plan in $2(64-1)$ steps only, whatever the number of ranks per node. For small arrays, where each step costs its start-up, that is nearly all of the time. For large ones it makes hardly a difference, for the bytes on each link are the same, and what the plain ring loses in steps, the layered plan loses on whole arrays that go up and down the tree through the node's memory.
#
# ## Why Horovod fuses small tensors
#
# A network's gradient is not one array but one per layer, many of them small: biases, normalisation. **Predict** from the ring's row in your table of $\alpha$ and $\beta$: what is the gain of reducing 64 tensors of 4 kB as one of 256 kB?


# %%
def one_by_one_or_fused(n_tensors: int, n: int) -> tuple[float, float]:
    """Seconds for n_tensors allreduces of n float32, and for a single one of them all; medians of 15."""
    import time

    import numpy as np
    from mpi4py import MPI

    from nurion_utils import allreduce

    comm, ring = MPI.COMM_WORLD, allreduce.ring(MPI.COMM_WORLD.size)
    tensors = {"one by one": [np.zeros(n, "f4") for _ in range(n_tensors)], "fused": [np.zeros(n_tensors * n, "f4")]}
    times = {name: [] for name in tensors}
    for _ in range(15):
        for name, arrays in tensors.items():
            comm.Barrier()
            begin = time.perf_counter()
            for array in arrays:
                allreduce.run(ring, comm, array)
            times[name].append(comm.allreduce(time.perf_counter() - begin, op=MPI.MAX))
    return tuple(float(np.median(values)) for values in times.values())


one_by_one_s, fused_s = world.run(one_by_one_or_fused, 64, 1024)[0]
link, ring = fitted["ring"], allreduce.ring(P)
predicted_ms = [64e3 * allreduce.time(ring, 4096, link), 1e3 * allreduce.time(ring, 64 * 4096, link)]
print(f"one by one {one_by_one_s * 1e3:.2f} ms (predicted {predicted_ms[0]:.2f})")
print(f"fused      {fused_s * 1e3:.2f} ms (predicted {predicted_ms[1]:.2f})")
print(f"gain       {one_by_one_s / fused_s:.0f} (predicted {predicted_ms[0] / predicted_ms[1]:.0f})")

# %% [markdown]
# The times themselves can miss by a factor of two or more where ranks share cores: a burst of 64 small allreduces is another thing for the operating system than the long series of the fit. The gain is what counts. This is *tensor fusion*: Horovod copies tensors that are ready at about the same time into one buffer (of up to 128 MiB, unless told otherwise) and reduces that. The next notebook watches it do so.
#
# ## Train with your own ring
#
# Once all ranks have started from the same weights, an allreduce is the only thing that data-parallel training needs of the network. So put yours in: `DistributedOptimizer` takes a `reducer`, a function that averages a flat array over the ranks, in place of Horovod.


# %%
def twenty_steps(with_what: str) -> tuple:
    """The weights after 20 training steps, gradients averaged by Horovod or by our ring."""
    import horovod.tensorflow as hvd
    import keras
    from mpi4py import MPI

    from nurion_utils import allreduce, models
    from nurion_utils.datasets import Shard, digits
    from nurion_utils.training import DistributedOptimizer

    comm = MPI.COMM_WORLD
    ring = allreduce.ring(comm.size)
    keras.utils.set_random_seed(1)
    network = models.mlp()
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    if with_what == "horovod":
        hvd.init()
        optimizer = DistributedOptimizer(optimizer)
    else:
        optimizer = DistributedOptimizer(optimizer, reducer=lambda flat: allreduce.run(ring, comm, flat, op="mean"))
    x, y, _, _ = digits.load()
    shard = Shard(len(x), comm.size, comm.rank, batch_size=16, seed=0)
    network.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = network.fit(shard.dataset(x, y), steps_per_epoch=20, verbose=0)
    return network.get_weights(), history.history["loss"][0]


(ring_weights, ring_loss), *other_ranks = world.run(twenty_steps, "ring")
(horovod_weights, horovod_loss), *_ = world.run(twenty_steps, "horovod")
pairs = list(zip(ring_weights, horovod_weights, strict=True))
difference = max(abs(ours - theirs).max() for ours, theirs in pairs)
between_ranks = max(abs(a - b).max() for weights, _ in other_ranks for a, b in zip(ring_weights, weights, strict=True))
print(f"loss {ring_loss:.4f} with our ring, {horovod_loss:.4f} with Horovod")
print(f"largest difference of any weight: {difference:.0e}; between ranks: {between_ranks:.0e}")

# %% [markdown]
# The same weights, up to the rounding of sums formed in another order; and on all ranks the same to the last bit, because the ring *copies* each finished chunk to everyone.
#
# ## To 8305 nodes
#
# The very same objects now go to Nurion's nodes. What a message costs there, `Link.of` reads from the description of the machine: 2.5 µs to start, 12.3 GB/s. Both figures are assumed from what is known of Omni-Path, not taken from Nurion's guide (`nurion.table()` says where every figure comes from), and the ratios below depend on them.
#
# The array is CosmoFlow's gradient of 28 MB. **Predict:** on 8192 nodes each step of the ring sends 3.4 kB. What does it spend its time on?

# %%
fabric = allreduce.FatTree.of(nurion)
link = fabric.link
counts_of_ranks = [2**k for k in range(1, 14)] + [nurion.node.count]
large = {
    name: [allreduce.time(algorithm(n), gradient_bytes, link) for n in counts_of_ranks]
    for name, algorithm in ALGORITHMS.items()
    if name != "naive"
}
ring_8192 = allreduce.ring(8192)
latency_share = allreduce.time(ring_8192, 0, link) / allreduce.time(ring_8192, gradient_bytes, link)
print(f"ring on 8192 nodes: {len(ring_8192.steps)} steps, {latency_share:.0%} of the time is latency")

# %% alt="Left: predicted time of an allreduce of 28 megabytes against the number of ranks up to 8305. Rabenseifner stays near five milliseconds for powers of two and near ten at 8305 ranks; the ring equals it for few ranks and rises to over forty milliseconds; recursive doubling and the tree grow slowly from a higher level. Right: a map of the algorithm to choose by number of ranks and size: recursive doubling for small arrays, the ring for large arrays on few ranks, Rabenseifner between them; numbers of ranks that are no power of two make stripes in it, where the ring holds out longer."
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

names = ["ring", "rabenseifner", "recursive_doubling"]  # the first that is within 5 % of the best
colours = [style.BLUE, style.PINK, style.YELLOW]
map_ranks = sorted([2**k for k in range(1, 14)] + [3 * 2**k for k in range(12)])
map_sizes = np.logspace(2, 9, 29)
choice = np.empty((len(map_sizes), len(map_ranks)), int)
for column, n in enumerate(map_ranks):
    schedules = [ALGORITHMS[name](n) for name in names]
    seconds = np.array([[allreduce.time(schedule, size, link) for schedule in schedules] for size in map_sizes])
    choice[:, column] = (seconds <= 1.05 * seconds.min(axis=1, keepdims=True)).argmax(axis=1)
figure, (left_axis, right_axis) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
for name, values in large.items():
    left_axis.loglog(counts_of_ranks, np.array(values) * 1e3, label=name, lw=1.2, ms=4, **STYLES[name])
left_axis.set(xlabel="ranks, one per node", ylabel="predicted time, ms", title="28 MB on Nurion's links")
left_axis.set_yticks([2, 5, 10, 20, 50], [2, 5, 10, 20, 50])
left_axis.minorticks_off()
left_axis.legend(frameon=False, fontsize=8)
right_axis.pcolormesh(range(len(map_ranks) + 1), np.append(map_sizes, 1.8e9), choice, cmap=ListedColormap(colours))
right_axis.set_xticks(np.arange(0, len(map_ranks), 4) + 0.5, map_ranks[::4])
right_axis.set(yscale="log", xlabel="ranks, one per node", ylabel="size of the array, bytes", title="which to choose")
keys = [Patch(fc=colour, label=name) for colour, name in zip(colours, names, strict=True)]
right_axis.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, fontsize=8)
plt.show()

# %%
pd.DataFrame(large, index=pd.Index(counts_of_ranks, name="ranks")).mul(1e3).round(2).iloc[[1, 4, 9, 12, 13]]

# %% [markdown]
# (Milliseconds.) That the ring hardly depends on the number of ranks is true of its *bytes*. Its number of *steps* grows with $P$, and on thousands of nodes the start-up times of 16,000 messages are nearly all it does.
#
# **Rabenseifner's algorithm** sends as few bytes in $2\log_2 P$ steps; `print(allreduce.rabenseifner(8))` shows how. It wants a power of two. For any other number some ranks first hand their whole array to a neighbour and get the sum back at the end (8305 is 8192 and 113 more), which doubles the bytes: the jump at the right end of the left figure, and the stripes in the map, which shows powers of two and three times powers of two in turn. Most numbers of ranks behave like the latter. (Libraries have less crude ways for these numbers.)
#
# By this model, then, the ring is never better than Rabenseifner on a power of two, only as good where arrays are large enough (the map names the ring where it is within 5 %), and it is better for other numbers of ranks. But it is simple, and gentle with the network, because everyone talks to a neighbour only. How much that is worth is the last question.
#
# ## Where the ranks sit
#
# Nurion's network is a **fat tree**: 32 nodes on each edge switch, but only 16 links from that switch up to the rest. If all 32 nodes send to other switches at the same time, two must share a link; this is what "50 % blocking" means.
#
# `allreduce.simulate` sends every step through such a tree: transfers that share a link share its bandwidth fairly. Where the ranks sit is a parameter: in order; as a busy batch system hands nodes out, in order but with gaps; or anywhere.
#
# **Predict:** each rank of the ring sends to the next rank. In order, how many of the 32 streams of a switch leave it? And with random placement? And will Rabenseifner's algorithm, with its distant partners, suffer more than the ring or less?

# %%
n, size_bytes = 2048, 1e9
placements = {
    "in order": fabric.in_order(n),
    "batch system": fabric.scheduled(n, seed=1),
    "random": fabric.random(n, seed=1),
}
rows = []
for name in ("ring", "rabenseifner", "recursive_doubling"):
    schedule = ALGORITHMS[name](n)
    alone_s = allreduce.time(schedule, size_bytes, link)
    for where, placement in placements.items():
        steps = allreduce.simulate(schedule, size_bytes, fabric, placement)
        worst = steps.loc[steps["time_s"].idxmax()]
        total_s = steps["time_s"].sum()
        rows.append((name, where, total_s, total_s / alone_s, worst["flows"], worst["busiest_link"]))
columns = ["algorithm", "placement", "time_s", "slowdown", "flows on the busiest link", "busiest link"]
placed = pd.DataFrame(rows, columns=columns)
placed.round(2)

# %% alt="Bars of the slowdown by shared links for three algorithms and three placements of 2048 ranks on Nurion's fat tree, with one gigabyte. The ring is not slowed down at all in order and as the batch system places it, and about fourfold at random. Rabenseifner is hardly slowed down in order, nearly twofold by the batch system's placement, and more than fourfold at random; recursive doubling suffers in every placement."
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
looks = {"in order": ("#DDDDDD", ""), "batch system": (style.SKY, "//"), "random": (style.VERMILION, "xx")}
for i, (where, (colour, hatch)) in enumerate(looks.items()):
    values = placed[placed["placement"] == where].set_index("algorithm")["slowdown"]
    at = np.arange(3) + 0.27 * (i - 1)
    bars = axis.bar(at, values, 0.25, color=colour, hatch=hatch, ec="black", lw=0.6, label=where)
    axis.bar_label(bars, fmt="%.1f", fontsize=8)
axis.set_xticks(range(3), values.index)
axis.set(ylabel="time / time without shared links", ylim=(0, 6.5))
axis.set_title(f"{n} ranks, {size_bytes / 1e9:g} GB, predicted for Nurion's fat tree", fontsize=10)
axis.legend(title="placement", frameon=False, ncols=3, loc="upper left")
plt.show()

# %% [markdown]
# (`edge 30 up 15` is the link from edge switch 30 up to core switch 15.) In order, a single stream leaves each switch and a single one enters it: for the ring, a blocking tree is as good as a full one. The batch system's gaps do not change that, as long as the ranks are numbered along the nodes. With random placement nearly all streams leave their switch. 32 streams on 16 links would be two each if they were spread evenly; but the way up is fixed by the destination, and somewhere several meet on one link. Everyone then waits for that link, in every step.
#
# Rabenseifner's algorithm exchanges its large halves with near partners and only small pieces with distant ones, so in order it loses next to nothing either. But as soon as the numbering does not fit the switches, "near" ranks sit under different ones. Recursive doubling sends everything to distant partners too, and pays in every placement.
#
# Which of the two is faster on 2048 nodes depends, then, on the size *and* on the placement:

# %%
choices_by_size = {}
for label, size in (("28 MB, ms", gradient_bytes), ("1 GB, ms", size_bytes)):
    choices_by_size[label] = {
        f"{name}, {where}": allreduce.simulate(ALGORITHMS[name](n), size, fabric, placement)["time_s"].sum() * 1e3
        for name in ("ring", "rabenseifner")
        for where, placement in placements.items()
    }
by_size = pd.DataFrame(choices_by_size)
by_size.style.format("{:.1f}")

# %% [markdown]
# With 28 MB Rabenseifner's few steps win in every placement. With 1 GB and the placement that a batch system gives, or a random one, the ring does, although it needs 186 times as many steps.
#
# These are predictions of a model, and it leaves things out: other people's traffic, the ranks' own delays, routes that adapt, algorithms that work in a pipeline. They say what routes and placement alone cost. The simulator itself was checked against SimGrid, an established simulator of networks, for up to 512 hosts.
#
# ## Exercises
#
# **1. Write the missing step, in the other direction.** A ring may as well run to the left. Its allgather over $P$ ranks is given, and begins with chunk $r-1$ complete on rank $r$ (that is, chunk $(r-1) \bmod P$). Write the reduce-scatter that brings this about: the function returns the transfers of one step.

# %% tags=["exercise"]
from nurion_utils.allreduce import Schedule, Step, Transfer


def allgather_step(step: int, P: int) -> list[Transfer]:
    return [Transfer(r, (r - 1) % P, chunk=(r - 1 + step) % P, reduce=False) for r in range(P)]


def reduce_scatter_step(step: int, P: int) -> list[Transfer]:
    transfers = []
    # --- solution
    transfers = [Transfer(r, (r - 1) % P, chunk=(r + step) % P) for r in range(P)]
    # --- end solution
    return transfers


# %% tags=["check"]
from nurion_utils import allreduce

for P in (2, 4, 7):
    first = [reduce_scatter_step(step, P) for step in range(P - 1)]
    assert any(first), "Nothing is sent yet: put a list of Transfer(...) in place of the dots."
    assert all(len(step) == P for step in first), (
        f"With {P} ranks, {P} transfers go on in every step, one from each rank."
    )
    assert all(t.reduce for step in first for t in step), (
        "In the reduce-scatter every transfer is reduced: reduce=True."
    )
    second = [allgather_step(step, P) for step in range(P - 1)]
    try:
        allreduce.check(Schedule("yours", P, P, tuple(map(Step.of, first + second))))
    except allreduce.ScheduleError as error:
        raise AssertionError(f"With {P} ranks it is not right yet: {error}.") from None
print("Right, for any number of ranks.")

# %% [markdown]
# **2. Find the fault.** This ring of four ranks has one wrong transfer. `allreduce.check(suspect)` says what is missing at the end; the fault lies earlier. `print(suspect)`, and give the step (counted from 0), the transfer as it is, and as it should be.

# %% tags=["exercise"]
from nurion_utils.allreduce import Schedule, Step, Transfer

sent = [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1], [0, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2]]  # chunk, by step and rank
suspect = Schedule(
    "suspect",
    ranks=4,
    chunks=4,
    steps=tuple(
        Step.of([Transfer(rank, (rank + 1) % 4, chunk, reduce=step < 3) for rank, chunk in enumerate(chunks)])
        for step, chunks in enumerate(sent)
    ),
)
faulty_step, wrong, right_one = None, None, None  # a number, the Transfer as it is, the Transfer as it should be
# --- solution
faulty_step, wrong, right_one = 3, Transfer(0, 1, 0, reduce=False), Transfer(0, 1, 1, reduce=False)
# --- end solution

# %% tags=["check"]
from nurion_utils.allreduce import ScheduleError, check

assert None not in (faulty_step, wrong, right_one), "Put your three answers in place of the dots."
assert isinstance(wrong, Transfer) and isinstance(right_one, Transfer), (
    "Write transfers as Transfer(0, 1, 0, reduce=True)."
)
assert faulty_step in range(6), "The steps are counted from 0 to 5."
assert wrong in list(suspect.steps[faulty_step]), f"Step {faulty_step} has no {wrong}: compare with the print."
steps = [[right_one if i == faulty_step and t == wrong else t for t in step] for i, step in enumerate(suspect.steps)]
try:
    check(Schedule("mended", 4, 4, tuple(Step.of(step) for step in steps)))
except ScheduleError as error:
    raise AssertionError(f"That does not mend it: {error}.") from None
print("Right: in a ring, the chunk that a rank sends counts down by one from step to step.")

# %% [markdown]
# **3. Choose an algorithm** for each of these, on Nurion's links, that nobody shares: `"naive"`, `"tree"`, `"ring"`, `"recursive_doubling"` or `"rabenseifner"`. Within 10 % of the best counts. Six ranks are no power of two, so Rabenseifner and recursive doubling send the array of two ranks to neighbours first, and back at the end.

# %% tags=["exercise"]
choices = {
    (1024, 8): None,  # ranks, bytes: one loss to be averaged
    (6, 500_000_000): None,  # the gradient of a large network on six nodes
    (4096, 28_170_000): None,  # CosmoFlow on half of the machine
}
# --- solution
choices = {(1024, 8): "recursive_doubling", (6, 500_000_000): "ring", (4096, 28_170_000): "rabenseifner"}
# --- end solution

# %% tags=["check"]
from nurion_utils import allreduce, sites
from nurion_utils.allreduce import ALGORITHMS

link = allreduce.Link.of(sites.load("nurion"))
for (n, size), chosen in choices.items():
    assert chosen is not None, f"Put a name in place of the dots for {n} ranks and {size} bytes."
    assert chosen in ALGORITHMS, f"There is no {chosen!r}; choose from {', '.join(ALGORITHMS)}."
    seconds = {name: allreduce.time(make(n), size, link) for name, make in ALGORITHMS.items()}
    ratio = seconds[chosen] / min(seconds.values())
    steps = len(ALGORITHMS[chosen](n).steps)
    costs = f"{steps} steps, of which start-up alone is {1e3 * steps * link.alpha_s:.3g} ms"
    assert ratio < 1.1, (
        f"{n} ranks, {size} bytes: {chosen} takes {ratio:.3g} times as long as the best; it has {costs}."
    )
print("Right, all three.")

# %%
world.stop()

# %%
assert fitted["ring"].alpha_s > 0 and median_error < 50, "the two-parameter model does not describe these ranks at all"
assert big.loc[("naive", n_hosts := lab_table["ranks"].max()), "time_s"] > 1.5 * big.loc[("ring", n_hosts), "time_s"]
assert one_by_one_s > fused_s
between_nodes = [step for step in by_node.steps if (step.source // 2 != step.destination // 2).all()]
assert [len(step) for step in between_nodes] == [4] * 6 and len(by_node.steps) == 8
assert set(layered.xs("hierarchical", level=1)["messages that leave each node"]) == {126}
assert layered.loc[(16, "ring"), "1 kB, ms"] > 10 * layered.loc[(16, "hierarchical"), "1 kB, ms"]
assert abs(layered.loc[(16, "ring"), "28 MB, ms"] / layered.loc[(16, "hierarchical"), "28 MB, ms"] - 1) < 0.1
assert difference < 1e-5 and between_ranks == 0
assert large["ring"][-1] > 4 * large["rabenseifner"][-1] and latency_share > 0.8
slowdown = placed.set_index(["algorithm", "placement"])["slowdown"]
assert abs(slowdown["ring", "in order"] - 1) < 0.01 and slowdown["ring", "random"] > 2
assert slowdown["rabenseifner", "in order"] < 1.1 and slowdown["rabenseifner", "batch system"] > 1.3
assert slowdown["recursive_doubling", "in order"] > 1.3
for where in placements:
    assert by_size.loc[f"rabenseifner, {where}", "28 MB, ms"] < by_size.loc[f"ring, {where}", "28 MB, ms"]
assert by_size.loc["ring, random", "1 GB, ms"] < by_size.loc["rabenseifner, random", "1 GB, ms"]
assert round(len(allreduce.ring(2048).steps) / len(allreduce.rabenseifner(2048).steps)) == 186
assert by_size.loc["ring, batch system", "1 GB, ms"] < by_size.loc["rabenseifner, batch system", "1 GB, ms"]

# %% [markdown]
# ## What to take along
#
# - An allreduce costs a start-up time per message and a time per byte. The ring sends $2(P-1)$ messages and $2N(P-1)/P$ bytes per rank; no algorithm gets by with fewer bytes from its busiest rank.
# - Small arrays want few steps: recursive doubling. Large arrays want few bytes: the ring, or Rabenseifner, above all where there are thousands of ranks and their number is a power of two. Small tensors should be fused into large ones.
# - A plan written as data can be counted, costed, simulated and proved right before it runs.
# - On a blocking tree neighbours should sit near each other: in order the ring does not notice the blocking, at random it pays for it in every step.
#
# **Next:** the libraries that do this for Horovod, MPI, Gloo and oneCCL, and what they make of it.
