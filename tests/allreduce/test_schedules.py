"""Schedules as data: for any number of ranks they are right, they are counted and costed exactly, and a broken one
is found out without being run."""

import dataclasses
import math
import pickle
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils import allreduce
from nurion_utils.allreduce import Link, Schedule, ScheduleError, Step, Transfer, time
from nurion_utils.allreduce.checking import walk

ALGORITHMS = {
    **allreduce.ALGORITHMS,
    "hierarchical by 1": lambda ranks: allreduce.hierarchical(ranks, 1),
    "hierarchical by 3": lambda ranks: allreduce.hierarchical(ranks, 3),
    "hierarchical by 4": lambda ranks: allreduce.hierarchical(ranks, 4),
}
schedules = st.builds(lambda name, ranks: ALGORITHMS[name](ranks), st.sampled_from([*ALGORITHMS]), st.integers(2, 9))
few_ranks = st.integers(1, 40)
sizes = st.integers(0, 10**9)
# From a femtosecond up: next to the smallest float that there is, no product has twelve digits.
costs = st.just(0.0) | st.floats(1e-15, 1e-3)
links = st.builds(Link, costs, costs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_right_for_any_number_of_ranks(algorithm: str):
    for ranks in range(1, 34):
        allreduce.check(ALGORITHMS[algorithm](ranks))


@given(few_ranks, sizes)
def test_a_ring_sends_two_p_minus_one_messages_and_together_two_n_p_minus_one_bytes(ranks: int, size_bytes: int):
    ring = allreduce.ring(ranks)
    assert {ring.messages(rank) for rank in range(ranks)} == {2 * (ranks - 1)}
    # per rank 2 N (P - 1) / P on average, and no rank strays from that by more than a byte per message
    sent = [ring.bytes_sent(rank, size_bytes) for rank in range(ranks)]
    assert sum(sent) == 2 * size_bytes * (ranks - 1)
    assert all(abs(each - 2 * size_bytes * (ranks - 1) / ranks) <= 2 * (ranks - 1) for each in sent)


@given(few_ranks, st.integers(0, 10**7))
def test_where_the_array_can_be_divided_every_rank_of_a_ring_sends_exactly_the_same(ranks: int, per_rank: int):
    size_bytes = 8 * ranks * per_rank
    for rank in range(ranks):
        assert allreduce.ring(ranks).bytes_sent(rank, size_bytes, itemsize=8) == 2 * size_bytes * (ranks - 1) // ranks


@given(schedules, st.integers(0, 1000), st.sampled_from([1, 2, 4, 8]))
def test_what_is_sent_is_received(schedule: Schedule, n: int, itemsize: int):
    received = 0
    for rank in range(schedule.ranks):
        for action in schedule.actions(rank):
            first, last = (chunk * n // schedule.chunks for chunk in action.receive)
            received += (last - first) * itemsize
    assert received == sum(schedule.bytes_sent(rank, n * itemsize, itemsize) for rank in range(schedule.ranks))
    assert sum(map(schedule.messages, range(schedule.ranks))) == sum(map(len, schedule.steps))


@given(few_ranks, sizes, links)
def test_the_cost_of_a_ring_is_the_published_formula(ranks: int, n: int, link: Link):
    a, b = dataclasses.astuple(link)
    share = (ranks - 1) / ranks
    expected = 2 * (ranks - 1) * a + 2 * n * share * b
    assert math.isclose(time(allreduce.ring(ranks), n, link), expected, rel_tol=1e-12)


@given(st.integers(0, 7), sizes, links)
def test_costs_on_a_power_of_two_ranks_are_the_published_formulas(log2: int, n: int, link: Link):
    a, b = dataclasses.astuple(link)
    share = 1 - 0.5**log2
    doubling = log2 * (a + n * b)
    halving = 2 * log2 * a + 2 * n * share * b
    assert math.isclose(time(allreduce.recursive_doubling(2**log2), n, link), doubling, rel_tol=1e-12)
    assert math.isclose(time(allreduce.rabenseifner(2**log2), n, link), halving, rel_tol=1e-12)


@given(few_ranks, sizes, links)
def test_one_message_at_a_time_costs_naive_what_it_must(ranks: int, n: int, link: Link):
    a, b = dataclasses.astuple(link)
    expected = 2 * (ranks - 1) * (a + n * b)
    assert math.isclose(time(allreduce.naive(ranks), n, link), expected, rel_tol=1e-12)


def test_at_8192_ranks_the_ring_pays_for_its_many_steps():
    link = Link(alpha_s=2e-6, beta_s_per_byte=1 / 8e9)
    times_ms = [time(make(8192), 28.15e6, link) * 1e3 for make in (allreduce.ring, allreduce.rabenseifner)]
    assert [round(time_ms, 1) for time_ms in times_ms] == [39.8, 7.1]


def test_with_one_rank_there_is_nothing_to_do():
    for make in ALGORITHMS.values():
        assert (make(1).steps, make(1).messages(0), make(1).bytes_sent(0, 100), time(make(1), 1e6, Link(1, 1))) == (
            (), 0, 0, 0,
        )  # fmt: skip


def arrives(schedule: Schedule) -> bool:
    """Whether the transfers compute an allreduce, by doing them with numbers instead of sets."""
    held = [[1000**rank] * schedule.chunks for rank in range(schedule.ranks)]
    for step in schedule.steps:
        for column in (step.source, step.destination):
            if len({*column.tolist()}) < len(step):
                return False  # somebody waits for a second message that never comes
        sent = [(t, held[t.source][t.chunk : t.chunk + t.count]) for t in step]
        for t, values in sent:
            for chunk, value in enumerate(values, start=t.chunk):
                held[t.destination][chunk] = value + t.reduce * held[t.destination][chunk]
    return held == [[sum(1000**rank for rank in range(schedule.ranks))] * schedule.chunks] * schedule.ranks


def changed(schedule: Schedule, at: int, transfers: list[Transfer], inserted: bool = False) -> Schedule:
    steps = [*schedule.steps]
    steps[at : at + (not inserted)] = [Step.of(transfers)]
    return dataclasses.replace(schedule, steps=tuple(steps))


@st.composite
def mutants(draw) -> tuple[str, Schedule]:
    schedule = draw(schedules)
    at = draw(st.integers(0, len(schedule.steps) - 1))
    transfers = list(schedule.steps[at])
    i = draw(st.integers(0, len(transfers) - 1))
    transfer = transfers[i]
    others = [t for t in transfers if t != transfer]
    elsewhere = st.integers(0, schedule.ranks - 1)
    kind = draw(st.sampled_from(["lost", "twice at once", "twice", "reduce or copy", "destination", "chunk", "order"]))
    match kind:
        case "lost":
            return kind, changed(schedule, at, others)
        case "twice at once":
            return kind, changed(schedule, at, [*transfers, transfer])
        case "twice":
            return kind, changed(schedule, at + 1, transfers, inserted=True)
        case "reduce or copy":
            return kind, changed(schedule, at, [*others, transfer._replace(reduce=not transfer.reduce)])
        case "destination":
            return "any", changed(schedule, at, [*others, transfer._replace(destination=draw(elsewhere))])
        case "chunk":
            chunk = draw(st.integers(0, schedule.chunks - transfer.count))
            return "any", changed(schedule, at, [*others, transfer._replace(chunk=chunk)])
    steps = [*schedule.steps]
    random.Random(draw(st.integers())).shuffle(steps)
    return "any", dataclasses.replace(schedule, steps=tuple(steps))


@settings(max_examples=500, deadline=None)
@given(mutants())
def test_a_mutated_schedule_is_caught(mutant: tuple[str, Schedule]):
    kind, schedule = mutant
    if kind != "any" or not arrives(schedule):  # a change of any kind may happen to do no harm
        with pytest.raises(ScheduleError, match=r"^(step \d+: )?(rank \d|Transfer)"):
            allreduce.check(schedule)
    else:
        assert list(walk(schedule))  # harmless, and check does not invent a fault
        allreduce.check(schedule)


@pytest.mark.parametrize(
    "steps, message",
    [
        ([[(0, 1, 0)], [(1, 0, 0)]], "step 1: rank 0 would reduce the contribution of rank 0 to chunk 0 a second time"),
        ([[(0, 1, 0)], [(1, 2, 0, 1, False)], [(1, 2, 0, 1, False)]], "step 2: rank 2 has chunk 0 already"),
        ([[(0, 1, 0)]], "rank 0 ends without the contribution of ranks 1, 2 to chunk 0"),
        ([[(0, 1, 0), (0, 2, 0)]], "step 0: rank 0 would have to send two messages at once"),
        ([[(0, 2, 0), (1, 2, 0)]], "step 0: rank 2 would have to receive two messages at once"),
        ([[(1, 1, 0)]], "step 0: rank 1 sends to itself"),
        ([[(0, 7, 0)]], "names a rank that is not among 0 to 2"),
        ([[(0, 1, 1)]], "names a chunk that is not among 0 to 0"),
        ([[(0, 1, 0, 0)]], "names a chunk that is not among 0 to 0"),
    ],
)
def test_check_says_what_is_wrong_and_where(steps: list, message: str):
    broken = Schedule("mine", 3, 1, tuple(Step.of([Transfer(*t) for t in step]) for step in steps))
    with pytest.raises(ScheduleError, match=message):
        allreduce.check(broken)


def test_a_ring_written_out_by_hand_equals_the_library_s():
    def by_hand(ranks: int, first: int, reduce: bool) -> list[Step]:
        return [
            Step.of([Transfer(r, (r + 1) % ranks, (r + first - s) % ranks, reduce=reduce) for r in range(ranks)])
            for s in range(ranks - 1)
        ]

    mine = Schedule("mine", 5, 5, (*by_hand(5, 0, True), *by_hand(5, 1, False)))
    assert mine == allreduce.ring(5) and hash(mine) == hash(allreduce.ring(5))
    assert mine != allreduce.ring(4) and mine != allreduce.rabenseifner(5) and mine != "ring"


def test_schedules_cannot_be_changed():
    ring = allreduce.ring(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ring.ranks = 5
    with pytest.raises(ValueError, match="read-only"):
        ring.steps[0].chunk[0] = 2
    copied = pickle.loads(pickle.dumps(ring))
    assert copied == ring
    with pytest.raises(ValueError, match="read-only"):
        copied.steps[0].chunk[0] = 2


def test_equal_schedules_have_one_hash_and_only_they_pass_for_the_same_on_ranks():
    first, second = Transfer(0, 1, 0), Transfer(2, 3, 0)
    one, other = (Schedule("mine", 4, 1, (Step.of(order),)) for order in ([first, second], [second, first]))
    assert one == other and len({one, other}) == 1
    apart = Schedule("mine", 4, 1, (Step.of([first]), Step.of([second])))
    assert apart != one and apart.fingerprint != one.fingerprint


def test_numbers_from_numpy_are_as_good_as_any():
    ring = allreduce.ring(np.int32(64))
    allreduce.check(ring)
    assert ring == allreduce.ring(64) and ring.bytes_sent(0, np.int32(2**30)) == allreduce.ring(64).bytes_sent(0, 2**30)
    transfer = Transfer(0, 1, np.int8(100), np.int8(100))
    assert Schedule("mine", 2, 200, (Step.of([transfer]),)).actions(0)[0].send == (100, 200)
    assert Link(np.float32(1), 0).alpha_s == 1


def test_schedules_print_their_steps():
    text = str(allreduce.rabenseifner(4)).splitlines()
    assert repr(allreduce.rabenseifner(4)) == "<Rabenseifner on 4 ranks: 4 steps, 4 chunks>"
    assert text[1] == "step 0   0 +> 1 [2-3]   1 +> 0 [0-1]   2 +> 3 [2-3]   3 +> 2 [0-1]"
    assert text[-1] == "step 3   0 => 1 [0-1]   1 => 0 [2-3]   2 => 3 [0-1]   3 => 2 [2-3]"


def test_a_ring_of_the_whole_machine_takes_little_memory():
    columns = {id(column.base if column.base is not None else column)
               for step in allreduce.ring(8305).steps for column in dataclasses.astuple(step)}  # fmt: skip
    assert len(columns) < 10


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: allreduce.ring(0), "ranks must be a whole number from 1 up, not 0"),
        (lambda: allreduce.tree(2.5), "ranks must be a whole number from 1 up, not 2.5"),
        (lambda: allreduce.naive(True), "ranks must be a whole number"),
        (lambda: allreduce.rabenseifner("4"), "ranks must be a whole number"),
        (lambda: allreduce.hierarchical(8, 0), "ranks_per_node must be a whole number from 1 up, not 0"),
        (lambda: allreduce.ring(4).messages(4), "rank must be a whole number from 0 to 3, not 4"),
        (lambda: allreduce.ring(4).messages(-1), "from 0 to 3, not -1"),
        (lambda: allreduce.ring(4).bytes_sent(0, -8), "size_bytes must be a whole number from 0 up"),
        (
            lambda: allreduce.ring(4).bytes_sent(0, 10, itemsize=4),
            "a multiple of the 4 bytes of an element, not 10",
        ),
        (lambda: time(allreduce.ring(4), -1, Link(1, 1)), "size_bytes must be a number from 0, not -1"),
        (lambda: time(allreduce.ring(4), math.nan, Link(1, 1)), "size_bytes must be a number from 0, not nan"),
        (lambda: time(allreduce.ring(4), 1e6, 12.3), r"link must be a Link\(alpha_s, beta_s_per_byte\), not 12.3"),
        (lambda: allreduce.simulate(allreduce.ring(4), 1e6, None), "fabric must be a FatTree.* not None"),
        (lambda: Step.of([(0, 1, 0)]), r"a step is made of Transfer\(source, destination, chunk\), not \(0, 1, 0\)"),
        (lambda: Step.of([Transfer(0, 1, 0.5)]), "chunk of a transfer must be a whole number from 0 up, not 0.5"),
        (lambda: Step.of([Transfer(-1, 1, 0)]), "source of a transfer must be a whole number from 0 up, not -1"),
        (
            lambda: allreduce.draw_trace(pd.DataFrame({"rank": [0]})),
            "needs the columns rank, .* lacks step, begin_s",
        ),
        (lambda: allreduce.fit(pd.DataFrame({"ranks": [0]}), {"native": None}), "it lacks contender, size_bytes, time"),
        (lambda: Link(-1, 0), "alpha_s must be a number from 0, not -1"),
        (lambda: Schedule("mine", 2, 0, ()), "chunks must be a whole number from 1 up, not 0"),
        (lambda: Schedule("mine", 2, 2, ([Transfer(0, 1, 0)],)), "steps must be made with Step.of"),
        (lambda: allreduce.draw(allreduce.ring(40)), "room for 16 ranks and as many chunks, and this is <ring on 40"),
        (lambda: allreduce.draw(allreduce.naive(16)), "a drawing has room for 29 steps, and this schedule has 30"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message: str):
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_a_drawing_shows_how_many_contributions_each_chunk_has_after_each_step():
    figure = allreduce.draw(allreduce.ring(3))
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["before", *(f"after step {i}" for i in range(4))]
    assert [[int(text.get_text()) for text in axis.texts] for axis in (panels[0], panels[2], panels[-1])] == [
        [1] * 9,
        [1, 3, 2, 2, 1, 3, 3, 2, 1],
        [3] * 9,
    ]
    assert all(axis.get_xlabel() == "chunk" for axis in panels)


def test_an_animation_is_a_picture_that_moves_without_a_script():
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(allreduce.animate(allreduce.ring(3))._repr_png_()))
    frames = []
    for i in range(image.n_frames):
        image.seek(i)
        frames.append(np.asarray(image.convert("L")))
    assert len(frames) >= 5 and not np.array_equal(frames[0], frames[-1])
