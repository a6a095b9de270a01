"""What the machine must bring: a Python, a C++20 compiler, make, CMake, and perhaps an Open MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from console import SetupError

PYTHON_VERSIONS = ("3.11", "3.12")
ABOUT_PYTHON = """
import importlib.util, sys, sysconfig
print(getattr(sys, "_base_executable", sys.executable))
print(sys.version.split()[0])
print(sysconfig.get_path("include"))
print(importlib.util.find_spec("ensurepip") is not None)
"""
OLDEST_CMAKE = (3, 19)  # cmake/adjustments.cmake defers a call


@dataclass(frozen=True)
class Python:
    """An interpreter that the environment can be made from."""

    executable: str
    version: str
    include: str
    can_make_venv: bool

    @property
    def minor(self) -> str:
        """The version as Debian names its packages, such as ``3.11``."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class SystemMPI:
    """An Open MPI 4.1 that is installed on the machine."""

    compiler: str
    version: str


def find_python(wanted: str, remembered: str) -> Python:
    """The interpreter to use: the wanted one, else the remembered one, else the first on PATH.

    Args:
        wanted: a name or path given by the user, or nothing.
        remembered: the interpreter that the environment was made from, or nothing.

    Raises:
        SetupError: there is none, or the wanted one has another version.
    """
    names = [f"python{version}" for version in PYTHON_VERSIONS]
    for name in [wanted] if wanted else [remembered, *names, "python3", "python"]:
        python = _inspect_python(name)
        if python is not None and python.minor in PYTHON_VERSIONS:
            return python
    versions = " or ".join(PYTHON_VERSIONS)
    if wanted:
        raise SetupError(f"PYTHON={wanted} is not a Python {versions}.")
    raise SetupError(
        f"No Python {versions} was found; name one with make setup PYTHON=..., or on Debian "
        f"install one: apt-get install python3.11 python3.11-dev python3.11-venv"
    )


def check_tools(python: Python) -> None:
    """Check everything that the build will need, before anything is downloaded.

    Raises:
        SetupError: one sentence that names all that is missing and the packages that bring it.
    """
    missing = dict(_missing_tools(python))
    if missing:
        raise SetupError(
            f"Missing on this machine: {', '.join(missing)}; "
            f"on Debian install: apt-get install {' '.join(missing.values())}"
        )


def find_system_mpi(ignore: Path) -> SystemMPI | None:
    """The Open MPI 4.1 on PATH, or None; other MPIs are passed over.

    Args:
        ignore: the environment's own folder of programs, which may be on PATH too.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if Path(folder) != ignore)
    compiler = shutil.which("mpicxx", path=path)
    if compiler is None or shutil.which("mpirun", path=path) is None:
        return None
    found = re.search(r"Open MPI (4\.1\.\d+)", _output_of(compiler, "--showme:version"))
    return SystemMPI(compiler, found[1]) if found else None


def _inspect_python(name: str) -> Python | None:
    """Ask an interpreter about itself; None if it does not start."""
    answer = _output_of(name, "-c", ABOUT_PYTHON).splitlines()
    if len(answer) != 4:
        return None
    return Python(answer[0], answer[1], answer[2], answer[3] == "True")


def _missing_tools(python: Python) -> Iterator[tuple[str, str]]:
    """What is missing, each with the Debian package that brings it."""
    if not _compiles_cxx20(os.environ.get("CXX", "c++")):
        yield "a C++20 compiler", "g++"
    if shutil.which("make") is None:
        yield "make", "make"
    if _cmake_version() < OLDEST_CMAKE:
        yield f"CMake {'.'.join(map(str, OLDEST_CMAKE))} or newer", "cmake"
    if not Path(python.include, "Python.h").is_file():
        yield f"the headers of Python {python.minor}", f"python{python.minor}-dev"
    if not python.can_make_venv:
        yield f"the venv module of Python {python.minor}", f"python{python.minor}-venv"


def _compiles_cxx20(compiler: str) -> bool:
    """Whether the compiler starts and knows C++20's headers."""
    command = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        finished = subprocess.run(
            command, input=b"#include <span>\n", check=False, capture_output=True
        )
    except OSError:
        return False
    return finished.returncode == 0


def _cmake_version() -> tuple[int, ...]:
    """CMake's version, (0,) without CMake."""
    found = re.search(r"version (\d+)\.(\d+)", _output_of("cmake", "--version"))
    return tuple(map(int, found.groups())) if found else (0,)


def _output_of(*command: str) -> str:
    """What a command prints, empty if it cannot be started or fails."""
    try:
        finished = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return finished.stdout if finished.returncode == 0 else ""
