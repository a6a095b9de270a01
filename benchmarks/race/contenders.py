"""Who races: each contender's program, its options, and what it needs around it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from gossip_hvd.transport.mpi import TUNING

# What gossip_hvd sets for itself; given to Horovod in its second variant.
TUNED = {name: value for name, value in TUNING.items() if "btl_tcp" in name}


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: as asked for on the command line.
        title: as printed.
        program: module under ``benchmarks.race.programs``.
        arguments: of the program.
        env: environment variables of its own.
        wire: ``"float32"`` or ``"16-bit"``: whose transfer it is compared with.
        hides: whether its limit is the larger of compute and transfer, or (ATC) their sum.
        models: how many models' bytes a round sends and receives.
        means: of all rounds, how many are exact means that nothing hides, 0 to 1.
        needs: a peer that must be installed first, as pip names it.
    """

    name: str
    title: str
    program: str
    arguments: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    wire: str = "float32"
    hides: bool = True
    models: int = 1
    means: float = 0.0
    needs: str | None = None

    def limit(self, compute: float, transfer: float, hosts: int) -> float:
        """Seconds of a step that costs nothing beside compute and the wire.

        Args:
            compute: seconds of a step.
            transfer: seconds of one model out of and into every host.
            hosts: how many.
        """
        moved = self.models * transfer
        usual = max(compute, moved) if self.hides else compute + moved
        mean = compute + transfer * 2 * (hosts - 1) / hosts
        return (1 - self.means) * usual + self.means * mean


def _ours(
    name: str,
    title: str,
    *,
    wire: str = "float32",
    models: int = 1,
    means: float = 0.0,
    momentum: float = 0.0,
    **options: object,
) -> Contender:
    if wire != "float32":
        options["wire_dtype"] = wire
    return Contender(
        name,
        title,
        "gossip",
        ("--options", json.dumps(options), "--momentum", str(momentum)),
        wire="float32" if wire == "float32" else "16-bit",
        hides=options["timing"] == "awc",
        models=models,
        means=means,
    )


def _keras(name: str, title: str, **options: object) -> Contender:
    given = ("--options", json.dumps(options))
    env = {"KERAS_BACKEND": "tensorflow", "TF_NUM_INTRAOP_THREADS": "1"}
    hides = options["timing"] == "awc"
    return Contender(name, title, "keras_fit", given, env, hides=hides)


def _decent(topology: str) -> Contender:
    return Contender(
        f"decent-{topology}",
        f"Decent-DP {topology}",
        "decent",
        ("--topology", topology),
        needs="decent-dp==0.2.3",
    )


_SHIFT = {"method": "crossover", "peers": "shift", "segments": "one"}
_FAIR = {"method": "crossover", "peers": "fair"}
_EXPONENTIAL = {"method": "gossip", "topology": "one_peer_exponential"}
_MATCHING = {"method": "gossip", "topology": "random_matching"}
_PGA = {"method": "gossip_pga", "period": 6}
_GRAD = {"method": "gossipgrad"}

CONTENDERS = {
    c.name: c
    for c in (
        Contender("alone", "compute alone", "alone"),
        _ours("node", "ours: the node's all-reduce only", timing="atc", method="none", models=0),
        _ours("shift", "ours: one random peer a round, AWC", timing="awc", **_SHIFT),
        _ours("shift-bf16", "… bfloat16 wire", timing="awc", wire="bfloat16", **_SHIFT),
        _ours("fair", "ours: crossover fair, AWC", timing="awc", **_FAIR),
        _ours("fair-bf16", "… bfloat16 wire", timing="awc", wire="bfloat16", **_FAIR),
        _ours("exponential", "ours: one-peer exponential, AWC", timing="awc", **_EXPONENTIAL),
        _ours("matching", "ours: random matching, AWC", timing="awc", **_MATCHING),
        _ours("ceca", "ours: CECA, AWC", timing="awc", method="ceca"),
        _ours("sgp", "ours: SGP, overlapped", timing="awc", method="sgp"),
        _ours("pga", "ours: Gossip-PGA, H = 6, AWC", timing="awc", means=1 / 6, **_PGA),
        _ours("gossipgrad", "ours: GossipGraD, AWC", timing="awc", models=2, momentum=0.9, **_GRAD),
        _ours("shift-stale", "… staleness 1", timing="awc", staleness=1, **_SHIFT),
        _ours("shift-atc", "ours: one random peer a round, ATC", timing="atc", **_SHIFT),
        _ours("fair-atc", "ours: crossover fair, ATC", timing="atc", **_FAIR),
        _keras("keras-shift", "ours: Keras fit, one random peer, AWC", timing="awc", **_SHIFT),
        _keras("keras-fair", "ours: Keras fit, crossover fair, AWC", timing="awc", **_FAIR),
        _decent("complete"),
        _decent("one-peer-exp"),
        _decent("alternating-exp-ring"),
        Contender("ddp", "PyTorch DDP, gloo", "ddp"),
        Contender("ddp-bf16", "… bf16 hook", "ddp", ("--hook", "bf16"), wire="16-bit"),
        Contender("ddp-fp16", "… fp16 hook", "ddp", ("--hook", "fp16"), wire="16-bit"),
        Contender("horovod", "Horovod", "horovod_world"),
        Contender("horovod-tuned", "Horovod, our MPI settings", "horovod_world", env=TUNED),
        Contender(
            "horovod-fp16",
            "Horovod fp16",
            "horovod_world",
            ("--compression", "fp16"),
            wire="16-bit",
        ),
        Contender(
            "horovod-fp16-tuned",
            "Horovod fp16, our MPI settings",
            "horovod_world",
            ("--compression", "fp16"),
            env=TUNED,
            wire="16-bit",
        ),
    )
}

LIMIT = Contender("limit", "plain TCP sockets", "sockets")
