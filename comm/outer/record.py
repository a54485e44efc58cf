"""The membership record of a round: whose messages count, as a file that is created once.

The one idea: whoever takes part may write the record, and the store lets one of them; from then on
the round is settled for all, those who were absent among them. Records are linked by hash and carry
the books on: how far each replica's stream of tokens was counted.

    outer.json                                run_id, and what all replicas must agree on
    replicas/a-e0001.json                     a claim to the name a
    left/a-e0001.json                         a left: nobody waits for it; lists what it left
    left/a-e0001-p0of2.error                  its error buffers
    left/a-e0001.heir                         who took them on
    rounds/00000012/a-e0001-p0of2.message     what rank 0 of 2 of a sends in round 12 (message.py)
    round-00000012.json                       the record: round 12 is settled
    anchors/00000010/a-e0001-p0of2.anchor     weights and momentum before round 10
    anchor-00000010.json                      its creation makes them an anchor
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from gossamer.comm.manifest import LogError, PartRef
from gossamer.comm.outer.seal import NO_SEAL, Seal

Shapes = Mapping[str, tuple[int, ...]]
"""Of all tensors, by name."""

MESSAGE = r"rounds/(\d+)/(.+)-e(\d+)-p(\d+)of(\d+)\.message"
CLAIM = r"replicas/(.+)-e(\d+)\.json"
LEFT = r"left/(.+)-e(\d+)\.json"
RECORD = r"round-(\d+)\.json"
ANCHOR = r"anchor-(\d+)\.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """One replica's message that counts."""

    replica: str
    incarnation: int
    round: int
    """The round it was made in: the record's, or the one before where it was late."""
    tokens_before: int
    tokens: int
    """It trained tokens [tokens_before, tokens_before + tokens) of its replica's stream."""
    parts: list[PartRef]
    """One a rank; nameless without a store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """How a round was settled."""

    run_id: str
    round: int
    parent_hash: str | None
    """blake2b-256, hex, of the last record's file."""
    base_hash: str
    """Hash of the weights that the round began with, and of their masks where there are any."""
    mask_version: int = 0
    """The round before which those masks last changed."""
    counted: list[Counted]
    """In the order in which they are added up: by replica, then by round."""
    refused: dict[str, str]
    """Why a replica's message of this round does not count."""
    books: dict[str, int]
    """Tokens of each replica's stream up to which they were counted, or lost for good."""
    written_by: str
    created_s: float
    """Unix time."""


def record_name(number: int) -> str:
    """The file whose creation settles round `number`."""
    return f"round-{number:08d}.json"


def message_name(number: int, replica: str, incarnation: int, rank: int, num_ranks: int) -> str:
    """The file of what one rank sends."""
    return f"rounds/{number:08d}/{replica}-e{incarnation:04d}-p{rank}of{num_ranks}.message"


def anchor_name(number: int) -> str:
    """The file whose creation makes the parts of an anchor one."""
    return f"anchor-{number:08d}.json"


def left_name(replica: str, incarnation: int) -> str:
    """The file by which a replica leaves."""
    return f"left/{replica}-e{incarnation:04d}.json"


def groups(name: str, pattern: str) -> tuple[str, ...] | None:
    """The groups of `pattern` in a file's name; None for another file."""
    match = re.fullmatch(pattern, name)
    return match.groups() if match else None


def pack_record(record: Record, seal: Seal = NO_SEAL) -> bytes:
    """The file's bytes."""
    return seal.pack(asdict(record), record_name(record.round))


def unpack_record(data: bytes, name: str, seal: Seal = NO_SEAL) -> Record:
    """Reads the file `name`. Raises LogError; SignatureError where `seal` has keys, none of which
    signed it."""
    try:
        entry = seal.unpack(data, name)
        counted = [
            Counted(**each | {"parts": read_parts(each["parts"])}) for each in entry["counted"]
        ]
        record = Record(**entry | {"counted": counted})
        _check_types(record)
        for each in counted:
            _check_types(each)
        return record
    except LogError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LogError(f"{name} is not a record of a round: {error}") from error


def read_parts(entries: list[dict]) -> list[PartRef]:
    """References as JSON has them. Raises TypeError or KeyError."""
    parts = [PartRef(**entry) for entry in entries]
    for part in parts:
        _check_types(part)
    return parts


def _check_types(entry: Record | Counted | PartRef) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "str": (str,),
        "float": (float,),
        "str | None": (str, type(None)),
    }
    for field in fields(entry):
        kind = kinds.get(str(field.type), (list, dict))
        if not isinstance(getattr(entry, field.name), kind):
            raise TypeError(f"field {field.name} must not be {getattr(entry, field.name)!r}")
