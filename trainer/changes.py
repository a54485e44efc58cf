"""Which elements of the published weights change: per step, so far, and how far steps overlap.

The one idea: what counts are the bits that engines get, not the masters, of which nearly all move.
Each rank keeps masks of the rows it owns and counts in them; only counts cross ranks.
What it is for: "RL finetunes small subnetworks", Mukherjee et al. 2025, arXiv:2505.11711, measured
on a run of your own, by layer and expert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.publisher import Rows
from gossamer.parallel.gather import gather_texts

MEASURES = ("elements", "changed", "kept", "seen", "ever", "net")
"""Of a group of tensors: its elements; those that changed since the last measurement; of these,
those that had changed at the measurement before, too, and those that ever had; all that ever
changed; those that now differ from the start."""
PARTS = (("self_attn", "attention"), ("shared_expert", "shared"), ("norm", "norms"), ("mlp", "mlp"))
LAYER, EXPERT = re.compile(r"\.layers\.(\d+)\.(.*)"), re.compile(r"\.experts\.(\d+)\.")


def group_of(name: str) -> str:
    """`3/expert 5`, `3/attention`, `3/router`, `3/norms`, ... of layer 3; or the tensor's name."""
    layer = LAYER.search(name)
    if layer is None:
        return name
    rest = layer[2].replace("block_sparse_moe", "mlp")
    if expert := EXPERT.search(name):
        return f"{layer[1]}/expert {expert[1]}"
    if ".gate." in rest and "shared" not in rest:
        return f"{layer[1]}/router"
    part = next((part for word, part in PARTS if word in rest), "other")
    return f"{layer[1]}/{part}"


@dataclass(slots=True)
class _Masks:
    """Of rows of one tensor. Masks are packed, eight elements a byte."""

    start: np.ndarray
    last: np.ndarray
    changed: np.ndarray
    ever: np.ndarray


class ChangeMasks:
    """Of the rows of one rank, since the values they have now: two copies, two bits an element."""

    def __init__(self, rows: Iterable[Rows]) -> None:
        self._masks: dict[tuple[str, int], _Masks] = {}
        for each in rows:
            bits = tensor_bits(each.values).copy()
            none = np.packbits(np.zeros(len(bits), bool))
            self._masks[each.name, each.row_start] = _Masks(bits, bits, none, none)

    def measure(self, rows: Iterable[Rows]) -> dict[str, list[int]]:
        """MEASURES by group, and from now on "last" is now. The rows must be those of the start."""
        counts: dict[str, np.ndarray] = {}
        for each in rows:
            own, bits = self._masks[each.name, each.row_start], tensor_bits(each.values)
            changed = np.packbits(bits != own.last)
            ever = own.ever | changed
            found = (changed, changed & own.changed, changed & own.ever, ever)
            net = np.count_nonzero(bits != own.start)
            numbers = [len(bits), *(np.count_nonzero(np.unpackbits(mask)) for mask in found), net]
            group = group_of(each.name)
            counts[group] = counts.get(group, 0) + np.array(numbers)
            own.last, own.changed, own.ever = bits.copy(), changed, ever
        return {group: numbers.tolist() for group, numbers in counts.items()}


class Changes:
    """The masks of a run, if every_steps is not 0; every rank has one and makes the same calls."""

    def __init__(
        self, every_steps: int, rows: Callable[[], Iterator[Rows]], event: Callable[..., None]
    ) -> None:
        """`rows` gives this rank's, a collective call; `event` is called on rank 0."""
        self._every_steps, self._rows, self._event = every_steps, rows, event
        self._masks: ChangeMasks | None = None
        self._since_step = self._last_step = 0

    def begin(self, step: int) -> None:
        """Starts anew from the weights after `step`: a phase, an attempt or new owners begin."""
        if self._every_steps:
            self._masks = ChangeMasks(self._rows())
            self._since_step = self._last_step = step

    def after_update(self, step: int, phase: str) -> None:
        """Every every_steps steps: a `change` event with the counts of all ranks."""
        if self._masks is None or step % self._every_steps:
            return
        total: dict[str, np.ndarray] = {}
        for text in gather_texts(json.dumps(self._masks.measure(self._rows()))):
            for group, numbers in json.loads(text).items():
                total[group] = total.get(group, 0) + np.array(numbers)
        groups = sorted(total, key=_by_number)
        columns = zip(*(total[group].tolist() for group in groups), strict=True)
        told = dict(zip(MEASURES, map(list, columns), strict=True))
        elements, changed, kept, seen, ever, net = (sum(told[each]) for each in MEASURES)
        self._event(
            "change",
            phase=phase,
            step=step,
            since_step=self._since_step,
            steps=step - self._last_step,
            changed_share=changed / elements,
            kept_share=kept / max(1, changed),
            seen_share=seen / max(1, changed),
            ever_share=ever / elements,
            net_share=net / elements,
            groups=groups,
            **told,
        )
        self._last_step = step


def _by_number(group: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, expert 2 before expert 10; what is in no layer comes first."""
    words = re.split(r"(\d+)", group)
    numbered = [(int(word), "") if word.isdigit() else (-1, word) for word in words]
    return [(int(group[0].isdigit()), ""), *numbered]
