"""Horovod's timeline: what it says and in what words, where it may break off, and what of the steps it explains."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import timeline as bench
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nurion_utils.backends import timeline
from nurion_utils.backends.timeline import draw
from nurion_utils.backends.timeline.file import OPERATIONS, TimelineError

matplotlib.use("Agg")
no_deadline = settings(deadline=None)
EPOCH_US = 1_795_551_301_659_418
HEADER = (
    f'{{"name": "process_name", "ph": "M", "pid": 0, "args": {{"start_time_since_epoch_in_micros":{EPOCH_US}}}}},\n'
    '{"name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0}}'
)


class Writer:
    """Writes what horovod/common/timeline.cc does, times in microseconds."""

    def __init__(self) -> None:
        self.units, self.separators, self.tensors = [HEADER], ["[\n"], {}

    def write(self, path: Path) -> Path:
        path.write_bytes(self.text)
        return path

    @property
    def text(self) -> bytes:
        pairs = zip(self.separators, self.units, strict=True)
        return ("".join(separator + unit for separator, unit in pairs) + "]").encode()

    def begin(self, name: str, tensors: str | list[str], us: int) -> "Writer":
        for tensor in [tensors] if isinstance(tensors, str) else tensors:
            self._event(tensor, '{"ph": "B", "name": "%s", "ts": %d, "pid": %d}', name, us)
        return self

    def end(self, tensors: str | list[str], us: int, dtype: str = "", shape: list[int] | None = None) -> "Writer":
        args = f', "args": {{"dtype": "{dtype}", "shape": "{shape}"}}' if dtype else ""
        for tensor in [tensors] if isinstance(tensors, str) else tensors:
            self._event(tensor, '{"ph": "E", "ts": %d, "pid": %d' + args + "}", us)
        return self

    def ready(self, rank: int, tensor: str, us: int) -> "Writer":
        return self._event(tensor, '{"ph": "X", "name": "%d", "ts": %d, "pid": %d, "dur": 0}', rank, us)

    def cycle(self, us: int) -> "Writer":
        return self._unit(f'{{"ph": "i", "name": "CYCLE_START", "ts": {us}, "s": "g"}}')

    def span(self, name: str, tensors: str | list[str], begin: int, end: int) -> "Writer":
        return self.begin(name, tensors, begin).end(tensors, end)

    def _event(self, tensor: str, form: str, *values: object) -> "Writer":
        if tensor not in self.tensors:
            pid = self.tensors[tensor] = len(self.tensors) + 1
            self._unit(
                f'{{"name": "process_name", "ph": "M", "pid": {pid}, "args": {{"name": "{tensor}"}}}},\n'
                f'{{"name": "process_sort_index", "ph": "M", "pid": {pid}, "args": {{"sort_index": {pid}}}}}'
            )
        return self._unit(form % (*values, self.tensors[tensor]))

    def _unit(self, unit: str) -> "Writer":
        self.separators.append(",\n" if "process_sort" in self.units[-1] else ",")
        self.units.append(unit)
        return self


def two_steps() -> Writer:
    """Two tensors in one buffer, half hidden behind the first step's computation; one alone and bare in the second."""
    fused = ["a", "b"]
    trace = Writer().cycle(790).begin("NEGOTIATE_ALLREDUCE", fused, 800)
    trace.ready(1, "a", 800).ready(0, "a", 890).ready(1, "b", 895).ready(0, "b", 900).end(fused, 900)
    trace.begin("ALLREDUCE", fused, 900).span("WAIT_FOR_DATA", "a", 900, 905)
    trace.span("MEMCPY_IN_FUSION_BUFFER", fused, 905, 950).span("MPI_ALLREDUCE", fused, 950, 1250)
    trace.span("MEMCPY_OUT_FUSION_BUFFER", fused, 1250, 1290)
    trace.end("a", 1300, "float32", [100]).end("b", 1300, "float64", [3, 5])
    trace.span("NEGOTIATE_ALLREDUCE", "c", 3000, 3100)
    trace.begin("ALLREDUCE", "c", 3100).span("MPI_ALLREDUCE", "c", 3110, 3480).end("c", 3500, "float16", [])
    return trace


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    return timeline.read(two_steps().write(tmp_path / "timeline.json"))


