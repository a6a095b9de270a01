"""Every row of the methods' table with PyTorch's own optimizers, on real ranks.

The adapter brings learning rates, losses and the optimizers' histories to the methods; training
must be what the simulator makes of the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from rank import Rank
from ranks import Job, on_ranks
from rows import (
    BETA2,
    COLUMNS,
    EPSILON,
    MU,
    ROWS,
    SEED,
    SHAPE,
    SLOTS,
    TABLE,
    Quadratic,
    Row,
    losses_at,
    rate_at,
    sgd,
)

import gossip_hvd.torch as hvd
from gossip_hvd.node import Cluster
from gossip_hvd.rounds import GRADIENTS, MOMENTUM, VARIANCE, WEIGHTS
from gossip_hvd.simulate import Simulation

STEPS = 6
BLOCKS = {f"p{i}": block for i, (_, block) in enumerate(SHAPE)}
CUTS = np.cumsum([size for size, _ in SHAPE])[:-1]


def adam(rate: float, t: int) -> Callable[[Mapping[str, Any]], None]:
    """PyTorch's Adam, bias correction included."""

    def step(slots: Mapping[str, Any]) -> None:
        g, v, s = slots[GRADIENTS], slots[MOMENTUM], slots[VARIANCE]
        v[...] = MU * v + (1 - MU) * g
        s[...] = BETA2 * s + (1 - BETA2) * g**2
        scale = np.sqrt(s) / np.sqrt(1 - BETA2 ** (t + 1)) + EPSILON
        slots[WEIGHTS][...] -= rate / (1 - MU ** (t + 1)) * v / scale

    return step


class Model(torch.nn.Module):
    """The table's numbers as parameters, each a quadratic of its own."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, COLUMNS, dtype=torch.float64)
        for name, values in zip(BLOCKS, start.tensor_split(CUTS.tolist()), strict=True):
            self.register_parameter(name, torch.nn.Parameter(values.clone()))

    @property
    def flat(self) -> torch.Tensor:
        return torch.cat(list(self.parameters()))


def trained(me: Rank, row: Row, task: Quadratic, timing: str) -> tuple[Any, list[bytes]]:
    """The gossip, and this rank's weights after every step."""
    model = Model()
    if row.optimizer == "SGD":
        optimizer: Any = torch.optim.SGD(model.parameters(), 1.0, momentum=MU)
    else:
        optimizer = torch.optim.Adam(model.parameters(), 1.0, betas=(MU, BETA2), eps=EPSILON)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        model.named_parameters(),
        method=row.method,
        segments=BLOCKS.__getitem__,
        seed=SEED,
        timing=timing,
    )
    b, h = torch.tensor(task.b[me.node]), torch.tensor(task.h)
    seen = []
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate_at(t)
        optimizer.zero_grad()
        optimizer.gossip.report_loss(losses_at(t, len(me.nodes))[me.node])
        (h / 2 * (model.flat - b) ** 2).sum().backward()
        optimizer.step()
        seen.append(model.flat.detach().numpy().copy())
    optimizer.gossip.drain()
    seen.append(model.flat.detach().numpy().copy())
    return optimizer.gossip, seen


def simulated(me: Rank, gossip: Any, row: Row, task: Quadratic, timing: str) -> list[Any]:
    """Every node's weights after every step."""
    layout = gossip.layout
    places = np.concatenate(
        [
            start // 8 + np.arange(field.size)
            for name in BLOCKS
            for field, start in zip(layout.fields, layout.offsets, strict=True)
            if field.name == name
        ]
    )
    cluster = Cluster(tuple(tuple(ranks) for ranks in me.nodes))
    sim = Simulation(cluster, gossip.method, layout, seed=SEED, slots=SLOTS, timing=timing)
    start = np.zeros(sim.values(0).size)
    start[places] = np.linspace(-1, 1, COLUMNS)
    sim.fill(np.tile(start, (len(me.nodes), 1)))

    def gradient(node: int, values: Any) -> Any:
        g = np.zeros_like(values)
        g[places] = task.of(node, values[places])
        return g

    seen = []
    for t in range(STEPS):
        local = sgd(rate_at(t)) if row.optimizer == "SGD" else adam(rate_at(t), t)
        sim.train(gradient, local, rate_at(t), losses_at(t, len(me.nodes)))
        seen.append(sim.nodes()[:, places])
    sim.drain()
    seen.append(sim.nodes()[:, places])
    return seen


@on_ranks([Job(1), Job(2), Job(5), Job(4, "node", 2), Job(4), Job(4, "world")])
def test_every_method_trains_as_in_the_simulator(me: Rank) -> None:
    nodes = len(me.nodes)
    for name, timing in [(name, timing) for name, timing, n in TABLE if n == nodes]:
        row, task = ROWS[name], Quadratic.draw(nodes, 1.0)
        gossip, mine = trained(me, row, task, timing)
        everyone = me.gather(mine)
        assert all(np.array_equal(everyone[rank], mine) for rank in me.nodes[me.node])
        if me.rank:
            continue
        for t, known in enumerate(simulated(me, gossip, row, task, timing)):
            for node, ranks in enumerate(me.nodes):
                np.testing.assert_allclose(
                    everyone[ranks[0]][t],
                    known[node],
                    rtol=1e-11,
                    atol=1e-12,
                    err_msg=f"{name}, {timing}, step {t}, node {node}",
                )
    me.settle()
