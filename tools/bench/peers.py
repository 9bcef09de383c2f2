"""The same training, network, batch and cores in other libraries, on one machine or over a link."""

import pandas as pd
import peer_tensorflow
import peer_torch
from blocks import QUIET_CORES, QUIET_WITH_LINKS, alternate
from groups import training


def measure(
    network: int | list[int], batch: int, rate_mbit: float | None = None, pairs: int = 7, block_s: float = 1.5
) -> pd.DataFrame:
    """Time a training step of two ranks; see `blocks.alternate` for the table.

    Parameters
    ----------
    network
        Side of the volumes of `nurion_utils.models.cosmoflow_small`, or the widths of a perceptron.
    batch
        Samples per rank.
    rate_mbit
        Of the links between two virtual nodes, in 10^6 bit/s; None for two ranks of one machine.
    """
    ways = ["distributed", "alone", "one message", "half precision"]
    how = network, batch, block_s
    with (
        training(ways, *how, rate_mbit=rate_mbit) as ours,
        training(["torch"], *how, peer_torch.prepare, rate_mbit) as torch,
        training(["tensorflow"], *how, peer_tensorflow.prepare, rate_mbit) as tensorflow,
    ):
        quiet = QUIET_CORES if rate_mbit is None else QUIET_WITH_LINKS
        return alternate({**ours, **torch, **tensorflow}, pairs, quiet)
