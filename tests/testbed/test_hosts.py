"""Hosts in namespaces: links carry what they say, can be cut, and a killed owner leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep

import pytest
from gossamer.launch import testbed
from gossamer.launch.bench.wire import open_wire

pytestmark = pytest.mark.testbed

OWNER = """
import subprocess, sys, time
from gossamer.launch.testbed import hosts
with hosts(2, mbit=100) as (a, b):
    process = a.popen(["sleep", "600"])
    print(a.namespace, b.namespace, a.switch, process.pid, flush=True)
    time.sleep(600)
"""
LISTEN = """
import socket
with socket.create_server(("", 4000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
while word := connection.recv(1):
    print(word.decode(), flush=True)
"""
SPEAK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 4000))
while word := sys.stdin.buffer.raw.read(1):
    connection.sendall(word)
"""


@pytest.fixture(autouse=True)
def _needs_a_testbed():
    if reason := testbed.unusable():
        pytest.skip(reason)


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines() if line}


def own_namespaces() -> set[str]:
    """Others may make some at the same time."""
    return {each for each in namespaces() if each.startswith(f"gossamer-{os.getpid()}-")}


@contextmanager
def killed_owner():
    """(names, pid of a process inside) of a network whose owner was killed."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    *names, pid = owner.stdout.readline().split()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    yield set(names), int(pid)


def test_a_100_mbit_link_carries_90_to_100_mbit():
    size = 4_000_000
    with open_wire(100) as send:
        for _ in range(20):  # a busy machine can only be slower
            mbit = size * 8e-6 / send(bytes(size))
            assert mbit <= 100
            if mbit >= 90:
                break
    assert mbit >= 90


def test_an_unshaped_link_is_much_faster_and_a_rate_can_change():
    size = 2_000_000
    enough_s = size * 8e-6 / 500
    with open_wire(1000) as send:
        # a busy machine can only be slower
        assert any(send(bytes(size)) < enough_s for _ in range(20))
    with testbed.hosts(1, mbit=1000) as (host,):
        for mbit, shown in ((50, "rate 50Mbit"), (None, "noqueue")):
            host.set_rate(mbit)
            for namespace, device in ((host.namespace, "eth0"), (host.switch, host.port)):
                words = ["tc", "-n", namespace, "qdisc", "show", "dev", device]
                text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                assert shown in text


def test_a_cut_link_carries_nothing_until_it_is_restored():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with testbed.hosts(2) as (near, far):
        listener = far.popen([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
        assert listener.stdout.readline() == b"ready\n"
        os.set_blocking(listener.stdout.fileno(), False)
        speaker = near.popen([sys.executable, "-c", SPEAK, far.address], **pipes)

        def heard(seconds: float) -> bytes:
            deadline, text = perf_counter() + seconds, b""
            while not text and perf_counter() < deadline:
                text = listener.stdout.read() or b""
                sleep(0.01)
            return text

        def say(word: bytes) -> None:
            speaker.stdin.write(word)
            speaker.stdin.flush()

        say(b"a")
        assert heard(10) == b"a\n"
        far.cut()
        say(b"b")
        assert heard(0.5) == b""
        far.restore()
        assert heard(20) == b"b\n"


def test_nothing_is_left_after_use():
    before = own_namespaces()
    with testbed.hosts(3, mbit=10) as made:
        process = made[0].popen(["sleep", "600"])
        assert len({host.address for host in made}) == 3
        assert len(own_namespaces() - before) == 4
    assert process.wait(60) == -signal.SIGKILL
    assert own_namespaces() == before


def test_the_next_use_sweeps_what_a_killed_owner_left():
    with killed_owner() as (names, pid):
        assert names <= namespaces()
        with testbed.hosts(1) as (mine,):
            now = namespaces()
            assert not names & now and mine.namespace in now
            # swept beside a live network of our own, which stays
            testbed.sweep()
            assert mine.namespace in namespaces()
        assert (
            not Path(f"/proc/{pid}/cmdline").exists()
            or not Path(f"/proc/{pid}/cmdline").read_bytes()
        )


def test_what_the_machine_cannot_do_is_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="hosts must be from 1 to 200, not 0"):
        with testbed.hosts(0):
            pass
    monkeypatch.setenv("PATH", "")
    assert testbed.unusable() == "the network test bed needs ip and tc; install iproute2"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert testbed.unusable() == "the network test bed needs root; run it as root"
