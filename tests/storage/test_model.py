"""The simulator of a shared file system, against laws and against an event simulation in plain Python."""

import heapq
import math
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nurion_utils import sites
from nurion_utils.storage import ParallelFileSystem, Workload, simulate, summarise
from nurion_utils.storage.model import METADATA

no_deadline = settings(deadline=None)
fewer = settings(deadline=None, max_examples=40)
MS = 1e-3
# 8 ms to serve 200 kB, of all four targets 100 MB/s; an open takes 2 ms
SYSTEM = ParallelFileSystem(targets=4, target_mb_per_s=25, metadata_ops_per_s=500, timeout_s=30)
FAST_OPENS = replace(SYSTEM, metadata_ops_per_s=10_000)
FILE_BYTES = 200_000


def plain_simulation(storage: ParallelFileSystem, workload: Workload) -> dict[tuple[int, int], list[float]]:
    """Request, ready, begin and end of every (reader, step), and when it failed; as far as the job gets."""
    events, number = [], 0
    waiting = {target: [] for target in range(METADATA, storage.targets)}
    at_work = dict.fromkeys(waiting, False)
    first = workload.first_targets(storage)
    shares = [int(share) for share in storage.shares(workload.file_bytes) if share]
    times: dict[tuple[int, int], list[float]] = {}
    missing: dict[tuple[int, int], int] = {}
    asked, buffered, computing, at_barrier = [0] * workload.readers, [0] * workload.readers, {}, set()
    fetching = [False] * workload.readers
    taken = [0] * workload.readers  # steps that the reader has begun

    def later(time_s: float, order: tuple, act, *arguments) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (time_s, *order, number, act, arguments))

    def enter(now: float, target: int, key: tuple, service_s: float, then) -> None:
        waiting[target].append((now, key, service_s, then))
        if not at_work[target]:
            serve(now, target)

    def serve(now: float, target: int) -> None:
        while waiting[target]:
            came_s, key, service_s, then = waiting[target].pop(0)
            if now > came_s + storage.timeout_s:
                times[key][4] = min(times[key][4], came_s + storage.timeout_s)
                continue
            at_work[target] = True
            return later(now + service_s, (0, 0), done, target, then)
        at_work[target] = False

    def done(now: float, target: int, then) -> None:
        then(now)
        serve(now, target)

    def request(now: float, reader: int) -> None:
        step = asked[reader]
        asked[reader] += 1
        key = reader, step
        times[key] = [now, math.nan, math.nan, math.nan, math.inf]
        missing[key] = len(shares) * workload.files_per_step
        fetching[reader] = True
        for file in first[step, reader].tolist():

            def opened(now: float, file: int = file) -> None:
                for i, share in enumerate(shares):
                    service_s = share / storage.target_mb_per_s / 1e6
                    enter(now, (file + i) % storage.targets, key, service_s, lambda now: piece(now, key))

            enter(now, METADATA, key, 1 / storage.metadata_ops_per_s, opened)

    def piece(now: float, key: tuple[int, int]) -> None:
        missing[key] -= 1
        if not missing[key]:
            times[key][1] = now
            fetching[key[0]] = False
            buffered[key[0]] += 1
            go_on(now, key[0])

    def go_on(now: float, reader: int) -> None:
        if buffered[reader] and reader not in computing and reader not in at_barrier:
            buffered[reader] -= 1
            computing[reader] = taken[reader]
            times[reader, taken[reader]][2] = now
            taken[reader] += 1
            later(now + workload.compute_s, (1, reader), computed, reader)
        room = buffered[reader] < workload.prefetch
        idle = reader not in computing and reader not in at_barrier and not buffered[reader]
        if asked[reader] < workload.steps and not fetching[reader] and (room if workload.prefetch else idle):
            request(now, reader)

    def computed(now: float, reader: int) -> None:
        at_barrier.add(reader)
        if len(at_barrier) == workload.readers:
            together = sorted(at_barrier)
            for each in together:
                at_barrier.remove(each)
                times[each, computing.pop(each)][3] = now
            for each in together:
                go_on(now, each)

    for reader in range(workload.readers):
        later(0.0, (1, reader), go_on, reader)
    while events:
        now, *_, act, arguments = heapq.heappop(events)
        act(now, *arguments)
    return times


