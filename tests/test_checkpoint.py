"""Files of a checkpoint: whole or refused by name, contained, private, and never half a state."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossip_hvd.checkpoint import folder, job, manifest, tensors
from gossip_hvd.checkpoint.folder import name_of
from gossip_hvd.checkpoint.job import Content, Party, Tensor, newest, save, state_of
from gossip_hvd.checkpoint.manifest import Manifest
from gossip_hvd.checkpoint.tensors import Kind
from gossip_hvd.checkpoint.trees import flatten, unflatten
from gossip_hvd.errors import CheckpointError
from gossip_hvd.node import Cluster

NODE = "node0000.safetensors"
T = TypeVar("T")


class Alone:
    """A world of one rank."""

    rank = 0

    def allgather(self, data: bytes, what: str) -> list[bytes]:
        return [data]


PARTY = Party(Alone(), Cluster.grouped(1, 1))


def content(number: int) -> Callable[[], Content]:
    """A state in which every byte tells the number."""
    arrays = {
        "a": np.full(70, number, np.float32),
        "b": [np.full((3, 2), number, np.int64), number, "text", None, (1.5, True)],
        7: {"empty": np.zeros(0, np.float32)},
    }
    tree, named = flatten(arrays, np.ndarray)
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
    made = [
        Tensor(Kind(kinds[n.tensor.dtype], n.tensor.shape), n.tensor.reshape(-1).view(np.uint8))
        for n in named
    ]
    return lambda: Content(tree, [n.name for n in named], made)


def saved(directory: Path, number: int, keep: int = 9) -> Path:
    return save(PARTY, directory, content(number), keep)


def number_in(directory: Path) -> int:
    """The number that the newest whole checkpoint tells, everywhere in it."""
    found = newest(PARTY, directory)
    assert found is not None
    state = state_of(found, 0, 0, lambda t: t)
    number = state["b"][1]
    assert (state["a"].data.view(np.float32) == number).all()
    assert (state["b"][0].data.view(np.int64) == number).all()
    assert state["b"][2:] == ["text", None, (1.5, True)]
    assert state["a"].kind.shape == (70,)
    assert state[7]["empty"].data.size == 0
    return int(number)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 9])
def test_what_is_saved_comes_back_and_the_last_ones_are_kept(tmp_path: Path, keep: int) -> None:
    assert newest(PARTY, tmp_path / "nowhere") is None
    for number in range(7):
        path = saved(tmp_path, number, keep=keep)
        assert path == tmp_path / name_of(number)
        assert number_in(tmp_path) == number
        assert folder.numbers(tmp_path) == [*range(7)][: number + 1][-keep:]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", NODE]


class Ranks:
    """A world of several ranks, each a thread that acts on a disk of its own."""

    def __init__(self, size: int) -> None:
        self.size, self.said = size, [b""] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def each(self, action: Callable[[Party, int], T]) -> list[T]:
        """Let every rank, a node by itself, do the same."""
        cluster = Cluster.grouped(self.size, 1)
        with ThreadPoolExecutor(self.size) as pool:
            return list(
                pool.map(lambda r: action(Party(Member(self, r), cluster), r), range(self.size))
            )


class Member:
    """One rank of them."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def allgather(self, data: bytes, what: str) -> list[bytes]:
        self.ranks.said[self.rank] = data
        self.ranks.barrier.wait()
        every = list(self.ranks.said)
        self.ranks.barrier.wait()
        return every


def test_what_only_some_nodes_have_does_not_push_out_what_all_have(tmp_path: Path) -> None:
    """With disks of their own, one node lost checkpoint 2 and the other 3."""
    ranks, disks = Ranks(2), [tmp_path / "a", tmp_path / "b"]

    def store(number: int, keep: int) -> None:
        ranks.each(lambda party, rank: save(party, disks[rank], content(number), keep))

    def found() -> int:
        numbers = ranks.each(lambda party, rank: newest(party, disks[rank]))
        (number,) = {one.whole.number for one in numbers if one is not None}
        return number

    for number in range(4):
        store(number, 9)
    folder.remove(disks[0], 2)
    folder.remove(disks[1], 3)
    store(4, keep=2)
    assert [folder.numbers(disk) for disk in disks] == [[1, 3, 4], [1, 2, 4]]
    flipped(disks[0] / name_of(4))
    assert found() == 1, "keep=2 leaves two that all nodes have"
    store(5, keep=2)
    assert [folder.numbers(disk) for disk in disks] == [[4, 5], [4, 5]]
    assert found() == 5


