"""Build the Horovod wheel against the TensorFlow, MPICH and oneCCL of the running Python's environment.

    python tools/horovod_wheel.py DIRECTORY

leaves one wheel in DIRECTORY, with MPI, Gloo and oneCCL. The library inside finds its MPI and oneCCL relative
to itself, so the wheel serves every environment that holds the versions of `requirements.lock`, wherever
that lies.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"

# Horovod 0.28.1 predates this TensorFlow and this oneCCL: (file, text that occurs once, its replacement).
PATCHES = [
    # The body is for GPUs only, and what it includes does not compile with TensorFlow 2.21.
    (
        "horovod/tensorflow/xla_mpi_ops.cc",
        "#if TENSORFLOW_VERSION >= 2006000000\n\n#include",
        "#if TENSORFLOW_VERSION >= 2006000000 && HAVE_GPU\n\n#include",
    ),
    # oneCCL's headers are C++17.
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
    # A second, C++11, Gloo is configured, but nothing links it.
    (
        "CMakeLists.txt",
        "add_subdirectory(third_party/gloo)",
        "add_subdirectory(third_party/gloo EXCLUDE_FROM_ALL)",
    ),
    # Gloo would use the network that the host's name stands for, whatever HOROVOD_GLOO_IFACE says.
    (
        "horovod/common/gloo/gloo_context.cc",
        "gloo_iface_;\n  device_attr.ai_family = AF_UNSPEC;\n  auto dev = CreateDevice(device_attr);\n\n  global_ctx",
        "global_context.gloo_iface_;\n  device_attr.ai_family = AF_UNSPEC;\n  auto dev = CreateDevice(device_attr);\n\n"
        "  global_ctx",
    ),
    # Gloo's thread that watches the sockets asks again at once while the thread that sends holds a socket's lock. Where
    # they share a core, the first keeps the second from letting go until the scheduler steps in: an allreduce of 4 kB
    # took 4 ms instead of 0.6. Now it gives up the core, unless NURION_GLOO_SPINS is set to measure the difference.
    (
        "third_party/gloo/gloo/transport/tcp/pair.cc",
        "  if (!lock) {\n    return;\n  }\n\n  // State must be <= CONNECTED.",
        '  if (!lock) {\n    static const bool spins = getenv("NURION_GLOO_SPINS") != nullptr;\n'
        "    if (!spins) {\n      sched_yield();\n    }\n    return;\n  }\n\n  // State must be <= CONNECTED.",
    ),
    (
        "third_party/gloo/gloo/transport/tcp/pair.cc",
        "#include <netinet/tcp.h>\n",
        "#include <netinet/tcp.h>\n#include <sched.h>\n",
    ),
    # Started a second time in a process, with HOROVOD_CYCLE_TIME or HOROVOD_FUSION_THRESHOLD set the first time,
    # Horovod would write its default for the one into the place of the other, or beyond the end of the array.
    (
        "horovod/common/parameter_manager.cc",
        "  } else {\n    Eigen::VectorXd v = TunableParameter::BestValue();\n    v[index_",
        "  } else if (fixed_values_.count(variable) == 0) {\n    Eigen::VectorXd v = TunableParameter::BestValue();\n"
        "    v[index_",
    ),
    # While it had nothing to write, the timeline's thread gave up the core and asked again at once. Together with the
    # thread that polls MPI it left 3 % of a shared core to the ranks of another session. Now it sleeps a millisecond.
    (
        "horovod/common/timeline.cc",
        "    std::this_thread::yield();\n",
        "    std::this_thread::sleep_for(std::chrono::milliseconds(1));\n",
    ),
    # A rank that wakes for its cycle polls MPI until the last rank has woken. The next cycle was counted from when each
    # had woken, so the ranks never came to wake together, and idle they kept a core busy that others may need. Counted
    # from when they have met, they wake together, and rest.
    (
        "horovod/common/operations.cc",
        "    if (process_set_id == 0) {\n      state.mark_cycles_in_timeline",
        "    if (process_set_id == 0) {\n      state.last_cycle_start = std::chrono::steady_clock::now();\n"
        "      state.mark_cycles_in_timeline",
    ),
    # Debug symbols make the wheel 15 times larger; Horovod optimises both kinds of build alike (-O3).
    ("setup.py", "else 'RelWithDebInfo'", "else 'Release'"),
]

BUILD_SETTINGS = {
    "CCL_ROOT": sys.prefix,
    "CCL_CONFIGURATION": "cpu",
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITHOUT_NVTX": "1",
}

# From site-packages/horovod/tensorflow: MPICH in lib, oneCCL in lib/cpu, TensorFlow beside Horovod.
RUNPATH = "$ORIGIN/../../../..:$ORIGIN/../../../../cpu:$ORIGIN/../../tensorflow"


def patch(source: Path) -> None:
    """Apply `PATCHES`; SystemExit where a text to be replaced does not occur exactly once."""
    for name, old, new in PATCHES:
        text = (source / name).read_text()
        if text.count(old) != 1:
            sys.exit(f"Cannot patch {name} of Horovod: {old!r} occurs {text.count(old)} times instead of once.")
        (source / name).write_text(text.replace(old, new))


def build(target: Path) -> None:
    """Download, patch, compile, make relocatable, and put the finished wheel into `target`."""
    version = re.search(r"^horovod==(\S+)", LOCK.read_text(), re.MULTILINE)[1]
    # Compiler settings of the caller's shell must not end up in a wheel that others will use.
    foreign = re.compile(r"HOROVOD_|CMAKE_|CCL_|(CC|CXX|CUDACXX|CPPFLAGS|CFLAGS|CXXFLAGS|LDFLAGS)$")
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix="work-") as work:
        env |= BUILD_SETTINGS | {
            "CC": "gcc",
            "CXX": "g++",
            "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
            "PATH": f"{sys.prefix}/bin:{env['PATH']}",
            "TMPDIR": work,
        }

        def run(*command: str) -> None:
            subprocess.run(command, cwd=work, env=env, check=True)

        def pip(verb: str, *arguments: str) -> None:
            run(sys.executable, "-m", "pip", verb, "--no-deps", "--no-build-isolation", *arguments)

        pip("download", "--no-binary", "horovod", f"horovod=={version}")
        shutil.unpack_archive(f"{work}/horovod-{version}.tar.gz", work)
        source = Path(work, f"horovod-{version}")
        patch(source)
        pip("wheel", "--verbose", "--no-cache-dir", "--wheel-dir", "built", str(source))

        [wheel] = Path(work, "built").iterdir()
        run("wheel", "unpack", "--dest", "unpacked", str(wheel))
        [library] = Path(work, "unpacked").rglob("mpi_lib*.so")
        run("patchelf", "--set-rpath", RUNPATH, str(library))
        run("wheel", "pack", "--dest-dir", str(target), f"unpacked/horovod-{version}")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
