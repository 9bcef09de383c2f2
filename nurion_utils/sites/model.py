"""What a machine is, as data: its parts, and where each of their figures comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import pandas as pd

# A figure's unit is the ending of its name, so that it is written once.
_UNITS = {
    "_gb_per_s": "GB/s", "_per_s": "1/s", "_per_cycle": "1/cycle", "_pflops": "Pflop/s", "_ghz": "GHz",
    "_gb": "GB", "_tb": "TB", "_pb": "PB", "_mib": "MiB", "_us": "us", "_ns": "ns", "_s": "s",
    "_percent": "%", "_hours": "h",
}  # fmt: skip


class SiteError(ValueError):
    """A site that does not exist, or whose description is wrong; the message says what would be right."""


def _cores() -> int:
    """Cores this process may use: its CPU affinity, or less where a container sets a quota."""
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _memory_bytes(kind: Literal["total", "available"]) -> int:
    limit = Path("/sys/fs/cgroup/memory.max")
    quota = limit.read_text().strip() if limit.exists() else "max"
    memory = getattr(psutil.virtual_memory(), kind)
    return memory if quota == "max" else min(memory, int(quota))


_MEASURED = {
    "cores": _cores,
    "memory_gb": lambda: round(_memory_bytes("total") / 1e9, 1),
    "memory_usable_gb": lambda: round(_memory_bytes("available") / 1e9, 1),
}


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Figure(_Checked):
    """One figure and where it comes from.

    It is ``read`` there, ``remembered`` (to be checked before anything depends on it), ``derived`` from other figures,
    ``measured`` when the site is loaded, or ``chosen`` (a limit that is set, not found).
    """

    value: int | float | str | list[str]
    status: Literal["read", "remembered", "derived", "measured", "chosen"]
    source: str = Field(min_length=1)
    date: str | None = Field(None, pattern=r"^\d{4}(-\d\d){0,2}$")  # of the source: year, month and day as far as known

    @property
    def cited(self) -> str:
        """Its source as a sentence names it, with the date where there is one."""
        return f"{self.source}, {self.date}" if self.date else self.source


class DatedFigure(Figure):
    """A figure of a rule, which is true of a date only."""

    date: str = Field(pattern=r"^\d{4}(-\d\d){0,2}$")


class Part(_Checked):
    """A part of a machine: plain numbers as attributes, their provenance in ``figures``."""

    figures: dict[str, Figure]

    @model_validator(mode="before")
    @classmethod
    def _values_beside_their_provenance(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "figures" in raw:
            return raw
        figures, values = {}, {}
        for key, figure in raw.items():
            if isinstance(figure, dict) and figure.get("status") == "measured" and key in _MEASURED:
                figure = {"value": _MEASURED[key]()} | figure
            figures[key] = figure
            values[key] = figure.get("value") if isinstance(figure, dict) else figure
        return {"figures": figures, **values}


class Node(Part):
    """A partition of equal nodes."""

    count: int | None = Field(None, gt=0)
    cores: int | None = Field(None, gt=0)
    memory_gb: float | None = Field(None, gt=0)
    memory_usable_gb: float | None = Field(None, gt=0)
    processor: str | None = None
    clock_ghz: float | None = Field(None, gt=0)
    flop_per_cycle: int | None = Field(None, gt=0)
    memory_usable_flat_gb: float | None = Field(None, gt=0)
    fast_memory_gb: float | None = Field(None, gt=0)
    fast_memory_gb_per_s: float | None = Field(None, gt=0)

    @property
    def peak_gflops(self) -> float:
        """Peak speed of one node in Gflop/s: cores x clock x flop per cycle."""
        if self.cores is None or self.clock_ghz is None or self.flop_per_cycle is None:
            raise SiteError("this node's peak is unknown: describe its cores, clock_ghz and flop_per_cycle")
        return self.cores * self.clock_ghz * self.flop_per_cycle


class Performance(Part):
    """Speed of the whole machine: the peak as quoted, and what HPL reached."""

    rpeak_quoted_pflops: float = Field(gt=0)
    rmax_pflops: float = Field(gt=0)


class Fabric(Part):
    """The network between nodes: a ``topology`` such as "fat tree" or "dragonfly", and the figures that are known."""

    name: str
    topology: str
    link_gb_per_s: float | None = Field(None, gt=0)
    latency_us: float | None = Field(None, gt=0)
    switch_latency_ns: float | None = Field(None, gt=0)
    # What only a fat tree has.
    edge_switches: int | None = Field(None, gt=0)
    edge_ports: int | None = Field(None, gt=0)
    edge_down: int | None = Field(None, gt=0)
    edge_up: int | None = Field(None, gt=0)
    directors: int | None = Field(None, gt=0)
    director_ports: int | None = Field(None, gt=0)
    blocking_percent: float | None = Field(None, ge=0, lt=100)


class _Storage(Part):
    path: str
    kind: str
    metadata_ops_per_s: float | None = Field(None, gt=0)
    stripe_count: int | None = Field(None, gt=0)
    stripe_mib: float | None = Field(None, gt=0)
    timeout_s: float | None = Field(None, gt=0)


class FileSystem(_Storage):
    """A shared file system: files are cut into stripes, which lie on storage targets (Lustre's OSTs)."""

    bandwidth_gb_per_s: float = Field(gt=0)
    bandwidth_measured_gb_per_s: float | None = Field(None, gt=0)
    capacity_pb: float | None = Field(None, gt=0)
    targets: int | None = Field(None, gt=0)


class BurstBuffer(_Storage):
    """Flash between the nodes and the shared file system; ``back_end`` says how data gets there and back.

    ``ime`` by commands in the job, ``datawarp`` and ``rabbit`` by directives to the scheduler, ``posix`` by copying.
    """

    back_end: Literal["ime", "datawarp", "rabbit", "posix"]
    capacity_tb: float | None = Field(None, gt=0)
    capacity_quoted_pb: float | None = Field(None, gt=0)
    bandwidth_gb_per_s: float | None = Field(None, gt=0)
    servers: int | None = Field(None, gt=0)
    server_gb_per_s: float | None = Field(None, gt=0)
    # What only an IME has.
    erasure_coding: str | None = None
    mpi_io_prefix: str | None = None
    flush_at_dirty_percent: float | None = Field(None, gt=0, lt=100)
    flush_at_free_percent: float | None = Field(None, gt=0, lt=100)
    stage_in_command: str | None = None
    sync_out_command: str | None = None
    purge_command: str | None = None
    status_command: str | None = None
    warning: str | None = None


class Scheduler(Part):
    """What starts jobs; ``launcher`` starts ranks in a job, and what is said of ``queues`` is in the site's."""

    kind: Literal["PBS Pro", "Slurm", "Flux"]
    launcher: str
    queues: list[str] = []  # empty where they are not known; a job then names its own, or none
    job_queue: str | None = None
    queue_option: str | None = None  # where a queue is not what the scheduler calls one: "--qos"
    most_hours: float | None = Field(None, gt=0)  # in queues that do not say otherwise
    submit_from: str | None = None
    modules: list[str] = []
    job_modules: list[str] = []


class _Rule(Part):
    figures: dict[str, DatedFigure]


class Queue(_Rule):
    """What a queue takes: ``running`` and ``waiting`` count the jobs of one user, ``partition`` names its nodes."""

    partition: str | None = None
    architecture: str | None = None  # as `uname -m` says it
    most_hours: float | None = Field(None, gt=0)
    most_nodes: int | None = Field(None, gt=0)
    most_running: int | None = Field(None, gt=0)
    most_waiting: int | None = Field(None, gt=0)


class Option(_Rule):
    """What a site wants of an option of its scheduler, whose name is the entry's, as in ``[options."-A"]``.

    ``needed`` never is forbidden; ``usual`` is written where a job says nothing, "" where the option has no value.
    """

    needed: Literal["always", "burst buffer", "usually", "never"]
    usual: str | None = None
    values: list[str] = []
    pattern: str | None = None  # a regular expression for the whole value
    remark: str | None = None


class Ranks(Part):
    """How many ranks the site lets anyone start at once."""

    max_ranks: int = Field(gt=0)


class Site(_Checked):
    """A machine; see the module's docstring. ``partitions`` lists the one most jobs use first, if any is known."""

    name: str
    title: str
    sources: dict[str, str] = {}
    partitions: dict[str, Node] = {}
    ranks: Ranks | None = None
    performance: Performance | None = None
    fabric: Fabric | None = None
    file_systems: dict[str, FileSystem] = {}
    burst_buffer: BurstBuffer | None = None
    scheduler: Scheduler | None = None
    queues: dict[str, Queue] = {}
    options: dict[str, Option] = {}

    @model_validator(mode="after")
    def _queues_are_those_of_the_scheduler(self) -> Site:
        known = self.scheduler.queues if self.scheduler else []
        for name, queue in self.queues.items():
            if name not in known or queue.partition not in {None, *self.partitions}:
                raise ValueError(
                    f"queues.{name}: name it in scheduler.queues, and with a partition that is described, if any"
                )
        return self

    @property
    def node(self) -> Node:
        """The node that most jobs use: the first partition; SiteError if none is described."""
        if not self.partitions:
            raise SiteError(f"site {self.name!r} does not say what its nodes are: add [partitions.NAME] to it")
        return next(iter(self.partitions.values()))

    @property
    def rpeak_pflops(self) -> float:
        """Peak speed of the whole machine in Pflop/s, from its partitions' figures."""
        if not self.partitions or any(node.count is None for node in self.partitions.values()):
            raise SiteError(f"site {self.name!r} does not say how many nodes it has: add their count to its partitions")
        return sum(node.count * node.peak_gflops for node in self.partitions.values()) / 1e6

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part of the machine with its dotted name, in the order of the description."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for key, part in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(part, Part):
                    yield f"{name}.{key}".rstrip("."), part

    def table(self) -> pd.DataFrame:
        """All figures: columns figure, value, unit, status, source, date ("" if none is known)."""
        import pandas as pd

        rows = []
        for name, part in self.parts():
            for key, figure in part.figures.items():
                value = ", ".join(figure.value) if isinstance(figure.value, list) else figure.value
                unit = next((unit for suffix, unit in _UNITS.items() if key.endswith(suffix)), "")
                rows.append((f"{name}.{key}", value, unit, figure.status, figure.source, figure.date or ""))
        columns = ["figure", "value", "unit", "status", "source", "date"]
        return pd.DataFrame(rows, columns=columns, dtype=object)  # integers stay integers beside other values
