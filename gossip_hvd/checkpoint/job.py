"""What all ranks do together: write one checkpoint, or find the newest that is whole everywhere.

Every rank hands over a tree and its tensors. The ranks of a node hold equal values but for a few
(random generators, batch norm's statistics, shares of a method's arrays): a tensor that several
of them hold is written once. All write into one file, each its own tensors; the first rank of the
node makes the file, reads it back and names it. After each stage all ranks hear whether it went
well everywhere, so that a full disk on one node is an error on all and leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gossip_hvd.agreement import Gatherer, require_success
from gossip_hvd.checkpoint import folder, tensors
from gossip_hvd.checkpoint.folder import Draft, Reader
from gossip_hvd.checkpoint.manifest import File, Manifest
from gossip_hvd.checkpoint.tensors import Header, Kind
from gossip_hvd.checkpoint.trees import unflatten
from gossip_hvd.errors import CheckpointError
from gossip_hvd.node import Cluster
from gossip_hvd.transport import Bytes

log = logging.getLogger("gossip_hvd")

SAVE, RESTORE = "save_checkpoint", "restore"
T = TypeVar("T")


@dataclass(frozen=True)
class Party:
    """This rank among all.

    Attributes:
        world: all ranks.
        cluster: the nodes.
    """

    world: Gatherer
    cluster: Cluster

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.cluster.node_of(self.world.rank)

    @property
    def place(self) -> int:
        """This rank's position in its node."""
        return self.cluster.nodes[self.node].index(self.world.rank)

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its node."""
        return self.place == 0

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Do something on every rank; all must call.

        Args:
            what: for errors.
            action: may fail with an ``OSError`` or a ``CheckpointError``.

        Raises:
            CheckpointError: on every rank, where one has failed.
        """
        failure = ""
        try:
            result = action()
        except OSError as error:
            failure = f"{error.filename or 'the disk'}: {error.strerror or error}."
        except CheckpointError as error:
            failure = str(error)
        require_success(self.world, what, failure)
        return result

    def leaders(self, what: str, action: Callable[[], T]) -> T | None:
        """As ``together``, done by the first rank of each node."""
        return self.together(what, action if self.leads else lambda: None)


@dataclass(frozen=True)
class Tensor:
    """A tensor as bytes.

    Attributes:
        kind: its dtype and shape.
        data: its values.
    """

    kind: Kind
    data: Bytes


@dataclass(frozen=True)
class Content:
    """What one rank saves.

    Attributes:
        tree: of ``trees.flatten``.
        names: of the tree's tensors, by their number.
        tensors: likewise.
    """

    tree: Any
    names: Sequence[str]
    tensors: Sequence[Tensor]


# Saving ----------------------------------------------------------------------------------------


def save(party: Party, directory: Path, content: Callable[[], Content], keep: int) -> Path:
    """Write one checkpoint; all ranks must call.

    Args:
        party: this rank among all.
        directory: one for all nodes, or one on each; all ranks of a node see the same.
        content: of this rank; called here so that its errors become everybody's.
        keep: how many finished checkpoints to keep.

    Raises:
        CheckpointError: on every rank, where one of them cannot write; older checkpoints are left
            as they were.
    """
    mine, seen = party.together(SAVE, lambda: (content(), folder.numbers(directory)))
    said = _tell(party, mine, max(seen, default=-1))
    number = 1 + max(one["newest"] for one in said)
    header, places = _lay_out([said[rank] for rank in party.cluster.nodes[party.node]])
    draft = Draft(directory, number, party.node)
    pieces = (
        (header.places[name], mine.tensors[i].data) for i, name in places[party.place].items()
    )
    try:
        party.leaders(SAVE, lambda: draft.create(header))
        party.together(SAVE, lambda: draft.write(pieces))
        found = party.leaders(SAVE, lambda: (draft.finish(), folder.finished(directory)))
        files, everywhere = _files(party, found)
        whole = Manifest(number, party.cluster.nodes, files)
        party.leaders(SAVE, lambda: draft.commit(whole))
    except CheckpointError:
        # All ranks have agreed on it. After what one rank alone has met, an interrupt say, the
        # checkpoint may be whole, and others may be deleting the ones before.
        _forget(party, directory, number)
        raise
    party.leaders(SAVE, lambda: folder.prune(directory, number, keep, everywhere))
    return directory / folder.name_of(number)


def _tell(party: Party, mine: Content, newest: int) -> list[dict[str, Any]]:
    """What every rank is going to write, by rank."""
    alone = len(party.cluster.nodes[party.node]) == 1
    entries = [
        [name, t.kind.dtype, t.kind.shape, "" if alone else _digest(t.data)]
        for name, t in zip(mine.names, mine.tensors, strict=True)
    ]
    facts = {"newest": newest, "tree": mine.tree, "tensors": entries}
    letter = zlib.compress(json.dumps(facts).encode(), 1)
    return [json.loads(zlib.decompress(text)) for text in party.world.allgather(letter, SAVE)]


