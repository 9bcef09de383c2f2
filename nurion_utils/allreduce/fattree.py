"""A fat tree of switches in which transfers share links: what congestion adds to a schedule's time.

>>> from nurion_utils import allreduce, sites
>>> nurion = allreduce.FatTree.of(sites.load("nurion"))
>>> steps = allreduce.simulate(allreduce.ring(8305), 100e6, nurion)  # a row per step
>>> f"{steps.time_s.sum():.3f} s, at most {steps.flows.max()} transfer on a link"
'0.058 s, at most 1 transfer on a link'

The steps follow one another as if all ranks waited for the slowest, every transfer of a step starts at once, routes
never change, and nobody else uses the network. So it shows what routes and placement cost, and no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils._checks import number, positive, whole_number
from nurion_utils.allreduce.cost import Link
from nurion_utils.allreduce.schedule import Schedule, ScheduleError, Step

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.sites import Site

# A copy with reduction reads what came and what is there, and writes the sum: three bytes through memory for each.
_MEMORY_ACCESSES = 3
# Other people's jobs on a busy machine have 1 to 512 nodes, each power of two as often as the next; chosen.
_LARGEST_OTHER_JOB = 512


@dataclass(frozen=True)
class FatTree:
    """Nodes on edge switches, and every edge switch on the same core switches, one link to each.

    Every link carries its full bandwidth both ways at the same time. Links are numbered: those from the nodes up, down
    to the nodes, the nodes' memories, from the edge switches up, and down to them; `link_name` says which is which. The
    core switch on the route to a node is numbered by that node alone (d-mod-k; Zahavi 2010), as in real fabrics and
    SimGrid, which spreads the nodes of a switch over all its links.
    """

    nodes: int  # the last edge switch may have free places
    edge_down: int  # nodes on every edge switch
    edge_up: int  # core switches on every edge switch
    link: Link  # what a message costs where it shares no link
    memory_beta_s_per_byte: float  # what a byte costs between ranks of a node, which all share the node's memory

    def __post_init__(self) -> None:
        for name in ("nodes", "edge_down", "edge_up"):
            whole_number(getattr(self, name), name)
        if not isinstance(self.link, Link):
            raise ValueError(f"link must be a Link(alpha_s, beta_s_per_byte), not {self.link!r}")
        positive(self.link.beta_s_per_byte, "link.beta_s_per_byte")
        positive(self.memory_beta_s_per_byte, "memory_beta_s_per_byte")

    @classmethod
    def of(cls, site: Site) -> FatTree:
        """The fabric of a site's first partition; ranks of a node talk at a third of its fast memory's rate."""
        from nurion_utils.sites import SiteError

        fabric, memory = site.fabric, site.node.fast_memory_gb_per_s
        if not (fabric and fabric.topology == "fat tree" and fabric.edge_down and fabric.edge_up and memory):
            raise SiteError(
                f"the site {site.name!r} does not describe a fat tree (edge_down, edge_up) between nodes with fast "
                "memory: take one that does, such as 'nurion', or make a FatTree of your own figures"
            )
        memory_beta_s_per_byte = 1e-9 * _MEMORY_ACCESSES / memory
        return cls(site.node.count, fabric.edge_down, fabric.edge_up, Link.of(site), memory_beta_s_per_byte)

    @property
    def edges(self) -> int:
        """How many edge switches there are."""
        return -(-self.nodes // self.edge_down)

    @cached_property
    def seconds_per_byte(self) -> np.ndarray:
        """What a byte costs on each link."""
        cost = np.full(3 * self.nodes + 2 * self.edges * self.edge_up, float(self.link.beta_s_per_byte))
        cost[2 * self.nodes : 3 * self.nodes] = self.memory_beta_s_per_byte
        return cost

    def paths(self, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
        """The links from each source node to its destination node, in order: n x 4, -1 where there are fewer."""
        edge_from, edge_to, core = source // self.edge_down, destination // self.edge_down, destination % self.edge_up
        first_up = 3 * self.nodes
        first_down = first_up + self.edges * self.edge_up
        up, down = first_up + edge_from * self.edge_up + core, first_down + edge_to * self.edge_up + core
        paths = np.stack([source, up, down, self.nodes + destination], axis=1)
        paths[edge_from == edge_to, 1:3] = -1
        inside = source == destination
        paths[inside] = -1
        paths[inside, 0] = 2 * self.nodes + source[inside]
        return paths

    def link_name(self, link: int) -> str:
        """The name of a link, such as "node 5 down", "node 5 memory" or "edge 17 up 3" (to core switch 3)."""
        if not 0 <= link < len(self.seconds_per_byte):
            raise ValueError(f"the links are numbered 0 to {len(self.seconds_per_byte) - 1}, not {link!r}")
        if link < 3 * self.nodes:
            kind, node = divmod(link, self.nodes)
            return f"node {node} {('up', 'down', 'memory')[kind]}"
        number, core = divmod(link - 3 * self.nodes, self.edge_up)
        way, edge = divmod(number, self.edges)
        return f"edge {edge} {('up', 'down')[way]} {core}"

    def in_order(self, ranks: int, ranks_per_node: int = 1) -> np.ndarray:
        """The node of each rank when nodes are filled one after the other, from node 0 on."""
        needed = -(-whole_number(ranks, "ranks") // whole_number(ranks_per_node, "ranks_per_node"))
        if needed > self.nodes:
            raise ValueError(
                f"{ranks} ranks need {needed} nodes at {ranks_per_node} per node, but there are only {self.nodes}"
            )
        return np.arange(ranks) // ranks_per_node

    def random(self, ranks: int, seed: int, ranks_per_node: int = 1) -> np.ndarray:
        """The node of each rank when nodes are drawn at random, in random order: as bad as it may reasonably get."""
        return np.random.default_rng(seed).permutation(self.nodes)[self.in_order(ranks, ranks_per_node)]

    def scheduled(self, ranks: int, seed: int, ranks_per_node: int = 1) -> np.ndarray:
        """The node of each rank as a busy batch system gives them: in order, but with gaps.

        Other jobs of random sizes fill the machine; they end in random order until there are enough free nodes.
        """
        places = self.in_order(ranks, ranks_per_node)
        rng = np.random.default_rng(seed)
        job_ends = np.cumsum(_LARGEST_OTHER_JOB ** rng.random(self.nodes)).astype(int)  # enough of them in any case
        job_of = np.searchsorted(job_ends, np.arange(self.nodes), side="right")
        turn = rng.permutation(job_of[-1] + 1)[job_of]  # at which turn each node becomes free
        enough = np.searchsorted(np.cumsum(np.bincount(turn)), places[-1] + 1)
        return np.flatnonzero(turn <= enough)[places]


def simulate(
    schedule: Schedule, size_bytes: float, fabric: FatTree, placement: np.ndarray | None = None
) -> pd.DataFrame:
    """Send every step of a schedule through a fat tree in which its transfers share links fairly.

    A step takes the link's alpha, then until its last transfer has arrived. The array of `size_bytes` is cut into equal
    chunks. `placement` has the node of each rank: from `FatTree.in_order` (the default), `random`, `scheduled`, or of
    your own making.

    Returns a row per step: step, time_s, busiest_link (the name of the one that needs longest for its bytes; "" where
    the step is empty), flows (how many transfers share it). ValueError for a placement that does not give every rank a
    node of the fabric, a rank that the schedule does not have, or a step whose transfers differ in their number of
    chunks.
    """
    import pandas as pd

    if not isinstance(fabric, FatTree):
        raise ValueError(f"fabric must be a FatTree, such as FatTree.of(sites.load('nurion')), not {fabric!r}")
    chunk_bytes = number(size_bytes, "size_bytes", least=0) / schedule.chunks
    nodes = _nodes(schedule.ranks, fabric, placement)
    # The steps of a ring share their columns, which the schedule keeps, so that only the few different ones need work.
    kinds: dict[tuple[int, ...], tuple[float, str, int]] = {}
    rows = []
    for number_of_step, step in enumerate(schedule.steps):
        key = id(step.source), id(step.destination), id(step.count)
        if key not in kinds:
            _require_simple(number_of_step, step, schedule.ranks)
            kinds[key] = _simulate_step(step, chunk_bytes, fabric, nodes)
        rows.append((number_of_step, *kinds[key]))
    return pd.DataFrame(rows, columns=["step", "time_s", "busiest_link", "flows"])


def _simulate_step(step: Step, chunk_bytes: float, fabric: FatTree, nodes: np.ndarray) -> tuple[float, str, int]:
    """Seconds, the busiest link's name, and how many transfers share it."""
    if not len(step):
        return 0.0, "", 0
    paths = fabric.paths(nodes[step.source], nodes[step.destination])
    flows = np.bincount(paths[paths >= 0])
    seconds_per_byte = flows * fabric.seconds_per_byte[: len(flows)]
    busiest = int(np.argmax(seconds_per_byte))
    # Transfers of one size are all done when the busiest link is. Filling all links evenly, the first to be full is the
    # one with the least bandwidth per transfer, which is the busiest: its n transfers get 1/n of it each, and nobody
    # gets less. As others finish, loads only fall, so this stays so until those n finish together.
    done_s = fabric.link.alpha_s + step.count[0] * chunk_bytes * seconds_per_byte[busiest]
    return float(done_s), fabric.link_name(busiest), int(flows[busiest])