def test_a_node_with_an_empty_disk_costs_the_others_nothing_that_they_would_keep(
    tmp_path: Path,
) -> None:
    ranks, disks = Ranks(2), [tmp_path / "a", tmp_path / "b"]
    for number in range(4):
        if number == 3:
            disks[1].rename(tmp_path / "unmounted")
        ranks.each(lambda party, rank: save(party, disks[rank], content(0), 3))
    assert [folder.numbers(disk) for disk in disks] == [[1, 2, 3], [3]]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = saved(tmp_path / "new", 1)
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [path, *path.iterdir()]}
    assert modes == {path: 0o700, path / NODE: 0o600, path / "manifest.json": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_file_is_one_of_safetensors(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    found = load_file(saved(tmp_path, 3) / NODE)
    assert {name: (a.shape, str(a.dtype)) for name, a in found.items()} == {
        "a": ((70,), "float32"),
        "b/0": ((3, 2), "int64"),
        "7/empty": ((0,), "float32"),
    }


# Refused by name ---------------------------------------------------------------------------------


def torn(path: Path) -> None:
    os.truncate(path / NODE, (path / NODE).stat().st_size - 1)


def flipped(path: Path) -> None:
    data = bytearray((path / NODE).read_bytes())
    data[-1] ^= 1
    (path / NODE).write_bytes(data)


def rewritten(path: Path, **changes: Any) -> None:
    text = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**text, **changes}))


