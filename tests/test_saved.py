"""The gossip's state: a job goes on to the bit from the midst of an exchange; damage is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import CASES, ROWS, SLOTS, Quadratic, simulation, train

from gossip_hvd.errors import CheckpointError
from gossip_hvd.rounds import WEIGHTS
from gossip_hvd.saved import checked, plain_state, set_state
from gossip_hvd.simulate import Simulation

BEFORE, AFTER = 5, 4


def state_of(sim: Simulation) -> list[Any]:
    """All that a run has come to, to the bit."""
    return [
        *(sim.values(rank, slot).tobytes() for rank in range(sim.cluster.size) for slot in SLOTS),
        *(sim.values(rank).tobytes() for rank in range(sim.cluster.size)),
        *({n: a.tobytes() for n, a in e.seat.arrays.items()} for e in sim.engines),
        *({n: a.tobytes() for n, a in e.seat.replicas.items()} for e in sim.engines),
        *((e.number, e.state, e.begun) for e in sim.engines),
    ]


def through_json(saved: dict[str, Any]) -> dict[str, Any]:
    """As a file gives it back: arrays apart, all else through JSON."""
    arrays: list[Any] = []

    def apart(value: Any) -> int:
        arrays.append(value)
        return len(arrays) - 1

    text = json.dumps(saved, default=apart)
    plain = json.loads(text)
    for kind in ("arrays", "replicas"):
        plain[kind] = {name: arrays[i] for name, i in plain[kind].items()}
    if plain["in_flight"]:
        plain["in_flight"]["values"] = arrays[plain["in_flight"]["values"]]
    return plain


def resumed(sim: Simulation, make: Callable[..., Simulation]) -> Simulation:
    """Another job that goes on from this one's states."""
    other = make(order=99)
    for rank in range(sim.cluster.size):
        for slot in (WEIGHTS, *SLOTS):
            other.values(rank, slot)[...] = sim.values(rank, slot)
    states = [through_json(plain_state(engine)) for engine in sim.engines]
    found = [checked(s, engine) for s, engine in zip(states, other.engines, strict=True)]
    for engine, one in zip(other.engines, found, strict=True):
        set_state(engine, one)
    return other


@pytest.mark.parametrize(("name", "timing"), CASES)
@pytest.mark.parametrize(("n", "wire_dtype"), [(2, None), (4, "bfloat16"), (5, None)])
def test_a_run_goes_on_to_the_bit_from_the_midst_of_an_exchange(
    name: str, timing: str, n: int, wire_dtype: str | None
) -> None:
    row, task = ROWS[name], Quadratic.draw(n, 1.0)
    if row.even and n % 2:
        return

    def make(**options: Any) -> Simulation:
        return simulation(row, n, timing, wire_dtype=wire_dtype, largest=64, **options)

    whole, begun = make(), make(order=1)
    for t in range(BEFORE):
        train(whole, row, task, t)
        train(begun, row, task, t)
    flying = [engine.in_flight for engine in begun.engines]
    assert flying[0] == (timing == "awc") or row.method.when(BEFORE) == "reduction"
    assert len(set(flying)) == 1
    other = resumed(begun, make)
    for t in range(BEFORE, BEFORE + AFTER):
        train(whole, row, task, t)
        train(begun, row, task, t)
        train(other, row, task, t)
    for sim in (whole, begun, other):
        sim.drain()
    assert state_of(whole) == state_of(begun), "saving changes nothing"
    assert state_of(whole) == state_of(other)


@pytest.mark.parametrize("name", ["gossip", "crossover", "ceca", "sgp uneven"])
def test_a_state_may_be_taken_however_far_the_exchange_has_come(name: str) -> None:
    """Whatever has arrived at whom, what was sent is all that matters."""
    row, n = ROWS[name], 4
    task = Quadratic.draw(n, 1.0)

    def make(**options: Any) -> Simulation:
        return simulation(row, n, "awc", largest=64, **options)

    whole = make()
    for t in range(2 * BEFORE):
        train(whole, row, task, t)
    whole.drain()
    for polls in range(0, 60, 4):
        part = make(order=polls)
        for t in range(BEFORE):
            train(part, row, task, t)
        for i in range(polls):
            part.engines[i * i % part.cluster.size].poll()
        other = resumed(part, make)
        for t in range(BEFORE, 2 * BEFORE):
            train(other, row, task, t)
        other.drain()
        assert state_of(whole) == state_of(other), polls


