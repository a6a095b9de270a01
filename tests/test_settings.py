"""Settings: arguments beat the environment, which beats defaults; bad text and names are named."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip_hvd.errors import ConfigError, GossipError, unknown
from gossip_hvd.options import EngineOptions
from gossip_hvd.settings import LONGEST, PREFIX, SCOPES, VARIABLES, refuse_unknown, setting

GOOD = {
    "SCOPE": "world",
    "NODE_SIZE": "2",
    "METHOD": "gossip",
    "SEED": "-5",
    "STALL_TIMEOUT": "2.5",
}
PARSED = {"SCOPE": "world", "NODE_SIZE": 2, "METHOD": "gossip", "SEED": -5, "STALL_TIMEOUT": 2.5}
BAD = [
    ("NODE_SIZE", "0"),
    ("NODE_SIZE", "-1"),
    ("NODE_SIZE", "two"),
    ("NODE_SIZE", ""),
    ("NODE_SIZE", "1.5"),
    ("SEED", "x"),
    ("STALL_TIMEOUT", "0"),
    ("STALL_TIMEOUT", "-3"),
    ("STALL_TIMEOUT", "nan"),
    ("STALL_TIMEOUT", "inf"),
    ("STALL_TIMEOUT", "soon"),
    ("STALL_TIMEOUT", "1e10"),
    ("STALL_WARNING", "never"),
    ("SCOPE", "World"),
    ("METHOD", "gosip"),
    ("RECORD_DIR", ""),
]


@pytest.mark.parametrize("name", sorted(VARIABLES))
def test_argument_before_environment_before_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setting(name) == VARIABLES[name].default
    if name in GOOD:
        assert setting(name, environ={PREFIX + name: GOOD[name]}) == PARSED[name]
        monkeypatch.setenv(PREFIX + name, GOOD[name])
        assert setting(name) == PARSED[name]
    argument = object()
    assert setting(name, argument) is argument


@pytest.mark.parametrize(("name", "text"), BAD)
def test_bad_text_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        setting(name, environ={PREFIX + name: text})
    sentence = str(caught.value)
    assert f"{PREFIX}{name}={text!r}" in sentence
    assert VARIABLES[name].expected in sentence
    assert caught.value.__suppress_context__


texts = (
    st.text(max_size=20)
    | st.binary(max_size=20).map(os.fsdecode)  # as Python shows bytes that are no UTF-8
    | st.integers().map(str)
    | st.floats().map(str)
    | st.from_regex(r"[-+]?[0-9_]{1,30}([.eE][-+]?[0-9]{0,5})?", fullmatch=True)
    | st.sampled_from(["never", "9" * 5000, "x" * 100_000, *SCOPES, "crossover"])
)


@settings(max_examples=1000)
@given(st.sampled_from(sorted(VARIABLES)), texts)
def test_any_text_is_a_value_or_an_error_that_names_the_variable(name: str, text: str) -> None:
    try:
        value = setting(name, environ={PREFIX + name: text})
    except ConfigError as error:
        assert str(error).startswith(f"{PREFIX}{name}=")
        assert VARIABLES[name].expected in str(error)
        assert len(str(error)) < 600
        return
    if isinstance(value, float):
        assert 0 < value <= LONGEST or text == "never"
    assert type(value) in (str, int, float)
    assert value != ""


@given(st.dictionaries(st.text(max_size=30).map(lambda t: PREFIX[: len(t)] + t) | st.text(), texts))
def test_any_environment_is_known_or_refused_by_name(environ: dict[str, str]) -> None:
    foreign = [k for k in environ if k.startswith(PREFIX) and k[len(PREFIX) :] not in VARIABLES]
    try:
        refuse_unknown(environ)
    except ConfigError as error:
        assert repr(foreign[0]) in str(error)
        return
    assert not foreign


def test_an_argument_makes_bad_text_harmless() -> None:
    assert setting("NODE_SIZE", 3, {PREFIX + "NODE_SIZE": "two"}) == 3


def test_zero_is_an_argument() -> None:
    assert setting("SEED", 0, {PREFIX + "SEED": "9"}) == 0


def test_every_variable_says_what_it_expects_and_means() -> None:
    for name, variable in VARIABLES.items():
        assert name == name.upper()
        assert variable.expected
        assert variable.meaning


def test_unknown_variables_are_refused_with_the_nearest() -> None:
    refuse_unknown({PREFIX + name: text for name, text in GOOD.items()} | {"HOROVOD_RANK": "1"})
    with pytest.raises(ConfigError, match=r"'GOSSIP_HVD_NODESIZE'.*mean 'GOSSIP_HVD_NODE_SIZE'"):
        refuse_unknown({"GOSSIP_HVD_NODESIZE": "2"})


def test_unknown_variables_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unknown()
    monkeypatch.setenv("GOSSIP_HVD_SEEDS", "1")
    with pytest.raises(ConfigError, match="mean 'GOSSIP_HVD_SEED'"):
        refuse_unknown()


def test_unknown_names_all_that_exist_and_the_nearest() -> None:
    error = unknown("fruit", "aple", ["pear", "apple"])
    assert str(error) == "unknown fruit 'aple': known are apple, pear; did you mean 'apple'?"
    assert isinstance(error, GossipError)
    assert isinstance(error, ValueError)
    assert str(unknown("fruit", "aple", [])).startswith("unknown fruit 'aple'")


# The engine's options --------------------------------------------------------------------------


def test_engine_options_are_taken_out_and_the_methods_left() -> None:
    options = {"timing": "awc", "peers": "fair", "staleness": 2, "seed": 5}
    made = EngineOptions.take(options)
    assert (made.timing, made.staleness, made.seed) == ("awc", 2, 5)
    assert options == {"peers": "fair"}
    assert EngineOptions.take({}) == EngineOptions()


def test_the_seed_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSIP_HVD_SEED", "12")
    assert EngineOptions.take({}).seed == 12
    assert EngineOptions.take({"seed": 3}).seed == 3
    assert EngineOptions.take({"seed": 0}).seed == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timing": "acw"}, "unknown timing 'acw': known are atc, awc; did you mean 'awc'?"),
        ({"wire_dtype": "float15"}, "did you mean 'float16'?"),
        ({"wire_dtype": "float32"}, "unknown wire_dtype 'float32'"),
        ({"staleness": -1, "timing": "awc"}, "staleness=-1"),
        ({"staleness": 1}, "staleness=1 with timing='atc'"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"chunk_bytes": 63}, "chunk_bytes=63"),
        ({"chunk_bytes": 2**31}, f"chunk_bytes={2**31}"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        EngineOptions.take(options)


def test_messages_are_larger_where_all_nodes_are_on_one_host() -> None:
    left_open, given = EngineOptions.take({}), EngineOptions.take({"chunk_bytes": 1 << 12})
    assert [left_open.over(hosts).largest for hosts in (1, 2, 8)] == [1 << 22, 1 << 18, 1 << 18]
    assert [given.over(hosts).largest for hosts in (1, 2)] == [1 << 12] * 2
    assert left_open.over(1).over(2) == left_open.over(1), "decided once"


@pytest.mark.parametrize("chunk_bytes", [65, 100, 1_000_001])
def test_chunks_that_would_cut_an_element_are_refused_or_rounded(chunk_bytes: int) -> None:
    try:
        made = EngineOptions.take({"chunk_bytes": chunk_bytes})
    except ConfigError:
        return
    assert made.chunk_bytes % 64 == 0
