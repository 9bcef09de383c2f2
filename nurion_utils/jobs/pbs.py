"""A job in the words of PBS Pro."""

from __future__ import annotations

from nurion_utils.jobs.job import Job, Line

PREFIX, ID = "#PBS", "${PBS_JOBID%%.*}"
START = [Line('cd "$PBS_O_WORKDIR"', "PBS begins in the home folder; this is where the job was submitted", "qsub(1B)")]
AGAIN, CANCEL = 'qsub -W depend=afterany:"$PBS_JOBID"', "qdel"


def header(job: Job) -> list[Line]:
    """The directives for what is the job's own."""
    each, threads = job.ranks_per_node, job.cores or 1
    whole = job.node and job.node.cores
    cores = whole or each * threads
    shape = f"{job.nodes}:ncpus={cores}:mpiprocs={each}:ompthreads={threads}"
    lines = [Line(f"#PBS -N {job.name}", "its name in the queue")]
    lines += [Line(f"#PBS -q {job.queue}", "the queue")] if job.queue else []
    lines += [
        Line(
            f"#PBS -l select={shape}", f"{job.nodes} nodes, on each {each} rank{'s' * (each > 1)} with {threads} cores"
        )
    ]
    lines += [] if whole else [Line("#PBS -l place=scatter", "or some of these could lie on one node", "qsub(1B)")]
    lines += [Line(f"#PBS -l walltime={job.clock}", "then it is ended")]
    return [*lines, Line("#PBS -j oe", f"one log for all, {job.name}.o with the job's number", "qsub(1B)")]