@pytest.fixture
def compute() -> pd.DataFrame:
    starts, durations = [0.0, 2e-3, 0.0, 2e-3], [1.1e-3, 1e-3, 1.9e-3, 1.9e-3]
    return pd.DataFrame({"step": [0, 1, 0, 1], "start_s": starts, "duration_s": durations, "rank": [0, 0, 1, 1]})


def same_rows(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_categorical=False)


def test_each_span_is_a_row_with_its_phase_and_its_times(table):
    a = table[table["tensor"] == "a"].set_index("phase")[["activity", "start_s", "duration_s"]]
    us = {phase: (round(row.start_s * 1e6), round(row.duration_s * 1e6)) for phase, row in a.iterrows()}
    assert us == {
        "ready": (890, 0),  # the last of two
        "negotiate": (800, 100),
        "queue": (900, 5),
        "fuse": (905, 45),
        "wire": (950, 300),
        "unfuse": (1250, 40),
        "allreduce": (900, 400),
    }
    assert a.loc["wire", "activity"] == "MPI_ALLREDUCE" and a.loc["negotiate", "activity"] == "NEGOTIATE_ALLREDUCE"
    cycle = table[table["phase"] == "cycle"].iloc[0]
    assert (cycle["tensor"], cycle["activity"], cycle["buffer"]) == ("", "CYCLE_START", -1)
    assert cycle["start_s"] == pytest.approx(790e-6) and math.isnan(cycle["bytes"])
    assert table.attrs == {"epoch_s": EPOCH_US / 1e6, "unfinished": 0}


def test_ticks_tell_which_rank_was_ready_when(table):
    ready = table[(table["phase"] == "ready") & (table["tensor"] == "b")]
    assert list(zip(ready["rank"], (ready["start_s"] * 1e6).round(), strict=True)) == [(1, 895), (0, 900)]
    assert (table.loc[table["phase"] != "ready", "rank"] == -1).all()


def test_bytes_and_buffer_are_on_all_rows_of_an_occurrence(table):
    of_tensors = table[table["phase"] != "cycle"].groupby("tensor", observed=True)[["bytes", "buffer"]]
    assert (of_tensors.nunique() == 1).all(axis=None)
    assert of_tensors.first().to_dict("index") == {
        "a": {"bytes": 400, "buffer": 0},
        "b": {"bytes": 120, "buffer": 0},
        "c": {"bytes": 2, "buffer": 1},
    }


def test_operations_that_only_touch_in_time_travel_in_buffers_of_their_own(tmp_path):
    trace = Writer()
    for tensor, us in [("a", 10), ("b", 20), ("c", 20), ("d", 20)]:  # b and c begin and end in the same microsecond
        trace.begin("ALLREDUCE", tensor, us).end(tensor, 20, "uint8", [7])
    table = timeline.read(trace.write(tmp_path / "timeline.json"))
    assert table["buffer"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("activity", "phase"),
    {
        "WAIT_FOR_OTHER_TENSOR_DATA": "queue",
        "MEMCPY_IN_SHARED_BUFFER": "fuse",
        "CCL_ALLREDUCE": "wire",
        "GLOO_BCAST": "wire",
        "MPI_CROSS_ALLGATHER": "wire",
        "NCCL_REDUCESCATTER": "wire",
        "MEMCPY_OUT_HOST_BUFFER": "unfuse",
        "ALLOCATE_OUTPUT": "prepare",
        "INIT_FUSION_BUFFER": "prepare",
    }.items(),
)
def test_activities_have_common_words(tmp_path, activity, phase):
    trace = Writer().begin("BROADCAST", "a", 1).span(activity, "a", 2, 3).end("a", 4)
    table = timeline.read(trace.write(tmp_path / "timeline.json"))
    assert table["phase"].tolist() == [phase, "broadcast"] and table["activity"].tolist() == [activity, "BROADCAST"]
    assert table["bytes"].isna().all()  # a broadcast does not say


@pytest.mark.parametrize("name", ["기울기/층_1", "{x: [1, 2]}", "two words,", "[3]}}, b"])
def test_names_are_taken_as_they_are_written(tmp_path, name):
    trace = Writer().begin("ALLREDUCE", name, 1).end(name, 2, "int8", [2, 3])
    trace.begin("ALLREDUCE", "next", 3).end("next", 4, "bool", [1])
    table = timeline.read(trace.write(tmp_path / "timeline.json"))
    assert table["tensor"].tolist() == [name, "next"] and table["bytes"].tolist() == [6, 1]


