"""The process that connects a notebook with its ranks: ipyparallel's controller, and the broker of `agent`, if any."""

import json
import os
import sys
from pathlib import Path

from nurion_utils.ranks.processes import agent
from nurion_utils.ranks.processes.guardian import end_with_parent


def command(directory: Path, where: list[str]) -> list[str]:
    """The command that starts it, listening `where`; its files are in `directory`."""
    return [
        *[sys.executable, "-P", "-c", "from nurion_utils.ranks.processes.controller import main; main()"],
        *[f"--profile-dir={directory / 'profile'}", *where, "--usethreads", "--nodb", "--log-level=ERROR"],
        # A rank answers calls from its second heartbeat on, so they come quickly; but that a rank is dead is for the
        # watcher to say: a machine too busy for heartbeats must not lose its ranks.
        *["--HeartMonitor.period=200", "--HeartMonitor.max_heartmonitor_misses=1000000000"],
        # Nobody uses the scheduler of tasks, but all ranks connect to its ports: with none there, they would try for
        # ever, and be taken for a peer by whoever is given that port next, such as Gloo.
        *["--TaskScheduler.scheme_name=pure", "--IPController.broadcast_scheduler_depth=0"],
    ]


def on_this_machine(directory: Path) -> list[str]:
    return command(directory, ["--ip=127.0.0.1", "--location=127.0.0.1"])


def in_files(directory: Path) -> list[str]:
    return command(directory, ["--transport=ipc", f"--ip={directory}/c", "--location=127.0.0.1"])


def for_nodes(directory: Path, address: str) -> list[str]:
    """For ranks on other nodes; ``world.json`` in the directory has their keys."""
    return command(directory, [f"--ip={address}", f"--location={address}", "--IPController.enable_curve=True"])


def main() -> None:
    os.register_at_fork(after_in_child=end_with_parent)  # it forks a process for the heartbeats
    from ipyparallel.controller.app import IPController

    def url(self: IPController, kind: str, channel: str, index: int | None = None) -> str:
        """Where it listens is where it tells others to connect, over ipc too."""
        info = getattr(self, f"{kind}_info")
        return f"{info['interface']}:{info[channel] if index is None else info[channel][index]}"

    IPController.construct_url = url
    directory = Path(sys.argv[1].removeprefix("--profile-dir=")).parent
    if (world := directory / "world.json").exists():
        agent.serve(directory, json.loads(world.read_text()), sys.argv[2].removeprefix("--ip="))
    IPController.launch_instance()
