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
from nurion_utils.allreduce import FatTree, Link, Schedule, Step, Transfer, fattree, simulate

SIMGRID = Path(__file__).parent / "simgrid"
ALGORITHMS = [*allreduce.ALGORITHMS]
LINK = Link(alpha_s=1e-6, beta_s_per_byte=1e-9)
MIXED = Schedule("mixed", 4, 4, [Step.of([Transfer(0, 1, 0, 4), Transfer(2, 3, 0, 3)])])
no_deadline = settings(deadline=None)  # the first example imports pandas


@pytest.fixture(scope="module")
def nurion() -> FatTree:
    return FatTree.of(sites.load("nurion"))


def _tree(nodes: int = 16, down: int = 4, up: int = 2) -> FatTree:
    return FatTree(nodes, down, up, LINK, memory_beta_s_per_byte=2e-10)


def _one_step(ranks: int, transfers, chunks: int = 1) -> Schedule:
    return Schedule("one step", ranks, chunks, [Step.of(transfers)])


@st.composite
def trees(draw) -> FatTree:
    nodes, down, up = (draw(st.integers(1, most)) for most in (40, 8, 6))
    return _tree(nodes, down, up)


def test_nurion_is_what_its_description_says(nurion):
    assert (nurion.nodes, nurion.edge_down, nurion.edge_up, nurion.edges) == (8305, 32, 16, 260)
    link = nurion.link
    assert (link.alpha_s, 1e-9 / link.beta_s_per_byte) == pytest.approx((2.5e-6, 12.3))
    assert nurion.memory_beta_s_per_byte == pytest.approx(3 / 490e9)


def test_a_route_goes_up_and_down_no_further_than_it_must():
    tree = _tree()

    def route(source: int, destination: int) -> list[str]:
        path = tree.paths(np.array([source]), np.array([destination]))[0]
        return [tree.link_name(link) for link in path if link >= 0]

    assert route(1, 13) == ["node 1 up", "edge 0 up 1", "edge 3 down 1", "node 13 down"]
    assert route(1, 14) == ["node 1 up", "edge 0 up 0", "edge 3 down 0", "node 14 down"]
    assert route(1, 2) == ["node 1 up", "node 2 down"]
    assert route(1, 1) == ["node 1 memory"]


@no_deadline
@given(trees())
def test_every_link_has_a_name_of_its_own(tree):
    names = {tree.link_name(link) for link in range(len(tree.seconds_per_byte))}
    assert len(names) == len(tree.seconds_per_byte) == 3 * tree.nodes + 2 * tree.edges * tree.edge_up


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


@no_deadline
@given(st.sampled_from(ALGORITHMS), st.integers(1, 20), st.floats(0, 1e9))
def test_on_a_single_switch_nothing_is_shared_and_the_time_is_the_models(algorithm, ranks, size):
    schedule = allreduce.ALGORITHMS[algorithm](ranks)
    steps = simulate(schedule, size, _tree(nodes=20, down=20))
    assert steps.time_s.sum() == pytest.approx(allreduce.time(schedule, size, LINK), rel=1e-9)
    assert (steps.flows == 1).all() and len(steps) == len(schedule.steps)


