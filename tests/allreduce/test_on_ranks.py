"""Schedules on real ranks: the result of MPI's own Allreduce, exactly as many messages and bytes as counted, and
refusals instead of hangs."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from mpi4py import MPI

from nurion_utils import allreduce, ranks
from nurion_utils.allreduce import running
from nurion_utils.allreduce import shared as shared_memory

OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN, "prod": MPI.PROD, "mean": MPI.SUM}
TIMEOUT_S = 60  # nothing here takes long unless it hangs


@pytest.fixture(scope="module")
def world5() -> Iterator[ranks.World]:
    """Five ranks; groups of them make every number of ranks up to five."""
    with ranks.start(5) as world:
        yield world


def algorithms(n: int) -> list[allreduce.Schedule]:
    return [*(make(n) for make in allreduce.ALGORITHMS.values()), allreduce.hierarchical(n, 2)]


def each_group(body) -> list:
    """Results of ``body(comm)`` on groups of the first 1, 2, ... ranks; a rank outside a group waits."""
    world, results = MPI.COMM_WORLD, []
    for n in range(1, world.size + 1):
        comm = world.Split(0 if world.rank < n else MPI.UNDEFINED)
        if comm != MPI.COMM_NULL:
            results.append(body(comm))
            comm.Free()
        world.Barrier()
    return results


def differences(comm: MPI.Comm) -> list[str]:
    """Where a schedule's result is not that of MPI, over lengths, types and operations, in both executors."""
    found = []
    shared_memory.STRETCH_BYTES = 64  # so that 1000 elements take several passes, and the shorter arrays one
    random = np.random.default_rng(comm.rank)
    for n in (0, 1, 3, comm.size + 1, 1000):
        for dtype in ("float16", "float32", "float64", "int32", "int64"):
            array = random.integers(-9, 9, n).astype(dtype) if dtype[0] == "i" else random.normal(size=n).astype(dtype)
            for op in [op for op in OPS if op != "mean" or dtype[0] == "f"]:
                exact, size = (a.astype("f8" if dtype[0] == "f" else dtype) for a in (array, abs(array)))
                comm.Allreduce(MPI.IN_PLACE, exact, OPS[op])
                comm.Allreduce(MPI.IN_PLACE, size, OPS[op])
                exact, size = (a / comm.size if op == "mean" else a for a in (exact, size))
                bound = 0 if dtype[0] == "i" or op in ("max", "min") else 2 * comm.size * np.finfo(dtype).eps * size
                with allreduce.SharedArray(comm, n, dtype) as shared:
                    for schedule in algorithms(comm.size):
                        result = array.copy()
                        allreduce.run(schedule, comm, result, op)
                        if not (abs(result - exact) <= bound).all():
                            found.append(f"{schedule} {n} {dtype} {op}")
                        if comm.allgather(result.tobytes()) != [result.tobytes()] * comm.size:
                            found.append(f"{schedule} {n} {dtype} {op}: not the same on all ranks")
                        shared.array[:] = array
                        shared.allreduce(schedule, op)
                        if shared.array.tobytes() != result.tobytes():
                            found.append(f"{schedule} {n} {dtype} {op}: another result in shared memory")
    return found


def test_every_schedule_gives_the_result_of_mpi_in_both_executors(world5: ranks.World):
    assert world5.run(each_group, differences, timeout_s=4 * TIMEOUT_S)[0] == [[]] * 5


def test_what_is_really_sent_is_what_the_schedule_counts(world5: ranks.World):
    def counts(comm: MPI.Comm) -> bool:
        for schedule in algorithms(comm.size):
            for n in (0, 1, 1001):
                counting = running.CountingComm(comm)
                trace: list[dict] = []
                allreduce.run(schedule, counting, np.zeros(n), trace=trace)
                expected = schedule.messages(comm.rank), schedule.bytes_sent(comm.rank, 8 * n, itemsize=8)
                if (counting.messages, counting.bytes_sent) != expected:
                    return False
                if sum(row["sent_bytes"] for row in trace) != expected[1]:
                    return False
        return True

    assert all(all(groups) for groups in world5.run(each_group, counts, timeout_s=TIMEOUT_S))


def test_arrays_of_any_shape_are_reduced_in_place(world2: ranks.World):
    def cube() -> float:
        array = np.ones((2, 3, 4), "float32")
        allreduce.run(allreduce.ring(2), MPI.COMM_WORLD, array)
        return array.sum(), array.shape

    assert world2.run(cube, timeout_s=TIMEOUT_S) == [(48, (2, 3, 4))] * 2


def test_one_allreduce_after_the_other_in_shared_memory_does_not_mix_them_up(world5: ranks.World):
    def many() -> bool:
        comm, random = MPI.COMM_WORLD, np.random.default_rng(0)
        with allreduce.SharedArray(comm, 50, "int64") as shared:
            for turn in range(300):
                shared.array[:] = turn * (comm.rank + 1)  # at once, while a slow neighbour may still be reading
                schedule = algorithms(comm.size)[random.integers(6)]
                shared.allreduce(schedule)
                if (shared.array != turn * 15).any():
                    return False
        return True

    assert all(world5.run(many, timeout_s=TIMEOUT_S))


