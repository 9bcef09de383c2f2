"""What one rank is given and runs: its share of the machine, then an ipyparallel engine.

Everything that must happen before TensorFlow, Horovod or MPI are loaded happens here: background threads
inherit the pinning only when they start after it.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

from nurion_utils.ranks import stalls
from nurion_utils.ranks.failures import ASK, ASK_AROUND, RankError
from nurion_utils.ranks.processes.guardian import end_with_parent, mapped_by, remove


def cores_by_rank(n: int, cores: list[int]) -> list[list[int]]:
    """Deal out cores: consecutive ones to each of `n` ranks, or one shared core each if ranks outnumber them.

    >>> cores_by_rank(2, [0, 1, 2, 3])
    [[0, 1], [2, 3]]
    >>> cores_by_rank(4, [0, 1])
    [[0], [1], [0], [1]]
    """
    if n >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(n)]
    share = len(cores) // n
    return [cores[rank * share : (rank + 1) * share] for rank in range(n)]


def main() -> None:
    """Become rank PMI_RANK of those whose run directory, shares of cores and pause the command line names."""
    if sys.argv[1] == "--of":
        return on_a_node(Path(sys.argv[2]))
    run_directory, shares, progress_s = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
    rank = int(os.environ["PMI_RANK"])  # of MPICH's own launcher, which started this process
    own = run_directory / f"rank{rank}"
    end_with_parent()
    os.sched_setaffinity(0, shares[rank])
    stay_outside(Path(f"{own}.status"))
    end_with_parent()
    work(own, run_directory / "profile", progress_s)


def on_a_node(shared: Path) -> None:
    """Become a rank of those whose world is described in the folder `shared`, on a node of a job."""
    from nurion_utils.ranks.environment import identity, installation
    from nurion_utils.ranks.processes import agent, controller, folders

    world, who = json.loads((shared / "world.json").read_text()), identity()

    def fail(sentence: str) -> None:
        folders.write_whole(shared / f"rank{who.rank}.fault", sentence.encode())
        os._exit(1)

    def require_one_world(size: int) -> None:
        if size != world["n"]:
            fail(
                f"there is no world of {world['n']} ranks, but a rank on node {os.uname().nodename} in one of {size}: "
                f"the launcher {world['launcher']!r} and this environment's MPI do not understand each other; give the "
                "site one that does, such as 'mpiexec -n {ranks} -ppn {ranks_per_node}', or srun with --mpi=pmi2"
            )

    require_one_world(who.size)
    if who.local_rank == 0:
        own = installation()
        if other := [
            f"{name} {own[name]} instead of {told}" for name, told in world["installation"].items() if own[name] != told
        ]:
            fail(
                f"node {os.uname().nodename} has another environment than the notebook, {', '.join(other)}: put it in "
                "a folder that all nodes share"
            )
    try:
        chosen = agent.choose(shared, who.rank, controller.for_nodes)
    except RankError as error:
        fail(str(error))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == world["cores"]:  # else others use them, too: who sits where is for the node to say
        os.sched_setaffinity(0, cores_by_rank(world["ranks_per_node"], cores)[who.local_rank])
    if child := os.fork():
        return agent.look_after(child, who.rank, shared, world, chosen)
    end_with_parent()
    os.environ["IPYTHONDIR"] = str(shared / "ipython")
    work(shared / f"rank{who.rank}", Path(chosen["profile"]), require_one_world=require_one_world)


def work(
    own: Path, profile: Path, progress_s: float = 0.0, require_one_world: Callable[[int], None] = lambda size: None
) -> None:
    """Be a rank until the end: an engine of the controller whose files are in `profile`; its own are `own`.*."""
    note_output(own)
    process = {"pid": os.getpid(), "namespace": os.readlink("/proc/self/ns/pid"), "node": os.uname().nodename}
    Path(f"{own}.process").write_text(json.dumps(process))

    # The slow imports come while the controller starts, too.
    import cloudpickle  # noqa: F401 (so that the first call finds it loaded)
    from ipykernel.iostream import OutStream
    from ipyparallel.engine.app import IPEngine
    from mpi4py import MPI

    require_one_world(MPI.COMM_WORLD.size)
    stalls.answer(own)
    # Cells show what Python prints. ipykernel would also forward what C++ libraries log; that stays in the log file.
    OutStream.__init__ = partialmethod(OutStream.__init__, watchfd=False)
    warnings.filterwarnings("ignore", "To exit: use")  # IPython's advice on sys.exit(), wrong for a rank
    # Interrupts are for cells only, which set their own handler. SIGTERM ends the rank; an ipyparallel engine
    # would stop listening and stay, and the notebook wait for it.
    IPEngine.init_signal = lambda self: signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The first of these makes mpi4py a communicator of its own, for which it holds Python's lock: nobody could ask a
    # rank that waits there where it is.
    MPI.COMM_WORLD.allreduce(0)
    remove(mapped_by(os.getpid()))  # all have it open; without a name it cannot outlive them
    connection_file = profile / "security" / "ipcontroller-engine.json"
    while not is_complete(connection_file):
        time.sleep(0.02)  # the guardian ends us if the controller never comes
    sys.argv = [
        *["ipengine", f"--file={connection_file}", f"--profile-dir={profile}", "--mpi"],
        *["--timeout=60", "--log-level=ERROR"],
        "--IPEngine.enable_nanny=False",  # somebody watches; saves one Python process per rank
        "--IPEngine.max_heartbeat_misses=0",  # nor need a rank suspect that the controller is gone
    ]
    if progress_s:
        from tornado.ioloop import PeriodicCallback

        # The last bytes that this rank has sent may need MPI's help to leave it, and others wait for them.
        PeriodicCallback(lambda: MPI.COMM_WORLD.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG), 1000 * progress_s).start()
    IPEngine.launch_instance()


def stay_outside(status: Path) -> None:
    """Go on in a child; this process writes down how that ended, and stays: mpiexec would else kill the other ranks."""
    if child := os.fork():
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status.write_text(str(ended))
        os.utime(status, ns=2 * (time.time_ns(),))  # finer than the file system's clock: who was first?
        while True:
            signal.pause()


def note_output(own: Path) -> None:
    """Keep what libraries write below Python (MPI aborts, crashes), and stacks when signals ask for them."""
    log = open(f"{own}.log", "wb", buffering=0)  # open for the process' life
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    stacks = open(f"{own}.stack", "ab", buffering=0)  # to append, for who reads it may empty it
    faulthandler.enable(log, all_threads=False)
    faulthandler.register(ASK, file=stacks, all_threads=False)
    faulthandler.register(ASK_AROUND, file=stacks, all_threads=True)


def is_complete(path: Path) -> bool:
    """The controller writes the file in place: it exists before it is whole."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