def _nodes(ranks: int, fabric: FatTree, placement: np.ndarray | None) -> np.ndarray:
    if placement is None:
        return fabric.in_order(ranks)
    nodes = np.asarray(placement)
    if nodes.shape != (ranks,) or nodes.dtype.kind not in "iu":
        raise ValueError(
            f"a placement must have one whole number for each of the {ranks} ranks, the number of its node, not "
            f"an array of shape {nodes.shape} and type {nodes.dtype}"
        )
    wrong, last = np.flatnonzero((nodes < 0) | (nodes >= fabric.nodes)), fabric.nodes - 1
    if len(wrong):
        raise ValueError(f"the placement puts rank {wrong[0]} on node {nodes[wrong[0]]}, but the nodes are 0 to {last}")
    return nodes.astype(int)


def _require_simple(number_of_step: int, step: Step, ranks: int) -> None:
    for column in (step.source, step.destination):
        if len(column) and not 0 <= column.min() <= column.max() < ranks:
            raise ScheduleError(f"step {number_of_step} names a rank that is not among 0 to {ranks - 1}")
    if len(step) and np.ptp(step.count):
        raise ScheduleError(
            f"step {number_of_step} mixes transfers of different lengths, which the simulation does not follow: put "
            "each length into a step of its own"
        )
