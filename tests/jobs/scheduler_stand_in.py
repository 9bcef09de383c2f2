#!/usr/bin/env python3
"""A stand-in for Slurm and PBS Pro, for tests only: commands of their names, linked to this file, behave as theirs.

It is strict: options that it does not know, resources that do not exist and jobs that it never heard of are refused
with the words and the exit status of the real ones. It has no daemon: `qsub` and `sbatch` leave a process behind that
waits for free nodes, runs the script on this machine as if on those nodes, and ends with the job. With `--serve` it is
a server, for whoever ends all that a command leaves behind, and for jobs on virtual nodes.

STAND_IN is a directory for its records; STAND_IN_RULES a JSON object with any of
on (a command that runs others on the node that its first argument names; jobs are then run by a server, on such nodes),
nodes (3), cores (of each, 2), queues (["main"]), most_minutes (of a job; a longer one is refused by PBS Pro and waits
for ever in Slurm), history (true: what has ended can be asked after), kill_s (2: from SIGTERM to SIGKILL), slots (how
many nodes may be busy at once; all).
"""

import contextlib
import fcntl
import functools
import getpass
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# In a job only what the scheduler tells of itself leads here.
HERE = os.environ.get("STAND_IN") or os.environ.get("PBS_JOBCOOKIE") or os.environ.get("SLURM_CONF", "/nowhere")
HERE = Path(HERE)
RULES = {
    "on": None,
    "nodes": 3,
    "cores": 2,
    "queues": ["main"],
    "most_minutes": None,
    "history": True,
    "kill_s": 2,
    "slots": None,
}
if "STAND_IN" in os.environ:
    (HERE / f"rules.{os.getpid()}").write_text(os.environ.get("STAND_IN_RULES", "{}"))
    os.replace(HERE / f"rules.{os.getpid()}", HERE / "rules")
RULES |= json.loads((HERE / "rules").read_text())
NEVER_PBS, NEVER_SLURM = "Can Never Run: Not enough total nodes available", "PartitionNodeLimit"


