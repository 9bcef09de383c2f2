"""What averaging gradients costs: the same two ranks, with allreduce and without."""

import pandas as pd
from blocks import alternate
from groups import our_ranks


def measure(size: int, batch: int, pairs: int = 20, block_s: float = 1.5) -> pd.DataFrame:
    """Time a training step on `batch` volumes of ``size``^3 per rank; see `blocks.alternate` for the table."""
    with our_ranks(["distributed", "alone"], size, batch, block_s) as ours:
        return alternate(ours, pairs)
