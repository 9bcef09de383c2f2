"""What to run on which machine, how large and for how long: a plan, of which nothing here knows the readers."""

from __future__ import annotations

import base64
import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nurion_utils import sites
from nurion_utils._checks import number, whole_number

MOST_BYTES = 90_000  # of a pickled function: one word of a command may have 128 KiB


class Line(NamedTuple):
    """A line of a script, why it is there, and who says so."""

    text: str
    why: str = ""
    source: str = "the job"


@dataclass(frozen=True)
class Notebook:
    """A notebook, and values for its ``parameters`` cell; ValueError if it has no parameter of that name.

    Its kernel runs on the first node, under papermill; ranks are started by the notebook. A parameter ``n_ranks`` is
    as many as the job has, unless it is given.
    """

    path: str | os.PathLike[str]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if re.search(r"[{}]", str(self.file)):  # papermill would fill something in
            raise ValueError(f"the path of a notebook must be without braces, not {str(self.file)!r}")
        if unknown := sorted(set(self.parameters) - set(self.known)):
            known = ", ".join(self.known) or "none"
            raise ValueError(
                f"{self.file.name!r} has no parameter {unknown[0]!r}; those of its parameters cell: {known}"
            )
        self.written()

    @property
    def file(self) -> Path:
        """Where it is, from the root on."""
        return Path(self.path).absolute()

    @cached_property
    def known(self) -> list[str]:
        """The names in its parameters cell."""
        import papermill

        try:
            return list(papermill.inspect_notebook(self.file))
        except Exception as error:  # papermill and nbformat have one for each way in which a file can be wrong
            words = " ".join(str(error).split())
            raise ValueError(f"{self.path} cannot be read as a notebook, an .ipynb file: {words}") from None

    def written(self, **others: Any) -> str:
        """All parameters, and `others` where they are not given, as one line of YAML, which papermill reads."""
        import yaml

        try:
            values = others | dict(self.parameters)
            return yaml.safe_dump(values, default_flow_style=True, allow_unicode=True, width=math.inf).strip()
        except yaml.YAMLError as error:
            words = " ".join(str(error).split())
            raise ValueError(f"parameters must be numbers, texts, lists and mappings of these: {words}") from None


