"""The tables in the repository's ``data`` folder, each explained in its ``README.md``: loaded, and measured again.

python -m nurion_utils.recordings network_lab      measures data/network_lab.csv again, in the time that it says
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

DIRECTORY = Path(__file__).parents[1] / "data"


class Recorder(NamedTuple):
    """What measures a table again; names, not imports: a table is loaded by rooms far below its recorder."""

    function: str  # module:function, which returns the table but for its source
    packages: tuple[str, ...]  # whose versions the table's source names
    minutes: int  # on 2 cores


RECORDERS = {
    "backends": Recorder("nurion_utils.backends.recording:backends", ("horovod", "mpich", "oneccl-devel"), 11),
    "large_batch_digits": Recorder("nurion_utils.large_batch.experiment:record", ("tensorflow-cpu",), 15),
    "network_lab": Recorder("nurion_utils.allreduce.measuring:record_lab", ("mpich",), 6),
    "resnet_epochs": Recorder("nurion_utils.backends.recording:resnet_epochs", ("horovod", "mpich", "oneccl-devel"), 4),
}


def load(name: str) -> pd.DataFrame:
    """The table ``data/<name>.csv``.

    ValueError, which says what tables there are, if it is not among them; FileNotFoundError if the package was
    installed without its repository.
    """
    import pandas as pd

    file = DIRECTORY / f"{name}.csv"
    if not DIRECTORY.is_dir():
        raise FileNotFoundError(f"the recorded tables belong in {DIRECTORY}; work in a clone of the repository")
    if not file.is_file():
        names = sorted(each.stem for each in DIRECTORY.glob("*.csv"))
        raise ValueError(f"there is no table {name!r}; choose from {', '.join(names)}")
    return pd.read_csv(file)


def main(arguments: list[str]) -> None:
    """Measure one table again and put it in the place of the old one."""
    if len(arguments) != 1 or arguments[0] not in RECORDERS:
        times = ", ".join(f"{name} ({recorder.minutes} minutes)" for name, recorder in RECORDERS.items())
        sys.exit(f"usage: python -m nurion_utils.recordings NAME, with NAME one of {times}")
    recorder, file = RECORDERS[arguments[0]], DIRECTORY / f"{arguments[0]}.csv"
    module, function = recorder.function.split(":")
    table = getattr(import_module(module), function)()
    versions = ", ".join(f"{name} {version(name)}" for name in recorder.packages)
    linux, cores = ".".join(platform.release().split(".")[:2]), len(os.sched_getaffinity(0))
    source = f"recorded with {versions} and Linux {linux} on {cores} cores, {datetime.date.today()}"
    table.assign(source=source).to_csv(f"{file}.new", index=False, float_format="%.6g", lineterminator="\n")
    os.replace(f"{file}.new", file)
    print(f"{file}: {len(table)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
