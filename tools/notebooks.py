"""Build, run and publish the notebooks.

    python tools/notebooks.py build [--check]    notebooks/src -> notebooks and their exercise editions
    python tools/notebooks.py run [NAME ...]     execute with papermill into build/executed, then render the site
    python tools/notebooks.py site               render build/executed into build/site

What a writer needs to know, from tags to exercises, stands at the top of `notebook_sources.py`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from notebook_sources import Refused, build, front, tags, write

ROOT = Path(__file__).resolve().parents[1]


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end. asyncio lets only KeyboardInterrupt and SystemExit out of its loop."""


def _environment(build_dir: Path, scratch: Path) -> dict[str, str]:
    """For the kernels: silence, and no trace of the user's own configuration, read or written."""
    private = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "KERAS_HOME")
    return {
        **{name: str(scratch / name.lower()) for name in private},
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one of the same name in the home folder
        "MPLCONFIGDIR": str(build_dir / "matplotlib"),  # kept: making the font cache takes seconds
        "PYTHONSTARTUP": "",
        "GRPC_VERBOSITY": "ERROR",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TQDM_DISABLE": "1",
    }


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _last_line(text: str) -> str:
    return (_plain(text).strip().splitlines() or [""])[-1].strip()


def _errors(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for output in cell.get("outputs", []) if output.output_type == "error"]


def _failing_line(cell: nbformat.NotebookNode) -> str:
    """The line of the cell that its traceback names, or its first one where that names none, as for ``%%px``."""
    shown = _plain("\n".join(_errors(cell)[-1].traceback))
    numbers = re.findall(rf"In\[{cell.execution_count}\], line (\d+)", shown)
    return cell.source.splitlines()[int(numbers[-1]) - 1 if numbers else 0].strip()


def _execute(twin: Path, target: Path, scratch: Path, parameters: dict, timeout_s: float, report: list) -> None:
    """Execute one notebook; whatever happens, write what was done to `target` and one row to `report`."""
    import notebook_site
    import papermill
    import psutil
    from jupyter_client import AsyncKernelManager
    from nbclient.exceptions import CellTimeoutError
    from traitlets.config import Config

    started, number, source = time.monotonic(), 0, ""

    def note(cell, cell_index):
        nonlocal number, source
        number, source = number + 1, cell.source.strip().partition("\n")[0]

    class Kernel(AsyncKernelManager):
        async def start_kernel(self, **options):  # what the kernel's libraries write past Jupyter goes to a file
            await super().start_kernel(stdout=log, stderr=log, **options)

    bar = {"desc": twin.stem, "leave": False} if sys.stderr.isatty() else False
    if not bar:
        print(f"{twin.stem}: running", flush=True)
    partial, others = scratch / twin.name, set(psutil.Process().children())
    problem, error = "stopped", ""
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".log").open("wb")
    try:
        papermill.execute_notebook(
            twin,
            partial,
            parameters,
            kernel_name="python3",
            cwd=twin.parent,
            progress_bar=bar,
            on_cell_execute=note,
            timeout_func=lambda cell: max(1.0, started + timeout_s - time.monotonic()),
            kernel_manager_class=Kernel,
            config=Config({"KernelManager": {"connection_file": str(scratch / f"{twin.stem}.json")}}),
            extra_arguments=["--log-level=50"],  # the kernel's own remarks are not for the reader
        )
        problem = ""
    except papermill.PapermillExecutionError as failure:
        wrong = [cell for cell in nbformat.read(partial, 4).cells if _errors(cell)][-1]
        # papermill also counts an error that was asked for; if the last one was, every cell did run.
        problem = "" if "raises-exception" in tags(wrong) else "failed"
        if problem:
            error, source = f"{failure.ename}: {_last_line(failure.evalue)}", _failing_line(wrong)
    except CellTimeoutError:
        problem = f"over the time limit of {timeout_s:g} s"
    except Exception as failure:  # no kernel came up, or it died
        problem, error = "failed", f"{type(failure).__name__}: {_last_line(str(failure))}"
    finally:
        for child in set(psutil.Process().children()) - others:
            # A kernel that was interrupted while it started is not yet nbclient's to end.
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait()
        log.close()
        if os.path.getsize(log.name) == 0:
            os.remove(log.name)
        elif problem:
            error += f"\nMore may be in build/executed/{twin.stem}.log."
        seconds = time.monotonic() - started
        nb = nbformat.read(partial if partial.exists() else twin, 4)
        nb.cells = [cell for cell in nb.cells if "papermill-error-cell-tag" not in tags(cell)]
        nb.metadata.pop("papermill", None)
        if problem:
            problem += f" at In [{number}] `{source}`" if number else " before the first cell"
        faults = notebook_site.faults(notebook_site.page(nb, front(nb)))
        problem = "\n".join(line for line in [problem, error, *faults] if line)
        nb.metadata["run"] = {"seconds": round(seconds, 1), "problem": problem}
        write(target, nbformat.writes(nb))
        report.append((twin.stem, seconds, problem))
        print(f"{twin.stem}: {'NOT PASSED' if problem else 'passed'} after {seconds:.1f} s", flush=True)


