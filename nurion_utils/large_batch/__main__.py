"""``python -m nurion_utils.large_batch [RANKS] [FOLDER]``: the table of notebook 05, on standard output."""

import sys

from nurion_utils import ranks
from nurion_utils.large_batch import experiment

if __name__ == "__main__":
    with ranks.start(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as world:
        table = experiment.run(world, path=sys.argv[2] if len(sys.argv) > 2 else None)
    courses = [" ".join(f"{error:.2f}" for error in errors) for errors in table["validation_errors"]]
    table = table[[*experiment.COLUMNS, "validation_errors"]].assign(validation_errors=courses)
    table.to_csv(sys.stdout, index=False, float_format="%.4g", lineterminator="\n")