@st.composite
def cases(draw, timeouts=False) -> tuple[ParallelFileSystem, Workload]:
    """Times are multiples of unrelated irrational numbers, or rounding would decide who comes first."""
    whole = st.integers
    service_s, open_s = draw(whole(1, 9)) * math.pi * MS, draw(whole(1, 9)) * math.e * 0.1 * MS
    storage = ParallelFileSystem(
        targets=draw(whole(1, 5)),
        target_mb_per_s=FILE_BYTES / service_s / 1e6,
        metadata_ops_per_s=1 / open_s,
        stripe_count=draw(whole(1, 6)),
        stripe_bytes=draw(st.sampled_from([70_001, 2**20])),
        timeout_s=draw(whole(1, 40)) * math.sqrt(2) * MS if timeouts else math.inf,
    )
    workload = Workload(
        readers=draw(whole(1, 9)),
        steps=draw(whole(1, 5)),
        files_per_step=draw(whole(1, 3)),
        file_bytes=FILE_BYTES,
        compute_s=draw(whole(0, 9)) * math.sqrt(3) * MS,
        prefetch=draw(whole(0, 1)),
        seed=draw(whole(0, 99)),
    )
    return storage, workload


def as_table(times: dict[tuple[int, int], list[float]]) -> pd.DataFrame:
    columns = ["request_s", "ready_s", "begin_s", "end_s", "fails_s"]
    table = pd.DataFrame.from_dict(times, orient="index", columns=columns)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["reader", "step"])
    return table.sort_index()


def assume_no_photo_finish(*tables: pd.DataFrame) -> None:
    """Two readers that ask at the same moment, but for rounding, may be served in either order."""
    for table in tables:
        gaps_s = np.diff(np.sort(table["request_s"]))
        assume(not ((gaps_s > 0) & (gaps_s < 1e-9)).any())


@no_deadline
@given(cases())
def test_the_simulator_agrees_with_real_queues(case):
    ours = simulate(*case).set_index(["reader", "step"])
    plain = as_table(plain_simulation(*case))
    assume_no_photo_finish(ours, plain)
    assert len(ours) == case[1].readers * case[1].steps and not ours["failed"].any()
    for name in ("request_s", "ready_s", "begin_s", "end_s"):
        assert ours[name].to_numpy() == pytest.approx(plain[name].to_numpy(), rel=1e-9, abs=1e-12)


@no_deadline
@given(cases(timeouts=True))
def test_a_job_ends_with_the_first_request_that_times_out_as_it_does_with_real_queues(case):
    ours = simulate(*case).set_index(["reader", "step"])
    plain = as_table(plain_simulation(*case))
    ends_s = plain["fails_s"].min()
    assume(math.isfinite(ends_s))
    assume_no_photo_finish(ours, plain)
    plain = plain[plain["request_s"] < ends_s]
    assert ours.index.equals(plain.index)
    assert ours["failed"].any() and (plain.loc[ours["failed"], "fails_s"].to_numpy() == pytest.approx(ends_s))
    assert ours.loc[ours["failed"], "end_s"].to_numpy() == pytest.approx(ends_s)
    for name in ("ready_s", "begin_s"):
        assert ours[name].to_numpy() == pytest.approx(plain[name].where(plain[name] <= ends_s).to_numpy(), nan_ok=True)


@fewer
@given(cases())
def test_no_more_comes_out_than_all_targets_deliver_and_the_metadata_server_opens(case):
    storage, workload = case
    table = simulate(storage, workload)
    summary = summarise(table, workload)
    assert summary["throughput_gb_per_s"] <= storage.bandwidth_gb_per_s * (1 + 1e-9)
    files = table["ready_s"].notna().sum() * workload.files_per_step
    assert table["ready_s"].max() >= files / storage.metadata_ops_per_s * (1 - 1e-9)
    assert 0 <= summary["accelerator_utilisation"] <= 1 + 1e-9


@fewer
@given(cases())
def test_who_asks_first_is_served_first(case):
    """Of files on one target; whole bursts, because the last file of one decides."""
    storage, workload = case
    table = simulate(replace(storage, targets=1), replace(workload, prefetch=0)).sort_values("request_s", kind="stable")
    assert (np.diff(table["ready_s"]) > 0).all()


