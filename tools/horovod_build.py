"""Builds Horovod 0.28.1, as released, against the environment's own frameworks and MPI.

Horovod comes as source only, so what it is compiled against must be there before it: that is why
it is no dependency of this package, and why this file exists. Two CMake files in ``cmake/`` say
what today's PyTorch and TensorFlow need; not a line of Horovod is changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from console import run_logged

CMAKE_FILES = Path(__file__).resolve().parent / "cmake"
GIGABYTES_PER_COMPILER = 2.5
SWITCHES = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW"}


def build_wheel(python: Path, horovod: str, frameworks: Sequence[str], folder: Path) -> Path:
    """Compile Horovod into a wheel, which fits this environment only.

    Args:
        python: the environment's interpreter.
        horovod: Horovod's version.
        frameworks: what to build it for, of ``torch`` and ``tensorflow``.
        folder: receives the wheel, and the log beside it.

    Returns:
        The wheel's path.

    Raises:
        SetupError: the build failed; the text names the log.
    """
    for old_wheel in folder.glob("horovod-*.whl"):
        old_wheel.unlink()
    # The library paths of this environment are compiled in, so pip's cache must not see it.
    options = ["--verbose", "--no-cache-dir", "--no-deps", "--no-build-isolation"]
    source = ["--no-binary", "horovod", f"horovod=={horovod}", "--wheel-dir", f"{folder}"]
    run_logged(
        [f"{python}", "-m", "pip", "wheel", *options, *source],
        log=folder / "horovod.log",
        environment=build_environment(python, frameworks),
        progress=compiled_so_far,
    )
    return next(folder.glob("horovod-*.whl"))


def build_environment(python: Path, frameworks: Sequence[str]) -> dict[str, str]:
    """The variables that steer Horovod's build, on top of the caller's own."""
    chosen = {
        f"HOROVOD_{'WITH' if framework in frameworks else 'WITHOUT'}_{switch}": "1"
        for framework, switch in SWITCHES.items()
    }
    return {
        **os.environ,
        **chosen,
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITHOUT_GLOO": "1",  # serves the elastic launcher only, which excludes MPI
        "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_TOOLCHAIN_FILE": f"{CMAKE_FILES / 'toolchain.cmake'}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses Horovod's older parts without it
        "CPATH": os.pathsep.join(map(str, tensorflow_headers(python))),
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "MAKEFLAGS": f"-j{compilers_at_once()}",
    }


def tensorflow_headers(python: Path) -> list[Path]:
    """Folders of headers that TensorFlow includes by a shorter name than it ships them under."""
    packages = python.parent.parent.glob("lib/python3*/site-packages/tensorflow/include/external")
    inner = ("highwayhash", "farmhash_archive/src")
    return [external / folder for external in packages for folder in inner]


def compilers_at_once() -> int:
    """As many compilers as there are cores, fewer if the memory would not hold them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / GIGABYTES_PER_COMPILER)))


def compiled_so_far(log: str) -> str:
    """The last percentage that CMake printed."""
    percentages = re.findall(r"^\s*\[\s*(\d+)%\]", log, re.MULTILINE)
    return f"compiling, {percentages[-1]} %" if percentages else "configuring"