@dataclass(frozen=True)
class Job:
    """What to run on which machine; a ValueError in one sentence if that cannot be written as a script.

    `what` is a command, one line of shell, before which the launcher of the ranks is put, or a function without
    arguments that each rank calls, or a `Notebook`. `data` and `results` are directories on the shared file system, in
    which ``$USER`` is the user's name: of the data, staged into the burst buffer where the site has one; and of what
    comes back, `data` with ``-results`` at its end unless given. They are found in ``$DATA`` and ``$RESULTS``. `hours`
    of walltime are rounded up to whole minutes. `capacity_gb` is space in a burst buffer that is made for the job: of
    all with DataWarp, of each node with Rabbit. `options` are further ones of the scheduler, in its own words, as
    ``{"-A": "pytorch"}``, with "" for one without a value. `cores_per_rank` are the node's, shared out, and `queue` the
    site's usual one, unless given. The variables of `environment` are exported. `python` runs functions and notebooks,
    and its folder is searched for commands: this one, unless given. `directory` is where the job is submitted and runs,
    if that is known already.

    With `requeue` a job that has ended submits itself again if its exit status is 75 (``os.EX_TEMPFAIL``: saved, but
    not done; see `ResumeCallback.exit_code`; a notebook's cell calls ``sys.exit(75)``), or if the walltime has ended
    it. All other errors end the chain; so do two jobs in a row without progress, that is in which neither
    `ResumeCallback` nor a sweep or search with a path has saved anything. (Staging does not count: its files may be
    gone with the job.) A program of its own writes a line into the file ``$NURION_PROGRESS`` when it has saved
    something. It must be saved where the next job finds it: a node's own disk is lost, and the chain would not end. On
    Slurm the ranks of a command or function get SIGTERM two minutes before the end, or a tenth of the walltime if that
    is less, unless ``--signal`` is among the options.
    """

    what: Notebook | Callable[[], Any] | str
    site: sites.Site | str
    nodes: int = 1
    ranks_per_node: int = 1
    hours: float = 1.0
    queue: str | None = None
    cores_per_rank: int | None = None
    data: str | None = None
    results: str | None = None
    capacity_gb: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    python: str | None = None
    directory: str | os.PathLike[str] | None = None
    requeue: bool = False

    def __post_init__(self) -> None:
        site = sites.load(self.site) if isinstance(self.site, str) else self.site
        if (scheduler := site.scheduler) is None:
            raise ValueError(f"site {site.name!r} has no scheduler: take one that has, such as 'nurion'")
        usual = {"queue": scheduler.job_queue, "name": self._usual_name()}
        usual["results"] = f"{str(self.data).rstrip('/')}-results" if self.data is not None else None
        for key, value in {"site": site, **{key: usual[key] for key in usual if getattr(self, key) is None}}.items():
            object.__setattr__(self, key, value)
        for key in ("nodes", "ranks_per_node", *(["cores_per_rank"] if self.cores_per_rank is not None else [])):
            whole_number(getattr(self, key), key)
        for key in ("hours", *(["capacity_gb"] if self.capacity_gb is not None else [])):
            number(getattr(self, key), key, above=0)
        if self.cores is None and "{cores_per_rank}" in scheduler.launcher:
            raise ValueError(f"cores_per_rank is needed: site {site.name!r} does not say how many cores a node has")
        self._require_words()
        self._require_paths()
        _require_command(self.command, read=isinstance(self.what, str))

    def _usual_name(self) -> str:
        what = self.what.file.stem if isinstance(self.what, Notebook) else getattr(self.what, "__name__", "train")
        return re.sub(r"^[^A-Za-z]+|[^\w.-]", "", what, flags=re.ASCII)[:15] or "train"

    def _require_words(self) -> None:
        """Whatever is written into the script is one word or one line there, and says what it says here."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z][\w.-]{0,14}", self.name, re.ASCII):
            words = "a letter and up to 14 letters, digits, '.', '_' or '-'"  # 15 are all that PBS takes
            raise ValueError(f"name must be {words}, not {self.name!r}")
        if self.queue is not None and not re.fullmatch(r"[\w.@-]+", str(self.queue), re.ASCII):
            raise ValueError(f"queue must be a word of letters, digits, '.', '_', '@' or '-', not {self.queue!r}")
        for key, value in self.options.items():
            if not re.fullmatch(r"--?[A-Za-z][\w-]*", str(key), re.ASCII) or not _is_line(value):
                raise ValueError(f"options are such as {{'-A': 'tf'}} or {{'--exclusive': ''}}, not {key!r}: {value!r}")
            if unsafe := re.search(r"[^ -~]|[\"'\\#$`]", value):  # which schedulers read each in its own way
                raise ValueError(f"option {key} cannot have {unsafe[0]!r} in its value {value!r}: leave it out")
        for key, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", str(key), re.ASCII) or not _is_line(value):
                raise ValueError(f"environment must be names and a line of text each, not {key!r} and {value!r}")
        if self.python is not None and not (_is_line(self.python) and self.python.startswith("/")):
            raise ValueError(f"python must be the path of an interpreter from the root on, not {self.python!r}")

    def _require_paths(self) -> None:
        paths = [self.data, self.results] if self.data is not None else []
        if self.results is not None and not paths:
            raise ValueError(f"results need data: name the directory of data, not only {self.results!r}")
        for path in paths:  # no "..": nobody can tell here where it leads there
            if not _is_line(path) or not path.startswith("/") or ".." in path.split("/"):
                raise ValueError(f"{path!r} must be an absolute path on {self.site.name!r}, one line without '..'")
        if paths and any(PurePosixPath(one).is_relative_to(other) for one, other in (paths, paths[::-1])):
            raise ValueError(f"the results must not lie in the data, nor the data in the results: {self.results!r}")

    @property
    def minutes(self) -> int:
        """Walltime in whole minutes, the finest that all schedulers know."""
        return max(1, math.ceil(round(60 * self.hours, 6)))

    @property
    def clock(self) -> str:
        """Walltime as hours, minutes and seconds."""
        return f"{self.minutes // 60:02d}:{self.minutes % 60:02d}:00"

    @property
    def ranks(self) -> int:
        """On all nodes together."""
        return self.nodes * self.ranks_per_node

    @property
    def partition(self) -> str | None:
        """The nodes that its queue has: the site's first, unless the queue says otherwise."""
        queue = self.site.queues.get(self.queue)
        return (queue and queue.partition) or next(iter(self.site.partitions), None)

    @property
    def node(self) -> sites.Node | None:
        """What is known of such a node."""
        return self.site.partitions.get(self.partition)

    @property
    def cores(self) -> int | None:
        """Cores of each rank, if they are known."""
        if self.cores_per_rank or not (self.node and self.node.cores):
            return self.cores_per_rank
        return max(1, self.node.cores // self.ranks_per_node)

    @property
    def burst_buffer(self) -> sites.BurstBuffer | None:
        """The one that its data goes through, if any."""
        buffer = self.site.burst_buffer
        return buffer if buffer and self.data is not None and buffer.back_end != "posix" else None

    @property
    def launcher(self) -> str:
        """The command that starts the ranks; nothing for a notebook, which starts its own."""
        if isinstance(self.what, Notebook):
            return ""
        sizes = {"ranks_per_node": self.ranks_per_node, "cores_per_rank": self.cores}
        sizes |= {"nodes": self.nodes, "ranks": self.ranks}
        try:
            return self.site.scheduler.launcher.format(**sizes) + " "
        except (LookupError, ValueError):
            known = ", ".join(f"{{{size}}}" for size in sizes)
            raise ValueError(
                f"scheduler.launcher of site {self.site.name!r} may have {known}, not {self.site.scheduler.launcher!r}"
            ) from None

    @cached_property
    def command(self) -> str:
        """What each rank runs, or the first node for a notebook, as shell, in which ``$job`` is the job's number."""
        python = shlex.quote(self.python or sys.executable)
        if isinstance(self.what, Notebook):
            values = self.what.written(**({"n_ranks": self.ranks} if "n_ranks" in self.what.known else {}))
            file, stem = shlex.quote(str(self.what.file)), shlex.quote(self.what.file.stem)
            words = ["--cwd", str(self.what.file.parent), "-k", "python3", "--log-output", "--no-progress-bar"]
            words = shlex.join([*words, "-y", values])
            return f'{python} -m nurion_utils.jobs.executing {file} {stem}."$job".ipynb {words}'
        if callable(self.what):
            code = f"import base64, pickle; pickle.loads(base64.b64decode('{_pickled(self.what, self.name)}'))()"
            return f'{python} -c "{code}"'
        return self.what


def _pickled(function: Callable[[], Any], name: str) -> str:
    import cloudpickle

    try:
        inspect.signature(function).bind()
        pickled = base64.b64encode(cloudpickle.dumps(function)).decode()
    except Exception as error:  # whatever a function holds on to can fail in its own way
        words = "it must need no arguments, nor what cannot be pickled"
        raise ValueError(f"function {name!r} cannot be sent to the nodes ({error}): {words}") from None
    if len(pickled) > MOST_BYTES:
        raise ValueError(f"function {name!r} brings {len(pickled):,} bytes along: let it read data from a file")
    return pickled


def _require_command(command: Any, read: bool) -> None:
    if not _is_line(command) or not command.strip() or command.lstrip()[0] in "-#":
        raise ValueError(f"command must be one line of shell, as 'python train.py \"$DATA\"', not {command!r}")
    shell = {"input": f"launcher {command}\n", "encoding": "utf-8", "env": os.environ | {"LC_ALL": "C"}}
    if read and (told := subprocess.run(["bash", "-n"], capture_output=True, **shell).stderr):
        raise ValueError(f"bash cannot read the command {command!r}: {' '.join(told.split())}")


def _is_line(text: Any) -> bool:
    return isinstance(text, str) and text.replace("\t", " ").isprintable()
