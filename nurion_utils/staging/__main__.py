"""``python -m nurion_utils.staging SRC DST``, alone or under mpiexec; see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from nurion_utils.ranks import identity
from nurion_utils.staging import stager
from nurion_utils.staging.plans import StageError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nurion_utils.staging",
        description="Copy a folder so that it can be trusted: hashed, resumable, nothing half-written ever visible.",
        epilog="Under mpiexec, all ranks share the work. Exit status: 0 done, 1 some files failed, 2 refused.",
    )
    parser.add_argument("source", nargs="?", help="the folder to copy (not with --purge)")
    parser.add_argument("destination", help="the folder to copy it to")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan")
    parser.add_argument("--verify", action="store_true", help="read everything again, and mend what is damaged")
    parser.add_argument("--purge", action="store_true", help="remove what was staged to DESTINATION, and nothing else")
    parser.add_argument("--json", action="store_true", help="print the result, or what was wrong, as JSON")
    parser.add_argument("--replicate", action="store_true", help="each rank needs all files at a place of its own")
    options, comm = parser.parse_args(arguments), None
    if identity().size > 1:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    first = comm is None or comm.rank == 0
    try:
        text, result = _carry_out(options, comm)
    except StageError as error:
        if first and options.json:
            print(json.dumps({"error": str(error), "failures": error.failures}))
        elif first:
            print(error, file=sys.stderr)
        return 1 if error.failures else 2
    except KeyboardInterrupt:
        print("interrupted; a further run goes on from here", file=sys.stderr)
        return 130
    if first:
        print(json.dumps(result) if options.json else text)
    return 0


def _carry_out(options: argparse.Namespace, comm: Any) -> tuple[str, dict[str, Any]]:
    """What there is to say of it, in words and in numbers."""
    if options.purge == (options.source is not None) or (options.purge and (options.verify or options.dry_run)):
        raise StageError("give a source and a destination, or --purge and the destination alone")
    if options.purge:
        removed = stager.purge(options.destination) if comm is None or comm.rank == 0 else 0
        return f"{removed:,} files removed", {"removed_files": removed}
    if options.dry_run:
        plan = stager.plan(options.source, options.destination, comm.size if comm else 1, options.replicate)
        sums = {"files": len(plan.files), "bytes": plan.bytes, "staged_files": len(plan.staged)}
        return str(plan), {**sums, "ranks": plan.table().to_dict("records")}
    report = stager.stage(options.source, options.destination, comm, replicate=options.replicate, verify=options.verify)
    return str(report), asdict(report)


if __name__ == "__main__":
    sys.exit(main())