BAD = {
    "dtype": (lambda rank: np.zeros(4, complex if rank == 1 else float), {}, "rank 1: the array must be of float16"),
    "list": (lambda rank: [0.0] * 4, {}, "rank 0: a numpy array is needed, not list; rank 1: a numpy array"),
    "strided": (lambda rank: np.zeros(8)[::2] if rank else np.zeros(4), {}, "rank 1: the array is not contiguous"),
    "matrix": (lambda rank: np.matrix([1.0, 2.0]), {}, "a numpy array is needed, not matrix"),
    "trace": (lambda rank: np.zeros(4), {"trace": True}, "trace must be a list, or None, not True"),
    "read-only": (lambda rank: np.broadcast_to(0.0, 1), {}, "the array is read-only; pass a copy"),
    "length": (lambda rank: np.zeros(4 + rank), {}, "rank 0: 4 x float64, sum, <ring.*; rank 1: 5 x float64"),
    "types": (lambda rank: np.zeros(4, ["f4", "f8"][rank]), {}, "rank 0: 4 x float32.*; rank 1: 4 x float64"),
    "op": (lambda rank: np.zeros(4), {"op": "median"}, "op must be one of sum, max, min, prod, mean, not 'median'"),
    "mean": (lambda rank: np.zeros(4, int), {"op": "mean"}, "the mean of integers is not of int64"),
    "ranks": (lambda rank: np.zeros(4), {"n": 3}, "<ring on 3 ranks.*> cannot run on the 2 ranks"),
    "schedule": (lambda rank: np.zeros(4), {"differ": True}, "same length, dtype, op and schedule.*naive"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_reduced_is_refused_on_every_rank(world2: ranks.World, what: str):
    make, options, message = BAD[what]

    def attempt() -> str:
        comm = MPI.COMM_WORLD
        schedule = allreduce.ring(options.get("n", 2))
        if "differ" in options and comm.rank:
            schedule = allreduce.naive(2)
        try:
            allreduce.run(schedule, comm, make(comm.rank), options.get("op", "sum"), options.get("trace"))
        except ValueError as error:
            return str(error)

    first, second = world2.run(attempt, timeout_s=TIMEOUT_S)
    assert first == second and "\n" not in first
    with pytest.raises(ValueError, match=message):
        raise ValueError(first)


def test_an_overflow_that_one_rank_takes_for_an_error_leaves_nobody_waiting(world2: ranks.World):
    def overflow() -> list[float]:
        comm, ring = MPI.COMM_WORLD, allreduce.ring(2)
        errors = "raise" if comm.rank == 0 else "ignore"
        with np.errstate(all=errors), allreduce.SharedArray(comm, 4, "float16") as shared:
            array = np.full(4, 6e4, "float16")
            shared.array[:] = array
            shared.allreduce(ring)
            allreduce.run(ring, comm, array)
            return [float(array[0]), float(shared.array[0])]

    assert world2.run(overflow, timeout_s=TIMEOUT_S) == [[np.inf, np.inf]] * 2


def test_a_shared_array_stays_where_it_is_and_can_be_closed_twice(world2: ranks.World):
    def use() -> list[str]:
        shared, errors = allreduce.SharedArray(MPI.COMM_WORLD, 4), []
        try:
            shared.array = np.zeros(4)
        except AttributeError:
            errors.append("array is not to be replaced")
        shared.close()
        shared.close()
        try:
            shared.allreduce(allreduce.ring(2))
        except ValueError as error:
            errors.append(str(error))
        return errors

    assert world2.run(use) == [["array is not to be replaced", "this SharedArray has been closed"]] * 2


def test_shared_memory_refuses_what_is_no_schedule_on_every_rank(world2: ranks.World):
    def attempt() -> str:
        with allreduce.SharedArray(MPI.COMM_WORLD, 4) as shared:
            try:
                shared.allreduce("ring")
            except ValueError as error:
                return str(error)

    assert all("a schedule is needed, such as allreduce.ring(2), not 'ring'" in text for text in world2.run(attempt))


def test_a_broken_schedule_is_refused_before_it_can_hang(world2: ranks.World):
    def attempt() -> str:
        send = allreduce.Step.of([allreduce.Transfer(0, 1, 0)])
        try:
            allreduce.run(allreduce.Schedule("half", 2, 1, (send,)), MPI.COMM_WORLD, np.zeros(4))
        except ValueError as error:
            return str(error)

    assert all("<half on 2 ranks: 1 steps, 1 chunks> is broken: rank 0 ends" in s for s in world2.run(attempt))


@pytest.mark.parametrize(
    "n, dtype, message",
    [("4", "f4", "number of elements must be"), (4, "c8", "dtype must be float16"), (4, "no", "not understood"),
     (10**15, "f4", "2 arrays of 1000000000000000 elements need 8,000,000,000,000,256 bytes in /dev/shm, which has"),
     (None, "f4", "all ranks must bring the same length and dtype, not rank 0: 4 x f4; rank 1: 5 x f4")],
)  # fmt: skip
def test_shared_arrays_that_cannot_be_are_refused_on_every_rank(world2: ranks.World, n, dtype, message: str):
    def attempt() -> str:
        try:
            allreduce.SharedArray(MPI.COMM_WORLD, 4 + MPI.COMM_WORLD.rank if n is None else n, dtype)
        except ValueError as error:
            return str(error)

    assert all(message in text for text in world2.run(attempt, timeout_s=TIMEOUT_S))


def test_measured_times_come_as_one_row_per_block(world2: ranks.World):
    contenders = {"ring": allreduce.ring(2), "native": None}
    table = allreduce.measure_allreduce(world2, contenders, [1024, 4096], repeats=3)
    assert list(table) == ["contender", "ranks", "size_bytes", "repeat", "time_s"]
    assert table.groupby(["contender", "size_bytes"])["repeat"].apply(list).tolist() == [[0, 1, 2]] * 4
    assert (table["time_s"] > 0).all()


@pytest.mark.parametrize(
    "contenders, sizes, message",
    [
        ({}, [4], "contenders are a dictionary"),
        ({"ring": "ring"}, [4], "contender 'ring' must be a schedule, or None"),
        ({"ring": allreduce.ring(3)}, [4], "contender 'ring' is for 3 ranks, and there are 2"),
        ({"native": None}, [], "sizes_bytes must be a list"),
        ({"native": None}, [6], "sizes must be multiples of 4 bytes"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(world2: ranks.World, contenders, sizes, message: str):
    with pytest.raises(ValueError, match=message):
        allreduce.measure_allreduce(world2, contenders, sizes)


def test_a_fit_finds_the_costs_that_times_were_made_with():
    contenders = {"ring": allreduce.ring(4), "native": None}
    link = allreduce.Link(3e-6, 2e-10)
    rows = [
        {"contender": name, "size_bytes": n, "time_s": allreduce.time(schedule, n, link)}
        for name, schedule in contenders.items()
        for n in (1e3, 1e5, 1e7)
    ]
    for found in allreduce.fit(pd.DataFrame(rows), contenders).values():
        assert (found.alpha_s, found.beta_s_per_byte) == pytest.approx((3e-6, 2e-10), rel=1e-6)
    with pytest.raises(ValueError, match="two sizes or more, and the table has 0 of contender 'naive'"):
        allreduce.fit(pd.DataFrame(rows), {"naive": allreduce.naive(4)})


def test_a_run_s_trace_is_drawn_as_a_timeline_of_all_ranks(world5: ranks.World):
    def traced() -> list[dict]:
        trace: list[dict] = []
        allreduce.run(allreduce.ring(5), MPI.COMM_WORLD, np.zeros(100_000), trace=trace)
        return trace

    table = pd.DataFrame([row for rows in world5.run(traced, timeout_s=TIMEOUT_S) for row in rows])
    assert table.groupby("rank")["step"].apply(list).tolist() == [[*range(8)]] * 5
    assert (table["begin_s"] <= table["received_s"]).all() and (table["received_s"] <= table["end_s"]).all()
    axis = allreduce.draw_trace(table).axes[0]
    assert axis.get_xlabel() == "time, ms" and len(axis.patches) == 2 * len(table)


def far(n: int, dtype: np.dtype) -> np.ndarray:
    """An array of any length in little memory: all of it but its last 16 MiB is the same 16 MiB again and again."""
    import ctypes
    import mmap
    import os

    tile, n_bytes = 2**24, n * np.dtype(dtype).itemsize
    file = os.memfd_create("tile")
    os.ftruncate(file, tile)
    c_mmap = ctypes.CDLL(None).mmap
    c_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    c_mmap.restype, memory, fixed = ctypes.c_void_p, mmap.mmap(-1, max(n_bytes, 1)), 0x10  # MAP_FIXED
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in range(begin, begin + n_bytes - tile, tile):
        assert c_mmap(at, tile, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, file, 0) == at
    os.close(file)
    return np.frombuffer(memory, dtype, n)


def test_messages_may_be_longer_than_32_bits_can_count(world2: ranks.World):
    def reduce() -> tuple[int, bool, bool]:
        from types import SimpleNamespace
        from unittest import mock

        comm, n = running.CountingComm(MPI.COMM_WORLD), 2**29 + 2**22
        array, tile = far(n, "float32"), 2**22
        array[:tile], array[-tile:] = comm.rank, comm.rank + 10
        with_far_memory = SimpleNamespace(**{**vars(np), "ma": np.ma, "empty": far})  # for what is received, too
        with mock.patch.object(running, "np", with_far_memory):
            allreduce.run(allreduce.naive(2), comm, array, "max")  # the one operation that may be done twice
        return comm.bytes_sent, (array[:tile] == 1).all(), (array[-tile:] == 11).all()

    sent = 4 * (2**29 + 2**22)
    assert sent > 2**31 and world2.run(reduce, timeout_s=2 * TIMEOUT_S) == [(sent, True, True)] * 2
