"""Who a process is, whoever launched it; and that an outer launch is not taken for ours."""

import os
import subprocess
import sys

import pytest

from nurion_utils.ranks import identity, own_environment
from nurion_utils.ranks.environment import Identity, end_of_job

LAUNCHED = {
    "Hydra": {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"},
    "gforker": {"PMI_RANK": "3", "PMI_SIZE": "8"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_RANK": "3",
    },
    "MVAPICH2": {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
    "PALS": {"PALS_RANKID": "3", "PALS_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PMI_RANK": "3"},
    "srun --mpi=pmix": {
        "PMIX_RANK": "3", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
    },
    "srun": {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
    "Horovod": {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1"},
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_rank_knows_who_it_is_below(launcher: str) -> None:
    local = 3 if launcher == "gforker" else 1
    assert identity(LAUNCHED[launcher]) == Identity(rank=3, size=8, local_rank=local)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PMI_RANK": "0"},
        {"PMI_RANK": "x", "PMI_SIZE": "2"},
        {"PMI_RANK": "2", "PMI_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "batch"},
    ],
)
def test_a_process_that_nobody_launched_is_alone(environment: dict[str, str]) -> None:
    assert identity(environment) == Identity(0, 1, 0)


KEPT = [
    *["HOME", "PATH", "HOROVOD_FUSION_THRESHOLD", "HOROVOD_CYCLE_TIME", "UCX_TLS", "MPIR_CVAR_CH4_NUM_VCIS"],
    *["I_MPI_FABRICS", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_SUBMIT_DIR", "PBS_JOBID", "PBS_O_WORKDIR"],
]  # fmt: skip
DROPPED = [
    *["PMI_RANK", "PMI_FD", "PMI_PORT", "PMI2_RANK", "PMIX_NAMESPACE", "PMIX_SERVER_URI41", "OMPI_COMM_WORLD_SIZE"],
    *[
        "OMPI_MCA_orte_ess_jobid",
        "PRTE_LAUNCHED",
        "PALS_RANKID",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "HYDRA_LAUNCHER",
    ],
    *["HYDI_CONTROL_FD", "MPIEXEC_PORT_RANGE", "I_MPI_HYDRA_BOOTSTRAP", "MV2_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK"],
    *["SLURM_STEP_ID", "SLURM_STEPID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"],
    *["SLURM_MPI_TYPE", "SLURM_PMIX_MAPPING_SERV", "SLURM_SRUN_COMM_PORT", "SLURM_LAUNCH_NODE_IPADDR", "PBS_TASKNUM"],
    *["HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_CONTROLLER", "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_ELASTIC"],
]


@pytest.mark.parametrize("name", [*KEPT, *DROPPED])
def test_what_an_outer_launch_says_does_not_reach_our_ranks_and_what_a_user_sets_does(monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert (name in own_environment()) == (name in KEPT)


JOB = """
from nurion_utils import ranks
def job():
    from mpi4py import MPI
    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
with ranks.start(2) as world:
    print(world.run(job, timeout_s=240))
"""


@pytest.mark.parametrize(
    ("told", "ends_at"),
    [
        ({}, None),
        ({"NURION_ENDS_AT": ""}, None),
        ({"SLURM_JOB_END_TIME": "1764215000"}, 1764215000),
        ({"NURION_ENDS_AT": "1764214000.5", "SLURM_JOB_END_TIME": "1764215000"}, 1764214000.5),
    ],
)
def test_a_job_tells_when_it_ends_and_its_script_knows_better_than_slurm(told, ends_at) -> None:
    assert end_of_job(told) == ends_at


@pytest.mark.parametrize("told", ["noon", "nan", "-1", "2026-11-27"])
def test_an_end_of_a_job_that_is_not_in_seconds_is_refused(told) -> None:
    with pytest.raises(ValueError, match=f"^NURION_ENDS_AT must be the seconds since 1970 .* not '{told}'$"):
        end_of_job({"NURION_ENDS_AT": told})


PMIX = {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.1.0", "PMIX_SERVER_URI2": "x;tcp4://127.0.0.1:1"}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("before", "outer"),
    {
        "mpiexec": (["mpiexec", "-n", "1"], {}),
        "gforker": (["mpiexec.gforker", "-n", "1"], {}),
        "pmix": ([], {**PMIX, "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_MPI_TYPE": "pmix"}),
        "a dead server": ([], {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "77", "PMI_PORT": "127.0.0.1:1"}),
    }.values(),
)
def test_ranks_start_below_another_launch(tmp_path, before: list[str], outer: dict[str, str]) -> None:
    (tmp_path / "job.py").write_text(JOB)
    command = [*(os.path.join(sys.prefix, "bin", word) if i == 0 else word for i, word in enumerate(before))]
    environment = {**os.environ, **outer, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run(
        [*command, sys.executable, str(tmp_path / "job.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "[(0, 2), (1, 2)]" in ended.stdout, ended.stderr
