"""Which of the messages at hand count.

The one idea: a verdict is a function of the messages and of the last record alone, written into the
record; receivers follow it and need no opinion of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gossamer.comm.manifest import PartRef
from gossamer.comm.outer.message import Message
from gossamer.comm.outer.record import Counted
from gossamer.comm.state_hash import format_hash


@dataclass(frozen=True, slots=True)
class Offer:
    """All parts of one replica's message for one round, or what is wrong with them."""

    replica: str
    incarnation: int
    round: int
    messages: list[Message] = field(default_factory=list)
    """One a rank."""
    parts: list[PartRef] = field(default_factory=list)
    fault: str | None = None

    @property
    def base_hash(self) -> str:
        """Of the whole weights that the replica began the round with."""
        return format_hash(sum(int(message.base_hash, 16) for message in self.messages))

    @property
    def tokens_before(self) -> int:
        return self.messages[0].tokens_before

    @property
    def tokens(self) -> int:
        return self.messages[0].tokens

    @property
    def mask_version(self) -> int:
        return self.messages[0].mask_version

    def counted(self) -> Counted:
        """Its entry in the record."""
        return Counted(
            replica=self.replica,
            incarnation=self.incarnation,
            round=self.round,
            tokens_before=self.tokens_before,
            tokens=self.tokens,
            parts=self.parts,
        )


def fault_of(message: Message, run_id: str, number: int, rank: int, num_ranks: int) -> str | None:
    """What keeps a message from being that rank's of that round, or None."""
    expected = {"run_id": run_id, "round": number, "rank": rank, "num_ranks": num_ranks}
    for field_name, value in expected.items():
        found = getattr(message, field_name)
        if found != value:
            return f"its message has {field_name} {found!r}, expected {value!r}"
    return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a record is made of."""

    base_hash: str
    counted: list[Counted]
    refused: dict[str, str]
    """Of this round: why a replica's message does not count."""
    books: dict[str, int]
    mask_version: int = 0
    """Of the masks that go with those weights."""


def judge(
    offers: Sequence[Offer],
    late: Sequence[Offer],
    books: Mapping[str, int],
    last_base_hash: str | None,
    own: str,
) -> Verdict:
    """Judges the `offers` of a round and those that came too `late` for the last one.

    The weights that most replicas began the round with are the right ones (of as many, those of the
    replica `own`). A message whose tokens are in the books already does not count.
    """
    refused = {offer.replica: offer.fault for offer in offers if offer.fault}
    sound = [offer for offer in offers if not offer.fault]
    votes = Counter(offer.base_hash for offer in sound)
    own_base = next((offer.base_hash for offer in sound if offer.replica == own), "")
    base = max(votes, key=lambda each: (votes[each], each == own_base, each), default="")
    for offer in sound:
        if offer.base_hash != base:
            refused[offer.replica] = (
                f"it began the round with weights {offer.base_hash}, the others with {base}"
            )
    good = [offer for offer in sound if offer.replica not in refused]
    version = max((each.mask_version for each in good), default=0)
    # what was made under older masks tells of elements that may be masked now
    late = [each for each in late if not each.fault and each.mask_version == version]
    good += [each for each in late if each.base_hash == last_base_hash]
    counted, stops = [], dict(books)
    for offer in sorted(good, key=lambda offer: (offer.replica, offer.round)):
        stop = stops.get(offer.replica, 0)
        if offer.tokens_before < stop:
            if offer in offers:
                refused[offer.replica] = (
                    f"its tokens begin at {offer.tokens_before}, the books hold them up to {stop}"
                )
            continue
        stops[offer.replica] = offer.tokens_before + offer.tokens
        counted.append(offer.counted())
    return Verdict(base, counted, refused, stops, version)
