"""What a run saves and puts back: its whole state as a checkpoint, and a session from one.

The one idea: the step pays for a copy to host memory; a thread of each rank writes it, and whether
it is done is asked by the step, in a collective at a place that is the same on every rank.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from gossamer.comm.log import StaleWriterError, WeightLog
from gossamer.parallel.engine import Engine, Owned
from gossamer.parallel.gather import gather_texts
from gossamer.trainer.checkpoint import (
    Checkpoint,
    list_checkpoints,
    list_unfinished,
    resume_order,
)
from gossamer.trainer.checkpoint_writer import (
    BackgroundWrite,
    Target,
    prune_checkpoints,
    take_snapshot,
)
from gossamer.trainer.config import CheckpointConfig
from gossamer.trainer.moe.diversify import diversified
from gossamer.trainer.run_folder import inside, open_run

if TYPE_CHECKING:
    from gossamer.trainer.model import MoEModel
    from torch import Tensor

WAIT_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlace:
    """Where a run lives and which attempt at it this is."""

    run_dir: Path
    """Of this host."""
    name: str
    attempt: int = 1
    resume_from: str | None = None
    """URL of the checkpoint to go on from, or where it is torn from the one before."""
    url: str | None = None
    """Of a run that is at one; every host has a `run_dir` of its own then."""

    def here(self) -> RunPlace:
        """The same, as the host that calls sees it."""
        return self if self.url is None else replace(self, run_dir=open_run(self.url))


@dataclass(slots=True)
class Progress:
    """Where the run stands."""

    step: int = 0
    """Optimizer updates done, skipped ones among them."""
    phase_index: int = 0
    phase_step: int = 0
    """Updates done in the current phase."""
    skips: int = 0
    """Updates skipped because the gradient was not finite."""
    phase_skips: int = 0
    """Those of the current phase, by which its learning rate is behind."""
    skips_in_row: int = 0
    """The last updates, as far as they were all skipped."""
    reference_version: int | None = None
    """Version of the weight log that the current grpo phase began with."""

    @property
    def lr_step(self) -> int:
        """Number of the next update in the phase's learning-rate curve."""
        return self.phase_step - self.phase_skips

    def advance(self, skipped: bool) -> None:
        """After an update."""
        self.step += 1
        self.phase_step += 1
        self.skips += skipped
        self.phase_skips += skipped
        self.skips_in_row = self.skips_in_row + 1 if skipped else 0

    def end_phase(self) -> None:
        self.phase_index += 1
        self.phase_step = self.phase_skips = 0


def checkpoint_root(url: str | None, run_dir: Path) -> str:
    """Where a run's checkpoints are, if its config says `checkpoint.url`."""
    return url or inside(run_dir, "checkpoints")


def open_whole(newest: str | Path) -> tuple[Checkpoint, dict[str, str]]:
    """The newest whole checkpoint up to `newest`, and by URL what is wrong with later ones.

    A collective call: each rank hashes its share of the files. Raises ValueError where none is
    whole; what was begun and never committed is told of, and is no fault.
    """
    root, limit = str(newest).rpartition("/")[0], resume_order(str(newest))
    listed = [url for url in list_checkpoints(root) if resume_order(url) <= limit]
    candidates = json.loads(gather_texts(json.dumps(listed))[0])  # rank 0's, as one list for all
    torn: dict[str, str] = {}
    for url in reversed(candidates):
        found, fault = None, ""
        try:
            found = Checkpoint(url)
            found.verify(dist.get_rank(), dist.get_world_size())
        except (ValueError, FileNotFoundError) as error:
            fault = str(error)
        faults = [*filter(None, map(json.loads, gather_texts(json.dumps(fault))))]
        if found is not None and not faults:
            later = (u for u in list_unfinished(root) if resume_order(u) > resume_order(url))
            return found, torn | {u: f"{u} was begun and never finished" for u in later}
        torn[url] = faults[0]
    raise ValueError(f"no checkpoint in {root} is whole: {'; '.join(torn.values()) or newest}")


