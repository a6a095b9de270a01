"""The gossip's state as plain values: what ``state_dict`` holds, checked before it is used.

Numbers, strings, lists and flat ``uint8`` arrays; nothing that would have to be unpickled. An
exchange in flight is kept as what this rank has sent: since a round is a function of its number,
every rank sends the same once more after a restart, and receives what it would have received.
So saving waits for nobody and changes nothing, and a restart goes on to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from gossip_hvd.engine import Engine
from gossip_hvd.errors import CheckpointError
from gossip_hvd.lowering import Posted, posted_bytes
from gossip_hvd.methods.contract import Context, State, restored
from gossip_hvd.segments import Layout
from gossip_hvd.transport import Bytes

VERSION = 1

LARGEST = 1 << 53
"""Whole numbers of a state are smaller: no round, seed or period comes near."""

REMEDY = (
    "Build the same model, optimizer and method on the same nodes, or restore with merge=True, "
    "which starts all nodes from their mean."
)


@dataclass(frozen=True)
class Saved:
    """A state that fits its engine.

    Attributes:
        round: rounds posted.
        state: the method's.
        begun: whether the method's arrays have their first values.
        loss: last reported.
        rates: last reported.
        arrays: the method's own arrays, by name; this rank's share, empty where not its own.
        replicas: those that are whole on every rank, likewise.
        posted: what the exchange in flight had sent; None where there was none.
    """

    round: int
    state: State
    begun: bool
    loss: float | None
    rates: float | list[float] | None
    arrays: dict[str, Bytes]
    replicas: dict[str, Bytes]
    posted: Posted | None


def plain_state(engine: Engine) -> dict[str, Any]:
    """All that an engine must know to go on, as plain values and copies of arrays.

    Call it where no round is owed.
    """
    assert not engine.owed, "pay first: peers wait for a round"
    seat, posted = engine.seat, engine.posted
    rates = seat.rates
    return {
        "version": VERSION,
        "method": engine.method.name,
        "options": engine.method.options(),
        "seed": engine.state.seed,
        "nodes": [list(ranks) for ranks in seat.cluster.nodes],
        "rank": seat.rank,
        "layout": fingerprint(seat.layout),
        "round": engine.number,
        "state": asdict(engine.state),
        "mass": engine.method.mass(engine.state, engine.number),
        "begun": engine.begun,
        "loss": engine.loss,
        "rates": list(rates) if isinstance(rates, Sequence) else rates,
        "arrays": {name: array.copy() for name, array in seat.arrays.items()},
        "replicas": {name: array.copy() for name, array in seat.replicas.items()},
        "in_flight": None
        if posted is None
        else {**_wire(engine), "note": posted.note.tolist(), "values": posted.values},
    }


def set_state(engine: Engine, saved: Saved) -> None:
    """Let a drained engine go on from a saved state; all ranks must call."""
    seat = engine.seat
    engine.number, engine.state, engine.begun = saved.round, saved.state, saved.begun
    engine.loss, seat.rates = saved.loss, saved.rates
    for mine, theirs in ((seat.arrays, saved.arrays), (seat.replicas, saved.replicas)):
        for name, array in theirs.items():
            np.copyto(mine[name], array)
    if saved.posted is not None:
        engine.post_again(saved.posted)


def begin_at(engine: Engine, number: int) -> None:
    """Count on from round ``number`` with the method's state of the first round."""
    if type(number) is not int or not 0 <= number < LARGEST:
        raise CheckpointError(f"the saved state's round is {number!r:.40}.")
    state = engine.state
    engine.number, engine.begun = number, False
    engine.state = engine.method.start(state.nodes, state.segments, state.seed)


def fingerprint(layout: Layout) -> str:
    """A text that is equal for models of equal tensors, cut into equal segments.

    Names do not count: Keras numbers layers on from model to model.
    """
    fields = [(f.dtype, f.size) for f in layout.fields]
    spans = [(s.start, s.stop) for s in layout.segments]
    digest = hashlib.sha256(json.dumps([fields, layout.offsets, spans]).encode()).hexdigest()
    return (
        f"{len(layout.fields)} parameters, {len(layout.segments)} segments, {layout.nbytes} bytes, "
        f"{digest[:16]}"
    )


def _wire(engine: Engine) -> dict[str, Any]:
    """What the bytes of an exchange in flight depend on."""
    seat = engine.seat
    return {
        "timing": engine.timing,
        "wire_dtype": seat.wire_dtype,
        "chunk_bytes": seat.largest,
        "nodes": [list(ranks) for ranks in seat.cluster.nodes],
    }


# Reading ---------------------------------------------------------------------------------------


def checked(plain: Any, engine: Engine) -> Saved:
    """A saved state, once everything in it fits this engine.

    Args:
        plain: what ``plain_state`` made, perhaps in another process, perhaps damaged since.
        engine: which will go on from it.

    Raises:
        CheckpointError: names the first entry that is missing, damaged or does not fit.
    """
    if not isinstance(plain, Mapping):
        raise CheckpointError(f"a saved state is a dictionary, and this is a {_kind(plain)}.")
    version = _take(plain, "version", int)
    if version != VERSION:
        raise CheckpointError(
            f"a saved state of version {version}; this gossip_hvd reads version {VERSION}."
        )
    seat, method = engine.seat, engine.method
    nodes = [list(ranks) for ranks in seat.cluster.nodes]
    expected = {
        "method": method.name,
        "options": method.options(),
        "layout": fingerprint(seat.layout),
        "nodes": nodes,
        "seed": engine.state.seed,
    }
    differs = "the saved state differs in its {key}: saved {there}, here {here}. " + REMEDY
    _require_same(plain, expected, differs)
    number = _take(plain, "round", int)
    if not 0 <= number < LARGEST:
        raise CheckpointError(f"the saved state's round is {number}.")
    own = _own(plain, seat.rank)
    state = _take(plain, "state", Mapping)
    _require_state(engine.state, state, "state")
    begun = _take(plain, "begun", bool)
    return Saved(
        number,
        restored(engine.state, state),
        begun and own,
        _number_or_none(plain, "loss"),
        _rates(plain, len(seat.layout.fields)),
        _arrays(plain, "arrays", seat.arrays) if own else {},
        _arrays(plain, "replicas", seat.replicas) if own else {},
        _posted(plain, engine, number, state),
    )


