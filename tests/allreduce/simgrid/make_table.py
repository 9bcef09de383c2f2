"""What SimGrid says about a fat tree: the table that tests/allreduce/test_fattree.py compares our simulation with.

SimGrid is not a dependency of this project. On Debian or Ubuntu, ``apt install python3-simgrid``, and then::

    /usr/bin/python3 tests/allreduce/simgrid/make_table.py > tests/allreduce/simgrid/reference.csv

The recorded table was made with SimGrid 3.32 in this way. Everything in it can be found again from its row: the
transfers of a step are written out below on their own, so that they check our schedules, too, and `nodes` gives the
placement. The machine is SimGrid's own fat tree, ``2;32,16;1,16;1,1``: 16 switches with 32 hosts each and one link to
each of 16 core switches, 12.3 GB/s both ways.

SimGrid shares by flow: the model CM02 without its corrections for TCP (window, cross traffic, factors) is plain
max-min fairness. A flow's weight is its latency there, so that long routes would get less; hence latency 0.

Columns: hosts (of the job), algorithm, placement, seed, size_bytes (of the array), steps (of the schedule; those of a
ring are all alike, so one of them is simulated), time_s (of the whole schedule), source.
"""

import argparse
import csv
import random
import sys

DOWN, SWITCHES, UP = 32, 16, 16
BYTES_PER_S = 12.3e9
CONFIGURATION = [
    "network/model:CM02", "network/latency-factor:1", "network/bandwidth-factor:1", "network/weight-S:0",
    "network/TCP-gamma:0", "network/crosstraffic:0", "surf/precision:1e-13", "maxmin/precision:1e-9",
]  # fmt: skip
ALGORITHMS = ("ring", "recursive doubling")


def nodes(placement, hosts, seed):
    """The node of each rank; of the random numbers, only those that Python promises never to change."""
    everyone = list(range(DOWN * SWITCHES))
    if placement == "random":
        draw = random.Random(seed)
        everyone.sort(key=lambda _: draw.random())
    return everyone[:hosts]


def steps(algorithm, hosts, size_bytes):
    """Steps of transfers (source rank, destination rank, bytes), and how often all of them are repeated."""
    everyone = range(hosts)
    if algorithm == "ring":
        return [[(rank, (rank + 1) % hosts, size_bytes // hosts) for rank in everyone]], 2 * (hosts - 1)
    distances = [2**i for i in range(hosts.bit_length() - 1)]
    return [[(rank, rank ^ distance, size_bytes) for rank in everyone] for distance in distances], 1


def table(all_hosts, seeds, sizes):
    """Simulate one case after the other; SimGrid can make one fat tree per process."""
    import simgrid

    engine = simgrid.Engine(["make_table", *(f"--cfg={option}" for option in CONFIGURATION)])
    simgrid.NetZone.create_fatTree_zone(
        "fat tree",
        None,
        simgrid.FatTreeParams(2, [DOWN, SWITCHES], [1, UP], [1, 1]),
        simgrid.ClusterCallbacks(
            lambda zone, _, number: (zone.create_host(str(number), "1Gf").seal().netpoint, None), None, None
        ),
        BYTES_PER_S,
        0.0,
        simgrid.Link.SharingPolicy.SPLITDUPLEX,
    ).seal()
    machine = sorted(engine.all_hosts, key=lambda host: int(host.name))
    rows = []

    def simulate(step, placed):
        start = engine.clock
        flows = [
            simgrid.Comm.sendto_async(machine[placed[source]], machine[placed[destination]], size)
            for source, destination, size in step
        ]
        for flow in flows:
            flow.wait()
        return engine.clock - start

    def case(algorithm, hosts, placement, seed, size_bytes):
        once, repeated = steps(algorithm, hosts, size_bytes)
        times = [simulate(step, nodes(placement, hosts, seed)) for step in once]
        return {
            "hosts": hosts, "algorithm": algorithm, "placement": placement, "seed": seed, "size_bytes": size_bytes,
            "steps": len(once) * repeated, "time_s": f"{repeated * sum(times):.9g}",
            "source": f"SimGrid {simgrid.simgrid_version.strip()}",
        }  # fmt: skip

    def everything():
        placements = [("in order", 0), *(("random", seed) for seed in seeds)]
        for hosts in all_hosts:
            for algorithm in ALGORITHMS:
                rows.extend(case(algorithm, hosts, *placement, size) for placement in placements for size in sizes)

    simgrid.Actor.create("all cases", machine[0], everything)
    engine.run()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**20, 2**24, 2**28])
    options = parser.parse_args()
    found = table(options.hosts, options.seeds, options.sizes)
    writer = csv.DictWriter(sys.stdout, found[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
