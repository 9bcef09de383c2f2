"""What averaging gradients costs: the same two ranks, with allreduce and without."""

import pandas as pd
from blocks import alternate
from groups import training


def measure(network: int, batch: int, pairs: int = 20, block_s: float = 1.5) -> pd.DataFrame:
    """Time a training step on `batch` volumes of ``network``^3 per rank; see `blocks.alternate` for the table."""
    with training(["distributed", "alone"], network, batch, block_s) as ours:
        return alternate(ours, pairs)