def test_in_order_a_ring_over_all_of_nurion_meets_no_congestion(nurion):
    ring = allreduce.ring(nurion.nodes)
    steps = simulate(ring, 100e6, nurion)
    assert (steps.flows == 1).all()
    assert steps.time_s.sum() == pytest.approx(allreduce.time(ring, 100e6, nurion.link), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_ring_keeps_clear_of_itself_on_sorted_nodes_but_not_on_random_ones(nurion, seed):
    ring = allreduce.ring(1024)
    sorted_, random = (simulate(ring, 100e6, nurion, place(1024, seed)) for place in (nurion.scheduled, nurion.random))
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
    step = simulate(shift, 1e6, nurion).iloc[0]
    assert step.busiest_link == "edge 0 up 0" and step.flows == 2
    assert step.time_s == pytest.approx(nurion.link.alpha_s + 2e6 * nurion.link.beta_s_per_byte)


def test_ranks_of_a_node_share_its_memory_and_its_link():
    tree = _tree()
    inside = [Transfer(0, 1, 0, 1, False), Transfer(1, 0, 0, 1, False)]
    step = simulate(_one_step(4, inside), 1e6, tree, tree.in_order(4, ranks_per_node=2)).iloc[0]
    assert (step.busiest_link, step.flows) == ("node 0 memory", 2)
    assert step.time_s == pytest.approx(LINK.alpha_s + 2e6 * 2e-10)

    outwards = [Transfer(0, 2, 0, 1, False), Transfer(1, 3, 0, 1, False)]
    step = simulate(_one_step(4, outwards), 1e6, tree, tree.in_order(4, ranks_per_node=2)).iloc[0]
    assert (step.busiest_link, step.flows) == ("node 0 up", 2)
    assert step.time_s == pytest.approx(LINK.alpha_s + 2e6 * 1e-9)


def test_a_ring_on_sixteen_ranks_per_node_crosses_each_link_once():
    tree = _tree()
    steps = simulate(allreduce.ring(256), 256e6, tree, tree.in_order(256, ranks_per_node=16))
    # Fifteen transfers through memory at 0.2 ns a byte take longer than one through the network at 1 ns.
    assert set(steps.busiest_link) == {"node 0 memory"} and set(steps.flows) == {15}


def test_a_step_without_transfers_takes_no_time():
    steps = simulate(Schedule("idle", 2, 1, [Step.of([]), *allreduce.ring(2).steps]), 1e6, _tree())
    assert steps.loc[0].tolist() == [0, 0.0, "", 0]
    assert simulate(allreduce.ring(1), 1e6, _tree()).columns.tolist() == ["step", "time_s", "busiest_link", "flows"]


@no_deadline
@given(st.sampled_from(ALGORITHMS), st.integers(2, 40), st.floats(1, 1e9), st.floats(1, 100), st.integers(0, 9))
def test_time_beyond_latency_grows_as_the_array_does(algorithm, ranks, size, factor, seed):
    tree = _tree(nodes=40)
    schedule, nodes = allreduce.ALGORITHMS[algorithm](ranks), tree.random(ranks, seed)
    less, more = (simulate(schedule, n, tree, nodes).time_s - LINK.alpha_s for n in (size, factor * size))
    assert more.to_numpy() == pytest.approx(factor * less.to_numpy(), rel=1e-6, abs=1e-15)


def test_the_steps_of_a_ring_are_worked_out_only_once(nurion, monkeypatch):
    worked_out, real = [], fattree._simulate_step
    monkeypatch.setattr(fattree, "_simulate_step", lambda *given: worked_out.append(given) or real(*given))
    assert len(simulate(allreduce.ring(8305), 1e8, nurion)) == 16608
    assert len(worked_out) == 1


def test_hierarchical_sends_between_nodes_what_a_ring_of_the_nodes_does():
    tree, ranks, per_node = _tree(nodes=16), 64, 4
    nodes = tree.in_order(ranks, per_node)
    crossing = [nodes[step.source] != nodes[step.destination] for step in allreduce.hierarchical(ranks, per_node).steps]
    assert [across.sum() for across in crossing if across.any()] == 30 * [16]
    assert all(across.all() for across in crossing if across.any())


def _make_table():
    spec = importlib.util.spec_from_file_location("make_table", SIMGRID / "make_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _deviations(rows: list[dict[str, str]], up: int | None = None) -> np.ndarray:
    """Ours over SimGrid's, less 1, of each row's time."""
    recipe = _make_table()
    link, up = Link(0.0, 1 / recipe.BYTES_PER_S), up or recipe.UP
    tree = FatTree(recipe.DOWN * recipe.SWITCHES, recipe.DOWN, up, link, memory_beta_s_per_byte=1e-12)
    found = []
    for row in rows:
        hosts = int(row["hosts"])
        schedule = getattr(allreduce, row["algorithm"].replace(" ", "_"))(hosts)
        nodes = np.array(recipe.nodes(row["placement"], hosts, int(row["seed"])))
        assert len(schedule.steps) == int(row["steps"])
        found.append(simulate(schedule, int(row["size_bytes"]), tree, nodes).time_s.sum() / float(row["time_s"]) - 1)
    return np.abs(found)


def test_simgrid_agrees_on_every_case_of_the_recorded_table():
    rows = list(csv.DictReader((SIMGRID / "reference.csv").read_text().splitlines()))
    assert len(rows) == 72 and {row["hosts"] for row in rows} == {"64", "128", "256", "512"}
    assert _deviations(rows).max() < 1e-6
    assert _deviations(rows, up=15).max() > 0.2  # the table would show wrong routes


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
    assert len(rows) == 4
    assert _deviations(rows).max() < 1e-3


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda: FatTree.of(sites.load("local")), "'local' does not describe a fat tree .* such as 'nurion'"),
        (lambda: _tree(nodes=0), "nodes must be a whole number from 1 up, not 0"),
        (lambda: _tree(up=1.5), "edge_up must be a whole number from 1 up, not 1.5"),
        (lambda: FatTree(4, 2, 1, None, 1e-9), "link must be a Link"),
        (lambda: FatTree(4, 2, 1, Link(0, 0), 1e-9), "link.beta_s_per_byte must be a number above 0, not 0"),
        (lambda: FatTree(4, 2, 1, LINK, 0), "memory_beta_s_per_byte must be a number above 0, not 0"),
        (lambda: _tree().link_name(64), "the links are numbered 0 to 63, not 64"),
        (lambda: _tree().in_order(17), "17 ranks need 17 nodes at 1 per node, but there are only 16"),
        (lambda: _tree().random(49, 0, 3), "49 ranks need 17 nodes at 3 per node, but there are only 16"),
        (lambda: _tree().scheduled(33, 0, 2), "33 ranks need 17 nodes at 2 per node, but there are only 16"),
        (lambda: _tree().in_order(2, 0), "ranks_per_node must be a whole number from 1 up, not 0"),
        (lambda: simulate(allreduce.ring(17), 1, _tree()), "17 ranks need 17 nodes"),
        (lambda: simulate(allreduce.ring(4), -1, _tree()), "size_bytes must be a number from 0, not -1"),
        (lambda: simulate(allreduce.ring(4), 1, _tree(), np.arange(3)), "each of the 4 ranks.*shape \\(3,\\)"),
        (lambda: simulate(allreduce.ring(2), 1, _tree(), [0.0, 1.0]), "one whole number .* type float64"),
        (lambda: simulate(allreduce.ring(2), 1, _tree(), [3, 16]), "rank 1 on node 16, but the nodes are 0 to 15"),
        (lambda: simulate(allreduce.ring(2), 1, _tree(), [-1, 3]), "rank 0 on node -1, but the nodes are 0 to 15"),
        (lambda: simulate(_one_step(2, [Transfer(0, 2, 0)]), 1, _tree()), "step 0 names a rank .* not among 0 to 1"),
        (lambda: simulate(MIXED, 1, _tree()), "step 0 mixes transfers of different lengths, .* a step of its own"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(attempt, sentence):
    with pytest.raises(ValueError, match=sentence):
        attempt()
