import pytest

from nurion_utils import ranks
from nurion_utils.training import step_timing


def measure(stages: tuple[str, ...]):
    import numpy as np
    from mpi4py import MPI

    from nurion_utils import models
    from nurion_utils.datasets import Shard
    from nurion_utils.training import step_timing

    x = np.random.default_rng(0).normal(size=(64, 64)).astype("float32")
    y = np.zeros((64, 10), "float32")
    shard = Shard(64, 1, 0, 8, seed=MPI.COMM_WORLD.rank)
    return step_timing.step_times(models.mlp, lambda: shard.dataset(x, y), stages=stages, rounds=2, block_s=0.02)


def test_all_ranks_report_the_same_times_and_every_stage_in_every_round(world2) -> None:
    first, second = world2.run(measure, step_timing.STAGES, timeout_s=120)
    assert first.equals(second)
    assert first.groupby("round")["stage"].agg(set).eq(set(step_timing.STAGES)).all()
    assert (first["ranks"] == 2).all() and (first["batch_per_rank"] == 8).all()
    assert (first["samples_per_s"] * first["step_s"]).round(6).eq(16).all()
    assert ((first["input_s"] > 0) & (first["input_s"] < first["step_s"])).all()


def test_the_parts_of_a_step_add_up_to_the_step(world2) -> None:
    table = world2.run(measure, step_timing.STAGES, timeout_s=120)[0]
    one_round = table[table["round"] == 0]
    whole = one_round.loc[one_round["stage"] == "allreduce", "step_s"].item()
    assert step_timing.parts(one_round)["time_s"].sum() == pytest.approx(whole)


def test_an_unknown_stage_is_refused_with_the_known_ones(world2) -> None:
    with pytest.raises(ranks.RankError, match="stage must be one of 'forward', .*, not 'sideways'"):
        world2.run(measure, ("sideways",))
