"""The tables in the repository's ``data`` folder, each explained in its ``README.md``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def read(name: str) -> pd.DataFrame:
    """The table ``data/<name>.csv``; FileNotFoundError where the package was installed without its repository."""
    import pandas as pd

    file = Path(__file__).parents[1] / "data" / f"{name}.csv"
    if not file.exists():
        raise FileNotFoundError(f"the table belongs at {file}; work in a clone of the repository")
    return pd.read_csv(file)
