"""Comparisons that hold their ground on a busy machine, or say that they cannot tell."""

import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nurion_utils import timing


@given(st.integers(1, 6), st.integers(0, 20))
def test_each_contender_has_one_turn_in_every_repeat_and_all_come_first_equally_often(n, repeats):
    names = [f"contender {i}" for i in range(n)]
    taken = list(timing.turns(names, repeats))
    for repeat in range(repeats):
        assert sorted(name for r, name in taken if r == repeat) == names
    firsts = [name for _, name in taken[::n]]
    assert max(map(firsts.count, names)) - min(map(firsts.count, names)) <= 1


@given(st.integers(1, 9), st.integers(0, 300))
def test_the_sum_of_exact_arrays_is_exact_in_any_order(ranks, elements):
    arrays = [timing.exact_arrays(4 * elements, rank, ranks)[0] for rank in range(ranks)]
    _, total = timing.exact_arrays(4 * elements, 0, ranks)
    assert np.array_equal(sum(arrays), total) and np.array_equal(sum(arrays[::-1]), total)


TABLE = pd.DataFrame(
    [("MPI", 0, 8.0), ("ring", 0, 2.0), ("MPI", 1, 9.0), ("ring", 1, 3.0), ("MPI", 2, 4.0), ("ring", 2, 4.0)],
    columns=["backend", "repeat", "time_s"],
).assign(size_bytes=4)


def test_ratios_are_of_the_same_turn():
    (row,) = timing.ratios(TABLE, "MPI", "backend", ["size_bytes"]).itertuples()
    assert (row.backend, row.size_bytes, row.turns) == ("ring", 4, 3)
    assert (row.least, row.low, row.speedup, row.high, row.most) == (1.0, 2.0, 3.0, 3.5, 4.0)


def test_ratios_of_what_was_not_measured_once_a_turn_are_refused():
    with pytest.raises(ValueError, match="the table has no time of 'Gloo', only of MPI, ring"):
        timing.ratios(TABLE, "Gloo", "backend")
    with pytest.raises(ValueError, match="several times of the same turn"):
        timing.ratios(pd.concat([TABLE, TABLE]), "MPI", "backend")
    with pytest.raises(ValueError, match="it lacks cycle_ms"):
        timing.ratios(TABLE, "MPI", "backend", ["cycle_ms"])


def test_a_clear_difference_is_found_with_six_pairs_and_its_direction_is_right():
    found = timing.Comparison((2.0,) * 6, 0.0)
    assert found.clear and found.median == 2.0
    assert str(found).startswith("2.00 x (median of 6 pairs")
    assert timing.Comparison((0.5,) * 6, 0.0).interval == (0.5, 0.5)


def test_noise_without_a_difference_is_said_to_be_too_much_to_tell():
    random = np.random.default_rng(0)
    verdicts = [timing.Comparison(tuple(random.lognormal(size=12)), 0.3) for _ in range(200)]
    wrong = [verdict for verdict in verdicts if verdict.clear]
    assert len(wrong) < 0.1 * len(verdicts)
    unclear = next(verdict for verdict in verdicts if not verdict.clear)
    assert str(unclear).startswith("too noisy to tell") and "other programs took" in str(unclear)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_the_interval_holds_the_median_and_few_pairs_are_never_clear(ratios):
    found = timing.Comparison(tuple(ratios), 0.0)
    low, high = found.interval
    assert low <= found.median <= high
    assert not (found.clear and len(ratios) < 6)


def test_the_load_of_others_is_seen_and_ones_own_is_not():
    burn = "import time; end = time.time() + 1.5\nwhile time.time() < end: pass"
    load = timing.OtherLoad()
    subprocess.run([sys.executable, "-c", burn], check=True)
    own = load.cores()
    load = timing.OtherLoad()
    subprocess.run(["setsid", "--fork", sys.executable, "-c", burn], stdout=subprocess.DEVNULL, check=True)
    time.sleep(1.5)
    others = load.cores()
    # What else runs here counts in both; so much does not change from one second to the next on two cores.
    assert others > 0.3 and own < others + 1
