"""Replicas on one machine that meet through links of a given rate.

The one idea: the folder where they meet is served over TCP, and each replica reaches it through a
forwarder of its own on loopback. With root the forwarder calls from inside a host of the test bed,
whose link the kernel shapes; without, it counts bytes itself.

    python -m gossamer.launch.thin_link serve FOLDER ADDRESS NAMESPACE
    python -m gossamer.launch.thin_link forward ADDRESS PORT NAMESPACE MBIT

Each prints its port and ends when its standard input does; `-` is no namespace.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gossamer.launch.testbed import TestbedError, hosts

LOOPBACK, NOWHERE = "127.0.0.1", "-"
PIECE_BYTES = 16_384
SHORTEST_SLEEP_S = 0.002
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class ThinLinks:
    """A folder behind links."""

    urls: list[str]
    """For open_store, one a link."""
    shaped_by: str
    """What keeps the rate, in words."""


@contextmanager
def thin_links(folder: Path, n: int, mbit: float) -> Iterator[ThinLinks]:
    """Serves `folder` behind `n` links of `mbit` megabits a second each way, until the end.

    Whoever can connect to this machine's loopback may write there.
    """
    if mbit <= 0:
        raise ValueError(f"a link's rate must be above 0 Mbit/s, not {mbit}")
    with ExitStack() as stack:
        try:
            # the server's own link is wide, as a bucket's is
            server, *ends = stack.enter_context(hosts(n + 1, mbit))
            server.set_rate(None)
            address, where, inside = server.address, server.namespace, [h.namespace for h in ends]
            rate, shaped_by = 0.0, "the kernel, in network namespaces"
        except TestbedError as error:
            address, where, inside = LOOPBACK, NOWHERE, [NOWHERE] * n
            rate, shaped_by = mbit, f"a proxy ({error})"
        port = stack.enter_context(_process("serve", folder, address, where))
        ports = [
            stack.enter_context(_process("forward", address, port, namespace, rate))
            for namespace in inside
        ]
        yield ThinLinks([f"http://{LOOPBACK}:{each}" for each in ports], shaped_by)


@contextmanager
def _process(*words: object) -> Iterator[int]:
    """The port of one that runs until the end."""
    argv = [sys.executable, "-m", __spec__.name, *map(str, words)]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        line = process.stdout.readline() if process.stdout else b""
        if not line:
            raise RuntimeError(f"`{' '.join(argv[3:])}` of the links died; its error is above")
        yield int(line)
    finally:
        process.kill()
        process.communicate()


class Pace:
    """Lets bytes pass at a rate, in the order in which they ask; 0 lets all pass."""

    def __init__(self, mbit: float) -> None:
        self._s_per_byte = 8e-6 / mbit if mbit else 0.0
        self._free_s = 0.0

    async def wait(self, nbytes: int) -> None:
        now_s = time.monotonic()
        self._free_s = max(self._free_s, now_s) + nbytes * self._s_per_byte
        if self._free_s - now_s > SHORTEST_SLEEP_S:
            await asyncio.sleep(self._free_s - now_s)


async def _forward(listener: socket.socket, address: str, port: int, mbit: float) -> None:
    up, down = Pace(mbit), Pace(mbit)

    async def answer(near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        try:
            far, to_far = await asyncio.open_connection(address, port)
        except OSError:
            to_near.close()
            return
        await asyncio.gather(_pump(near, to_far, up), _pump(far, to_near, down))

    await (await asyncio.start_server(answer, sock=listener)).serve_forever()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, pace: Pace) -> None:
    try:
        while data := await source.read(PIECE_BYTES):
            await pace.wait(len(data))
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()


def _enter(namespace: str) -> None:
    """This process's next sockets are in the namespace. Call before there are threads."""
    if namespace == NOWHERE:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)


def _end_with_input() -> None:
    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _main(what: str, *words: str) -> None:
    if what == "serve":
        folder, address, namespace = words
        _enter(namespace)
        from gossamer.comm.store import open_store
        from gossamer.comm.store.serve import serve

        print(
            serve(open_store(folder, create=True), address, writable=True).server_port, flush=True
        )
        sys.stdin.buffer.read()
        return
    address, port, namespace, mbit = words
    listener = socket.create_server((LOOPBACK, 0), backlog=128)
    _enter(namespace)
    print(listener.getsockname()[1], flush=True)
    _end_with_input()
    asyncio.run(_forward(listener, address, int(port), float(mbit)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
