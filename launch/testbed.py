"""Hosts on one machine: network namespaces joined by a bridge, each on a link of its own rate.

The one idea: everything made here lives in namespaces whose names carry the owner's pid and start
time, the bridge too; so to delete the names is to clean up, and who comes next can tell which
owners are dead. Links are shaped by tbf at both ends. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

NAME = re.compile(r"gossamer-(\d+)-(\d+)-\d+-\w+")
SUBNET = "10.93.0"
MAX_HOSTS = 200
# what a shaped link lets pass at once: a burst shorter than the kernel's timer ticks slows it
BURST_S = 0.0005
MIN_BURST_BYTES = 4_000
LONGEST_QUEUE_MS = 50

_numbers = itertools.count()


class TestbedError(RuntimeError):
    """The machine does not give us namespaces or links."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace with one link, `eth0`, to the bridge."""

    namespace: str
    address: str
    """IPv4, reachable from all hosts of the network and from nowhere else."""
    switch: str
    """The namespace that holds the bridge."""
    port: str
    """The bridge's end of the link."""

    def popen(
        self, argv: Sequence[str], stdin: int | IO | None = None, stdout: int | IO | None = None
    ) -> subprocess.Popen:
        """Starts a process in this host; with the network's end it is killed."""
        command = ["ip", "netns", "exec", self.namespace, *argv]
        return subprocess.Popen(command, stdin=stdin, stdout=stdout)

    def set_rate(self, mbit: float | None) -> None:
        """Shapes the link, both ways, to `mbit` megabits a second; None: as fast as it goes."""
        for namespace, device in ((self.namespace, "eth0"), (self.switch, self.port)):
            if mbit is None:
                # there may be none to delete
                _call("tc", "-n", namespace, "qdisc", "del", "dev", device, "root", check=False)
                continue
            burst = max(MIN_BURST_BYTES, round(mbit * 1e6 / 8 * BURST_S))
            shape = f"rate {round(mbit * 1e6)}bit burst {burst}b latency {LONGEST_QUEUE_MS}ms"
            where = f"qdisc replace dev {device} root tbf"
            _call("tc", "-n", namespace, *where.split(), *shape.split())

    def cut(self) -> None:
        """Takes the link down: packets are lost, connections hang."""
        _call("ip", "-n", self.switch, "link", "set", self.port, "down")

    def restore(self) -> None:
        """Takes a cut link up again."""
        _call("ip", "-n", self.switch, "link", "set", self.port, "up")


@contextmanager
def hosts(n: int, mbit: float | None = None) -> Iterator[list[Host]]:
    """`n` hosts on one bridge, each on a link of `mbit` megabits a second (None: unshaped).

    At the end their processes are killed and all is deleted; what owners that died before left
    is swept first. Raises TestbedError, in one sentence, where the machine cannot do this.
    """
    if not 1 <= n <= MAX_HOSTS:
        raise ValueError(f"hosts must be from 1 to {MAX_HOSTS}, not {n}")
    _check_machine()
    sweep()
    prefix = f"gossamer-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    made = [Host(f"{prefix}-{i}", f"{SUBNET}.{i + 1}", switch, f"port{i}") for i in range(n)]
    try:
        _call("ip", "netns", "add", switch)
        _call("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "br0", "up")
        for host in made:
            _plug(host)
            if mbit is not None:
                host.set_rate(mbit)
        yield made
    finally:
        _delete([switch, *(host.namespace for host in made)])


def unusable() -> str | None:
    """Why this machine cannot hold a test bed, in one sentence; None when it can."""
    try:
        with hosts(1, mbit=100):
            return None
    except TestbedError as error:
        return str(error)


def sweep() -> None:
    """Deletes what dead owners left, and kills the processes in it."""
    dead = []
    for name in _names():
        owner = NAME.fullmatch(name)
        if owner and _start_time(int(owner[1])) != owner[2]:
            dead.append(name)
    _delete(dead)


def _plug(host: Host) -> None:
    """A namespace, and a cable from it to the bridge."""
    name, peer = host.namespace, f"peer name {host.port} netns {host.switch}".split()
    _call("ip", "netns", "add", name)
    _call("ip", "-n", name, "link", "add", "eth0", "type", "veth", *peer)
    _call("ip", "-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _call("ip", "-n", host.switch, "link", "set", host.port, "master", "br0", "up")
    for device in ("lo", "eth0"):
        _call("ip", "-n", name, "link", "set", device, "up")


def _delete(names: list[str]) -> None:
    """Kills the processes in these namespaces, then deletes them; missing ones are fine."""
    there = set(_names()).intersection(names)
    deadline_s = time.monotonic() + 5.0
    while pids := [pid for name in there for pid in _pids(name)]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline_s:
            raise TestbedError(f"processes {pids} in {', '.join(sorted(there))} do not die")
        time.sleep(0.01)
    for name in there:
        _call("ip", "netns", "del", name, check=False)  # another sweep may be quicker


def _names() -> list[str]:
    return [line.split()[0] for line in _call("ip", "netns", "list").splitlines() if line]


def _pids(name: str) -> list[int]:
    return [int(pid) for pid in _call("ip", "netns", "pids", name, check=False).split()]


def _start_time(pid: int) -> str | None:
    """When a process began, in clock ticks after boot; None when it is dead."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise TestbedError("the network test bed needs root; run it as root")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise TestbedError(f"the network test bed needs {' and '.join(missing)}; install iproute2")


def _call(*argv: str, check: bool = True) -> str:
    """Standard output of a command. Raises TestbedError with what it said."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if check and done.returncode:
        said = done.stderr.strip().replace("\n", "; ")
        raise TestbedError(f"`{' '.join(argv)}` failed: {said}")
    return done.stdout