def test_spans_without_an_end_are_left_out_and_counted(tmp_path):
    trace = two_steps().begin("NEGOTIATE_ALLREDUCE", "a", 4000)
    trace.begin("ALLREDUCE", "d", 4001).begin("MPI_ALLREDUCE", "d", 4002)
    table = timeline.read(trace.write(tmp_path / "timeline.json"))
    assert table.attrs["unfinished"] == 3
    same_rows(table, timeline.read(two_steps().write(tmp_path / "timeline.json")))


def test_a_timeline_may_start_in_the_middle_of_operations(tmp_path):
    trace = Writer().ready(0, "a", 1).end("a", 2).span("MPI_ALLREDUCE", "b", 2, 3).end("b", 4, "int8", [1])
    trace.begin("ALLREDUCE", "a", 5).end("a", 6, "int8", [1])
    table = timeline.read(trace.write(tmp_path / "timeline.json"))
    assert table["phase"].tolist() == ["ready", "wire", "allreduce"] and table.attrs["unfinished"] == 0


def test_two_process_sets_may_negotiate_one_name(tmp_path):
    trace = Writer().begin("NEGOTIATE_ALLREDUCE", "a", 1).end("a", 2)
    trace.begin("ALLREDUCE", "a", 3).end("a", 4, "int8", [7]).ready(1, "a", 5).end("a", 6)
    cut = trace.write(tmp_path / "cut.json")
    assert timeline.read(cut)["phase"].tolist() == ["negotiate", "allreduce", "ready"]
    trace.begin("ALLREDUCE", "a", 7).end("a", 8, "int8", [7])
    table = timeline.read(trace.write(tmp_path / "timeline.json"))
    assert table["phase"].tolist() == ["negotiate", "allreduce", "ready", "allreduce"]
    assert table["buffer"].tolist() == [0, 0, 1, 1]


@given(st.integers(0, len(two_steps().text)), st.sampled_from(["#", "\x00", '"', "-1", "=", "é"]))
@no_deadline
def test_what_does_not_belong_is_refused(tmp_path_factory, at, garbage):
    text = two_steps().text
    assume(b'"args": {"name": ' not in text[max(at - 20, 0) : at])  # a name of one letter may become any other
    path = tmp_path_factory.getbasetemp() / "garbage.json"
    path.write_bytes(text[:at] + garbage.encode() + text[at:])
    with pytest.raises(TimelineError, match=r"garbage.json(, entry \d+: expected .*| is not a Horovod timeline: .*)"):
        timeline.read(path)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            lambda trace: trace._unit('{"ph": "B", "name": "ALLREDUCE", "ts": 4000, "pid": 77}'),
            "a tensor that has a name",
        ),
        (lambda trace: trace.begin("ALLREDUCE", "c", 3499), "a time no earlier than that of the event before"),
    ],
)
def test_events_out_of_order_are_refused_with_their_place(tmp_path, more, expected):
    n_before = len(json.loads(two_steps().text))
    with pytest.raises(TimelineError, match=f"timeline.json, entry {n_before}: expected {expected}; found .*'ph': 'B'"):
        timeline.read(more(two_steps()).write(tmp_path / "timeline.json"))


def test_an_operation_does_not_begin_inside_another(tmp_path):
    trace = Writer().begin("NEGOTIATE_ALLREDUCE", "a", 1).begin("ALLREDUCE", "a", 2)
    with pytest.raises(TimelineError, match="entry 5: expected the end of what the tensor is in"):
        timeline.read(trace.write(tmp_path / "timeline.json"))
    trace = two_steps().begin("ALLREDUCE", "c", 4000).begin("MPI_ALLREDUCE", "c", 4001).begin("MPI_BCAST", "c", 4002)
    with pytest.raises(TimelineError, match="expected an activity inside an operation"):
        timeline.read(trace.write(tmp_path / "timeline.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it has no entries"),
        ("{}", "Expected `array`, got `object`"),
        ("hello", r"invalid character \(byte 0\)"),
        ("]", r"invalid character \(byte 0\)"),
        ('[{"traceEvents": 1}]', r"unknown field `traceEvents` - at `\$\[0\]`"),
        ('[{"ph": "E", "ts": 1, "pid": 1}]', "its first entry does not say when it was started"),
        ('[{"ph": "X", "name": "first", "ts": 1, "pid": 1}]', "it has an event 'Xfirst'"),
    ],
)
def test_a_file_that_is_no_timeline_is_refused(tmp_path, text, words):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(TimelineError, match=f"other.json is not a Horovod timeline: .*{words}"):
        timeline.read(tmp_path / "other.json")