# Damage ----------------------------------------------------------------------------------------


def engine_and_state() -> tuple[Any, dict[str, Any]]:
    row = ROWS["ceca"]
    sim = simulation(row, 4, "awc")
    for t in range(3):
        train(sim, row, Quadratic.draw(4, 1.0), t)
    return sim.engines[0], plain_state(sim.engines[0])


def nested_engine_and_state() -> tuple[Any, dict[str, Any]]:
    row = ROWS["gossip_aga"]
    sim = simulation(row, 4, "awc")
    for t in range(4):
        train(sim, row, Quadratic.draw(4, 1.0), t)
    return sim.engines[0], plain_state(sim.engines[0])


ENGINES = [engine_and_state(), nested_engine_and_state()]

anything: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(np.zeros(3, np.uint8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every entry of nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    found = [path] if path else []
    return found + [p for key, inner in items for p in places(inner, (*path, key))]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_damage_to_a_state_is_named_or_harmless(data: st.DataObject) -> None:
    engine, state = data.draw(st.sampled_from(ENGINES))
    state = copy.deepcopy(state)
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(state)))
        inside = state
        for key in way:
            inside = inside[key]
        if data.draw(st.booleans()):
            del inside[last]
        else:
            inside[last] = data.draw(anything)
    try:
        found = checked(state, engine)
    except CheckpointError:
        return
    assert isinstance(found.round, int)
    assert kinds(found.state) == kinds(engine.state)


def kinds(state: Any) -> Any:
    """The classes and kinds of a state, all numbers alike."""
    if is_dataclass(state):
        return type(state), [kinds(getattr(state, f.name)) for f in fields(state)]
    return float if type(state) in (int, float) else type(state)


@given(anything)
def test_what_is_no_state_at_all_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        checked(value, ENGINES[0][0])


def test_a_refusal_names_what_differs() -> None:
    engine, state = ENGINES[0]
    cases = {
        "version 2; this gossip_hvd reads version 1": {"version": 2},
        "differs in its method: saved 'sgp', here 'ceca'": {"method": "sgp"},
        "differs in its options": {"options": {"ports": 1}},
        "differs in its nodes": {"nodes": [[0], [1]]},
        "differs in its layout": {"layout": "another"},
        "differs in its seed": {"seed": 8},
        "state of rank 5, loaded by rank 0, and it holds .*arrays, in_flight": {"rank": 5},
        "has no 'round'": None,
        "in flight with chunk_bytes=64": {"in_flight": {**state["in_flight"], "chunk_bytes": 64}},
        "the saved state.nodes is 5": {"state": {**state["state"], "nodes": 5}},
        "the saved state.seed is a str, not a int": {"state": {**state["state"], "seed": "7"}},
        "the saved state is not one of State": {"state": {"nodes": 4}},
        "the saved arrays are .., here they are .'others'.": {"arrays": {}},
        "the saved loss is a list, not a number": {"loss": []},
        "does not fit round 2": {"in_flight": {**state["in_flight"], "note": [1.0]}},
    }
    for message, change in cases.items():
        damaged = {**state, **(change or {})}
        if change is None:
            del damaged["round"]
        with pytest.raises(CheckpointError, match=message):
            checked(damaged, engine)


def test_the_state_of_another_rank_serves_where_all_ranks_have_the_same() -> None:
    row = ROWS["crossover"]
    sim = simulation(row, 4, "atc")
    for t in range(3):
        train(sim, row, Quadratic.draw(4, 1.0), t)
    found = checked(plain_state(sim.engines[0]), sim.engines[3])
    assert (found.round, found.begun) == (3, False)
