"""``python -m nurion_utils.sites list`` and ``python -m nurion_utils.sites show nurion``."""

from __future__ import annotations

import argparse
import sys

from nurion_utils import sites


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nurion_utils.sites", description="What a machine is.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the sites that have a description")
    commands.add_parser("show", help="print a site's figures").add_argument("name")
    options = parser.parse_args(arguments)
    if options.command == "list":
        print("\n".join(f"{name:10} {sites.load(name).title}" for name in sites.names()))
        return 0
    try:
        site = sites.load(options.name)
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
    sys.exit(main())
