"""Several hosts on one machine: network namespaces, each with its own name, address and link.

    with Testbed(4, rate="200mbit") as hosts:
        hosts.run(["mpirun", "-H", hosts.slots(2), "python", "train.py"], check=True)

Every host has one shaped link to a common bridge, as fast in as out. A stand-in for ssh lets
`mpirun -H` and `horovodrun -H` start ranks on all of them. Needs root, iproute2 and a kernel with
network namespaces, veth, bridge and tbf; `refusal` says what is missing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

BIN = Path(__file__).resolve().parent / "bin"
LINK = "e0"
# Packets wait rather than drop: a queue of 10 MB is 0.4 s at 200 Mbit/s.
QUEUE, BURST = 10_000_000, 256_000
NAME, NETWORK = "gh", 1
FIRST_ADDRESS = 10
LARGEST = 200


class TestbedError(RuntimeError):
    """Something about the hosts cannot be had; the text says what and why."""

    __test__ = False  # not a test, whatever pytest thinks of the name


def refusal() -> str | None:
    """Why hosts cannot be made here, in one sentence; None where they can."""
    if os.geteuid() != 0:
        return "making hosts needs root: run it as root, in a container of your own say."
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]!r} is missing: install iproute2 and util-linux."
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    if probe.returncode:
        return f"this machine allows no new network namespaces ({probe.stderr.strip()})."
    return None


def die_tidily() -> None:
    """Let SIGTERM unwind the stack, as SIGINT does, so that hosts are taken down."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


