"""What a schedule costs: seconds from latency and bandwidth, and latency and bandwidth from measured seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nurion_utils._checks import number, require_columns
from nurion_utils.allreduce.schedule import Schedule

if TYPE_CHECKING:
    import pandas as pd

    from nurion_utils.sites import Site


@dataclass(frozen=True)
class Link:
    """What a message of n bytes costs: ``alpha_s + n * beta_s_per_byte``."""

    alpha_s: float
    beta_s_per_byte: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, number(value, name, least=0))

    @classmethod
    def of(cls, site: Site) -> Link:
        """The links of the site's fabric: alpha from the latency of a message, beta from the rate of a link."""
        from nurion_utils.sites import SiteError

        fabric = site.fabric
        if not (fabric and fabric.latency_us and fabric.link_gb_per_s):
            raise SiteError(
                f"the site {site.name!r} does not give latency_us and link_gb_per_s of a fabric: take a site that "
                "does, such as 'nurion', or a Link of your own figures"
            )
        return cls(fabric.latency_us * 1e-6, 1e-9 / fabric.link_gb_per_s)


def time(schedule: Schedule | None, size_bytes: float, link: Link) -> float:
    """Seconds on links that nobody shares: the sum over all steps of the slowest transfer in each.

    The model of Thakur, Rabenseifner and Gropp (2005), in which what reducing costs is counted in beta; the array of
    `size_bytes` is cut into equal chunks. MPI's own allreduce, None, counts as one message of the whole array.
    """
    n = number(size_bytes, "size_bytes", least=0)
    if not isinstance(link, Link):
        raise ValueError(f"link must be a Link(alpha_s, beta_s_per_byte), not {link!r}")
    messages = {1.0: 1} if schedule is None else schedule.longest_messages
    return math.fsum(steps * (link.alpha_s + n * share * link.beta_s_per_byte) for share, steps in messages.items())


def fit(table: pd.DataFrame, contenders: Mapping[str, Schedule | None]) -> dict[str, Link]:
    """Each contender's alpha and beta in the model of `time`, by least squares of measured times' relative errors."""
    from scipy.optimize import nnls

    require_columns(table, ["contender", "size_bytes", "time_s"])
    links = {}
    for name, schedule in contenders.items():
        rows = table[table["contender"] == name]
        if "ranks" in table and rows["ranks"].nunique() > 1:
            raise ValueError(f"the rows of {name!r} are of several numbers of ranks; choose those of one")
        times = rows.groupby("size_bytes")["time_s"].median()
        if len(times) < 2:
            raise ValueError(f"a fit needs two sizes or more, and the table has {len(times)} of contender {name!r}")
        if schedule is not None and not schedule.steps or not (times > 0).all():
            raise ValueError(f"a fit needs steps, and times above 0, but contender {name!r} lacks them")
        terms = np.array([(time(schedule, 0, Link(1, 0)), time(schedule, n, Link(0, 1))) for n in times.index])
        scale = terms.max(axis=0)  # or the two columns differ by so much that nnls gives one up
        solution, _ = nnls(terms / scale / times.to_numpy()[:, None], np.ones(len(times)))
        links[name] = Link(*map(float, solution / scale))
    return links