def linked(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    (path / NODE).rename(elsewhere)
    (path / NODE).symlink_to(elsewhere)


def linked_folder(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def piped(path: Path) -> None:
    (path / NODE).unlink()
    os.mkfifo(path / NODE)


def outside(path: Path) -> None:
    (path.parent / "x").write_bytes((path / NODE).read_bytes())
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewritten(path, files=[{**files[0], "name": "../x"}])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "node0000.safetensors has [0-9]+ bytes, and its manifest says": torn,
    "holds other bytes than its manifest says": flipped,
    "manifest.json cannot be read .*never finished": lambda p: (p / "manifest.json").unlink(),
    "node0000.safetensors cannot be read .No such file": lambda p: (p / NODE).unlink(),
    "manifest is no JSON": lambda p: (p / "manifest.json").write_text("{"),
    "format version 0, written by": lambda p: rewritten(p, version=0),
    "not that of a gossip_hvd checkpoint": lambda p: rewritten(p, format="another"),
    "its manifest is that of checkpoint 5": lambda p: rewritten(p, number=5),
    "which ranks its nodes had": lambda p: rewritten(p, nodes=[[1]]),
    "does not name node0000.safetensors": outside,
    "node0000.safetensors cannot be read .Too many levels": linked,
    "manifest.json cannot be read .Not a directory": linked_folder,
    "not a plain file": piped,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_last_whole_one_used(
    message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1)
    DAMAGES[message](saved(tmp_path, 2))
    assert number_in(tmp_path) == 1
    (line,) = caplog.messages
    assert line.startswith("gossip_hvd: refused checkpoint-000001: on node 0, ")
    folder.remove(tmp_path, 0)
    with pytest.raises(
        CheckpointError, match=f"(?s)is whole. Refused checkpoint-000001.*{message}"
    ):
        newest(PARTY, tmp_path)
    assert saved(tmp_path, 3).name == name_of(2), "its number is not given again"
    assert number_in(tmp_path) == 3


def test_a_stranger_in_the_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000007").mkdir()
    (tmp_path / "checkpoint-000007" / "mine.txt").write_text("keep")
    (tmp_path / "checkpoint-000008").write_text("a file")
    (tmp_path / "checkpoint-1").mkdir()
    assert saved(tmp_path, 1, keep=1).name == name_of(9)
    assert saved(tmp_path, 2, keep=1).name == name_of(10)
    assert (tmp_path / "checkpoint-000007" / "mine.txt").exists()
    assert folder.numbers(tmp_path) == [7, 8, 10]
    assert number_in(tmp_path) == 2


# Faults while writing ---------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(nbytes: int) -> Iterator[None]:
    """The kernel refuses to write more, as a disk that is full or a quota that is used up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 700])
def test_without_room_the_older_checkpoints_stay(room: int, tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with no_file_larger_than(room), pytest.raises(CheckpointError, match="File too large"):
        saved(tmp_path, 2)
    assert folder.numbers(tmp_path) == [0], "nothing half-written is left"
    assert number_in(tmp_path) == 1
    saved(tmp_path, 3)
    assert number_in(tmp_path) == 3


CALLS = ("mkdir", "open", "posix_fallocate", "pwrite", "fsync", "rename", "unlink", "rmdir")
"""What changes the disk."""


def counted(monkeypatch: pytest.MonkeyPatch, stop: int, then: Callable[[], object]) -> list[str]:
    """From now on do ``then`` before call number ``stop`` of the operating system."""
    made: list[str] = []

    def before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == stop:
                then()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, before(name, getattr(os, name)))
    return made


def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    """A child is killed before each of its calls in turn; then another job goes on."""
    stop, done = 0, False
    seen = set()
    while not done:
        stop, directory = stop + 1, tmp_path / str(stop)
        saved(directory, 1, keep=2)
        saved(directory, 2, keep=2)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                counted(patch, stop, lambda: os._exit(9))
                saved(directory, 3, keep=2)
            os._exit(0)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        seen.add(number_in(directory))
        assert number_in(directory) in (2, 3)
        saved(directory, 4, keep=2)
        assert number_in(directory) == 4
        assert len(folder.numbers(directory)) == 2, "nothing half-written is left"
    assert seen == {2, 3}
    assert stop > 20


def test_an_error_at_any_moment_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stop, failed = 0, True
    while failed:
        stop, directory = stop + 1, tmp_path / str(stop)
        saved(directory, 1)
        with pytest.MonkeyPatch.context() as patch:
            made = counted(patch, stop, fail)
            try:
                saved(directory, 2)
                # Only deleting a leftover's folder may fail silently; it is tried again.
                failed = len(made) >= stop
            except CheckpointError as error:
                assert "No space left on device" in str(error)
        assert number_in(directory) in (1, 2)
        if failed and number_in(directory) == 1:
            assert folder.numbers(directory) == [0], made
    assert stop > 12


# Fuzz -------------------------------------------------------------------------------------------


WHOLE = Manifest(3, ((0, 1), (2,)), (manifest.File(10, "0" * 64), manifest.File(11, "f" * 64)))


@st.composite
def mutilated(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some of them changed, cut out or put in."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(out)))
        stop = start + draw(st.integers(0, 4))
        out[start:stop] = draw(st.binary(max_size=4))
    return bytes(out)


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | mutilated(WHOLE.text())
    | st.tuples(st.sampled_from(["nodes", "files", "number", "version"]), json_values).map(
        lambda change: json.dumps({**json.loads(WHOLE.text()), change[0]: change[1]}).encode()
    )
    | st.just(b"[" * 100_000)
)
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    try:
        found = manifest.parse(data, 3)
    except CheckpointError:
        return
    assert found == manifest.parse(found.text(), 3)
    assert sorted(r for ranks in found.nodes for r in ranks) == [*range(sum(map(len, found.nodes)))]
    assert len(found.files) == len(found.nodes)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_stands_in_the_newest_manifest_the_older_checkpoint_is_found(
    tmp_path: Path, data: st.DataObject
) -> None:
    if not folder.numbers(tmp_path):
        saved(tmp_path, 1)
        saved(tmp_path, 2)
        (tmp_path / "whole").write_bytes((tmp_path / name_of(1) / "manifest.json").read_bytes())
    whole = (tmp_path / "whole").read_bytes()
    key = data.draw(st.sampled_from(["nodes", "files", "number", "version", "format", "more"]))
    known = json.loads(whole)
    part = data.draw(st.sampled_from(["name", "bytes", "sha256"]))
    changed = json_values.map(lambda v: {**known, key: v}) | json_values.map(
        lambda v: {**known, "files": [{**known["files"][0], part: v}]}
    )
    found = data.draw(
        st.binary(max_size=99) | mutilated(whole) | changed.map(lambda v: json.dumps(v).encode())
    )
    (tmp_path / name_of(1) / "manifest.json").write_bytes(found)
    # What does not concern the values, such as who wrote it, may differ.
    assert number_in(tmp_path) in (1, 2)
    if not found.strip().startswith(b"{"):
        assert number_in(tmp_path) == 1


def node_file() -> bytes:
    mine = content(4)()
    kinds = [(n, t.kind) for n, t in zip(mine.names, mine.tensors, strict=True)]
    text = json.dumps({"tree": mine.tree, "tensors": list(mine.names)})
    header = tensors.lay_out(kinds, {"rank0": text})
    return header.data + b"".join(t.data.tobytes() for t in mine.tensors)


FILE = node_file()
HEADER = json.loads(FILE[8 : tensors.header_length(FILE[:8], len(FILE))])


def with_header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + FILE[-328:]


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=100)
    | mutilated(FILE)
    | st.tuples(st.sampled_from([*HEADER, "more"]), json_values).map(
        lambda change: with_header({**HEADER, change[0]: change[1]})
    )
    | st.tuples(
        st.sampled_from([name for name in HEADER if name != "__metadata__"]),
        st.sampled_from(["dtype", "shape", "data_offsets"]),
        json_values,
    ).map(lambda c: with_header({**HEADER, c[0]: {**HEADER[c[0]], c[1]: c[2]}}))
    | json_values.map(lambda v: with_header({**HEADER, "__metadata__": {"rank0": json.dumps(v)}}))
    | json_values.map(
        lambda v: with_header(
            {**HEADER, "__metadata__": {"rank0": json.dumps({"tree": v, "tensors": ["a"]})}}
        )
    )
    | st.just((1 << 62).to_bytes(8, "little"))
    | st.just(with_header({"a": {"dtype": "F32", "shape": [1 << 40] * 64, "data_offsets": [0, 1]}}))
)
def test_any_bytes_are_a_whole_state_or_refused(tmp_path: Path, data: bytes) -> None:
    """Whatever stands in a file whose size and digest the manifest confirms."""
    path = tmp_path / name_of(3)
    path.mkdir(exist_ok=True)
    (path / NODE).write_bytes(data)
    found = job.Found(tmp_path, replace(WHOLE, nodes=((0,),), files=WHOLE.files[:1]))
    try:
        state = state_of(found, 0, 0, lambda t: t)
    except CheckpointError:
        return
    for tensor in leaves(state):
        assert tensor.data.nbytes == tensor.kind.nbytes


def altered(name: str, **changes: Any) -> bytes:
    return with_header({**HEADER, name: {**HEADER[name], **changes}})


def saying(**entry: Any) -> bytes:
    return with_header({**HEADER, "__metadata__": {"rank0": json.dumps(entry)}})


FOREIGN = {
    "speaks of [0-9]+ bytes, and the file has": FILE + b"x",
    "a file of 5 bytes cannot have a header": FILE[:5],
    "cannot have a header of 1000000": (10**6).to_bytes(8, "little") + FILE[8:],
    "leave gaps or overlap, at 'a'": altered("a", data_offsets=[1, 281]),
    "leave gaps or overlap, at 'b/0'": altered("b/0", data_offsets=[272, 320]),
    "tensor of dtype 'F31'": altered("a", dtype="F31"),
    "without a proper shape": altered("a", shape=[-70]),
    "an entry that is no tensor": altered("a", more=1),
    "texts are damaged": with_header({**HEADER, "__metadata__": {"rank0": 1}}),
    "a name stands twice": FILE.replace(b'"7/empty"', b'"a"      '),
    "does not say what rank 0 of its node had": with_header({**HEADER, "__metadata__": {}}),
    "the file lacks tensors of rank 0": saying(tree=None, tensors=["a", "c"]),
    "tree is damaged: tensor 1 of 1": saying(tree={"tensor": 1}, tensors=["a"]),
    "tree is damaged: an entry of kind 'set'": saying(tree={"set": []}, tensors=[]),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_file_that_is_none_of_ours_is_refused(message: str, tmp_path: Path) -> None:
    (tmp_path / name_of(3)).mkdir()
    (tmp_path / name_of(3) / NODE).write_bytes(FOREIGN[message])
    found = job.Found(tmp_path, replace(WHOLE, nodes=((0,),), files=WHOLE.files[:1]))
    with pytest.raises(CheckpointError, match=message):
        state_of(found, 0, 0, lambda t: t)


def leaves(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    for inner in state.values() if isinstance(state, dict) else ():
        yield from leaves(inner)
    for inner in state if isinstance(state, list | tuple) else ():
        yield from leaves(inner)


plain_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(plain_values)
def test_plain_state_comes_back_as_it_was(value: Any) -> None:
    tree, named = flatten(value, np.ndarray)
    assert not named
    again = unflatten(json.loads(json.dumps(tree)), 0, lambda i: i)
    assert again == value
    assert repr(again) == repr(value)


def test_what_is_not_plain_is_refused_by_name() -> None:
    for value, message in (
        ({"a": [object()]}, "^a/0 is a object; only tensors"),
        ({"a": {1.5: 2}}, "^a: the key 1.5 is neither"),
        ({"rate": np.float32(1)}, "^rate is a float32"),
    ):
        with pytest.raises(CheckpointError, match=message):
            flatten(value, np.ndarray)