class Testbed:
    """The hosts `gh0`, `gh1`, … and the bridge between them.

    Args:
        hosts: how many; None takes those that are up.
        rate: of every link, such as ``"200mbit"``; None leaves links as fast as they are.
        name: prefix of the hosts' names; at most 8 letters.
        network: third number of the addresses 10.77.network.x.
    """

    __test__ = False

    def __init__(
        self,
        hosts: int | None = None,
        rate: str | None = None,
        *,
        name: str = NAME,
        network: int = NETWORK,
    ) -> None:
        if not re.fullmatch(r"[a-z]{1,8}", name) or name == "g":
            raise TestbedError(f"name={name!r}: expected 1 to 8 small letters, and not 'g'.")
        if hosts is not None and not 1 <= hosts <= LARGEST:
            raise TestbedError(f"{hosts} hosts: expected 1 to {LARGEST}.")
        self._wanted, self._rate, self.name, self.network = hosts, rate, name, network

    # As a whole ------------------------------------------------------------------------------

    def up(self) -> Testbed:
        """Make the hosts; those of an earlier `up` are replaced, unless something runs there."""
        if reason := refusal():
            raise TestbedError(reason)
        busy = {host: pids for host in self.hosts if (pids := self.pids(host))}
        if busy:
            host, pids = next(iter(busy.items()))
            raise TestbedError(f"{host} is in use by process {pids[0]}: wait for it, or `down`.")
        self.down()
        count = self._wanted or 0
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        names = [f"{self.name}{i}" for i in range(count)]
        table = "".join(f"{self.address(h)} {h}\n" for h in names)
        for host in names:
            etc = Path("/etc/netns") / host
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
            self._add(host)
        return self

    def down(self) -> None:
        """End what runs on the hosts and remove them; does nothing where there are none."""
        for host in self.hosts:
            for pid in self.pids(host):
                _kill(pid)
        for space in [*self.hosts, self._switch]:
            if space in _spaces():
                _ip("netns", "del", space)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)

    def __enter__(self) -> Testbed:
        return self.up()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    # Who is there ----------------------------------------------------------------------------

    @property
    def hosts(self) -> list[str]:
        """The hosts that are up, in order."""
        found = [s for s in _spaces() if re.fullmatch(rf"{self.name}\d+", s)]
        return sorted(found, key=self._index)

    def slots(self, ranks: int) -> str:
        """For `-H`: every host with so many ranks."""
        return ",".join(f"{host}:{ranks}" for host in self.hosts)

    def address(self, host: str) -> str:
        """A host's address."""
        return f"10.77.{self.network}.{FIRST_ADDRESS + self._index(host)}"

    @property
    def subnet(self) -> str:
        """Of all hosts, as Open MPI's `…_if_include` take it."""
        return f"10.77.{self.network}.0/24"

    def pids(self, host: str) -> list[int]:
        """Processes that run on a host."""
        return [int(pid) for pid in _ip("netns", "pids", host).split()]

    def status(self) -> list[dict[str, Any]]:
        """For each host its name, address, whether its link is up, its rate, its processes."""
        rows = []
        for host in self.hosts:
            link = _ip("-n", host, "-o", "link", "show", LINK)
            shaped = re.search(r"\brate (\S+)", _tc(host, "qdisc", "show", "dev", LINK))
            rows.append(
                {
                    "host": host,
                    "address": self.address(host),
                    "link": "up" if "state UP" in link else "cut",
                    "rate": shaped[1] if shaped else None,
                    "processes": len(self.pids(host)),
                }
            )
        return rows

    # What one can do to them -----------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What a command on a host needs to start ranks on all others."""
        return {
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "OMPI_MCA_plm_rsh_agent": str(BIN / "ssh"),
            "OMPI_MCA_btl_tcp_if_include": self.subnet,
            "OMPI_MCA_oob_tcp_if_include": self.subnet,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "GLOO_SOCKET_IFNAME": LINK,
        }

    def command(self, argv: Sequence[str], host: str | None = None) -> list[str]:
        """The same command, run on a host; by default on the first."""
        return [str(BIN / "ssh"), self._require(host), shlex.join(argv)]

    def run(
        self,
        argv: Sequence[str],
        host: str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command on a host to its end, as ``subprocess.run`` does.

        Where it takes longer than ``timeout`` seconds, it is ended on every host.
        """
        surroundings = {**os.environ, **self.environment(), **(env or {})}
        if env and "PATH" in env:
            surroundings["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
        try:
            return subprocess.run(
                self.command(argv, host), env=surroundings, timeout=timeout, **options
            )
        except subprocess.TimeoutExpired:
            for name in self.hosts:
                for pid in self.pids(name):
                    _kill(pid)
            raise

    def cut(self, host: str) -> None:
        """Take a host's link away."""
        _ip("-n", self._require(host), "link", "set", LINK, "down")

    def mend(self, host: str) -> None:
        """Give a host its link back."""
        _ip("-n", self._require(host), "link", "set", LINK, "up")

    def rate(self, host: str, rate: str) -> None:
        """Make a host's link so fast, in and out."""
        self._require(host)
        _shape(host, LINK, rate)
        _shape(self._switch, self._port(host), rate)

    # How -------------------------------------------------------------------------------------

    @property
    def _switch(self) -> str:
        return f"{self.name}-switch"

    def _index(self, host: str) -> int:
        return int(host.removeprefix(self.name))

    def _port(self, host: str) -> str:
        return f"p{self._index(host)}"

    def _require(self, host: str | None) -> str:
        hosts = self.hosts
        if not hosts:
            raise TestbedError("no host is up: `python -m benchmarks.testbed up 4` makes four.")
        if host is not None and host not in hosts:
            raise TestbedError(f"there is no host {host!r}: {', '.join(hosts)} are up.")
        return host or hosts[0]

    def _add(self, host: str) -> None:
        switch, port = self._switch, self._port(host)
        _ip("netns", "add", host)
        _ip(
            *("link", "add", LINK, "netns", host, "type", "veth"),
            *("peer", "name", port, "netns", switch),
        )
        _ip("-n", host, "addr", "add", f"{self.address(host)}/24", "dev", LINK)
        for space, link in ((host, "lo"), (host, LINK), (switch, port)):
            _ip("-n", space, "link", "set", link, "up")
        _ip("-n", switch, "link", "set", port, "master", "br0")
        if self._rate:
            _shape(host, LINK, self._rate)
            _shape(switch, port, self._rate)


def _shape(space: str, link: str, rate: str) -> None:
    _tc(
        *(space, "qdisc", "replace", "dev", link, "root", "tbf", "rate", rate),
        *("burst", str(BURST), "limit", str(QUEUE)),
    )


def _spaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def _ip(*words: str) -> str:
    return _said("ip", *words)


def _tc(space: str, *words: str) -> str:
    return _said("tc", "-n", space, *words)


def _said(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise TestbedError(f"{words[0]!r} is missing: install iproute2.") from None
    except subprocess.CalledProcessError as error:
        raise TestbedError(f"`{shlex.join(words)}` failed: {error.stderr.strip()}") from None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