def run(root: Path, names: list[str], parameters: dict[str, object], timeout_s: float) -> int:
    """Execute notebooks one after another, render the site and print the closing table; returns the exit code.

    It sets the environment and the signal handlers of its process, which should end soon after.

    Parameters
    ----------
    names : list of str
        Names or their leading numbers; none means all.
    parameters : dict
        Given to every notebook whose parameters cell has the name.
    timeout_s : float
        Time limit of each notebook, s.
    """
    drifted = build(root, check=True)
    if drifted:
        raise Refused(" ".join(drifted))
    twins = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    stems = [twin.stem for twin in twins]
    unknown = [name for name in names if not any(name in (stem, stem[:2]) for stem in stems)]
    if unknown or not twins:
        raise Refused(f"There is no notebook {' '.join(unknown)}; there are {', '.join(stems) or 'none'}.")
    chosen = [twin for twin in twins if not names or {twin.stem, twin.stem[:2]} & set(names)]

    import papermill
    import tqdm.auto  # noqa: F401  before TQDM_DISABLE is set, which is for the kernels only

    known = {twin: set(papermill.inspect_notebook(twin)) for twin in chosen}
    everywhere = set().union(*known.values())
    if not set(parameters) <= everywhere:
        unknown = ", ".join(sorted(set(parameters) - everywhere))
        raise Refused(f"No chosen notebook has the parameter {unknown}; they have {', '.join(sorted(everywhere))}.")

    def stop(number, frame):
        for ending in endings:
            signal.signal(ending, signal.SIG_IGN)  # the clean-up takes seconds and must not be cut short
        raise Stopped(number)

    # A signal that is ignored on arrival (nohup, a background job) stays ignored.
    endings = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    for ending in endings:
        signal.signal(ending, stop)
    for name in ("papermill", "asyncio", "traitlets"):  # the table says what went wrong
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    report: list[tuple[str, float, str]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="notebooks-", ignore_cleanup_errors=True) as scratch:
            os.environ |= _environment(root / "build", Path(scratch))
            for twin in chosen:
                given = {name: value for name, value in parameters.items() if name in known[twin]}
                _execute(twin, root / "build" / "executed" / twin.name, Path(scratch), given, timeout_s, report)
        import notebook_site

        notebook_site.site(root)
        code = int(any(problem for _, _, problem in report))
    except Stopped as stopped:
        code = 128 + stopped.args[0]
    wide = max(len(twin.stem) for twin in chosen)
    print(f"\n{'notebook':{wide}}  seconds  result")
    for name, seconds, problem in report:
        print(f"{name:{wide}}  {seconds:7.1f}  " + (problem or "passed").replace("\n", "\n" + " " * (wide + 11)))
    for twin in chosen[len(report) :]:
        print(f"{twin.stem:{wide}}        -  not run")
    print(f"Time limit {timeout_s:g} s per notebook. Pages: build/site/index.html", flush=True)
    return code


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0, 1 for a failure, 2 for bad input, 128 + n for signal n."""
    parser = argparse.ArgumentParser(prog="tools/notebooks.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="make the notebooks from notebooks/src")
    builder.add_argument("--check", action="store_true", help="change nothing; name what differs and exit with 1")
    runner = commands.add_parser("run", help="execute with papermill, then render the site")
    runner.add_argument("names", nargs="*", metavar="NAME", help="such as 00 or 00_first_steps; none means all")
    runner.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    runner.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for each notebook (600)")
    commands.add_parser("site", help="render what was executed")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "run":
            parameters = {name: _value(text) for name, text in chosen.parameters}
            return run(root, chosen.names, parameters, chosen.timeout)
        if chosen.command == "build":
            sentences = build(root, chosen.check)
        else:
            import notebook_site

            sentences = notebook_site.site(root)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return int(bool(sentences))


def _value(text: str) -> object:
    """A parameter as Python would read it; what is no literal is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
