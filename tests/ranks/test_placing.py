"""What is asked of a scheduler for ranks, before anything is submitted."""

import pytest

from nurion_utils import ranks, sites
from nurion_utils.ranks.launchers.placing import request


def asked(site, n, cores_per_rank=None, **wanted):
    return request(n, sites.load(site), cores_per_rank, None, wanted, {})


def pairs(submit):
    return [" ".join(pair) for pair in zip(submit, submit[1:], strict=False)]


def test_nurion_gets_whole_nodes_its_own_options_and_its_own_launcher():
    found = asked("nurion", 4, nodes=2, minutes=90)
    assert {
        *["-q normal", "-A tf", "-W sandbox=PRIVATE", "-l place=scatter", "-l walltime=01:30:00"],
        "-l select=2:ncpus=68:mpiprocs=2:ompthreads=34",
    } <= {*pairs(found.batch.submit)}
    assert "burst_buffer" not in found.batch.submit
    assert found.launcher == "mpirun -n 4" and {*found.launcher_env} == {"PATH"}


def test_an_option_that_is_given_takes_the_place_of_the_usual_one():
    found = pairs(asked("nurion", 1, options=["-A", "pytorch"]).batch.submit)
    assert "-A pytorch" in found and "-A tf" not in found


@pytest.mark.parametrize("n", [1, 3])
def test_any_pbs_gets_as_many_cores_as_the_ranks_want_and_mpich_is_brought_to_the_nodes(n):
    found = asked("pbs", n, 4, nodes=1)
    assert f"-l select=1:ncpus={4 * n}:mpiprocs={n}:ompthreads=4" in pairs(found.batch.submit)
    assert found.launcher == f"mpiexec -n {n} -ppn {n}" and found.launcher_env["HYDRA_LAUNCHER"] == "rsh"


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("neuron", "jobs on 'neuron' must have option --comment: give it in options"),
        ("elcapitan", "site 'elcapitan' has Flux: ranks are started through Slurm or PBS Pro"),
    ],
)
def test_what_a_scheduler_would_refuse_is_refused_before(site, says):
    with pytest.raises(ValueError, match=says):
        asked(site, 1)


def test_a_comment_makes_neuron_content():
    assert "--comment=field=ai;appl=tf" in asked("neuron", 1, options=["--comment=field=ai;appl=tf"]).batch.submit


@pytest.mark.parametrize(("site", "command"), [("slurm", "sbatch"), ("nurion", "qsub")])
def test_away_from_the_site_it_is_said_where_ranks_start(monkeypatch, tmp_path, site, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{command} is not found here: ranks of site '{site}' start from its login"):
        ranks.start(2, site=site)
