"""Schedules sent through a fat tree: routes, sharing, placements, and SimGrid's opinion of the same."""

import csv
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils import allreduce, sites
from nurion_utils.allreduce import FatTree, Link, Schedule, Step, Transfer, fattree

SIMGRID = Path(__file__).parent / "simgrid"
ALGORITHMS = ("naive", "tree", "ring", "recursive_doubling", "rabenseifner")
LINK = Link(alpha_s=1e-6, beta_s_per_byte=1e-9, gamma_s_per_byte=3e-10)
no_deadline = settings(deadline=None)  # the first example imports pandas


@pytest.fixture(scope="module")
def nurion() -> FatTree:
    return FatTree.of(sites.load("nurion"), gamma_s_per_byte=1e-11)


def _tree(nodes: int = 16, down: int = 4, up: int = 2, **options) -> FatTree:
    return FatTree(nodes, down, up, LINK, memory_beta_s_per_byte=2e-10, **options)


def _one_step(ranks: int, transfers, chunks: int = 1) -> Schedule:
    return Schedule("one step", ranks, chunks, [Step.of(transfers)])


@st.composite
def trees(draw) -> FatTree:
    nodes, down, up = (draw(st.integers(1, most)) for most in (40, 8, 6))
    return _tree(nodes, down, up, routing=draw(st.sampled_from(["node", "switch"])))


# -- the machine ------------------------------------------------------------------------------------------------------


def test_nurion_is_what_its_description_says(nurion):
    assert (nurion.nodes, nurion.edge_down, nurion.edge_up, nurion.edges) == (8305, 32, 16, 260)
    link = nurion.link
    assert (link.alpha_s, 1e-9 / link.beta_s_per_byte, link.gamma_s_per_byte) == pytest.approx((2.5e-6, 12.3, 1e-11))
    assert nurion.memory_beta_s_per_byte == pytest.approx(3 / 490e9)


def test_a_route_goes_up_and_down_no_further_than_it_must():
    tree, by_switch = _tree(), _tree(routing="switch")

    def route(tree: FatTree, source: int, destination: int) -> list[str]:
        path = tree.paths(np.array([source]), np.array([destination]))[0]
        return [tree.link_name(link) for link in path if link >= 0]

    assert route(tree, 1, 13) == ["node 1 up", "edge 0 up 1", "edge 3 down 1", "node 13 down"]
    assert route(tree, 1, 14) == ["node 1 up", "edge 0 up 0", "edge 3 down 0", "node 14 down"]
    assert route(by_switch, 1, 14) == ["node 1 up", "edge 0 up 1", "edge 3 down 1", "node 14 down"]
    assert route(tree, 1, 2) == ["node 1 up", "node 2 down"]
    assert route(tree, 1, 1) == ["node 1 memory"]


@no_deadline
@given(trees())
def test_every_link_has_a_name_of_its_own(tree):
    names = {tree.link_name(link) for link in range(len(tree.seconds_per_byte))}
    assert len(names) == len(tree.seconds_per_byte) == 3 * tree.nodes + 2 * tree.edges * tree.edge_up


# -- placements -------------------------------------------------------------------------------------------------------


