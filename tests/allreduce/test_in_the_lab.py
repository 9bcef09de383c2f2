"""Schedules across the links of a network lab: what the interfaces count is what the schedules say, and headers."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nurion_utils import allreduce, ranks, recordings
from nurion_utils.allreduce import ALGORITHMS, Schedule, measure_allreduce

pytestmark = pytest.mark.lab

COLUMNS = [
    *["contender", "ranks", "rate_mbit", "size_bytes", "repeat"],
    *["time_s", "theory_s", "bytes_sent", "wire_bytes"],
]


@pytest.fixture(scope="module")
def lab4(permitted: None) -> Iterator[ranks.World]:
    with ranks.start(4, rate_mbit=200) as network:
        yield network


def test_a_measurement_has_a_row_for_each_observation_and_contenders_take_turns_to_be_first(lab4: ranks.World) -> None:
    ring, native = allreduce.ring(4), None
    table = measure_allreduce(lab4, {"ring": ring, "native": native}, sizes_bytes=[64, 1000], repeats=2)
    assert list(table) == COLUMNS
    assert list(table.contender) == 2 * ["ring", "native", "native", "ring"]
    assert list(table.size_bytes) == 4 * [64] + 4 * [1000] and list(table.repeat) == 2 * [0, 0, 1, 1]
    assert set(table.ranks) == {4} and set(table.rate_mbit) == {200.0} and (table.time_s > 0).all()
    rings = table[table.contender == "ring"]
    assert list(rings.theory_s) == [
        allreduce.time(ring, size, allreduce.Link(0, 8 / 200e6)) for size in rings.size_bytes
    ]
    assert table[table.contender == "native"][["theory_s", "bytes_sent"]].isna().all(axis=None)


@given(make=st.sampled_from([*ALGORITHMS.values()]), elements=st.integers(1, 2**17))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interfaces_send_what_the_schedule_says_and_headers(
    lab4: ranks.World, make: Callable[[int], Schedule], elements: int
) -> None:
    schedule = make(4)
    row = measure_allreduce(lab4, {"it": schedule}, sizes_bytes=[4 * elements], repeats=1).iloc[0]
    assert row.bytes_sent == sum(schedule.bytes_sent(rank, 4 * elements, 4) for rank in range(4))
    messages = sum(map(schedule.messages, range(4)))
    # headers and acknowledgements of each packet; of small messages, and of those with which the ranks meet
    assert row.bytes_sent < row.wire_bytes < 1.06 * row.bytes_sent + 300 * (messages + 24) + 1000


def test_links_have_their_rate_in_both_directions(lab4: ranks.World) -> None:
    # rank 0 is the bottleneck of the naive algorithm: first of what it receives, then of what it sends
    naive = allreduce.naive(4)
    table = measure_allreduce(lab4, {"naive": naive, "native": None}, sizes_bytes=[2**19], repeats=2)
    times = table[table.contender == "naive"]
    assert (times.time_s > 0.95 * times.theory_s).all()


def test_mpi_takes_the_network_too(lab4: ranks.World) -> None:
    table = measure_allreduce(lab4, {"native": None}, sizes_bytes=[2**18], repeats=2)
    least = 2 * 3 * 2**18  # bytes by all ranks together: no allreduce can do with less
    assert (table.wire_bytes > least).all() and (table.time_s > 0.9 * least / 4 * 8 / 200e6).all()


def test_a_wrong_sum_is_an_error_and_the_lab_lives_on(lab4: ranks.World) -> None:
    ring = allreduce.ring(4)
    broken = Schedule("ring without its last step", 4, ring.chunks, ring.steps[:-1])
    with pytest.raises(allreduce.ScheduleError):
        measure_allreduce(lab4, {"broken": broken}, sizes_bytes=[64])
    lab4.run(reduce_with, np.subtract)
    with pytest.raises(ranks.RankError, match="ArithmeticError: ring gave a wrong sum in 16 of 16 elements"):
        measure_allreduce(lab4, {"ring": ring}, sizes_bytes=[64])
    lab4.run(reduce_with, np.add)
    assert (measure_allreduce(lab4, {"ring": ring}, sizes_bytes=[64]).time_s > 0).all()


def reduce_with(operation: np.ufunc) -> None:
    from nurion_utils.allreduce import running

    running.OPERATIONS["sum"] = operation


@pytest.mark.parametrize(
    "contenders, sizes, repeats, words",
    [
        ({}, [4], 1, "contenders are a dictionary"),
        ({"native": None}, [], 1, "sizes_bytes must be a list of lengths"),
        ({"ring": allreduce.ring(3)}, [4], 1, "'ring' is for 3 ranks, and there are 4"),
        ({"ring": allreduce.ring}, [4], 1, "must be a schedule, or None for MPI's own"),
        ({"native": None}, [4, 6], 1, "multiples of 4 bytes, the length of a float32, not 6"),
        ({"native": None}, [0], 1, "from 1 up, not 0"),
        ({"native": None}, [4], 0, "repeats must be a whole number from 1 up, not 0"),
    ],
)
def test_impossible_measurements_are_refused(lab4: ranks.World, contenders, sizes, repeats, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure_allreduce(lab4, contenders, sizes, repeats)


def test_the_recorded_table_is_complete_and_near_theory() -> None:
    table = recordings.load("network_lab")
    assert list(table) == [*COLUMNS, "source"] and table.source.str.startswith("recorded with MPICH").all()
    names = {*ALGORITHMS, "native"}
    observations = table.groupby(["contender", "ranks", "size_bytes"]).size()
    sizes = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20, 4 * 10**6, 16 * 10**6]
    assert {*observations.index} == {(name, ranks, size) for name in names for ranks in (2, 4, 8) for size in sizes}
    assert (observations == 3).all() and (table.time_s > 0).all()
    large = table[table.size_bytes == 16 * 10**6]
    rings = large[large.contender == "ring"]
    assert (rings.time_s / rings.theory_s).between(0.95, 1.25).all()
    counted = large[large.contender != "native"]
    assert (counted.wire_bytes / counted.bytes_sent).between(1, 1.08).all()


def test_the_recorded_table_agrees_with_todays_schedules() -> None:
    for row in recordings.load("network_lab").query("contender != 'native'").itertuples():
        schedule = ALGORITHMS[row.contender](row.ranks)
        assert row.theory_s == pytest.approx(
            allreduce.time(schedule, row.size_bytes, allreduce.Link(0, 8e-6 / row.rate_mbit))
        )
        assert row.bytes_sent == sum(schedule.bytes_sent(rank, row.size_bytes, 4) for rank in range(row.ranks))


def test_bandwidth_bound_algorithms_win_large_arrays_and_few_steps_win_small_ones() -> None:
    table = recordings.load("network_lab")
    eight = table[table.ranks == 8].groupby(["size_bytes", "contender"]).time_s.median().unstack()
    assert eight.loc[16 * 10**6].drop("native").idxmin() in ("ring", "rabenseifner")
    assert eight.loc[2**10, "ring"] > eight.loc[2**10, "recursive_doubling"]
    assert np.argmax(eight.ring < eight.recursive_doubling) > 0
