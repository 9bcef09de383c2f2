"""A parallel file system and a job that reads from it, written down once as data.

A read waits twice, first come first served each time: at the metadata server, which opens the file, then at the
storage targets (Lustre's OSTs) that its stripes lie on, one request for all of the file's bytes on a target.
`storage.simulate` works the queues out, `storage.EmulatedFileSystem` plays them in real time, for real readers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nurion_utils import sites
from nurion_utils._checks import number, one_of, positive, whole_number

METADATA = -1  # stands for the metadata server where a target is named


@dataclass(frozen=True)
class ParallelFileSystem:
    """A parallel file system, such as a Lustre.

    Each of `targets` storage targets delivers `target_mb_per_s` times 10^6 bytes in a second, and the metadata server
    opens `metadata_ops_per_s` files in a second, for all readers together. A file is spread over `stripe_count`
    targets, in pieces of `stripe_bytes`. A request whose turn comes later than `timeout_s` after it was made is dropped
    unserved, and its reader told so; `math.inf` is for never. The defaults are Lustre's.
    """

    targets: int
    target_mb_per_s: float
    metadata_ops_per_s: float
    stripe_count: int = 1
    stripe_bytes: int = 2**20
    timeout_s: float = 100.0

    def __post_init__(self) -> None:
        for name in ("targets", "stripe_count", "stripe_bytes"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        positive(self.target_mb_per_s, "target_mb_per_s")
        positive(self.metadata_ops_per_s, "metadata_ops_per_s")
        if self.timeout_s != math.inf:
            positive(self.timeout_s, "timeout_s")

    @classmethod
    def of_site(cls, site: sites.Site | str, name: str = "scratch") -> ParallelFileSystem:
        """A file system of a site, or its ``"burst_buffer"``, from the site's description.

        What the description does not say about striping and timeouts is as Lustre's defaults. `sites.SiteError` if the
        site has none of that name, or does not say its bandwidth, its targets or its metadata operations a second.
        """
        machine = sites.load(site) if isinstance(site, str) else site
        known = machine.file_systems | ({"burst_buffer": machine.burst_buffer} if machine.burst_buffer else {})
        one_of(name, f"the file system of {machine.name!r}", known, sites.SiteError)
        part = known[name]
        section, servers = (name, "servers") if part is machine.burst_buffer else (f"file_systems.{name}", "targets")
        for key in (servers, "metadata_ops_per_s", "bandwidth_gb_per_s"):
            if getattr(part, key) is None:
                raise sites.SiteError(f"site {machine.name!r} does not say {section}.{key}; add it to its description")
        return cls(
            targets=getattr(part, servers),
            target_mb_per_s=part.bandwidth_gb_per_s * 1e3 / getattr(part, servers),
            metadata_ops_per_s=part.metadata_ops_per_s,
            stripe_count=part.stripe_count or cls.stripe_count,
            stripe_bytes=round(part.stripe_mib * 2**20) if part.stripe_mib else cls.stripe_bytes,
            timeout_s=part.timeout_s or cls.timeout_s,
        )

    @property
    def bandwidth_gb_per_s(self) -> float:
        """What all targets deliver together."""
        return self.targets * self.target_mb_per_s / 1e3

    def shares(self, file_bytes: int) -> np.ndarray:
        """Bytes of a file on its first target, on the one after it, and so on."""
        first = np.arange(min(self.stripe_count, self.targets)) * self.stripe_bytes  # where each one's stripes begin
        cycles, rest = divmod(file_bytes, len(first) * self.stripe_bytes)
        return cycles * self.stripe_bytes + np.clip(rest - first, 0, self.stripe_bytes)


@dataclass(frozen=True)
class Workload:
    """One epoch of a training job: each reader (a node) reads files and computes on them, step by step.

    Readers meet at the end of every step, as an allreduce makes them. Each opens `files_per_step` files of `file_bytes`
    together, as one burst; no file is read twice. Computing for `compute_s` is emulated by waiting, as MLPerf Storage
    does. `prefetch` steps, 0 or 1, are read ahead while the one before is computed, as tf.data does. `seed` is that of
    the targets on which the files' first stripes lie.
    """

    readers: int
    steps: int
    files_per_step: int
    file_bytes: int
    compute_s: float
    prefetch: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("readers", "steps", "files_per_step", "file_bytes"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        whole_number(self.prefetch, "prefetch", 0, 1)
        whole_number(self.seed, "seed", 0)
        number(self.compute_s, "compute_s", least=0)

    def first_targets(self, system: ParallelFileSystem) -> np.ndarray:
        """The target of each file's first stripe, at random, shape (steps, readers, files_per_step)."""
        shape = (self.steps, self.readers, self.files_per_step)
        return np.random.default_rng(self.seed).integers(0, system.targets, shape, np.min_scalar_type(system.targets))