@no_deadline
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 9))
def test_a_placement_fills_nodes_and_uses_none_twice(ranks, per_node, seed):
    tree = _tree(nodes=40)
    placements = {
        "in order": tree.in_order(ranks, per_node),
        "random": tree.random(ranks, seed, per_node),
        "scheduled": tree.scheduled(ranks, seed, per_node),
    }
    for nodes in placements.values():
        changes = np.flatnonzero(np.diff(nodes))
        assert len(nodes) == ranks and 0 <= nodes.min() <= nodes.max() < tree.nodes
        assert (changes + 1 == np.arange(per_node, ranks, per_node)).all()
        assert len(set(nodes)) == len(changes) + 1
    assert (placements["in order"] == np.arange(ranks) // per_node).all()
    assert (np.diff(placements["scheduled"]) >= 0).all()


def test_a_seed_gives_the_same_nodes_again_and_another_seed_others(nurion):
    for place in (nurion.random, nurion.scheduled):
        assert (place(1024, seed=1) == place(1024, seed=1)).all()
        assert (place(1024, seed=1) != place(1024, seed=2)).any()


def test_a_batch_system_gives_nodes_with_gaps(nurion):
    gaps = np.diff(nurion.scheduled(1024, seed=1)) > 1
    assert 1 <= gaps.sum() < 512  # pieces, but pieces of many nodes


# -- congestion -------------------------------------------------------------------------------------------------------


@no_deadline
@given(st.sampled_from(ALGORITHMS), st.integers(1, 20), st.floats(0, 1e9))
def test_on_a_single_switch_nothing_is_shared_and_the_time_is_the_models(algorithm, ranks, size):
    schedule = getattr(allreduce, algorithm)(ranks)
    steps = schedule.simulate(size, _tree(nodes=20, down=20))
    assert steps.time_s.sum() == pytest.approx(schedule.time(size, LINK), rel=1e-9)
    assert (steps.flows == 1).all() and len(steps) == len(schedule.steps)


def test_a_step_that_copies_much_and_reduces_little_is_no_longer_than_either():
    step = _one_step(4, [Transfer(0, 1, 0, 4, reduce=False), Transfer(2, 3, 0, 3, reduce=True)], chunks=4)
    assert step.simulate(4e6, _tree()).time_s.sum() == pytest.approx(step.time(4e6, LINK), rel=1e-9)


def test_in_order_a_ring_over_all_of_nurion_meets_no_congestion(nurion):
    ring = allreduce.ring(nurion.nodes)
    steps = ring.simulate(100e6, nurion)
    assert (steps.flows == 1).all()
    assert steps.time_s.sum() == pytest.approx(ring.time(100e6, nurion.link), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_ring_keeps_clear_of_itself_on_sorted_nodes_but_not_on_random_ones(nurion, seed):
    ring = allreduce.ring(1024)
    sorted_, random = (ring.simulate(100e6, nurion, place(1024, seed)) for place in (nurion.scheduled, nurion.random))
    assert (sorted_.flows == 1).all()
    assert (random.flows > 1).all()
    assert random.time_s.sum() > sorted_.time_s.sum()


def test_where_every_node_sends_to_the_next_switch_two_share_each_up_link(nurion):
    source = np.arange(8192)
    paths = nurion.paths(source, (source + 32) % 8192)
    flows = dict(zip(*np.unique(paths, return_counts=True), strict=True))
    by_kind = {kind: {flows[link] for link in flows if nurion.link_name(link).startswith(kind)} for kind in ("e", "n")}
    assert by_kind == {"e": {2}, "n": {1}}
    shift = _one_step(8192, [Transfer(rank, (rank + 32) % 8192, 0, 1, False) for rank in range(8192)])
    step = shift.simulate(1e6, nurion).iloc[0]
    assert step.busiest_link == "edge 0 up 0" and step.flows == 2
    assert step.time_s == pytest.approx(nurion.link.alpha_s + 2e6 * nurion.link.beta_s_per_byte)


def test_routes_by_switch_bring_all_nodes_of_a_switch_through_one_link():
    shift = _one_step(16, [Transfer(rank, (rank + 4) % 16, 0) for rank in range(16)])
    flows = [shift.simulate(1e6, _tree(routing=routing)).flows[0] for routing in ("node", "switch")]
    assert flows == [2, 4]


def test_ranks_of_a_node_share_its_memory_and_its_link():
    tree = _tree()
    inside = [Transfer(0, 1, 0, 1, False), Transfer(1, 0, 0, 1, False)]
    step = _one_step(4, inside).simulate(1e6, tree, tree.in_order(4, ranks_per_node=2)).iloc[0]
    assert (step.busiest_link, step.flows) == ("node 0 memory", 2)
    assert step.time_s == pytest.approx(LINK.alpha_s + 2e6 * 2e-10)

    outwards = [Transfer(0, 2, 0, 1, False), Transfer(1, 3, 0, 1, False)]
    step = _one_step(4, outwards).simulate(1e6, tree, tree.in_order(4, ranks_per_node=2)).iloc[0]
    assert (step.busiest_link, step.flows) == ("node 0 up", 2)
    assert step.time_s == pytest.approx(LINK.alpha_s + 2e6 * 1e-9)


def test_a_ring_on_sixteen_ranks_per_node_crosses_each_link_once():
    tree = _tree()
    steps = allreduce.ring(256).simulate(256e6, tree, tree.in_order(256, ranks_per_node=16))
    # Fifteen transfers through memory at 0.2 ns a byte take longer than one through the network at 1 ns.
    assert set(steps.busiest_link) == {"node 0 memory"} and set(steps.flows) == {15}


def test_a_step_without_transfers_takes_no_time():
    steps = Schedule("idle", 2, 1, [Step.of([]), *allreduce.ring(2).steps]).simulate(1e6, _tree())
    assert steps.loc[0].tolist() == [0, 0.0, "", 0]
    assert allreduce.ring(1).simulate(1e6, _tree()).columns.tolist() == ["step", "time_s", "busiest_link", "flows"]


@no_deadline
@given(st.sampled_from(ALGORITHMS), st.integers(2, 40), st.floats(1, 1e9), st.floats(1, 100), st.integers(0, 9))
def test_time_beyond_latency_grows_as_the_array_does(algorithm, ranks, size, factor, seed):
    tree = _tree(nodes=40)
    schedule, nodes = getattr(allreduce, algorithm)(ranks), tree.random(ranks, seed)
    less, more = (schedule.simulate(n, tree, nodes).time_s - LINK.alpha_s for n in (size, factor * size))
    assert more.to_numpy() == pytest.approx(factor * less.to_numpy(), rel=1e-6, abs=1e-15)


def test_the_steps_of_a_ring_are_worked_out_only_twice(nurion, monkeypatch):
    worked_out, real = [], fattree._simulate_step
    monkeypatch.setattr(fattree, "_simulate_step", lambda *given: worked_out.append(given) or real(*given))
    monkeypatch.delattr(fattree, "fair_finish_times")  # not needed where all transfers have one size
    assert len(allreduce.ring(8305).simulate(1e8, nurion)) == 16608
    assert len(worked_out) == 2  # with and without reduction


# -- fairness ---------------------------------------------------------------------------------------------------------


def test_two_flows_over_one_link_get_half_each_and_then_all_of_it():
    finish = fattree.fair_finish_times(np.array([[0], [0]]), np.array([1.0, 3.0]), np.array([1.0]))
    assert finish.tolist() == [2.0, 4.0]


def test_a_flow_held_up_on_one_link_leaves_the_rest_of_another_to_others():
    paths = np.array([[0, 1], [0, -1], [1, -1], [-1, -1]])
    finish = fattree.fair_finish_times(paths, np.array([1.0, 1.0, 6.0, 5.0]), np.array([1.0, 2.0]))
    # Two share link 0 until 2 s; the third has 1.5 of link 1's 2 until then, and all of it for the other 3 bytes.
    assert finish.tolist() == [2.0, 2.0, 3.5, 0.0]


@st.composite
def flows(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    links = draw(st.integers(1, 6))
    route = st.sets(st.integers(0, links - 1), min_size=1, max_size=4)
    routes = [sorted(route) for route in draw(st.lists(route, min_size=1, max_size=12))]
    sizes = draw(st.lists(st.integers(0, 50), min_size=len(routes), max_size=len(routes)))
    capacities = draw(st.lists(st.integers(1, 9), min_size=links, max_size=links))
    return np.array([route + [-1] * (4 - len(route)) for route in routes]), np.array(sizes), np.array(capacities, float)


@no_deadline
@given(flows())
def test_rates_fill_no_link_beyond_its_capacity_and_every_flow_has_a_full_link_on_which_nobody_gets_more(case):
    paths, _, capacities = case
    rates = fattree._fair_rates(paths, capacities)
    load = np.array([rates[(paths == link).any(axis=1)].sum() for link in range(len(capacities))])
    assert (load <= capacities * (1 + 1e-9)).all()
    for path, rate in zip(paths, rates, strict=True):
        full = [link for link in path if link >= 0 and load[link] >= capacities[link] * (1 - 1e-9)]
        assert any(rate >= rates[(paths == link).any(axis=1)].max() * (1 - 1e-9) for link in full)


@no_deadline
@given(flows())
def test_no_link_carries_its_bytes_faster_than_it_can(case):
    paths, sizes, capacities = case
    finish = fattree.fair_finish_times(paths, sizes, capacities)
    for link, capacity in enumerate(capacities):
        across = (paths == link).any(axis=1)
        assert finish[across].max(initial=0) >= sizes[across].sum() / capacity * (1 - 1e-6)


@no_deadline
@pytest.mark.parametrize("most", [1, 9], ids=["of one size", "of several sizes"])
@given(tree=trees(), per_node=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_a_step_ends_when_its_last_transfer_has_arrived_and_been_reduced(most, tree, per_node, seed, data):
    ranks = min(30, tree.nodes * per_node)
    rank = st.integers(0, ranks - 1)
    kinds = data.draw(st.sampled_from([[True], [False], [True, False]]))
    transfer = st.builds(Transfer, rank, rank, st.just(0), st.integers(1, most), st.sampled_from(kinds))
    schedule = _one_step(ranks, data.draw(st.lists(transfer, min_size=1, max_size=40)), chunks=most)
    nodes, (step,) = tree.random(ranks, seed, per_node), schedule.steps
    paths = tree.paths(nodes[step.source], nodes[step.destination])
    arrived = fattree.fair_finish_times(paths, step.count * 1e6, 1 / tree.seconds_per_byte)
    expected = LINK.alpha_s + (arrived + step.reduce * step.count * 1e6 * LINK.gamma_s_per_byte).max()
    assert schedule.simulate(most * 1e6, tree, nodes).time_s[0] == pytest.approx(expected, rel=1e-6)


# -- SimGrid ----------------------------------------------------------------------------------------------------------


def _make_table():
    spec = importlib.util.spec_from_file_location("make_table", SIMGRID / "make_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _deviations(rows: list[dict[str, str]], routing: str = "node") -> np.ndarray:
    """Ours over SimGrid's, less 1: of each row's time, and of the mean time at which a flow is done."""
    recipe = _make_table()
    link = Link(0.0, 1 / recipe.BYTES_PER_S)
    tree = FatTree(recipe.DOWN * recipe.SWITCHES, recipe.DOWN, recipe.UP, link, 1e-12, routing)
    found = []
    for row in rows:
        hosts, size = int(row["hosts"]), int(row["size_bytes"])
        if row["algorithm"] == "unequal":
            transfers = [Transfer(rank, (rank + hosts // 2 + 1) % hosts, 0, 1 + rank % 7) for rank in range(hosts)]
            schedule = _one_step(hosts, transfers, chunks=8)
        else:
            schedule = getattr(allreduce, row["algorithm"].replace(" ", "_"))(hosts)
        nodes = np.array(recipe.nodes(row["placement"], hosts, int(row["seed"])))
        finish = [
            fattree.fair_finish_times(
                tree.paths(nodes[step.source], nodes[step.destination]),
                step.count * size / schedule.chunks,
                1 / tree.seconds_per_byte,
            )
            for step in schedule.steps[: int(row["simulated"])]
        ]
        assert len(schedule.steps) == int(row["steps"])
        ours = schedule.simulate(size, tree, nodes).time_s.sum(), np.mean(finish)
        found.append([ours[0] / float(row["time_s"]) - 1, ours[1] / float(row["mean_finish_s"]) - 1])
    return np.abs(found)


def test_simgrid_agrees_on_every_case_of_the_recorded_table():
    rows = list(csv.DictReader((SIMGRID / "reference.csv").read_text().splitlines()))
    assert len(rows) == 108 and {row["hosts"] for row in rows} == {"64", "128", "256", "512"}
    assert _deviations(rows).max() < 1e-6
    assert _deviations(rows, routing="switch").max() > 1  # the table would show wrong routes


def test_simgrid_agrees_on_a_case_tried_now():
    python, needs = "/usr/bin/python3", "import simgrid; simgrid.NetZone.create_fatTree_zone"
    try:
        subprocess.run([python, "-c", needs], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip(f"{python} has no SimGrid as of version 3.32; on Debian 12: apt install python3-simgrid")
    options = ["--hosts", "64", "--seeds", "7", "--sizes", "4194304"]
    made = subprocess.run(
        [python, SIMGRID / "make_table.py", *options], check=True, capture_output=True, text=True, timeout=120
    )
    rows = list(csv.DictReader(made.stdout.splitlines()))
    assert len(rows) == 6
    assert _deviations(rows).max() < 1e-3


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda: FatTree.of(sites.load("local")), "'local' describes no fat tree .* such as 'nurion'"),
        (lambda: _tree(nodes=0), "nodes must be a whole number from 1 up, not 0"),
        (lambda: _tree(up=1.5), "edge_up must be a whole number from 1 up, not 1.5"),
        (lambda: _tree(routing="adaptive"), "routing must be 'node' or 'switch', not 'adaptive'"),
        (lambda: FatTree(4, 2, 1, None, 1e-9), "link must be a Link"),
        (lambda: FatTree(4, 2, 1, Link(0, 0), 1e-9), "link.beta_s_per_byte must be a number above 0, not 0"),
        (lambda: FatTree(4, 2, 1, LINK, 0), "memory_beta_s_per_byte must be a number above 0, not 0"),
        (lambda: _tree().link_name(64), "the links are numbered 0 to 63, not 64"),
        (lambda: _tree().in_order(17), "17 ranks need 17 nodes at 1 per node, but there are only 16"),
        (lambda: _tree().random(49, 0, 3), "49 ranks need 17 nodes at 3 per node, but there are only 16"),
        (lambda: _tree().scheduled(33, 0, 2), "33 ranks need 17 nodes at 2 per node, but there are only 16"),
        (lambda: _tree().in_order(2, 0), "ranks_per_node must be a whole number from 1 up, not 0"),
        (lambda: allreduce.ring(17).simulate(1, _tree()), "17 ranks need 17 nodes"),
        (lambda: allreduce.ring(4).simulate(-1, _tree()), "size_bytes must be a number of bytes from 0 up"),
        (lambda: allreduce.ring(4).simulate(1, _tree(), np.arange(3)), "each of the 4 ranks.*shape \\(3,\\)"),
        (lambda: allreduce.ring(2).simulate(1, _tree(), [0.0, 1.0]), "one whole number .* type float64"),
        (lambda: allreduce.ring(2).simulate(1, _tree(), [3, 16]), "rank 1 on node 16, but the nodes are 0 to 15"),
        (lambda: allreduce.ring(2).simulate(1, _tree(), [-1, 3]), "rank 0 on node -1, but the nodes are 0 to 15"),
        (lambda: _one_step(2, [Transfer(0, 2, 0)]).simulate(1, _tree()), "step 0 names a rank .* not among 0 to 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(attempt, sentence):
    with pytest.raises(ValueError, match=sentence):
        attempt()
