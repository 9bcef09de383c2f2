"""Set up `.venv` in stages: the pinned packages, Horovod, this project.

    python3.11 tools/setup.py [bench]

A completed stage leaves a stamp in `.venv`, a digest of all that would invalidate it: an interrupted set-up
goes on where it stopped, a complete one ends at once. `bench` adds the peers that `make bench` compares with.
What can be refused is refused before anything is changed.
"""

import configparser
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Up here, because an older Python can read this file but not carry it out.
if sys.version_info[:2] != (3, 11):
    sys.exit(
        f"The pinned packages need Python 3.11 and this is Python {platform.python_version()}: "
        "install python3.11, or name one with make PYTHON=/path/to/python3.11."
    )

ROOT = Path(__file__).resolve().parent.parent
VENV, LOG = ROOT / ".venv", ROOT / "build" / "setup.log"
SYSTEM_PYTHON = os.path.realpath(sys.executable)  # we may run in the .venv that is about to be renewed
LOCK = (ROOT / "requirements.lock").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))
WHEELS = re.sub(r"^horovod==.*\n", "", LOCK, flags=re.MULTILINE)
PROJECT = (ROOT / "pyproject.toml").read_text()
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nurion"
UV = CACHE / f"uv-{PINS['uv']}"
# All that the compiled library depends on, but for the compiler: see `compiled_horovod`.
HOROVOD = "\n".join(
    [f"{name}=={PINS[name]}" for name in ("horovod", "tensorflow-cpu", "mpich", "oneccl-devel")]
    + [sys.implementation.cache_tag, platform.machine(), os.confstr("CS_GNU_LIBC_VERSION") or ""]
    + [(ROOT / "tools" / "horovod_wheel.py").read_text()]
)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def child_environment() -> "dict[str, str]":
    """Our environment less what redirects Python and pip, with pip's site settings told to uv as well."""
    files = configparser.RawConfigParser()
    own = os.environ.get("PIP_CONFIG_FILE") or Path.home() / ".config" / "pip" / "pip.conf"
    files.read(["/etc/pip.conf", Path.home() / ".pip" / "pip.conf", own])
    foreign = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    for setting, variable in [
        ("index-url", "UV_DEFAULT_INDEX"),
        ("proxy", "ALL_PROXY"),
        ("cert", "SSL_CERT_FILE"),
        ("trusted-host", "UV_INSECURE_HOST"),
        ("default-timeout", "UV_HTTP_TIMEOUT"),
    ]:
        value = files.get("install", setting, fallback=files.get("global", setting, fallback=""))
        value = os.environ.get("PIP_" + setting.upper().replace("-", "_")) or value
        if value:
            env.setdefault(variable, value)
    return {**env, "UV_SYSTEM_CERTS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


ENV = child_environment()


def call(*command: "str | Path", text: str = "") -> None:
    """Run a command with its output in the log; where it fails, show the log's end and stop."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a") as log:
        print("$", *command, file=log, flush=True)
        # Without close_fds the lock goes along: if we are killed, the next set-up waits for what we leave behind.
        done = subprocess.run(
            command, input=text, text=True, cwd=ROOT, env=ENV, stdout=log, stderr=log, close_fds=False
        )
    if done.returncode:
        print(f" failed; {LOG} ends with:", *LOG.read_text().splitlines()[-15:], sep="\n")
        sys.exit("The set-up stopped: mend what these lines name and run the same command again to resume.")


def put(source: Path, target: Path) -> None:
    """Copy into the cache so that the target is never there by halves."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(source, unfinished)
    os.replace(unfinished, target)


def compiled_horovod() -> Path:
    """Place of the wheel in the cache, whether or not it is there yet.

    Each compiler has its own; a machine without one takes what another has compiled.
    """
    name = f"horovod-{digest(HOROVOD)}-gcc"
    if not shutil.which("g++"):
        return next(CACHE.glob(f"{name}*/*.whl"), CACHE / name / "none.whl")
    version = subprocess.check_output(["g++", "-dumpfullversion"], text=True).strip()
    return CACHE / f"{name}{version}" / f"horovod-{PINS['horovod']}-cp311-cp311-linux_x86_64.whl"


def check(pending: "list[str]") -> None:
    """Refuse, in one sentence, what cannot succeed; nothing but the cache of downloads is touched here."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(
            "The pinned packages are for Linux on x86_64 and this is "
            f"{platform.system()} on {platform.machine()}: use a machine or a container of that kind."
        )
    for tool in ("g++", "make"):
        if "Horovod" in pending and not shutil.which(tool) and not compiled_horovod().exists():
            sys.exit(f"Horovod is compiled here and {tool} is missing: install it, as with apt install {tool}.")
    # Measured: packages and their cache 2.3 (on one disk they are shared), the build of Horovod 0.3.
    needed_gb = 3.0 if {"packages", "bench"} & set(pending) else 0.5
    for place, remedy in [(ROOT, "clone to another disk"), (CACHE, "name another place with XDG_CACHE_HOME")]:
        while not place.exists():
            place = place.parent
        free_gb = shutil.disk_usage(place).free / 1e9
        if free_gb < needed_gb:
            sys.exit(
                f"The set-up needs {needed_gb} GB of disk and {place} has {free_gb:.1f} GB left: "
                f"make room, or {remedy}."
            )
    if "packages" in pending:
        fetch_uv()
        plan_downloads()


OFFLINE = (
    "The pinned packages cannot be fetched ({}): connect this machine to the network, or name your site's "
    "mirror or proxy with python3 -m pip config set global.index-url (or global.proxy) URL."
)


def fetch_uv() -> None:
    """Fetch uv, which installs from a cache that all clones share, with pip, which comes with Python."""
    if UV.exists():
        return
    if not importlib.util.find_spec("ensurepip"):
        sys.exit("This Python cannot make environments: install its venv, as with apt install python3.11-venv.")
    with tempfile.TemporaryDirectory() as boot:
        for command in (
            [SYSTEM_PYTHON, "-m", "venv", boot],
            [f"{boot}/bin/pip", "install", "--quiet", "--retries=2", f"uv=={PINS['uv']}"],
        ):
            done = subprocess.run(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(OFFLINE.format(done.stdout.strip().splitlines()[-1].replace("ERROR: ", "")))
        put(Path(boot, "bin", "uv"), UV)


def plan_downloads() -> None:
    """Find out whether all wheels are cached, and if not, whether all can be had."""
    with tempfile.TemporaryDirectory() as empty:
        plan = [UV, "pip", "sync", "--dry-run", "--python", SYSTEM_PYTHON, "--target", empty, "-"]
        options = {"input": WHEELS, "text": True, "capture_output": True, "cwd": ROOT}
        cached = subprocess.run([*plan, "--offline"], env=ENV, **options)
        if cached.returncode == 0 and "Would download" not in cached.stderr:
            ENV["UV_OFFLINE"] = "1"
            return
        online = subprocess.run(plan, env=ENV, **options)
        if online.returncode:
            sys.exit(OFFLINE.format(online.stderr.strip().splitlines()[-1].replace("cause: ", "").strip()))


def install_packages() -> None:
    # Afresh, not over what is there: an install that was killed leaves packages that look complete.
    call(UV, "venv", "--clear", "--python", SYSTEM_PYTHON, "--prompt", "nurion", VENV)
    call(UV, "pip", "sync", "--python", VENV, "-", text=WHEELS)


def install_horovod() -> None:
    wheel = compiled_horovod()
    if not wheel.exists():
        print(" compiling (3 minutes on 2 cores) ...", end="", flush=True)
        built = ROOT / "build" / "horovod"
        shutil.rmtree(built, ignore_errors=True)
        call(VENV / "bin" / "python", "tools/horovod_wheel.py", built)
        put(built / wheel.name, wheel)
        shutil.rmtree(built)
    call(UV, "pip", "install", "--python", VENV, "--no-deps", "--offline", wheel)
    call(
        VENV / "bin" / "python", "-c",
        "import horovod.tensorflow as hvd; assert hvd.mpi_built() and hvd.gloo_built() and hvd.ccl_built()",
    )  # fmt: skip


def install_project() -> None:
    call(
        UV, "pip", "install", "--python", VENV, "--no-deps", "--no-build-isolation", "--offline", "--editable", ROOT
    )  # fmt: skip


def install_peers() -> None:
    # With pip, so that a site's own way to a CPU-only PyTorch (find-links, extra-index-url) is followed.
    import tomllib  # not at the top, which an older Python reads

    peers = tomllib.loads(PROJECT)["project"]["optional-dependencies"]["bench"]
    call(VENV / "bin" / "python", "-m", "pip", "install", *peers)


def main() -> None:
    stages = [
        ("packages", LOCK + str(ROOT), install_packages),
        ("Horovod", HOROVOD, install_horovod),
        ("nurion_utils", PROJECT, install_project),
    ]
    if "bench" in sys.argv[1:]:
        stages.append(("bench", PROJECT, install_peers))

    def unfinished() -> list:
        """Stages whose stamp is not there or not that of today; each stamp also covers the stages before it."""
        found, covered = [], ""
        for name, invalidated_by, install in stages:
            covered = digest(covered + invalidated_by)
            stamp = VENV / f"{name}.stamp"
            intact = os.access(VENV / "bin" / "python", os.X_OK) and stamp.exists() and stamp.read_text() == covered
            if not intact:
                found.append((name, install, stamp, covered))
        return found

    if not unfinished():
        return
    guard = os.open(__file__, os.O_RDWR)
    os.set_inheritable(guard, True)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Waiting for another set-up of this clone.", flush=True)
        fcntl.flock(guard, fcntl.LOCK_EX)
    pending = unfinished()
    if pending:
        check([name for name, *_ in pending])
        LOG.unlink(missing_ok=True)
    for name, install, stamp, covered in pending:
        print(f"Setting up: {name} ...", end="", flush=True)
        start = time.monotonic()
        install()
        stamp.write_text(covered)
        print(f" {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nThe set-up was interrupted: run the same command again to resume.")
    except OSError as error:
        sys.exit(f"The set-up stopped ({error}): mend that and run the same command again to resume.")
