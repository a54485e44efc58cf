"""What `gossamer bench replicas` has measured so far, and the rows that follow from it.

The one idea: measurements are kept as they were taken and rows are composed from them at the end,
so every number of a table can be worked out again from the file.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.launch.bench.replicas_arms import MAIN_DENSITY, MODELS, Arm, Sizes, Training
from gossamer.launch.bench.sync import machine
from gossamer.launch.summary import write_whole

Row = dict[str, Any]
KINDS = ("trainings", "links", "checks")


class Record:
    """A JSON file that is whole after every measurement."""

    def __init__(self, path: Path, sizes: Sizes, command: str) -> None:
        """Goes on from `path` if it is there. Raises ValueError if it holds anything else."""
        self.sizes = sizes
        self._path, self._lock = path, threading.Lock()
        about = {"command": command, "sizes": asdict(sizes)}
        self._data: Row = about | {"machine": machine()} | {kind: [] for kind in KINDS}
        if path.exists():
            old = json.loads(path.read_text())
            if {name: old.get(name) for name in about} != about:
                raise ValueError(
                    f"{path} holds other measurements; expected a new file, or one of `{command}`"
                    " with the same sizes"
                )
            self._data = old

    def add(self, kind: str, what: Row) -> None:
        """Keeps one of KINDS."""
        with self._lock:
            self._data[kind].append(what)
            self._save()

    def is_trained(self, training: Training) -> bool:
        """Whether its arm was trained, whatever for; what it is wanted for now is noted as well."""
        wanted = training.model, training.seed, training.arm
        for each in self._data["trainings"]:
            found = each["training"]
            if (found["model"], found["seed"], arm_of(each)) == wanted:
                if training.purpose != found["purpose"]:
                    each["also"] = sorted({*each.get("also", ()), training.purpose})
                return True
        return False

    def best(self, rule: str) -> Arm:
        """The arm of that rule that ended with the least loss of those that were tried."""
        tried = [each for each in self._of("tuning") if each["training"]["arm"]["rule"] == rule]
        return arm_of(min(tried, key=lambda each: each["curve"][-1][1]))

    def models_and_arms(self) -> list[tuple[str, Arm]]:
        """What was trained for the grid, one for each model, rule and density."""
        found: dict[tuple, tuple[str, Arm]] = {}
        for each in self._of("grid"):
            arm, model = arm_of(each), each["training"]["model"]
            found.setdefault((model, arm.rule, arm.density), (model, arm))
        return list(found.values())

    def link(self, model: str, arm: Arm, mbit: float) -> Row | None:
        """The timed exchanges of the arm's rule and density."""
        return next((e for e in self._links(model, arm) if e["link_mbit"] == mbit), None)

    def is_checked(self, arm: Arm, mbit: float) -> bool:
        """Whether the arm was run whole over that link."""
        return any(
            arm_of(each) == arm and each["link_mbit"] == mbit for each in self._data["checks"]
        )

    def finish(self) -> None:
        """Composes the rows."""
        targets, steps_s = {}, {}
        for model in MODELS:
            own = [each for each in self._of("grid") if each["training"]["model"] == model]
            ends = [each["curve"][-1][1] for each in own if _sets_target(arm_of(each))]
            if ends:
                targets[model] = max(ends)
                steps_s[model] = median(each["step_s"] for each in own)
        self._data |= {"target_loss": targets, "step_s": steps_s}
        self._data["load_average"] = round(os.getloadavg()[1], 1)
        trained = [each for each in self._of("grid") if each["training"]["model"] in targets]
        self._data["rows"] = [row for each in trained for row in self._rows(each)]
        self._save()

    def _rows(self, trained: Row) -> Iterator[Row]:
        """Of one training, one for each link that was timed; one without times if none was."""
        arm, model, sizes = arm_of(trained), trained["training"]["model"], self.sizes
        target, compute_s = self._data["target_loss"][model], sizes.steps * self._step_s(model)
        exchanges = sizes.steps if arm.every_step else sizes.rounds
        tokens = sizes.steps * sizes.step_tokens
        reached = next((at for at, loss in trained["curve"] if loss <= target), None)
        shared = {
            "rule": arm.rule,
            "density": arm.density,
            "error_feedback": arm.error_feedback,
            "model": model,
            "seed": trained["training"]["seed"],
            "tokens": tokens,
            "loss": trained["curve"][-1][1],
            "wire_bytes": trained["wire_bytes"],
            "target_loss": target,
            "tokens_to_target": reached,
        }
        links = self._links(model, arm)
        for link in links:
            least_s, median_s = min(link["exchange_s"]), median(link["exchange_s"])
            wall_s = compute_s + exchanges * least_s
            yield shared | {
                "link_mbit": link["link_mbit"],
                "link_bytes": round(link["link_bytes"] / link["exchanges"] * exchanges),
                "exchange_s": least_s,
                "wall_s": wall_s,
                "utilisation": compute_s / wall_s,
                "median_utilisation": compute_s / (compute_s + exchanges * median_s),
                "wall_to_target_s": reached and wall_s * reached / tokens,
            }
        if not links:
            timed = "link_mbit link_bytes exchange_s wall_s utilisation median_utilisation"
            yield shared | dict.fromkeys([*timed.split(), "wall_to_target_s"])

    def _step_s(self, model: str) -> float:
        return self._data["step_s"][model]

    def _of(self, purpose: str) -> list[Row]:
        return [e for e in self._data["trainings"] if e["training"]["purpose"] == purpose]

    def _links(self, model: str, arm: Arm) -> list[Row]:
        return [
            each
            for each in self._data["links"]
            if each["training"]["model"] == model
            and (arm_of(each).rule, arm_of(each).density) == (arm.rule, arm.density)
        ]

    def _save(self) -> None:
        write_whole(self._path, json.dumps(self._data, indent=1))


def _sets_target(arm: Arm) -> bool:
    """The target is what these came to with every seed."""
    is_main = arm.density in (None, MAIN_DENSITY) and arm.error_feedback is not False
    return is_main and arm.rule in ("ddp", "averaging", "diloco", "sparseloco")


def arm_of(measured: Row) -> Arm:
    """Of a training, link or check."""
    return Arm(**measured["training"]["arm"])