def fail(message, status=1):
    print(message, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def locked():
    with open(HERE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def jobs():
    return {int(path.stem): json.loads(path.read_text()) for path in HERE.glob("*.json")}


def write(number, job):
    (HERE / f"{number}.new").write_text(json.dumps(job))
    os.replace(HERE / f"{number}.new", HERE / f"{number}.json")


def change(number, **values):
    with locked():
        write(number, jobs()[number] | values)


def enqueue(job, script):
    """Takes a job in, and leaves the process behind that runs it."""
    with locked():
        number = max(jobs(), default=0) + 1
        shutil.copy(script, HERE / f"{number}.sh")
        state = {"state": "Q", "hosts": [], "exit": None, "cancelled": False, "user": getpass.getuser(), "pid": None}
        write(number, {**state, "directory": os.getcwd(), "submitted": time.time(), "started": None, **job})
    if not job["reason"] and not RULES["on"]:
        start_runner(number)
    return number


def start_runner(number):
    with open(HERE / f"{number}.runner", "w") as log:
        words = [sys.executable, str(Path(__file__).resolve()), "--run", str(number)]
        runner = subprocess.Popen(words, stdin=-3, stdout=log, stderr=log, start_new_session=True)
    change(number, runner=runner.pid)


def serve():
    """Runs all jobs that come."""
    while True:
        with locked():
            new = [number for number, job in jobs().items() if job["state"] == "Q" and "runner" not in job]
        for number in new:
            if not jobs()[number]["reason"]:
                start_runner(number)
        time.sleep(0.05)


def run(number):
    """What a node does with a job: waits for its turn, runs it, ends it when its time is up, and brings its output."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever is so where it was submitted
    while True:
        with locked():
            job, others = jobs()[number], jobs()
            busy = [host for other in others.values() if other["state"] == "R" for host in other["hosts"]]
            free = [f"n{i + 1}" for i in range(RULES["nodes"]) if f"n{i + 1}" not in busy]
            slots = (RULES["slots"] or RULES["nodes"]) - len(busy)
            if job["cancelled"]:
                return
            depends = others.get(job.get("after"), {"state": "F"})["state"] != "F"
            if not depends and len(free) >= job["nodes"] <= slots:
                hosts = free[: job["nodes"]]
                if not job.get("scatter", True) and job["nodes"] * job["cores"] <= RULES["cores"]:
                    hosts = hosts[:1] * job["nodes"]
                job |= {"state": "R", "hosts": hosts, "started": time.time()}
                write(number, job)
                break
        time.sleep(0.05)
    output, clean = HERE / f"{number}.out", {k: v for k, v in os.environ.items() if not k.startswith("STAND_IN")}
    environment, folder = (pbs_environment if job["kind"] == "pbs" else slurm_environment)(number, job)
    live = Path(job["output"]) if job["kind"] == "slurm" else output
    with open(live, "w") as log:
        clean = job.get("environment") or clean
        begin = functools.partial(start_on_node, environment=clean | environment, folder=folder, log=log)
        process = begin(job["hosts"][0], ["bash", str(HERE / f"{number}.sh")])
        change(number, pid=process.pid)
        tasks = Tasks(number, begin)
        code, over = watch(number, process, job["seconds"], tasks), False
        if code is None:
            over, code = True, end(process)
            log.seek(0, 2)
            print(f"=>> PBS: job killed: walltime {job['seconds'] + 1} exceeded limit {job['seconds']}", file=log)
        tasks.end()
    if job["kind"] == "pbs" and job["output"] != "/dev/null":
        shutil.copy(output, job["output"].replace("NUMBER", str(number)))
    change(number, state="F", exit=-29 if over and job["kind"] == "pbs" else code, over=over)


def start_on_node(host, words, environment, folder, log):
    there = [RULES["on"], host, "sh", "-c", 'cd "$0" && exec "$@"', folder] if RULES["on"] else []
    return subprocess.Popen(
        [*there, *words], env=environment, cwd=folder, stdin=-3, stdout=log, stderr=-2, start_new_session=True
    )


class Tasks:
    """What `pbs_tmrsh` asks for in a job: it leaves word in a file NUMBER.NAME.task, and waits for NUMBER.NAME.done."""

    def __init__(self, number, begin):
        self.number, self.begin, self.running = number, begin, {}

    def look(self):
        for task in HERE.glob(f"{self.number}.*.task"):
            host, *words = json.loads(task.read_text())
            task.unlink()
            self.running[task.with_suffix(".done")] = self.begin(host, words)
        for done, process in list(self.running.items()):
            if process.poll() is not None:
                done.with_suffix(".new").write_text(str(process.returncode))
                os.replace(done.with_suffix(".new"), done)
                del self.running[done]

    def end(self):
        for process in self.running.values():
            end(process)


def watch(number, process, seconds, tasks):
    """The exit status of the job, 128 more for a signal; None when its time is up."""
    ends = time.monotonic() + seconds
    while (code := process.poll()) is None:
        tasks.look()
        if jobs()[number]["cancelled"]:
            return end(process)
        if time.monotonic() > ends:
            return None
        time.sleep(0.05)
    return code if code >= 0 else 128 - code


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(RULES["kill_s"])
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    return code if code >= 0 else 128 - code


def pbs_environment(number, job):
    nodefile = HERE / f"{number}.nodes"
    nodefile.write_text("".join(f"{host}\n" * job["ranks"] for host in job["hosts"]))
    names = {"PBS_JOBID": f"{number}.head", "PBS_NODEFILE": str(nodefile), "PBS_ENVIRONMENT": "PBS_BATCH"}
    names |= {"PBS_JOBCOOKIE": str(HERE), "PBS_NODENUM": "0", "PBS_TASKNUM": "1", "PBS_MOMPORT": "15003"}
    names |= {"NCPUS": str(job["cores"]), "OMP_NUM_THREADS": str(job["threads"])}
    return names | {"PBS_O_WORKDIR": job["directory"], "PBS_JOBNAME": job["name"]}, os.path.expanduser("~")


def slurm_environment(number, job):
    hosts = ",".join(job["hosts"])
    names = {
        "SLURM_CONF": str(HERE),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": hosts,
        "SLURM_NNODES": str(job["nodes"]),
    }
    return names | {"SLURM_SUBMIT_DIR": job["directory"]}, job["directory"]


def directives(script, prefix):
    """The words after each #PBS or #SBATCH, up to the first line that is neither comment nor blank."""
    for line in Path(script).read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            return
        if line.startswith(f"#{prefix} "):
            yield shlex.split(line.removeprefix(f"#{prefix} "))


# -- PBS Pro


def qsub(words):
    given = []
    while words and words[0].startswith("-"):
        given.append(words[: 1 + (words[0] != "-V")])
        words = words[len(given[-1]) :]
    if len(words) != 1:
        fail("usage: qsub [options] script", 2)
    if not os.path.isfile(words[0]):
        fail(f"qsub: script file:: No such file or directory: {words[0]}", 1)
    job = {"kind": "pbs", "name": "STDIN", "queue": RULES["queues"][0], "nodes": 1, "ranks": 1, "seconds": 3600}
    job |= {"reason": "", "joined": False, "cores": 1, "threads": 1, "output": None, "scatter": False}
    for key, *values in [*directives(words[0], "PBS"), *given]:
        value = " ".join(values)
        if key == "-N":
            job["name"] = value
        elif key == "-q":
            job["queue"] = value
            if value not in RULES["queues"]:
                fail("qsub: Unknown queue", 170)
        elif key == "-l":
            pbs_resource(job, value)
        elif key == "-j" and value == "oe":
            job["joined"] = True
        elif key == "-o":
            job["output"] = value
        elif key == "-V":
            job["environment"] = {k: v for k, v in os.environ.items() if not k.startswith("STAND_IN")}
        elif key == "-W" and (after := re.fullmatch(r"depend=afterany:(\d+)\.head", value)):
            job["after"] = int(after[1])
        elif key not in ("-A", "-P", "-W"):
            fail(f"qsub: invalid option -- '{key.lstrip('-')}'", 2)
    if RULES["most_minutes"] and job["seconds"] > 60 * RULES["most_minutes"]:
        fail("qsub: Job violates queue and/or server resource limits", 188)
    job["output"] = job["output"] or f"{os.getcwd()}/{job['name']}.oNUMBER"
    number = enqueue(job, words[0])
    print(f"{number}.head", flush=True)
    if ["-W", "block=true"] in given:
        while jobs()[number]["state"] != "F":
            time.sleep(0.05)
        sys.exit(jobs()[number]["exit"])


def pbs_resource(job, value):
    key, _, text = value.partition("=")
    if key == "select":
        count, *chunks = text.split(":")
        given = dict(chunk.partition("=")[::2] for chunk in chunks)
        if not count.isdecimal() or not all(number.isdecimal() for number in given.values()):
            fail("qsub: Illegal attribute or resource value Resource_List.select", 166)
        if unknown := set(given) - {"ncpus", "mpiprocs", "ompthreads"}:
            fail(f"qsub: Unknown resource Resource_List.{min(unknown)}", 187)
        job |= {"nodes": int(count), "ranks": int(given.get("mpiprocs", 1))}
        cores = job["cores"] = int(given.get("ncpus", 1))
        job["threads"] = int(given.get("ompthreads", cores))
        if cores > RULES["cores"]:
            wanted, all_of_them = cores * int(count), RULES["nodes"] * RULES["cores"]
            job["reason"] = f"Can Never Run: Insufficient amount of resource: ncpus (R: {wanted} A: {all_of_them} T: 0)"
        elif int(count) > RULES["nodes"]:
            job["reason"] = NEVER_PBS
    elif key == "walltime":
        hours, minutes, seconds = map(int, text.split(":"))
        job["seconds"] = 3600 * hours + 60 * minutes + seconds
    elif key == "place":
        job["scatter"] = "scatter" in text.split(":")
    else:
        fail(f"qsub: Unknown resource Resource_List.{key}", 187)


def pbs_job(word, name):
    match = re.fullmatch(r"(\d+)(\.head)?", word)
    number = int(match[1]) if match else 0
    with locked():
        found = jobs()
    if number not in found:
        fail(f"{name}: Unknown Job Id {word}", 153)
    return number, found[number]


def qstat(words):
    history, words = "-x" in words, [word for word in words if word != "-x"]
    if words[:3] != ["-f", "-F", "json"] or len(words) != 4:
        fail("usage: qstat [-x] -f -F json job", 2)
    if history and not RULES["history"]:
        fail("qstat: PBS is not configured to maintain job history", 1)
    number, job = pbs_job(words[3], "qstat")
    if job["state"] == "F" and not history:
        fail(f"qstat: {number}.head Job has finished, use -x or -H to obtain historical job information", 35)
    told = {"Job_Name": job["name"], "Job_Owner": f"{job['user']}@head", "job_state": job["state"]}
    told |= {"queue": job["queue"], "substate": {"Q": 10, "R": 42, "F": 92}[job["state"]]}
    if job["reason"]:
        told["comment"] = job["reason"]
    if job["started"]:
        host = f"/{0}*{job['ranks']}" if job["ranks"] > 1 else "/0"
        told |= {"exec_host": "+".join(each + host for each in job["hosts"]), "stime": time.ctime(job["started"])}
    elif not job["reason"]:
        if RULES["on"]:
            told["comment"] = "Not Running: Insufficient amount of resource: ncpus"
        told["estimated"] = {"start_time": time.ctime(job["submitted"] + 60)}
    if job["state"] == "F":
        told["substate"] = 91 if job["cancelled"] else 93 if job["exit"] else 92
        told["Exit_status"] = job["exit"]
    print(json.dumps({"timestamp": int(time.time()), "pbs_server": "head", "Jobs": {f"{number}.head": told}}))


def qdel(words):
    for word in words:
        number, job = pbs_job(word, "qdel")
        if job["state"] == "F":
            fail(f"qdel: Job has finished {word}", 35)
        change(number, cancelled=True, **({"state": "F", "exit": 271} if job["state"] == "Q" else {}))


def qselect(words):
    options = dict(zip(words[::2], words[1::2], strict=True))
    if set(options) - {"-u", "-s", "-q", "-N"}:
        fail("usage: qselect [-u user] [-s states] [-q queue] [-N name]", 2)
    for number, job in jobs().items():
        is_so = {"-u": job["user"], "-q": job["queue"], "-N": job["name"]}
        wanted = all(options.get(key, value) == value for key, value in is_so.items())
        if wanted and job["state"] in options.get("-s", "HQRW"):  # what has ended is history
            print(f"{number}.head")


def pbs_tmrsh(words):
    if missing := {"PBS_JOBID", "PBS_JOBCOOKIE", "PBS_NODENUM", "PBS_TASKNUM", "PBS_MOMPORT"} - set(os.environ):
        fail(f"pbs_tmrsh: not within a job, which has {min(missing)}")
    number, (host, *words) = int(os.environ["PBS_JOBID"].partition(".")[0]), words
    if host not in jobs()[number]["hosts"]:
        fail(f"pbs_tmrsh: {host} is no node of this job")
    new = HERE / f"{number}.{os.uname().nodename}-{os.getpid()}.new"
    new.write_text(json.dumps([host, *words]))
    os.replace(new, new.with_suffix(".task"))
    while not (done := new.with_suffix(".done")).exists():
        time.sleep(0.05)
    sys.exit(int(done.read_text()))


# -- Slurm


def sbatch(words):
    *options, script = words
    after = [re.fullmatch(r"--dependency=afterany:(\d+)", option) for option in options[1:]]
    if options[:1] != ["--parsable"] or not all(after):
        fail("sbatch: error: only --parsable, one --dependency=afterany and a script are known here")
    if not os.path.isfile(script):
        fail(f"sbatch: error: Unable to open file {script}")
    given = dict(directive[0].partition("=")[::2] for directive in directives(script, "SBATCH"))
    known = "job-name nodes ntasks-per-node cpus-per-task time output partition exclusive comment signal".split()
    if unknown := set(given) - {f"--{name}" for name in known}:
        fail(f"sbatch: unrecognized option '{min(unknown)}'")
    queue = given.get("--partition", RULES["queues"][0])
    if queue not in RULES["queues"]:
        fail(
            f"sbatch: error: invalid partition specified: {queue}\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified"
        )
    hours, minutes, seconds = map(int, given["--time"].split(":"))
    job = {"kind": "slurm", "name": given["--job-name"], "queue": queue, "nodes": int(given["--nodes"]), "reason": ""}
    job |= {"ranks": int(given["--ntasks-per-node"]), "seconds": 3600 * hours + 60 * minutes + seconds}
    if job["nodes"] > RULES["nodes"]:
        job["reason"] = NEVER_SLURM
    elif RULES["most_minutes"] and job["seconds"] > 60 * RULES["most_minutes"]:
        job["reason"] = "PartitionTimeLimit"
    number = max(jobs(), default=0) + 1
    job["output"] = os.path.join(os.getcwd(), given["--output"].replace("%j", str(number)))
    print(enqueue(job | {"after": int(after[0][1]) if after else None}, script))


def scontrol(words):
    if words[:2] == ["show", "hostnames"]:
        return print(*words[2].split(","), sep="\n")
    if words[:3] != ["show", "job", "--oneliner"] or len(words) != 4:
        fail("scontrol: only 'show hostnames' and 'show job --oneliner' are known here")
    job = jobs().get(int(words[3]) if words[3].isdecimal() else 0)
    if job is None or (job["state"] == "F" and not RULES["history"]):
        fail("slurm_load_jobs error: Invalid job id specified")
    name = {"Q": "PENDING", "R": "RUNNING"}.get(job["state"])
    name = name or ("CANCELLED" if job["cancelled"] else "TIMEOUT" if job.get("over") else None)
    name = name or ("FAILED" if job["exit"] else "COMPLETED")
    reason = job["reason"] or {"PENDING": "Resources", "FAILED": "NonZeroExitCode", "TIMEOUT": "TimeLimit"}.get(name)
    start = job["started"] or (job["submitted"] + 60 if not job["reason"] else None)
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(start)) if start else "Unknown"
    code = job["exit"] or 0
    code = f"0:{code - 128}" if code > 128 else f"{code}:0"
    print(
        f"JobId={words[3]} JobName={job['name']} JobState={name} Reason={reason} ExitCode={code} StartTime={start} "
        f"ReqNodeList=(null) ExcNodeList=(null) NodeList={','.join(job['hosts']) or '(null)'} NumNodes={job['nodes']}"
    )


def squeue(words):
    if words[:7] != ["--me", "-h", "-r", "-t", "PENDING", "-o", "%i"] or words[7:8] not in ([], ["-p"]):
        fail("squeue: error: only one's own waiting jobs are told here")
    for number, job in jobs().items():
        if job["state"] == "Q" and (not words[7:] or job["queue"] == words[8]):
            print(number)


def scancel(words):
    for word in words:
        job = jobs().get(int(word)) if word.isdecimal() else fail(f"scancel: error: Invalid job id {word}")
        if job and job["state"] != "F":
            change(int(word), cancelled=True, **({"state": "F"} if job["state"] == "Q" else {}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(int(sys.argv[2]))
    elif sys.argv[1:] == ["--serve"]:
        serve()
    else:
        commands = (qsub, qstat, qdel, qselect, pbs_tmrsh, sbatch, scontrol, squeue, scancel)
        {command.__name__: command for command in commands}[Path(sys.argv[0]).name](sys.argv[1:])