@fewer
@given(cases(), st.integers(2, 4))
def test_twice_the_bandwidth_of_every_target_is_never_slower(case, factor):
    storage, workload = case
    faster = replace(storage, target_mb_per_s=storage.target_mb_per_s * factor)
    slow_s, fast_s = (simulate(each, replace(workload, prefetch=0))["end_s"].max() for each in (storage, faster))
    assert fast_s <= slow_s * (1 + 1e-9)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.integers(0, 60))
def test_a_file_lies_on_the_targets_on_which_its_bytes_do(targets, count, stripe_bytes, length):
    storage = ParallelFileSystem(targets, 1, 1, stripe_count=count, stripe_bytes=stripe_bytes)
    width = min(targets, count)
    expected = np.bincount([at // stripe_bytes % width for at in range(length)], minlength=width)
    assert storage.shares(length).tolist() == expected.tolist()


def test_random_placement_is_the_same_again_for_the_same_seed_only():
    storage, workload = ParallelFileSystem(9, 1, 1), Workload(50, 4, 1, 1, 0, seed=1)
    assert (workload.first_targets(storage) == workload.first_targets(storage)).all()
    assert (workload.first_targets(storage) != replace(workload, seed=2).first_targets(storage)).any()


def test_the_table_names_the_target_that_a_step_waited_for():
    workload = Workload(1, 3, 1, FILE_BYTES, 0.0)
    assert simulate(FAST_OPENS, workload)["target"].tolist() == workload.first_targets(FAST_OPENS).ravel().tolist()
    failed = simulate(ParallelFileSystem(4, 25, 100, timeout_s=0.05), Workload(20, 1, 1, 10, 0.0))
    assert set(failed.loc[failed["failed"], "target"]) == {METADATA}


def test_reading_ahead_hides_the_input_that_fits_beside_the_compute():
    workload = Workload(2, 10, 1, FILE_BYTES, compute_s=0.05)
    without, ahead = (
        summarise(simulate(SYSTEM, each), each)["accelerator_utilisation"]
        for each in (workload, replace(workload, prefetch=1))
    )
    assert without < 0.85 and ahead > 0.96


def test_an_epoch_of_8192_readers_takes_less_than_the_time_to_lose_patience():
    """It takes a tenth of a second here; 5 s are for a machine with much else to do."""
    storage = ParallelFileSystem.of_site("cori")
    for prefetch in (0, 1):
        began = time.perf_counter()
        simulate(storage, Workload(8192, 20, 1, 8 * 10**6, 0.129, prefetch=prefetch))
        assert time.perf_counter() - began < 5


def test_a_site_has_storage_with_the_bandwidth_that_it_describes():
    nurion = sites.load("nurion")
    assert ParallelFileSystem.of_site(nurion).bandwidth_gb_per_s == pytest.approx(300)
    buffer = ParallelFileSystem.of_site("nurion", "burst_buffer")
    assert buffer.bandwidth_gb_per_s == pytest.approx(800) and buffer.targets == nurion.burst_buffer.servers
    lacking = nurion.file_systems["scratch"].model_copy(update={"metadata_ops_per_s": None})
    site = nurion.model_copy(update={"file_systems": {"scratch": lacking}})
    with pytest.raises(sites.SiteError, match="'nurion' does not say file_systems.scratch.metadata_ops_per_s; add it"):
        ParallelFileSystem.of_site(site)


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda: ParallelFileSystem(0, 1, 1), "targets must be a whole number from 1 up, not 0"),
        (lambda: ParallelFileSystem(1, -1, 1), "target_mb_per_s must be a number above 0, not -1"),
        (lambda: ParallelFileSystem(1, 1, math.nan), "metadata_ops_per_s must be a number above 0, not nan"),
        (lambda: ParallelFileSystem(1, 1, 1, timeout_s=0), "timeout_s must be a number above 0, not 0"),
        (lambda: Workload(1, 1, 0, 1, 0), "files_per_step must be a whole number from 1 up, not 0"),
        (lambda: Workload(1, 1, 1, 1, -1), "compute_s must be a number from 0, not -1"),
        (lambda: Workload(1, 1, 1, 1, 0, prefetch=2), "prefetch must be a whole number from 0 to 1, not 2"),
        (lambda: ParallelFileSystem.of_site("nurion", "home"), "'scratch', 'burst_buffer', not 'home'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(attempt, sentence):
    with pytest.raises(ValueError, match=sentence):
        attempt()
