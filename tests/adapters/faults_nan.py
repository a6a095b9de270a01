"""Values that are not finite, where the job is told to go on: left out, or let in."""

from __future__ import annotations

from fault import Fault

AFTER = 10
"""Steps before node 1 holds a NaN and node 2 an infinity, of the weight alone."""

MIX = f"""
def mix(**options):
    hvd.init(node_size=1)
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(3, 2).double()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(),
        method="gossip", topology="random_matching", **options)
    bad = {{1: float("nan"), 2: float("inf")}}
    for step in range({3 * AFTER}):
        if step == {AFTER}:
            with torch.no_grad():
                model.weight[1] += hvd.rank()
                model.weight[0, 0] = bad.get(hvd.rank(), 1.0)
            before = nodes(model)
        optimizer.zero_grad()
        (0.0 * model(torch.ones(4, 3).double())).sum().backward()
        optimizer.step()
    optimizer.gossip.drain()
    return before, nodes(model)

def nodes(model):
    return [hvd.allgather(p.detach().reshape(1, -1)) for p in (model.weight, model.bias)]
"""


def left_out(timing: str) -> Fault:
    """Only the sums of what is sound are asked for, and that it has been mixed."""
    return Fault(
        f"a NaN and an infinity, nan_policy='skip', {timing}",
        f"{MIX}"
        f"(w0, b0), (w1, b1) = mix(nan_policy='skip', timing={timing!r})\n"
        "sound = [0, 3]\n"
        "moved = (w1[sound].sum(0) - w0[sound].sum(0)).abs().max(), (b1 - b0).sum(0).abs().max()\n"
        "assert w1[sound].isfinite().all() and not w1[[1, 2]].isfinite().all(1).any()\n"
        "assert abs(w0[0] - w0[3]).max() > 2 and abs(w1[0] - w1[3]).max() < 0.1\n"
        "assert max(moved) < 1e-12, moved\n"
        "tell('sums kept')",
        0,
        r"(?s)(sums kept\s.*){4}gossip_hvd: rank [03] [^\n]*: "
        r"values of node [12] are not finite and are left out\.",
        ranks=4,
    )


NAN: tuple[Fault, ...] = (
    left_out("atc"),
    left_out("awc"),
    Fault(
        "a NaN and an infinity, nan_policy='ignore'",
        f"{MIX}"
        "_, (weights, biases) = mix(nan_policy='ignore')\n"
        "assert not weights.isfinite().all(1).any() and biases.isfinite().all()\n"
        "tell('spread')",
        0,
        r"(spread\s+){4}",
        ranks=4,
    ),
)