class SavedPart(Protocol):
    """What else of a run goes into its checkpoints."""

    def state(self) -> dict[str, Any]:
        """JSON, under the part's name in the manifest; rank 0's is kept."""
        ...

    def kinds(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        """By (tensor, first row) of the rows that this rank owns: more tensors of their shape, by
        kind. All rows of a tensor have the same kinds."""
        ...


class Saver:
    """Saves and restores one rank of a run; every rank has one and makes the same calls."""

    def __init__(
        self,
        config: CheckpointConfig,
        root: str,
        epoch: int,
        engine: Engine,
        model: MoEModel,
        log: WeightLog,
        on_saved: Callable[[dict[str, Any]], None],
        torn: tuple[str, ...] = (),
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_saved` gets what the `checkpoint` event says, on every rank, once it is committed;
        `before_commit` is called before that on rank 0, in the thread that writes."""
        self._config, self._root, self._epoch = config, root, epoch
        self._engine, self._model, self._log = engine, model, log
        self._on_saved, self._torn = on_saved, torn
        self._before_commit = before_commit
        self.parts: dict[str, SavedPart] = {}
        self._write: BackgroundWrite | None = None
        self._event: dict[str, Any] = {}
        self._saved: tuple[Progress, str] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a write is in flight, as of the last look."""
        return self._write is not None

    def is_due(self, step: int) -> bool:
        return step % self._config.every_steps == 0

    def save(self, progress: Progress, data: dict[str, Any] | None, version: int | None) -> None:
        """Copies the whole state and begins to write it; waits for an earlier write first.

        Raises StaleWriterError when a later attempt has begun.
        """
        self.wait()
        if self._saved and self._saved[0] == progress:
            return  # nothing was learned since
        self._refuse_stale()
        start_s = time.perf_counter()
        target = Target(
            root=self._root,
            step=progress.step,
            epoch=self._epoch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        state = {
            "progress": asdict(progress),
            "num_updates": self._engine.num_updates,
            "data": data,
            "log": {"version": version},
            **{name: part.state() for name, part in self.parts.items()},
        }
        snapshot = take_snapshot(self._owned(), target.rank)
        self._event = {
            "step": progress.step,
            "version": version,
            "snapshot_s": time.perf_counter() - start_s,
        }
        self._saved = Progress(**asdict(progress)), target.url
        prune = partial(
            prune_checkpoints, self._root, self._config.keep_last, target.url, self._torn
        )
        # as text, now: the step will move what it describes
        self._write = BackgroundWrite(target, snapshot, json.dumps(state), self._may_commit, prune)
        self._write.start()
        if not self._config.asynchronous:
            self.wait()

    def _owned(self) -> Iterator[Owned]:
        """All rows of this rank, with what the parts hold of them."""
        beside = [part.kinds() for part in self.parts.values()]
        for rows in chain(self._engine.owned(with_moments=True), owned_buffers(self._model)):
            held = rows.moments
            for kinds in beside:
                held = held | kinds.get((rows.name, rows.row_start), {})
            yield replace(rows, moments=held)

    def poll(self) -> None:
        """Looks whether the write in flight is done on every rank. A collective call.

        Raises RuntimeError on every rank, in one sentence, when it failed on any.
        """
        write = self._write
        if write is None:
            return
        is_writing = write.is_alive()  # before its error: that is the last thing a thread sets
        flags = torch.tensor([int(is_writing), int(write.error is not None)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        is_writing, is_failed = map(bool, flags.tolist())
        if is_failed:
            write.abandon()
            self._refuse_stale()  # of all faults the one that another attempt would not mend
            told = next(filter(None, map(json.loads, gather_texts(json.dumps(write.fault)))))
            raise RuntimeError(
                f"writing the checkpoint of step {self._event['step']} failed: {told}"
            ) from write.error
        if not is_writing:
            self._write = None
            self._on_saved(self._event | {"bytes": write.num_bytes, "write_s": write.write_s})

    def wait(self) -> None:
        """Returns once the write in flight, if any, is committed. A collective call; see poll."""
        while self._write is not None:
            self._write.join(WAIT_S)
            self.poll()

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Puts engine, biases and RNG back. Raises ValueError for another model's checkpoint."""
        held = sum(math.prod(shape) for shape in checkpoint.shapes.values())
        buffers = self._model.buffers()
        expected = self._model.num_parameters()[0] + sum(b.numel() for b in buffers.values())
        if held != expected:
            raise ValueError(
                f"{checkpoint.url} holds {held} parameters; expected {expected} as in the model"
            )
        self._engine.write(checkpoint.read, checkpoint.state["num_updates"])
        for name, values in buffers.items():
            values.copy_(checkpoint.rows(name, 0, len(values)))
        rng = checkpoint.rng(dist.get_rank())
        if rng is not None:
            torch.set_rng_state(rng)
        return Progress(**checkpoint.state["progress"])

    def diversify(self, masked_share: float, seed: int) -> None:
        """Copies the one expert trained so far to all, from the checkpoint last saved."""
        self.wait()
        assert self._saved is not None, "save() comes first"
        read = diversified(Checkpoint(self._saved[1]).read, masked_share, seed)
        self._engine.write(read, self._engine.num_updates)

    def _may_commit(self) -> None:
        self._refuse_stale()
        self._before_commit()

    def _refuse_stale(self) -> None:
        if self._log.is_superseded(self._epoch):
            raise StaleWriterError(
                f"this is writer epoch {self._epoch} of the run, but a later one has begun;"
                " no checkpoint was committed"
            )


def owned_buffers(model: MoEModel) -> Iterator[Owned]:
    """Routing biases: alike on every rank, and the first rank's."""
    if dist.get_rank() == 0:
        for name, values in model.buffers().items():
            yield Owned(name, tuple(values.shape), 0, len(values), values, {})