def test_a_missing_file_and_an_empty_one_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(TimelineError, match="timeline.json cannot be read: No such file"):
        timeline.read(tmp_path / "timeline.json")
    (tmp_path / "timeline.json").touch()
    with pytest.raises(TimelineError, match="timeline.json is empty: Horovod writes nothing before"):
        timeline.read(tmp_path / "timeline.json")


def test_exposed_is_what_the_computation_of_rank_0_does_not_hide(table, compute):
    first, second = timeline.steps(table, compute).round(9).to_dict("records")
    assert first == {
        "step": 0,
        "step_s": 2e-3,
        "compute_s": 1.1e-3,
        "communication_s": 0.4e-3,
        "exposed_s": 0.2e-3,
        "tensors": 2,
        "buffers": 1,
        "tensors_per_buffer": 2,
    }
    assert second == {
        "step": 1,
        "step_s": 1.5e-3,
        "compute_s": 1e-3,
        "communication_s": 0.4e-3,
        "exposed_s": 0.4e-3,
        "tensors": 1,
        "buffers": 1,
        "tensors_per_buffer": 1,
    }


def test_seconds_since_1970_come_to_the_clock_of_the_timeline(table, compute):
    compute["start_s"] += EPOCH_US / 1e6
    with pytest.raises(ValueError, match=r'subtract table.attrs\["epoch_s"\]'):
        timeline.steps(table, compute)
    compute["start_s"] -= table.attrs["epoch_s"]
    assert timeline.steps(table, compute)["exposed_s"].tolist() == pytest.approx([0.2e-3, 0.4e-3], abs=1e-6)


def test_a_step_without_communication_has_nothing_to_bear(table, compute):
    compute["start_s"] += 1
    result = timeline.steps(table, compute)
    columns = ["communication_s", "exposed_s", "tensors", "buffers"]
    assert (result[columns] == 0).all(axis=None) and result["tensors_per_buffer"].isna().all()
    assert result["step_s"].tolist() == pytest.approx([2e-3, 1e-3])


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), max_size=8)


