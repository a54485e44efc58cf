"""What the replicas of a run came to: their metrics and the records of rounds in, a dict out.

The one idea: who counted in which round is told by the records, so it covers those who joined from
elsewhere; what a round cost, and the hash of the weights after it, by each replica itself.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from gossamer.comm.outer.record import RECORD, Record, groups, unpack_record
from gossamer.comm.store import Store
from gossamer.launch.summary import Event, mean, of_kind, read_events, settle, summarise


@dataclass(frozen=True, slots=True)
class Fleet:
    """All that is known of a run of several replicas."""

    events: list[Event]
    """Of the supervisor."""
    replicas: dict[str, list[Event]]
    """Of each replica that was started here and wrote any."""
    records: list[Record]

    @property
    def names(self) -> list[str]:
        """All that ever counted or ran, in order."""
        counted = {each.replica for record in self.records for each in record.counted}
        return sorted(counted | self.replicas.keys(), key=lambda name: (len(name), name))


def read_fleet(run_dir: Path, store: Store | None) -> Fleet:
    """Reads a run's folder and its rounds. Raises ValueError for unreadable metrics."""
    replicas = {}
    for folder in run_dir.glob("replica-*/"):
        if (folder / "metrics.jsonl").is_file():
            replicas[folder.name] = read_events(folder)
    records = []
    for name in store.list("round-") if store is not None else []:
        if groups(name, RECORD) and store is not None:
            records.append(unpack_record(store.get(name), name))
    return Fleet(read_events(run_dir), replicas, records)


def outer_rounds(events: list[Event]) -> list[Event]:
    """A replica's rounds, each once: the last time that it took part."""
    return sorted({e["round"]: e for e in of_kind(events, "outer_round")}.values(), key=_round)


def _round(event: Event) -> int:
    return event["round"]


def hashes_equal(fleet: Fleet) -> bool | None:
    """Whether after every round all replicas held the same weights; None where none said."""
    found: dict[int, set[str]] = defaultdict(set)
    for events in fleet.replicas.values():
        for event in of_kind(events, "outer_round"):
            if event.get("state_hash"):  # a rule on gradients shares no weights
                # one that had missed rounds applied them at once
                number = event.get("next_round", event["round"] + 1)
                found[number].add(event["state_hash"])
    return all(len(hashes) == 1 for hashes in found.values()) if found else None


def summarise_fleet(fleet: Fleet, run_dir: Path) -> Event:
    """summary.json's content. None means there was nothing to measure.

    replicas: of each its state (finished, lost, ended, ...), restarts (of its process, or of its
        trainer alone), steps, rounds in which it counted, tokens that the books hold of it,
        loss_last, heldout_loss_last, utilisation (share of time not waiting for rounds),
        state_hash after its last round.
    joined: members of the rounds that were not started here.
    rounds: settled ones; late: messages that counted a round later; refused: that never did.
    wire_bytes: of all messages that counted, as their frames lie in the store; without a store
        what the replicas say they sent.
    dense_bytes: the same messages as float32 weights.
    hashes_equal: after every round all replicas held the same weights.
    """
    starts, records = of_kind(fleet.events, "fleet_start"), fleet.records
    counted = [(record, each) for record in records for each in record.counted]
    told = [e for events in fleet.replicas.values() for e in outer_rounds(events)]
    books = records[-1].books if records else {}
    members = {name: _replica(fleet, name, run_dir) for name in fleet.replicas}
    params = max((e.get("params") or 0 for e in _run_starts(fleet)), default=0)
    ends = of_kind(fleet.events, "run_end")
    return {
        "name": starts[-1]["name"] if starts else run_dir.name,
        "end_reason": ends[-1]["reason"] if ends else None,
        "replicas": {
            name: member
            | {
                "rounds": sum(each.replica == name for _, each in counted) or member["rounds"],
                "tokens": books.get(name, member["tokens"]),
            }
            for name, member in sorted(members.items())
        },
        "joined": [name for name in fleet.names if name not in fleet.replicas],
        "params": params or None,
        "rounds": len(records) or len({e["round"] for e in told}),
        "late": sum(each.round < record.round for record, each in counted),
        "refused": sum(len(record.refused) for record in records),
        "tokens": sum(books.values()) or sum(m["tokens"] for m in members.values()),
        "wire_bytes": sum(part.nbytes for _, each in counted for part in each.parts)
        or sum(e["wire_bytes_sent"] for e in told),
        "dense_bytes": 4 * params * (len(counted) or len(told)),
        "hashes_equal": hashes_equal(fleet),
        "utilisation": mean([m["utilisation"] for m in members.values() if m["utilisation"]]),
        "restarts": sum(m["restarts"] for m in members.values()),
        "wall_s": _wall_s(fleet),
    }


def _replica(fleet: Fleet, name: str, run_dir: Path) -> Event:
    events = fleet.replicas[name]
    told = [e for e in of_kind(fleet.events, "replica") if e["replica"] == name]
    rounds = outer_rounds(events)
    alone = summarise(run_dir / name) if of_kind(events, "run_start") else {}
    return {
        "state": told[-1]["what"] if told else None,
        "restarts": max(0, len(of_kind(events, "run_start")) - 1),
        "steps": len(of_kind(settle(events), "train_step")),
        "loss_last": alone.get("loss_last"),
        "heldout_loss_last": alone.get("heldout_loss_last"),
        "utilisation": mean([e["utilisation"] for e in rounds]),
        "rounds": len(rounds),
        "tokens": sum(e["tokens"] for e in rounds),
        "state_hash": rounds[-1]["state_hash"] if rounds else None,
    }


def _run_starts(fleet: Fleet) -> list[Event]:
    return [e for events in fleet.replicas.values() for e in of_kind(events, "run_start")]


def _wall_s(fleet: Fleet) -> float | None:
    times = [e["time_s"] for events in (fleet.events, *fleet.replicas.values()) for e in events]
    return max(times) - min(times) if times else None


def is_fleet(run_dir: Path) -> bool:
    """Whether the folder is that of a run of several replicas."""
    path = run_dir / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("replicas", 1) > 1