def _require_same(plain: Mapping[str, Any], expected: Mapping[str, Any], differs: str) -> None:
    """Refuse another value than expected, in the words of ``differs``."""
    for key, value in expected.items():
        there, here = _text(_take(plain, key, object)), _text(value)
        if there != here:
            raise CheckpointError(differs.format(key=key, there=there[:300], here=here[:300]))


def _own(plain: Mapping[str, Any], rank: int) -> bool:
    """Whether the state is this rank's; that of another is refused where ranks' states differ."""
    theirs = _take(plain, "rank", int)
    if theirs == rank:
        return True
    differs = [key for key in ("arrays", "replicas", "in_flight") if plain.get(key)]
    if differs or plain.get("mass") != 1.0:
        raise CheckpointError(
            f"this is the state of rank {theirs}, loaded by rank {rank}, and it holds what each "
            f"rank has of its own ({', '.join(differs or ['mass'])}): let every rank save and "
            "load its own, as save_checkpoint and restore do."
        )
    return False


def _require_state(start: Any, plain: Any, where: str) -> None:
    """Refuse values that are not of the kinds that a method's state has."""
    if is_dataclass(start):
        names = [f.name for f in fields(start)]
        if not isinstance(plain, Mapping) or set(plain) != set(names):
            raise CheckpointError(f"the saved {where} is not one of {type(start).__name__}.")
        for name in names:
            _require_state(getattr(start, name), plain[name], f"{where}.{name}")
            if name in ("nodes", "segments", "seed") and plain[name] != getattr(start, name):
                raise CheckpointError(f"the saved {where}.{name} is {plain[name]!r}. {REMEDY}")
        return
    if isinstance(start, tuple):
        if not isinstance(plain, list | tuple) or len(plain) != len(start):
            raise CheckpointError(f"the saved {where} has not {len(start)} entries.")
        for i, (one, value) in enumerate(zip(start, plain, strict=True)):
            _require_state(one, value, f"{where}[{i}]")
        return
    fits = _is_number(plain) if _is_number(start) else type(plain) is type(start)
    if not fits:
        raise CheckpointError(f"the saved {where} is a {_kind(plain)}, not a {_kind(start)}.")


def _arrays(plain: Mapping[str, Any], key: str, mine: Mapping[str, Bytes]) -> dict[str, Bytes]:
    theirs = _take(plain, key, Mapping)
    if set(theirs) != set(mine):
        raise CheckpointError(
            f"the saved {key} are {sorted(map(str, theirs))}, here they are {sorted(mine)}."
        )
    return {n: _array(theirs[n], mine[n].nbytes, f"{key}[{n!r}]") for n in mine}


def _array(value: Any, nbytes: int, where: str) -> Bytes:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape != (nbytes,):
        shape = getattr(value, "shape", "")
        raise CheckpointError(
            f"the saved {where} is a {_kind(value)} {shape}, expected {nbytes} bytes."
        )
    return value


def _posted(
    plain: Mapping[str, Any], engine: Engine, number: int, state: Mapping[str, Any]
) -> Posted | None:
    entry = _take(plain, "in_flight", object)
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"the saved in_flight is a {_kind(entry)}.")
    differs = (
        "an exchange was in flight with {key}={there}, here it is {here}. Use the same, or save "
        "with drain=True."
    )
    _require_same(entry, _wire(engine), differs)
    note = _take(entry, "note", list)
    after, method = restored(engine.state, state), engine.method
    plan = method.plan(after, max(0, number - 1), engine.seat.node)
    numbers = len(note) == len(method.note(after, plan.number, Context()))
    numbers = numbers and all(map(_is_number, note))
    if number < 1 or not engine.flies_late(plan) or not numbers:
        raise CheckpointError(f"the saved in_flight does not fit round {number - 1}.")
    values = _array(entry.get("values"), posted_bytes(engine.seat, plan), "in_flight['values']")
    return Posted(np.asarray(note, np.float64), values)


def _rates(plain: Mapping[str, Any], count: int) -> float | list[float] | None:
    rates = _take(plain, "rates", object)
    if isinstance(rates, list) and len(rates) == count and all(map(_is_number, rates)):
        return [float(rate) for rate in rates]
    if isinstance(rates, list):
        raise CheckpointError(f"the saved rates are not {count} numbers.")
    return _number_or_none(plain, "rates")


def _number_or_none(plain: Mapping[str, Any], key: str) -> float | None:
    value = _take(plain, key, object)
    if value is None:
        return None
    if not _is_number(value):
        raise CheckpointError(f"the saved {key} is a {_kind(value)}, not a number.")
    return float(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < LARGEST
    return isinstance(value, float)


def _take(plain: Mapping[str, Any], key: str, kind: Any) -> Any:
    if key not in plain:
        raise CheckpointError(f"the saved state has no {key!r}: it is damaged, or none of ours.")
    value = plain[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"the saved {key} is a {_kind(value)}, not a {kind.__name__}.")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__


def _text(value: Any) -> str:
    """The same for values that are the same but for JSON's keys and lists."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{k}: {_text(v)}" for k, v in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value)