@given(intervals, intervals.filter(len))
@no_deadline
def test_steps_agree_with_counting_the_microseconds(operations, computations):
    rows = [("allreduce", *span) for span in operations]
    table = pd.DataFrame(rows, columns=["phase", "start_s", "duration_s"]).assign(buffer=range(len(rows)))
    computations = sorted(computations)
    starts = np.unique([begin for begin, _ in computations])
    compute = pd.DataFrame(computations, columns=["start_s", "duration_s"])
    compute["step"] = np.searchsorted(starts, compute["start_s"])
    for times in (table, compute):
        times[["start_s", "duration_s"]] = times[["start_s", "duration_s"]].astype(float) * 1e-6

    def grid(spans: list[tuple[int, int]]) -> np.ndarray:
        covered = np.zeros(80, bool)
        for begin, length in spans:
            covered[begin : begin + length] = True
        return covered

    computing, operating = map(grid, (computations, operations))
    ends = [begin + n for begin, n in computations + operations if begin >= starts[-1]]
    bounds = np.append(starts, max(ends))
    result = timeline.steps(table, compute)
    for row, begin, end in zip(result.itertuples(), bounds[:-1], bounds[1:], strict=True):
        c, o = computing[begin:end], operating[begin:end]
        counted = [end - begin, c.sum(), o.sum(), (o & ~c).sum()]
        assert np.multiply(row[2:6], 1e6) == pytest.approx(counted, abs=1e-6)
        assert row.exposed_s * 1e6 + (o & c).sum() == pytest.approx(row.communication_s * 1e6, abs=1e-6)
        last = row.Index == len(starts) - 1
        assert row.tensors == row.buffers == sum(begin <= at and (at < end or last) for at, _ in operations)
    assert (result["exposed_s"] >= 0).all() and (result["exposed_s"] <= result["communication_s"]).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda compute: compute.drop(columns="step"), "it lacks step"),
        (lambda compute: compute.assign(rank=1), "compute has no row of rank 0"),
        (lambda compute: compute.assign(duration_s=-1.0), "no duration below 0"),
        (lambda compute: compute.assign(start_s=np.nan), "must be finite"),
        (lambda compute: compute.assign(rank=0, step=[0, 1, 1, 0]), "one after the other"),
    ],
)
def test_computation_that_cannot_be_is_refused(table, compute, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        timeline.steps(table, change(compute))


def lanes(figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_a_picture_has_a_lane_for_each_rank_and_phase(table, compute):
    of_ranks = ["rank 0 computes", "rank 1 computes", "rank 0 is ready", "rank 1 is ready"]
    figure = draw.timeline(table, compute)
    assert lanes(figure) == [*of_ranks, "cycle", "negotiate", "queue", "fuse", "wire", "unfuse"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1"]  # buffers
    assert figure.axes[0].get_xlim() == pytest.approx((0, 3.9))
    bare = draw.timeline(table[table["tensor"] == "c"])
    assert lanes(bare) == ["negotiate", "fuse", "wire", "unfuse"]


def test_a_picture_of_a_part_shows_no_other_part(table):
    axis = draw.timeline(table, first_s=3e-3, last_s=4e-3).axes[0]
    assert [text.get_text() for text in axis.texts] == ["1"]
    assert axis.get_xlim() == pytest.approx((3, 4))
    with pytest.raises(ValueError, match="there is nothing to draw between 5 and 6 s"):
        draw.timeline(table, first_s=5, last_s=6)
    with pytest.raises(ValueError, match="there is nothing to draw between 0.004 and 0.003 s"):
        draw.timeline(table, first_s=4e-3, last_s=3e-3)


def test_a_picture_of_a_long_run_has_few_bars(tmp_path):
    bench.write(tmp_path / "timeline.json", 100_000)
    axis = draw.timeline(timeline.read(tmp_path / "timeline.json")).axes[0]
    drawn = [len(lane.get_paths()) for lane in axis.collections]
    assert len(drawn) == 6 and 0 < sum(drawn) < 5000


def test_a_picture_has_room_for_16_ranks(table):
    compute = pd.DataFrame({"rank": range(17), "start_s": 0.0, "duration_s": 1.0})
    assert "rank 15 computes" in lanes(draw.timeline(table, compute[:16]))
    with pytest.raises(ValueError, match="room for 16 ranks"):
        draw.timeline(table, compute)


def record(path: str, fusion: str) -> float:
    """One rank's part in two grouped allreduces, a broadcast and an allgather; when Horovod started."""
    import os
    import time

    os.environ |= {"HOROVOD_TIMELINE": path, "HOROVOD_FUSION_THRESHOLD": fusion}
    import horovod.tensorflow as hvd
    import tensorflow as tf

    started_s = time.time()
    hvd.init()
    tensors = [tf.ones([100 * n]) for n in (1, 2, 3)]

    @tf.function
    def reduce() -> list[tf.Tensor]:
        return hvd.grouped_allreduce(tensors, name="group")

    reduce()
    reduce()
    hvd.broadcast(tf.constant(3.0), 0)
    hvd.allgather(tf.ones([2 + hvd.rank(), 3], tf.float64))
    time.sleep(0.2)  # at shutdown the writer drops what it has not written
    hvd.shutdown()
    return started_s


@pytest.fixture(scope="module")
def recorded(world2, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("timelines")
    files = {"fused": folder / "fused.json", "unfused": folder / "unfused.json"}
    started_s = {}
    for kind, fusion in (("fused", str(64 << 20)), ("unfused", "0")):
        started_s[kind] = world2.run(record, str(files[kind]), fusion, timeout_s=120)[0]
        assert timeline.read(files[kind]).attrs["epoch_s"] == pytest.approx(started_s[kind], abs=5)
    return files


def test_a_group_travels_in_one_buffer_if_fusion_is_on(recorded):
    table = timeline.read(recorded["fused"])
    reduced = table[table["phase"] == "allreduce"]
    assert reduced.groupby("buffer").size().tolist() == [3, 3]
    assert reduced.groupby("buffer")["bytes"].agg(sorted).tolist() == [[400, 800, 1200]] * 2
    assert {"prepare", "fuse", "wire", "unfuse"} <= set(table["phase"])
    assert table.loc[table["phase"] == "ready", "rank"].value_counts().loc[[0, 1]].min() >= 3
    assert set(table.loc[(table["phase"] == "wire") & (table["bytes"] == 400), "activity"]) == {"MPI_ALLREDUCE"}


def test_each_tensor_travels_alone_if_fusion_is_off(recorded):
    table = timeline.read(recorded["unfused"])
    reduced = table[table["phase"] == "allreduce"]
    assert len(reduced) == 6 and reduced["buffer"].is_unique and reduced["bytes"].sum() == 2 * 2400
    assert not set(table["phase"]) & {"fuse", "unfuse"}


def test_what_other_operations_say(recorded):
    table = timeline.read(recorded["fused"]).set_index("phase")
    assert math.isnan(table.loc["broadcast", "bytes"])
    assert table.loc["allgather", "bytes"] == (2 + 3) * 3 * 8


def test_parts_lie_within_their_operations_and_after_their_negotiations(recorded):
    for path in recorded.values():
        table = timeline.read(path)
        table["end_s"] = table["start_s"] + table["duration_s"]
        whole = table[table["phase"].isin(OPERATIONS)]
        rows = table[table["buffer"] >= 0].merge(whole, on=["tensor", "buffer"], suffixes=("", "_of_whole"))
        before = rows["phase"].isin(["ready", "negotiate"])
        assert before.any() and (~before).any()
        assert (rows["end_s"] <= rows["end_s_of_whole"] + 1e-9).all()
        assert (rows["end_s"] <= rows["start_s_of_whole"] + 1e-9)[before].all()
        assert (rows["start_s"] >= rows["start_s_of_whole"])[~before].all()


def test_a_real_file_cut_anywhere_gives_the_rows_so_far(recorded, tmp_path):
    text = recorded["fused"].read_bytes()
    text = text[: text.index(b'"float32"') + 300]  # the first of the group has ended, another perhaps
    cut = tmp_path / "cut.json"
    cut.write_bytes(text)
    whole = timeline.read(cut)
    assert {"allreduce", "negotiate"} <= set(whole["phase"])
    rows_before = 0
    for n in range(1, len(text), 3):
        cut.write_bytes(text[:n])
        rows = timeline.read(cut)
        so_far = whole.iloc[: len(rows)]
        exact = ["tensor", "phase", "activity", "rank", "start_s", "duration_s"]
        assert all((rows[column].to_numpy() == so_far[column].to_numpy()).all() for column in exact)
        assert (rows["bytes"].isna() | (rows["bytes"] == so_far["bytes"])).all()  # known at an occurrence's end only
        assert ((rows["buffer"] == -1) | (rows["buffer"] == so_far["buffer"])).all()  # and this at its operation's
        assert len(rows) >= rows_before
        rows_before = len(rows)
    assert rows_before >= len(whole) - 1


# -- size and speed ---------------------------------------------------------------------------------------------------

READ = """
import json, sys
from pathlib import Path
from nurion_utils.backends import timeline
table = timeline.read(sys.argv[1])
# of this program alone; the maximum that getrusage knows began with the process that started it
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak_bytes = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"rows": len(table), "peak_bytes": peak_bytes}))
"""


@pytest.mark.slow
def test_a_million_events_take_less_than_a_gigabyte(tmp_path):
    bench.write(tmp_path / "timeline.json", 1_000_000)
    command = [sys.executable, "-c", READ, str(tmp_path / "timeline.json")]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, env=os.environ).stdout)
    assert result["rows"] > 500_000 and result["peak_bytes"] < 1e9


def test_the_bench_compares_readers_of_the_same_table():
    table = bench.measure(n_events=3000, pairs=1)
    assert set(table["contender"]) == {"nurion_utils", "json + pandas"} and (table["time_s"] > 0).all()
