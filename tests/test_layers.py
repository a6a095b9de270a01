"""Imports go down only, and each outside library has its one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import gossip_hvd

HOUSE = Path(gossip_hvd.__file__).parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("postmortem",),
    ("keras",),
    ("tensorflow",),  # above torch only because Keras may run on PyTorch
    ("torch",),
    ("variables",),
    ("simulate", "gossip", "ranks", "shards"),
    ("session",),
    ("operations",),
    ("execution", "correspondence"),
    ("saved",),
    ("engine",),
    ("progress",),
    ("shuffle", "checkpoint", "observe"),
    ("flight",),
    ("gather", "lowering", "vote"),
    ("seat",),
    ("handle", "memory", "node", "options", "agreement", "blocks", "negotiation"),
    ("joining",),
    ("transport",),
    ("guard",),
    ("watch",),
    ("inquiry", "terminate", "interrupts", "envelopes"),
    ("waits", "endings", "letters", "frames", "records", "small"),
    ("settings", "recorder", "requests", "versions"),
    ("methods", "reductions", "finite"),
    ("mixing", "rounds"),
    ("topology", "segments"),
    ("draws", "schedules", "staleness"),
    ("__init__",),
    ("errors",),
)
"""From the roof down. A room may use the rooms on lower floors, and none on its own.

The package's ``__init__`` is deep down: it names nothing but the version and the errors.
"""

DOORS = {
    "mpi4py": ("transport/mpi.py",),
    "horovod": ("torch/", "tensorflow/"),
    "torch": ("torch/",),
    "tensorflow": ("tensorflow/",),
    "keras": ("tensorflow/",),
}

FLOOR = {room: floor for floor, rooms in enumerate(reversed(FLOORS)) for room in rooms}
FILES = sorted(path.relative_to(HOUSE) for path in HOUSE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import, wherever in the file it stands."""

    module: str
    line: int
    typing_only: bool


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse((HOUSE / path).read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name"
            # `from gossip_hvd import draws` and `from gossip_hvd.transport import mpi`.
            found = [
                f"{node.module}.{a.name}" for a in node.names if is_module(node.module, a.name)
            ]
            found = found or [node.module or ""]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found = [str(node.args[0].value)]
        for name in found:
            yield Import(name, node.lineno, id(node) in for_types)


def is_module(package: str | None, name: str) -> bool:
    if package is None or package.split(".")[0] != "gossip_hvd":
        return False
    folder = HOUSE.joinpath(*package.split(".")[1:])
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def room(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "gossip_hvd":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


def file_of(module: str) -> Path:
    folder = Path(*module.split(".")[1:])
    return folder / "__init__.py" if (HOUSE / folder).is_dir() else folder.with_suffix(".py")


def test_every_room_has_its_floor() -> None:
    rooms = {room(path) for path in FILES}
    assert rooms <= set(FLOOR), "give new rooms a floor here and a line in ARCHITECTURE.md"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_only(path: Path) -> None:
    here = room(path)
    for one in imports(path):
        there = room_of(one.module)
        if there is None or there == here or one.typing_only or here not in FLOOR:
            continue
        assert FLOOR[there] < FLOOR[here], (
            f"gossip_hvd/{path}:{one.line} imports {one.module}: {there} is not below {here}"
        )


def test_no_module_needs_itself() -> None:
    """Also inside a room, where floors say nothing."""
    needs = {
        path: {
            file_of(one.module)
            for one in imports(path)
            if one.module.startswith("gossip_hvd.")
            and not one.typing_only
            and file_of(one.module) in FILES
        }
        - {path}
        for path in FILES
    }
    left = dict(needs)
    while left:
        free = [path for path, wanted in left.items() if not wanted & set(left)]
        assert free, f"a circle of imports among {sorted(map(str, left))}"
        for path in free:
            del left[path]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_outside_libraries_have_one_door(path: Path) -> None:
    for one in imports(path):
        doors = DOORS.get(one.module.split(".")[0])
        assert doors is None or one.typing_only or str(path).startswith(doors), (
            f"gossip_hvd/{path}:{one.line} imports {one.module}: only {' and '.join(doors)} may"
        )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_open_with_a_sentence_and_stay_short(path: Path) -> None:
    text = (HOUSE / path).read_text()
    doc = ast.get_docstring(ast.parse(text))
    assert doc, "a module says in its first sentence what it is for"
    assert doc.splitlines()[0].endswith("."), "the first line is that sentence"
    assert len(text.splitlines()) < 400


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    code = (
        f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


HEAVY = {"torch", "tensorflow", "keras", "horovod", "mpi4py"}


def test_importing_the_package_is_light() -> None:
    assert not loaded_by("import gossip_hvd") & (HEAVY | {"numpy", "ml_dtypes"})


@pytest.mark.parametrize("module", ["simulate", "session", "transport.mpi", "gossip"])
def test_the_core_loads_no_framework_and_starts_no_mpi(module: str) -> None:
    loaded = loaded_by(f"import gossip_hvd.{module}")
    assert "numpy" in loaded
    assert not loaded & HEAVY


PICKLING = {
    *("bcast", "allgather", "gather", "scatter", "alltoall", "allreduce", "reduce"),
    *("send", "recv", "isend", "irecv", "sendrecv", "ssend", "bsend"),
}
"""mpi4py's verbs for Python values; those for arrays begin with a capital letter."""

LOADERS = {"torch.load", "np.load", "numpy.load", "joblib.load", "eval", "exec", "compile"}
"""What may run what it reads."""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_unpickled_but_what_horovod_demands(path: Path) -> None:
    for one in imports(path):
        assert one.module.split(".")[0] not in ("pickle", "marshal", "shelve", "dill", "joblib")
        if one.module == "cloudpickle":
            assert path.name == "functions.py"
    for node in ast.walk(ast.parse((HOUSE / path).read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in LOADERS, f"gossip_hvd/{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in PICKLING:
            assert "comm" not in ast.unparse(node.value).lower(), f"gossip_hvd/{path}:{node.lineno}"
