"""The same training, network, batch and cores in other libraries."""

import pandas as pd
from blocks import alternate
from groups import our_ranks, peer


def measure(size: int, batch: int, pairs: int = 20, block_s: float = 1.5) -> pd.DataFrame:
    """Time a training step on `batch` volumes of ``size``^3 per rank; see `blocks.alternate` for the table."""
    with (
        our_ranks(["distributed"], size, batch, block_s) as ours,
        peer("peer_torch", size, batch, block_s) as torch,
        peer("peer_tensorflow", size, batch, block_s) as tensorflow,
    ):
        return alternate({**ours, "torch": torch, "tensorflow": tensorflow}, pairs)
