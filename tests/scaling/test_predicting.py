"""Laws that every prediction obeys, intervals that hold what they say, and bad input."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nurion_utils import allreduce, jobs, scaling, sites
from nurion_utils.allreduce import Link
from nurion_utils.scaling import calibrating, posterior, terms
from nurion_utils.scaling.workloads import Workload

COSMOFLOW = scaling.PUBLISHED["CosmoFlow"]
LINK = Link(3e-6, 1e-10)
WORKLOADS = st.builds(
    lambda size, batch, tensors, algorithm, strong: Workload(
        "any", size, tensors=tensors, algorithm=algorithm, sample_bytes=1e6, samples=1e6, storage="scratch",
        **({"global_batch": 8192.0 * batch} if strong else {"batch": float(batch)}),
    ),
    st.floats(1, 1e9), st.integers(1, 64), st.integers(1, 500), st.sampled_from(sorted(terms.ALGORITHMS)),
    st.booleans(),
)  # fmt: skip
SECONDS = st.floats(1e-4, 10)


def runs(step_s: float, nodes: tuple[int, ...] = (1, 2, 4)) -> pd.DataFrame:
    return pd.DataFrame({"nodes": nodes, "step_s": step_s})


@given(WORKLOADS, SECONDS)
@settings(deadline=None, max_examples=40)
def test_one_node_has_no_communication_and_twice_the_nodes_are_never_more_than_twice_as_fast(workload, step_s):
    table = scaling.predict("nurion", workload, 2 ** np.arange(13), scaling.calibrate(runs(step_s), "nurion", workload))
    assert table["communication_s"][0] == table["waiting_s"][0] == 0
    rates = table["samples_per_s"].to_numpy()
    assert (rates[1:] <= 2 * rates[:-1] * (1 + 1e-9)).all()
    assert (table["step_low_s"] < table["step_s"]).all() and (table["step_s"] < table["step_high_s"]).all()
    shares = table.filter(like="_share").drop(columns="narrows_share")
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1)


@given(WORKLOADS, SECONDS, st.sampled_from(["link_s_per_byte", "latency_s", "read_s_per_byte"]), st.floats(1, 100))
@settings(deadline=None, max_examples=40)
def test_a_faster_link_or_target_never_makes_a_step_slower(workload, step_s, name, factor):
    known, nodes = scaling.calibrate(runs(step_s), "nurion", workload), np.array([1.0, 3, 64, 8192])
    values, batch = known.values(), workload.batches(nodes)
    slow = values | {name: values[name] * factor}
    fast_s, slow_s = (terms.outputs(v, workload, known.targets, nodes, batch, "step_s") for v in (values, slow))
    assert (fast_s <= slow_s * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", sorted(terms.ALGORITHMS))
def test_the_closed_forms_cost_what_the_schedules_cost(name):
    for ranks in (1, 2, 3, 5, 8, 13, 64, 96):
        messages, arrays = terms.ALGORITHMS[name](np.array([float(ranks)]))
        ours = messages * LINK.alpha_s + arrays * 4e6 * LINK.beta_s_per_byte
        assert ours == pytest.approx(allreduce.time(allreduce.ALGORITHMS[name](ranks), 4e6, LINK))


def test_intervals_hold_runs_of_synthetic_machines_at_the_rate_that_they_say():
    rng, workload = np.random.default_rng(0), Workload("any", 40e6, batch=4, samples=1e5)
    seen, asked = np.array([1.0, 2, 4, 8]), np.array([64.0])
    priors = list(terms.PRIORS.values())
    held = 0
    for _ in range(200):
        drawn = [prior.median * np.exp(prior.spread * rng.normal()) for prior in priors]
        values = dict(zip(terms.PRIORS, drawn, strict=True))
        scatter = calibrating.SCATTER * np.exp(posterior.SCATTER_SPREAD * rng.normal())

        def measured(nodes):
            step_s = terms.outputs(values, workload, None, nodes, workload.batches(nodes), "step_s")  # noqa: B023
            return step_s * np.exp(scatter * rng.normal(size=len(nodes)))  # noqa: B023

        known = scaling.calibrate(pd.DataFrame({"nodes": seen, "step_s": measured(seen)}), None, workload)
        row = scaling.predict(None, workload, 64, known).iloc[0]
        held += row["step_low_s"] <= measured(asked)[0] <= row["step_high_s"]
    assert 180 <= held <= 198


def test_more_runs_narrow_the_interval_and_a_machine_seen_before_does_too():
    workload = Workload("any", 40e6, batch=1)
    other = scaling.calibrate(runs(0.3, (1, 2, 4, 8, 16, 32)), None, workload)
    knowns = [
        scaling.calibrate(runs(0.1, (1,)), None, workload),
        scaling.calibrate(runs(0.1, (1,)), None, workload, beside=[other]),
        scaling.calibrate(runs(0.1, (1, 2, 4, 8, 16)), None, workload),
    ]
    widths = [scaling.predict(None, workload, 64, known).eval("step_high_s / step_low_s").item() for known in knowns]
    assert widths[0] > widths[1] and widths[0] > widths[2]
    assert knowns[1].values()["sample_s"] == pytest.approx(0.1, rel=0.2)  # each one's own


def test_the_widest_doubt_is_named_and_so_is_the_weakest_input():
    known = scaling.calibrate(None, "nurion", COSMOFLOW)
    row = scaling.predict("nurion", replace(COSMOFLOW, samples=None), 64, known).iloc[0]
    assert row["narrows"] == "the time to compute a sample" and row["narrows_share"] > 0.5
    assert row["status"] == "chosen"


def test_samples_twice_as_large_would_wait_for_the_hottest_target_of_coris_lustre_but_not_of_its_burst_buffer():
    one = pd.DataFrame({"nodes": [1], "step_s": [0.129]})
    for storage, limited in (("scratch", True), ("burst_buffer", False)):
        large = 2 * COSMOFLOW.sample_bytes
        workload = replace(COSMOFLOW, storage=storage, sample_bytes=large, samples=None)
        table = scaling.predict("cori", workload, [64, 8192], scaling.calibrate(one, "cori", workload))
        assert table["input_s"][0] == 0 and (table["input_s"][1] > 0) == limited


def test_all_sizes_of_nurion_are_predicted_at_once():
    assert len(scaling.predict("nurion", COSMOFLOW, range(1, 8306))) == 8305


def test_plans_keep_the_sites_rules_and_become_jobs():
    plans = scaling.plan(COSMOFLOW, "nurion", epochs=100)
    cheapest, fastest = plans["cheapest"], plans["fastest"]
    assert cheapest.node_hours < fastest.node_hours and cheapest.hours > fastest.hours
    for plan in plans.values():
        assert plan.nodes <= 4970 and plan.walltime_hours <= {"normal": 48, "long": 120}[plan.queue]
        job = plan.job("python train.py", options={"-A": "tf"})
        assert isinstance(job, jobs.Job) and not jobs.lint(job)
    assert scaling.plan(COSMOFLOW, "nurion", epochs=100, most_batch=256)["fastest"].global_batch <= 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling.predict("nurian", COSMOFLOW, 4), "nurian"),
        (lambda: scaling.predict("nurion", COSMOFLOW, 0), "nodes must be a whole number from 1 to 8,305, not 0"),
        (lambda: scaling.predict("nurion", COSMOFLOW, 2.5), "nodes must be a whole number from 1 to 8,305, not 2.5"),
        (lambda: scaling.predict("nurion", COSMOFLOW, [1, 8306]), "nodes must be a whole number from 1 to 8,305, not"),
        (lambda: scaling.predict("nurion", COSMOFLOW, []), "nodes must be one number or more"),
        (lambda: replace(COSMOFLOW, gradient_bytes=-1), "gradient_bytes must be a number from 0, not -1"),
        (lambda: replace(COSMOFLOW, global_batch=4), "either batch .* or global_batch, and not both"),
        (lambda: replace(COSMOFLOW, algorithm="star"), "algorithm must be one of 'naive'"),
        (lambda: scaling.predict("nurion", replace(COSMOFLOW, batch=None, global_batch=4), 8), "take at most 4 nodes"),
        (lambda: scaling.calibrate(None, "nurion", replace(COSMOFLOW, operations=None)), "give measurements"),
        (lambda: scaling.calibrate(pd.DataFrame({"step_s": [1.0]}), None, COSMOFLOW), "it lacks nodes"),
        (lambda: scaling.calibrate(pd.DataFrame({"nodes": [1]}), None, COSMOFLOW), "columns step_s, epoch_s"),
        (lambda: scaling.calibrate(runs(-1.0), None, COSMOFLOW), "step_s must hold numbers above 0"),
        (
            lambda: scaling.predict("nurion", COSMOFLOW, 4, scaling.calibrate(runs(1.0), "cori", COSMOFLOW)),
            "of site 'cori': calibrate on 'nurion'",
        ),
        (lambda: scaling.plan(COSMOFLOW, "nurion", 1e6), "plan fewer epochs in each job"),
        (lambda: scaling.plan(COSMOFLOW, "nurion", 1, most_batch=0), "most_batch must be a whole number"),
        (lambda: scaling.plan(COSMOFLOW, "slurm", 1), "does not say how many nodes it has"),
        (lambda: scaling.plan(COSMOFLOW, "local", 1), "has no scheduler"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value) and not str(refused.value).endswith(".")


@pytest.mark.tensorflow
def test_a_workload_is_read_off_a_keras_model():
    import keras

    from nurion_utils.models import cosmoflow

    layers = [keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(10)]
    found = scaling.workload(keras.Sequential(layers), batch=16, samples=1000)
    kernel, dense = 3 * 3 * 3 * 4, 6 * 6 * 4 * 10
    assert found.operations == 3 * 2 * (kernel * 6 * 6 + dense)
    assert (found.gradient_bytes, found.tensors, found.sample_bytes) == (
        4 * (kernel + 4 + dense + 10),
        4,
        4 * 8 * 8 * 3,
    )
    assert scaling.workload(cosmoflow(), 1, 100).operations == pytest.approx(COSMOFLOW.operations, rel=0.3)
    with pytest.raises(ValueError, match="give it an Input, or build it"):
        scaling.workload(keras.Sequential([keras.layers.Dense(4)]), 16, 1000)
    with pytest.raises(ValueError, match="give the Input a fixed shape"):
        shapeless = keras.Sequential([keras.layers.Input((None, 3)), keras.layers.Conv1D(4, 3)])
        scaling.workload(shapeless, 16, 1000)


def test_a_site_that_describes_no_fabric_and_one_that_describes_it_are_told_apart_by_their_spread():
    widths = []
    for site in (None, sites.load("nurion")):
        known = scaling.calibrate(runs(0.1), site, replace(COSMOFLOW, samples=None))
        widths.append(known.prior[1][list(terms.PRIORS).index("latency_s")])
    assert widths[0] > widths[1]
