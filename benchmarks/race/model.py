"""The model that every contender trains, and the clock that times it; run inside each rank.

Compute is sleep: a third of it in forward, two thirds in backward, spread over the layers, so that
gradients appear one after the other as a real model's do while two cores carry eight ranks.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.testbed import LINK

LAYERS = 8
PERIOD = 0.01


class _Work(torch.autograd.Function):
    """Sleeps where a layer would compute; the weight's gradient is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, forward: float, backward: float) -> Any:
        ctx.backward_seconds, ctx.shape = backward, weight.shape
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        time.sleep(ctx.backward_seconds)
        return grad, torch.full(ctx.shape, 1e-3), None, None


class _Layer(torch.nn.Module):
    def __init__(self, size: int, forward: float, backward: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self._seconds = (forward, backward)

    def forward(self, x: torch.Tensor) -> Any:
        return _Work.apply(x, self.weight, *self._seconds)  # type: ignore[no-untyped-call]


class SleepyModel(torch.nn.Module):
    """Eight equal layers.

    Args:
        nbytes: of all parameters, in float32.
        compute: seconds of one step.
    """

    def __init__(self, nbytes: int, compute: float) -> None:
        super().__init__()
        size, share = nbytes // 4 // LAYERS, compute / LAYERS
        layers = [_Layer(size, share / 3, share * 2 / 3) for _ in range(LAYERS)]
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x)


@dataclass
class Meter:
    """Wakes every 10 ms: samples the link's counters and sees how late it was woken.

    Attributes:
        keep: whether to keep samples.
        samples: time, bytes received, bytes sent so far.
        overslept: the longest time by which it was woken too late; tenths of a second mean that
            the machine had no processor left for this rank, and that its times are worth nothing.
    """

    keep: bool
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    overslept: float = 0.0

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``."""
        last = time.monotonic()
        while not stop.wait(PERIOD):
            now = time.monotonic()
            self.overslept = max(self.overslept, now - last - PERIOD)
            last = now
            if self.keep:
                self.samples.append((now, *_link_bytes()))


@dataclass
class Lane:
    """One rank's part of a race: what was asked, and what the clock said.

    Attributes:
        asked: the command line.
        marks: machine-wide monotonic times of every step: begin, backward, update, end.
    """

    asked: argparse.Namespace
    rank: int
    size: int
    marks: list[tuple[float, float, float, float]] = field(default_factory=list)

    @classmethod
    def parse(cls, add: Callable[[argparse.ArgumentParser], object] | None = None) -> Lane:
        """From the command line; ``add`` may add a program's own options."""
        faulthandler.register(signal.SIGUSR1)  # says where a rank stands that does not come home
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True, help="folder for one JSON a rank")
        parser.add_argument("--steps", type=int, default=40)
        parser.add_argument("--warm-up", type=int, default=3)
        parser.add_argument("--bytes", type=int, default=34_000_000)
        parser.add_argument("--compute", type=float, default=1.0)
        parser.add_argument("--ranks-per-host", type=int, default=2)
        parser.add_argument("--late-chance", type=float, default=0.0)
        parser.add_argument("--late-seconds", type=float, default=0.0)
        parser.add_argument("--meter", action="store_true", help="sample the link's counters")
        if add is not None:
            add(parser)
        environ = os.environ
        rank, size = int(environ["OMPI_COMM_WORLD_RANK"]), int(environ["OMPI_COMM_WORLD_SIZE"])
        return cls(parser.parse_args(), rank, size)

    @property
    def host(self) -> int:
        """Index of this rank's host."""
        return self.rank // int(self.asked.ranks_per_host)

    def model(self) -> SleepyModel:
        """The model."""
        torch.set_num_threads(1)
        return SleepyModel(self.asked.bytes, self.asked.compute)

    def race(self, model: torch.nn.Module, update: Callable[[], object], **rest: Any) -> None:
        """Train a PyTorch model for a while and write down the times.

        Args:
            model: as the contender has wrapped it.
            update: the optimizer's step and what goes with it.
            rest: as for ``time``.
        """
        x = torch.zeros(1)

        def train(steps: Sequence[int]) -> None:
            for step in steps:
                self._step(model, update, x, step)

        self.time(train, **rest)

    def time(
        self,
        train: Callable[[Sequence[int]], object],
        *,
        barrier: Callable[[], object],
        drain: Callable[[], object] = lambda: None,
        about: dict[str, str] | None = None,
        extra: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Let somebody train for a while and write down the times.

        Args:
            train: trains these steps and appends to ``marks`` for each.
            barrier: returns when all ranks are there.
            drain: finishes what is still under way; part of the time.
            about: versions of what was measured.
            extra: more to write down, asked at the end.
        """
        train(range(-self.asked.warm_up, 0))
        drain()
        barrier()
        self.marks.clear()
        cpu = _cpu_seconds()
        with self._meter() as meter:
            begin = time.monotonic()
            train(range(self.asked.steps))
            drain()
            end = time.monotonic()
        cpu = _cpu_seconds() - cpu
        barrier()
        self.save(
            {
                "begin": begin,
                "end": end,
                "wall": (end - begin) / self.asked.steps,
                "steps": [mark[3] - mark[0] for mark in self.marks],
                "marks": self.marks,
                "cpu": cpu / self.asked.steps,
                "late": [self.late(step) for step in range(self.asked.steps)],
                "about": {"torch": torch.__version__, **(about or {})},
                "meter": meter.samples,
                "overslept": meter.overslept,
                "threads": _threads(),
                **extra(),
            }
        )

    def save(self, found: dict[str, Any]) -> None:
        """Write what this rank found for the one who started it."""
        path = self.asked.out / f"{self.rank}.json"
        path.write_text(json.dumps({"rank": self.rank, "host": self.host, **found}))

    def _step(
        self, model: torch.nn.Module, update: Callable[[], object], x: torch.Tensor, step: int
    ) -> None:
        begin = time.monotonic()
        if late := self.late(step):
            time.sleep(late)
        y = model(x)
        backward = time.monotonic()
        y.backward()
        updated = time.monotonic()
        update()
        self.marks.append((begin, backward, updated, time.monotonic()))

    def late(self, step: int) -> float:
        """Seconds by which this host is late in a step; the same on all its ranks."""
        draw = random.Random(f"late {self.host} {step}").random()
        return self.asked.late_seconds if draw < self.asked.late_chance else 0.0

    @contextmanager
    def _meter(self) -> Iterator[Meter]:
        """A meter that runs inside the block, on each host's first rank."""
        meter = Meter(keep=self.asked.meter)
        if self.rank % self.asked.ranks_per_host:
            yield meter
            return
        stop = threading.Event()
        thread = threading.Thread(target=meter.run, args=(stop,), daemon=True)
        thread.start()
        yield meter
        stop.set()
        thread.join()


def _link_bytes() -> tuple[int, int]:
    """Bytes received and sent so far on this host's link."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == LINK:
            numbers = counts.split()
            return int(numbers[0]), int(numbers[8])
    return 0, 0


def _threads() -> list[tuple[str, float]]:
    """Name and processor seconds of every thread so far."""
    tick, found = os.sysconf("SC_CLK_TCK"), []
    for task in sorted(Path("/proc/self/task").iterdir(), key=lambda p: int(p.name)):
        try:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        fields = rest.split()
        found.append((name, (int(fields[11]) + int(fields[12])) / tick))
    return found


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
