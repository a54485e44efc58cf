"""Bytes over a real TCP connection, timed: through a shaped link between two hosts, or loopback.

The one idea: sender and sink are two small processes, so that the same code runs in the hosts of a
test bed and without root. A transfer is timed at the sender, from the first byte until the sink
says that it has the last. Standard library only: the processes start in milliseconds.

    python -m gossamer.launch.bench.wire sink            prints its port; accepts one sender
    python -m gossamer.launch.bench.wire send HOST PORT  per line N on stdin: N bytes, then seconds
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import IO

from gossamer.launch.testbed import Host, hosts

PIECE_BYTES = 1 << 20
WARM_UP_BYTES = 100_000


@contextmanager
def open_wire(mbit: float | None) -> Iterator[Callable[[bytes], float]]:
    """A function that sends bytes and returns the seconds it took until all had arrived.

    `mbit`: over a link of so many megabits a second, in namespaces; None: loopback, unshaped.
    Raises TestbedError where the machine has no namespaces.
    """
    with ExitStack() as stack:
        ends: list[Host] = [] if mbit is None else stack.enter_context(hosts(2, mbit))
        sink = stack.enter_context(_process(ends[1:], "sink"))
        port = _line(sink.stdout)
        address = ends[1].address if ends else "127.0.0.1"
        sender = stack.enter_context(_process(ends[:1], "send", address, port))

        def send(data: bytes) -> float:
            assert sender.stdin is not None
            sender.stdin.write(b"%d\n" % len(data))
            sender.stdin.write(data)
            sender.stdin.flush()
            return float(_line(sender.stdout))

        send(bytes(WARM_UP_BYTES))
        yield send


@contextmanager
def _process(host: list[Host], *words: str) -> Iterator[subprocess.Popen]:
    argv = [sys.executable, "-m", __spec__.name, *words]
    start = host[0].popen if host else subprocess.Popen
    process = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(stream: IO[bytes] | None) -> str:
    line = stream.readline().decode().strip() if stream else ""
    if not line:
        raise RuntimeError("a process of the benchmark's wire died; its error is above")
    return line


def _sink() -> None:
    with socket.create_server(("", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    buffer = bytearray(PIECE_BYTES)
    while head := connection.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(head, "little")
        while left:
            left -= connection.recv_into(buffer, min(left, PIECE_BYTES))
        connection.sendall(b"!")


def _send(address: str, port: int) -> None:
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while line := sys.stdin.buffer.readline():
            data = sys.stdin.buffer.read(int(line))
            started_s = perf_counter()
            connection.sendall(len(data).to_bytes(8, "little"))
            connection.sendall(data)
            connection.recv(1)
            print(perf_counter() - started_s, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        _sink()
    else:
        _send(sys.argv[2], int(sys.argv[3]))
