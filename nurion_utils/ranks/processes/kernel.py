"""What Linux says of a process that does not answer for itself."""

import re
from pathlib import Path

STATES = {
    "T": "it is stopped, as SIGSTOP does",
    "t": "a debugger has stopped it",
    "D": "it is in a wait that no signal interrupts",
    "R": "it is running",
    "S": "it is asleep",
}
SHORT = 0.05  # of the memory, with less of which free even programs are read from the disk again and again


def state(pid: int) -> str:
    """What the main thread of a process does, in words, where in the kernel it waits, and whether memory is short."""
    try:
        letter = _fields(Path(f"/proc/{pid}/status"))["State"]
        place = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return "it has ended"
    words = STATES.get(letter, "it has ended") + f" ({place})" * (place not in ("", "0"))
    memory = _fields(Path("/proc/meminfo"))
    free, all_of_it = (int(memory[name]) / 2**20 for name in ("MemAvailable", "MemTotal"))
    return words + f"; of {all_of_it:.0f} GiB of memory {free:.1f} are left" * (free < SHORT * all_of_it)


def _fields(file: Path) -> dict[str, str]:
    """The first word after each name."""
    return dict(re.findall(r"^(\w+):\s+(\w+)", file.read_text(), re.MULTILINE))
