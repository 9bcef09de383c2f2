"""``python -m nurion_utils.staging SRC DST``, alone or under mpiexec; see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

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
    parser.add_argument("--replicate", action="store_true", help="each rank needs all files at a place of its own")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    comm = None
    if identity().size > 1:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    first = comm is None or comm.rank == 0
    try:
        if options.purge == (options.source is not None):
            raise StageError("give a source and a destination, or --purge and the destination alone")
        if options.purge:
            if options.verify or options.dry_run:
                raise StageError("--purge goes with no other option than --json")
            removed = stager.purge(options.destination) if first else 0
            result, text = {"removed_files": removed}, f"{removed:,} files removed"
        elif options.dry_run:
            size = 1 if comm is None else comm.size
            plan = stager.plan(options.source, options.destination, size, options.replicate)
            result = {"files": len(plan.files), "bytes": plan.bytes, "staged_files": len(plan.staged)}
            result["ranks"] = plan.table().to_dict("records")
            text = str(plan)
        else:
            report = stager.stage(
                options.source, options.destination, comm, replicate=options.replicate, verify=options.verify
            )
            result, text = asdict(report), str(report)
    except StageError as error:
        if first:
            print(json.dumps({"error": str(error), "failures": error.failures}) if options.json else error,
                  file=sys.stdout if options.json else sys.stderr)  # fmt: skip
        return 1 if error.failures else 2
    except KeyboardInterrupt:
        print("interrupted; a further run goes on from here", file=sys.stderr)
        return 130
    if first:
        print(json.dumps(result) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