def _digest(data: Bytes) -> str:
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def _lay_out(ranks: Sequence[Mapping[str, Any]]) -> tuple[Header, list[dict[int, str]]]:
    """A node's file, and by rank which of its tensors it writes under which name."""
    kinds: dict[str, Kind] = {}
    known: dict[tuple[str, Kind], str] = {}
    places: list[dict[int, str]] = []
    texts = {}
    for place, rank in enumerate(ranks):
        used, own = [], {}
        for i, (name, dtype, shape, digest) in enumerate(rank["tensors"]):
            kind = Kind(dtype, tuple(shape))
            file_name = known.get((digest, kind)) if digest else None
            if file_name is None:
                file_name = name if place == 0 else f"rank{place}/{name}"
                while file_name in kinds:  # 1 and "1" are two keys
                    file_name += "'"
                kinds[file_name], own[i] = kind, file_name
                known[digest, kind] = file_name
            used.append(file_name)
        places.append(own)
        texts[f"rank{place}"] = json.dumps({"tree": rank["tree"], "tensors": used})
    return tensors.lay_out(kinds.items(), texts), places


def _files(party: Party, found: tuple[File, list[int]] | None) -> tuple[tuple[File, ...], set[int]]:
    """Every node's file as its first rank has seen it, and which checkpoints all nodes have."""
    said = None
    if found is not None:
        file, finished = found
        said = [file.nbytes, file.sha256, finished]
    every = [json.loads(t) for t in party.world.allgather(json.dumps(said).encode(), SAVE)]
    firsts = [every[ranks[0]] for ranks in party.cluster.nodes]
    files = tuple(File(nbytes, digest) for nbytes, digest, _ in firsts)
    return files, set.intersection(*(set(finished) for _, _, finished in firsts))


def _forget(party: Party, directory: Path, number: int) -> None:
    """Leave nothing of a checkpoint that has failed."""
    if party.leads:
        try:
            folder.remove(directory, number)
        except OSError as error:
            log.warning("gossip_hvd: %s stays unfinished: %s", folder.name_of(number), error)


# Restoring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole on all nodes.

    Attributes:
        directory: it is in.
        whole: its manifest.
    """

    directory: Path
    whole: Manifest

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.directory / folder.name_of(self.whole.number)

    def fits(self, cluster: Cluster) -> bool:
        """Whether it was written by a job of the same nodes."""
        return self.whole.nodes == cluster.nodes


def newest(party: Party, directory: Path) -> Found | None:
    """The newest checkpoint that is whole on every node; all ranks must call.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointError: where there are some and none of them is whole; says why for each.
    """
    mine = party.together(RESTORE, lambda: folder.numbers(directory))
    every = party.world.allgather(json.dumps(mine).encode(), RESTORE)
    candidates = sorted({n for text in every for n in json.loads(text)}, reverse=True)
    refused: list[str] = []
    for number in candidates:
        why = _verdict(party, directory, number)
        if not why:
            for line in refused if party.world.rank == 0 else ():
                log.warning("gossip_hvd: refused %s", line)
            manifest = partial(folder.read_manifest, directory, number)
            return Found(directory, party.together(RESTORE, manifest))
        refused.append(f"{folder.name_of(number)}: {why}")
    if refused:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole. Refused " + " ".join(refused)
        )
    return None


def _verdict(party: Party, directory: Path, number: int) -> str:
    """Why a checkpoint cannot be used; empty where all nodes can."""
    seen, failure = "", ""
    if party.leads:
        try:
            seen = _examined(party, directory, number)
        except CheckpointError as error:
            failure = str(error)
    mine = json.dumps([seen, failure]).encode()
    every = [json.loads(text) for text in party.world.allgather(mine, RESTORE)]
    for node, ranks in enumerate(party.cluster.nodes):
        if every[ranks[0]][1]:
            return f"on node {node}, {every[ranks[0]][1]}"
    if len({seen for seen, _ in every if seen}) > 1:
        return "its manifest is not the same on all nodes."
    return ""


def _examined(party: Party, directory: Path, number: int) -> str:
    """Look at the files that this node needs; returns the digest of the manifest."""
    whole = folder.read_manifest(directory, number)
    nodes = len(party.cluster.nodes)
    same = whole.nodes == party.cluster.nodes
    # A job of another shape needs all files: its nodes share the work of looking.
    for node in [party.node] if same else range(party.node, len(whole.nodes), nodes):
        folder.verify(directory, whole, node)
    return hashlib.sha256(whole.text()).hexdigest()


def state_of(found: Found, node: int, place: int, make: Callable[[Tensor], Any]) -> Any:
    """What a rank has saved.

    Args:
        found: the checkpoint.
        node: the rank's node.
        place: its position there.
        make: a tensor of the framework from bytes.

    Raises:
        CheckpointError: for a file that does not hold what ours do.
    """
    reader = Reader(found.directory, found.whole.number, node)
    try:
        tree, names = parts(reader.header, place)
        # Each has memory of its own, also where several were equal and written once.
        return unflatten(tree, len(names), lambda i: make(read(reader, names[i])))
    finally:
        reader.close()


def read(reader: Reader, name: str) -> Tensor:
    """A tensor of a file."""
    return Tensor(reader.header.places[name].kind, reader.read(name))


def parts(header: Header, place: int) -> tuple[Any, list[str]]:
    """A rank's tree and the names of its tensors.

    Raises:
        CheckpointError: for a file that does not hold what ours do.
    """
    try:
        entry = json.loads(header.texts.get(f"rank{place}", ""))
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or set(entry) != {"tree", "tensors"}:
        raise CheckpointError(f"the file does not say what rank {place} of its node had.")
    names = entry["tensors"]
    known = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if not known or not set(names) <= set(header.places):
        raise CheckpointError(f"the file lacks tensors of rank {place} of its node.")
    unflatten(entry["tree"], len(names), lambda _: None)
    return entry["tree"], names
