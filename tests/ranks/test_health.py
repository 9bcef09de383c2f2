import pytest

from nurion_utils import health, ranks

pytestmark = pytest.mark.ranks


def test_a_sound_environment_has_no_fault_in_what_was_set_up(world4) -> None:
    report = health.report(world4).set_index("check")
    machine = {"cores busy with something else", "free memory", "free shared memory (/dev/shm)"}
    assert report.loc[~report.index.isin(machine), "ok"].all(), report.to_string()
    assert report.loc["operations Horovod was built with", "value"] == "MPI, Gloo, oneCCL"
    assert report.loc["MPI adds up the rank numbers", "value"] == "6 (expected 6)"


def test_a_fault_is_found_and_comes_with_its_remedy() -> None:
    with ranks.start(2, env={"HOROVOD_CPU_OPERATIONS": "CCL"}) as world:
        report = health.report(world).set_index("check")
    fault = report.loc["operation in use"]
    assert not fault["ok"] and fault["value"] == "CCL" and "unset it" in fault["remedy"]
    assert (report.loc[report["ok"], "remedy"] == "").all()
    assert (report.loc[~report["ok"], "remedy"] != "").all()


@pytest.mark.parametrize(("apart_s", "ok"), [(0.2, True), (1.5, False)])
def test_clocks_that_differ_by_more_than_a_second_are_found(apart_s: float, ok: bool) -> None:
    # The nodes of one machine have one clock, so what ranks would answer is made up.
    answers = [{"node": f"n{i}", "sees_folder": True, "clock_s": 1e9 + i * apart_s, "sent": {}} for i in range(2)]
    found = {check: (value, fine) for check, value, fine in health._node_checks(answers)}
    assert found["clocks of the nodes"] == (f"{apart_s:.3f} s apart", ok)
