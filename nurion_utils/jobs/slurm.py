"""A job in the words of Slurm."""

from __future__ import annotations

from nurion_utils.jobs.chain import warning_s
from nurion_utils.jobs.job import Job, Line

PREFIX, ID = "#SBATCH", "$SLURM_JOB_ID"
START: list[Line] = []
AGAIN, CANCEL = 'sbatch --parsable --dependency=afterany:"$job"', "scancel"


def header(job: Job) -> list[Line]:
    """The directives for what is the job's own."""
    queue = job.site.scheduler.queue_option or "--partition"
    warned = job.requeue and job.launcher and "--signal" not in job.options
    lines = [
        (f"--job-name={job.name}", "its name in the queue"),
        (f"--nodes={job.nodes}", "how many nodes"),
        *([(f"{queue}={job.queue}", "the queue")] if job.queue else []),
        (f"--ntasks-per-node={job.ranks_per_node}", "ranks on each node"),
        *([(f"--cpus-per-task={job.cores_per_rank}", "cores of each rank")] if job.cores_per_rank else []),
        (f"--time={job.clock}", "then it is ended"),
        (f"--output={job.name}.o%j", "one log for all, with the job's number"),
        *([(f"--signal=TERM@{warning_s(job)}", "a warning to the ranks before, so that they save")] if warned else []),
    ]
    return [Line(f"#SBATCH {text}", why) for text, why in lines]
