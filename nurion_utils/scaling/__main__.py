"""python -m nurion_utils.scaling [EXTRA.csv]      the fidelity table, its figure, and whether the score holds"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nurion_utils import recordings, style
from nurion_utils.scaling.comparing import fidelity, score, without_each_term
from nurion_utils.scaling.drawing import draw_fidelity

OUTPUT = Path("build/fidelity")
RECORDED = recordings.DIRECTORY / "fidelity_score.json"
_SHOWN = ["id", "quantity", "nodes", "published", "ours", "low", "high", "unit", "error_percent", "tolerance_percent"]
_SHOWN += ["passes", "use", "limits", "narrows", "status", "reason"]


def main(arguments: list[str]) -> int:
    """Print and write all; 1 if the score is below the recorded one."""
    table = fidelity(*arguments[:1])
    print(table[_SHOWN].to_string(index=False, na_rep="-", float_format="{:.4g}".format))
    reached, recorded = score(table), json.loads(RECORDED.read_text())
    print("\nscore without one term each:\n" + without_each_term().to_string(index=False, float_format="{:.3g}".format))
    print("\n" + ", ".join(f"{name} {value:.3g}" for name, value in reached.items()))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUTPUT / "fidelity.csv", index=False)
    style.use()
    draw_fidelity(table).savefig(OUTPUT / "fidelity.png", dpi=150)
    print(f"written: {OUTPUT}/fidelity.csv and {OUTPUT}/fidelity.png")
    worse = reached["median_error_percent"] > recorded["median_error_percent"]
    worse |= reached["within_tolerance"] < recorded["within_tolerance"]
    if worse and not arguments:
        print(f"the score has fallen below the recorded one, {recorded} in {RECORDED.name}", file=sys.stderr)
    return int(worse and not arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
