"""Where the replicas of a benchmark meet: threads of one process, or processes on shaped links.

The one idea: both ways hand over the same frames and come to the same verdict, so a training in
threads, which needs one core and no network, ends with the bits that real links would have brought.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from gossamer.comm.outer.collective import CollectiveExchange
from gossamer.comm.outer.exchange import Exchange, Identity, Settled
from gossamer.comm.outer.message import Message, pack_message, unpack_message
from gossamer.comm.outer.record import Shapes
from gossamer.comm.outer.verdict import Offer, judge
from torch import Tensor

TIMEOUT_S = 900.0


class Meeting(Protocol):
    """How one replica comes to the others."""

    turn: AbstractContextManager[Any]
    """Held while it computes: threads of one process take turns."""

    def exchange(self, identity: Identity, shapes: Shapes) -> Exchange:
        """Of messages."""
        ...

    def mean(self, flat: Tensor, step: int) -> None:
        """Replaces fp32 [elements] by the mean over all replicas."""
        ...

    def ready(self) -> None:
        """Waits for the others, so that what is timed next has no waiting for slower ones in it."""
        ...


class Hall:
    """A meeting of threads. `expected(n)` replicas take part of round n."""

    def __init__(self, replicas: int, expected: Callable[[int], int]) -> None:
        self.turn: AbstractContextManager[Any] = threading.Lock()
        self.sent_bytes: dict[str, int] = defaultdict(int)
        """Of frames and gradients, by replica."""
        self._replicas, self._expected = replicas, expected
        self._changed = threading.Condition()
        self._brought: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
        self._found: dict[tuple[str, int], Any] = {}
        self._books: dict[str, int] = {}
        self._failed = False

    def exchange(self, identity: Identity, shapes: Shapes) -> Exchange:
        return HallExchange(self, identity, shapes)

    def mean(self, flat: Tensor, step: int) -> None:
        name = threading.current_thread().name
        self.sent_bytes[name] += flat.nbytes
        self.bring("mean", step, name, flat.clone())
        self._found.pop(("mean", step - 2), None)

        def average(parts: dict[str, Tensor]) -> Tensor:
            return torch.stack([parts[name] for name in sorted(parts)]).mean(0)

        flat.copy_(self.find("mean", step, self._replicas, average))

    def ready(self) -> None:
        pass

    def bring(self, kind: str, number: int, name: str, what: object) -> None:
        """Lays `what` on the table of that number."""
        with self._changed:
            self._brought[kind, number][name] = what
            self._changed.notify_all()

    def find(self, kind: str, number: int, size: int, make: Callable[[dict], Any]) -> Any:  # noqa: ANN401
        """What `make`, called once, made of all that `size` replicas brought; waits for them."""
        key = kind, number
        with self._changed:
            self._changed.wait_for(
                lambda: self._failed or key in self._found or len(self._brought[key]) == size,
                TIMEOUT_S,
            )
            if key not in self._found:
                if self._failed or len(self._brought[key]) < size:
                    raise RuntimeError(f"another replica did not come to {kind} {number}")
                self._found[key] = make(self._brought.pop(key))
            return self._found[key]

    def fail(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def settle(self, number: int, shapes: Shapes) -> Settled:
        """The round's messages, unpacked and judged once for all threads."""

        def verdict(frames: dict[str, bytes]) -> Settled:
            read = {name: unpack_message(frames[name], shapes) for name in sorted(frames)}
            offers = [Offer(name, 1, number, [message]) for name, message in read.items()]
            found = judge(offers, [], self._books, None, min(frames))
            self._books = found.books
            return Settled(
                round=number,
                messages=[[read[each.replica]] for each in found.counted],
                counted=frozenset((each.replica, number) for each in found.counted),
                refused=found.refused,
                written_by=min(frames),
            )

        return self.find("round", number, self._expected(number), verdict)


class HallExchange:
    """One thread's way to the others."""

    def __init__(self, hall: Hall, identity: Identity, shapes: Shapes) -> None:
        self.identity = identity
        self._hall, self._shapes, self._number = hall, shapes, 0

    def next_round(self) -> int:
        return self._number

    def send(self, message: Message) -> None:
        frame = pack_message(message)
        self._hall.sent_bytes[message.replica] += len(frame)
        self._hall.bring("round", message.round, message.replica, frame)

    def settle(self, number: int) -> Settled:
        settled = self._hall.settle(number, self._shapes)
        self._number = max(self._number, number + 1)
        return settled


class Network:
    """A meeting of processes over gloo, each at its own address."""

    def __init__(self, rank: int, size: int, own: str, first: str, port: int) -> None:
        """`own` address of this rank, `first` of rank 0, which listens at `port`."""
        timeout = timedelta(seconds=TIMEOUT_S)
        store = dist.TCPStore(first, port, size, rank == 0, timeout=timeout)
        gloo: Any = dist.ProcessGroupGloo  # its stub knows nothing of devices
        options = gloo._Options()
        options._timeout, options._devices = timeout, [gloo.create_device(hostname=own)]
        # not torch's default group: to the model, this replica is alone
        self.group: dist.ProcessGroup = gloo(store, rank, size, options)
        self.turn: AbstractContextManager[Any] = nullcontext()
        self.waits = True
        """Whether `ready` waits."""

    def exchange(self, identity: Identity, shapes: Shapes) -> Exchange:
        return CollectiveExchange(self.group, identity, shapes)

    def mean(self, flat: Tensor, step: int) -> None:
        dist.all_reduce(flat, group=self.group)
        flat /= dist.get_world_size(self.group)

    def ready(self) -> None:
        if self.waits:
            dist.all_reduce(torch.zeros(1), group=self.group)
