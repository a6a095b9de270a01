"""Schedules by epoch, and the learning rate of Crossover-SGD's recipe."""

from __future__ import annotations

import pytest

from gossip_hvd.errors import ConfigError
from gossip_hvd.methods import Gossip, Schedule
from gossip_hvd.schedules import by_epoch, warm_up_and_decay


def test_epochs_become_rounds_of_peers_and_phases() -> None:
    peers = by_epoch({0: 2, 30: 1}, 7)
    assert peers == {0: 2, 210: 1}
    method = Gossip(peers=peers)
    state = method.start(8, 1, 0)
    met = [len(method.plan(state, number, 0).stages[0].receives) for number in (0, 209, 210, 999)]
    assert met == [2, 2, 1, 1]
    phases = by_epoch({0: "allreduce", 2: "crossover"}, 3)
    assert [Schedule(phases).phase(number)[2].name for number in (0, 5, 6)] == [
        "allreduce",
        "allreduce",
        "crossover",
    ]
    with pytest.raises(ConfigError, match="0 rounds"):
        by_epoch(peers, 0)


def test_the_recipe_warms_up_decays_and_holds() -> None:
    steps = 10
    assert warm_up_and_decay(0, steps) == 0
    assert warm_up_and_decay(180, steps) == 0.5
    assert warm_up_and_decay(360, steps) == 1
    # The 27th of 52 epochs of decay: (1 − 0.0025) (1 − 26 / 52)^2.2 + 0.0025.
    assert warm_up_and_decay(620, steps) == pytest.approx(0.9975 * 0.5**2.2 + 0.0025)
    assert {warm_up_and_decay(step, steps) for step in (880, 890, 900, 2000)} == {0.0025}
    factors = [warm_up_and_decay(step, steps) for step in range(360, 900)]
    assert factors == sorted(factors, reverse=True)
    with pytest.raises(ConfigError, match="no time to decay"):
        warm_up_and_decay(0, steps, epochs=38)
