"""``python -m nurion_utils.sites show nurion`` prints all figures of a machine, each with its source."""

from __future__ import annotations

import sys

from nurion_utils import sites


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 2 or arguments[0] != "show":
            names = ", ".join(sites.names())
            raise sites.SiteError(f"usage: python -m nurion_utils.sites show NAME, with NAME one of {names}")
        site = sites.load(arguments[1])
    except sites.SiteError as error:
        print(error, file=sys.stderr)
        return 2
    table = site.table().astype(str)
    rows = [table.columns, *table.to_numpy()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print(site.title, *lines, *(f"{key}: {title}" for key, title in site.sources.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
