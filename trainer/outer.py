"""Replicas in the training loop: every H updates a round with the others, and all start as one.

The one idea: progress is counted in rounds. A replica that comes new, or missed rounds, goes on at
the step where the others are; only its data goes on where it was, so that learning rates and the
end of the run are the same for all. What a round is: comm/outer/replica.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from gossamer.comm.codec.part import Rows
from gossamer.comm.names import expert_places
from gossamer.comm.outer.exchange import Exchange, Settled
from gossamer.comm.outer.replica import SHARED_PREFIX, WINDOW_PREFIX, Replica
from gossamer.comm.outer.rule import Key
from gossamer.comm.state_hash import format_hash
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Engine, Owned
from gossamer.parallel.gather import gather_texts
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.checkpoint import Checkpoint
from gossamer.trainer.config import PhaseConfig, TrainConfig
from gossamer.trainer.feed import Feed
from gossamer.trainer.model import MoEModel
from gossamer.trainer.outer_link import open_link
from gossamer.trainer.outer_state import outer_kinds, put_back, shared_weights
from gossamer.trainer.saving import Progress, RunPlace, owned_buffers
from gossamer.trainer.sparsity.rounds import SharedMasks
from gossamer.trainer.sparsity.run import SparseRun
from gossamer.trainer.update import UpdateResult
from torch import Tensor


class OuterSync:
    """One rank of a replica; every rank has one and makes the same calls."""

    def __init__(
        self,
        config: TrainConfig,
        place: RunPlace,
        dims: ParallelDims,
        engine: Engine,
        model: MoEModel,
        feed: Feed,
        event: Callable[..., None],
        sparse: SparseRun | None = None,
    ) -> None:
        """`event` is called with the name and fields of what happened, on rank 0."""
        assert config.outer is not None
        self._steps = config.max_steps
        self._sparse = sparse
        self._masks: SharedMasks | None = None
        if sparse is not None:
            self._masks = SharedMasks(sparse, config.outer.inner_steps, self._steps)
        self._config, self._outer, self._place = config, config.outer, place
        self._dims, self._engine, self._model = dims, engine, model
        self._feed, self._event = feed, event
        self._tokens_before = self._tokens = 0
        self._load_LE = torch.zeros(
            len(model.blocks), model.blocks[0].num_experts, dtype=torch.int64
        )
        self._clock_s: float | None = None
        held = [name for logical in model.segments.values() for name, _ in logical]
        self._experts = expert_places(held)

    # --- as the checkpoint has it ---------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {
            "round": self.replica.number,
            "tokens_before": self._tokens_before,
            "tokens": self._tokens,
            "expert_load": self._load_LE.tolist(),
        }

    def kinds(self) -> dict[Key, dict[str, Tensor]]:
        """Shared weights, momentum, error buffers, by the rows they belong to."""
        return outer_kinds(self.replica)

    # --- the loop's steps -----------------------------------------------------------------------

    def begin(self, progress: Progress, checkpoint: Checkpoint | None) -> None:
        """Meets the others and goes on where they are: from `checkpoint`, which the engine holds
        already, or from the newest anchor. A collective call.

        Raises StaleWriterError, LogError (see comm/outer/claim.py).
        """
        rows = list(self._rows())
        saved = checkpoint.state.get("outer") if checkpoint else None
        number = saved["round"] if saved else 0
        shapes: dict[str, tuple[int, ...]] = {}
        for text in gather_texts(json.dumps({each.name: each.shape for each in rows})):
            shapes |= {name: tuple(shape) for name, shape in json.loads(text).items()}
        shapes |= {SHARED_PREFIX + name: shape for name, shape in shapes.items()}
        link = self._link = open_link(
            self._outer, self._place, self._config.data, self._dims, shapes, number
        )
        self._exchange: Exchange = link.exchange
        if self._masks is not None:
            self._exchange = self._masks.through(link.exchange, shapes)
        if saved:
            self._tokens_before, self._tokens = saved["tokens_before"], saved["tokens"]
            self._load_LE = torch.tensor(saved["expert_load"])
        if checkpoint is not None and saved and self._can_go_on(number):
            self._go_on(rows, checkpoint, number, progress)
        else:
            self._start(rows, progress)
        if self.replica.rule.on_gradients:
            self._engine.on_gradient = self._exchange_gradient
        self._spent = self._spending()

    def drew(self, batch: TokenBatch) -> None:
        """Before an update: these are its tokens."""
        if self._clock_s is None:
            self._clock_s = time.perf_counter()
        self._tokens += int(batch.is_real_BS.sum())

    def updated(self, result: UpdateResult) -> None:
        """After an update."""
        self._load_LE += torch.tensor(result.expert_load)

    def sync(self, progress: Progress, phase: PhaseConfig) -> float:
        """After an update, the round if one is due; returns the seconds it took.

        Raises RefusedError, StaleWriterError, QuorumError, LogError, StoreError; then the run goes
        on from its last checkpoint, or from the newest anchor.
        """
        is_last = progress.step == self._steps
        if progress.step % self._outer.inner_steps and not is_last:
            return 0.0
        start_s, tokens = time.perf_counter(), self._tokens
        if not self.replica.rule.on_gradients:  # else it was when the step was taken
            self._round(list(self._rows()), progress.step)
        settled = self._settled
        self._tokens_before, self._tokens = self._tokens_before + tokens, 0
        self._load_LE.zero_()
        missed = self._catch_up()
        if not self.replica.rule.on_gradients:
            self._write()
        self._skip_data(phase)
        _move_on(progress, self._config, self.replica.number * self._outer.inner_steps)
        now_s = time.perf_counter()
        outer_s = now_s - start_s
        self._say_round(settled, progress.step, tokens, missed, outer_s)
        self._clock_s = time.perf_counter()
        return outer_s

    def leave(self) -> None:
        """The run is finished: nobody waits for this replica any more."""
        self.replica.leave()

    # --- parts ----------------------------------------------------------------------------------

    def _can_go_on(self, number: int) -> bool:
        """Whether a checkpoint from before round `number` will do."""
        course = self._link.course
        return course is None or self._agreed(lambda: int(course.can_go_on(number))) == 1

    def _go_on(
        self, rows: list[Rows], checkpoint: Checkpoint, number: int, progress: Progress
    ) -> None:
        """From the checkpoint; where the others are rounds ahead, without the round it was in."""
        link, shared = self._link, shared_weights(checkpoint, rows)
        if self._masks is not None:
            shared += self._masks.rows()
        self.replica = Replica(self._outer, self._exchange, shared, link.anchors, number)
        put_back(self.replica, checkpoint, rows)
        if self._masks is not None:
            self._masks.attach(self.replica, is_new=False)
        missed, course = 0, link.course
        if course is not None:
            until = self._agreed(lambda: course.next_own(number))
            if until > number + 1:
                missed = self.replica.catch_up(until)
                self._give_up_round(progress)
        self._say_start("checkpoint", missed)

    def _start(self, rows: list[Rows], progress: Progress) -> None:
        """From the newest anchor and the rounds since; the first replica makes the first anchor."""
        exchange, anchors, course = self._exchange, self._link.anchors, self._link.course
        if course is None:
            self.replica = Replica(self._outer, exchange, rows, number=0)
        else:
            newest = self._agreed(course.anchor)
            anchor = None if newest < 0 else newest
            self.replica = Replica(self._outer, exchange, rows, anchors, anchor=anchor)
        if self._masks is not None:
            self._masks.attach(self.replica, is_new=True)
        missed = 0
        if course is not None:
            missed = self.replica.catch_up(self._agreed(course.next_round))
            self._give_up_round(progress)
        self._say_start("anchor" if course else "config", missed)

    def _give_up_round(self, progress: Progress) -> None:
        """Takes up the shared weights, and what goes with them."""
        self._tokens_before, self._tokens = self._tokens_before + self._tokens, 0
        self._load_LE.zero_()
        self._write()
        if self._sparse is not None:
            self._sparse.follow()
        _move_on(progress, self._config, self.replica.number * self._outer.inner_steps, True)
        if progress.phase_index < len(self._config.phases):
            self._skip_data(self._config.phases[progress.phase_index])

    def _catch_up(self) -> int:
        """Applies rounds that were settled meanwhile; returns how many."""
        course = self._link.course
        if course is None:
            return 0
        return self.replica.catch_up(self._agreed(lambda: course.next_own(self.replica.number)))

    def _skip_data(self, phase: PhaseConfig) -> None:
        """Draws what was counted before and throws it away, so that no token is trained twice."""
        course = self._link.course
        if course is None:
            return
        until = self._agreed(lambda: course.token(self.replica.number))
        while self._tokens_before < until and phase.kind != "grpo":
            batch, _ = self._feed.draw(phase, 0)
            self._tokens_before += int(batch.is_real_BS.sum())
        self._tokens_before = max(self._tokens_before, until)

    def _exchange_gradient(self, owned: list[Owned]) -> None:
        """Between backward and step: a rule on gradients leaves their mean in `owned`."""
        rows = [Rows(each.name, each.shape, each.row_start, each.master) for each in owned]
        self._round(rows, self._engine.num_updates)

    def _round(self, trained: list[Rows], step: int) -> None:
        start_s = time.perf_counter()
        self._settled = self.replica.round(
            trained, self._tokens_before, self._tokens, step, self._idle()
        )
        self._round_s = time.perf_counter() - start_s
        self._send_s = self._link.exchange.sent_at_s - start_s

    def _rows(self) -> Iterator[Rows]:
        """What this rank owns, as it is now."""
        for rows in chain(self._engine.owned(with_moments=False), owned_buffers(self._model)):
            yield Rows(rows.name, rows.shape, rows.row_start, rows.master)
        if self._masks is not None:
            yield from self._masks.rows()

    def _write(self) -> None:
        """The shared weights become the model's, on all ranks."""

        def read(name: str, row_start: int, row_stop: int) -> Owned:
            rows = self.replica.rows[name, row_start]
            return Owned(name, rows.shape, row_start, row_stop, rows.values, {})

        if self._masks is not None:  # first: what grew in rounds that were missed has weights
            self._masks.install(min(self.replica.number * self._outer.inner_steps, self._steps))
        self._engine.write(read, None)
        for name, values in self._model.buffers().items():
            if self._dims.rank == 0:
                values.copy_(self.replica.rows[name, 0].values)
            dist.broadcast(values, src=0)

    def _idle(self) -> set[str]:
        """Tensors of experts that saw no token since the last round. Not their windows of dense
        gradients: these may reach back over several rounds."""
        idle = set()
        for name, _ in self.replica.rows:
            if name.startswith(WINDOW_PREFIX):
                continue
            place = self._experts.get(name.rpartition(" ")[2])  # a mask's is `mask of NAME`
            if place is not None and not self._load_LE[place]:
                idle.add(name)
        return idle

    def _agreed(self, look: Callable[[], int]) -> int:
        """What rank 0 sees in the log, on all ranks."""
        seen = torch.tensor([look() if self._dims.rank == 0 else 0])
        dist.broadcast(seen, src=0)
        return int(seen)

    def _say_round(
        self, settled: Settled, step: int, tokens: int, missed: int, sync_s: float
    ) -> None:
        now, before = self._spending(), self._spent
        self._spent = now
        sent, read, wait_s = (after - was for after, was in zip(now, before, strict=True))
        on_gradients, number = self.replica.rule.on_gradients, settled.round
        outer_s = sync_s + (self._round_s if on_gradients else 0.0)
        compute_s = time.perf_counter() - (self._clock_s or 0.0) - outer_s
        mine = [sent, read, int(self.replica.part_hash(), 16)]
        totals = [json.loads(text) for text in gather_texts(json.dumps(mine))]
        sent, read, state = map(sum, zip(*totals, strict=True))
        self._event(
            "outer_round",
            round=number,
            step=step,
            is_counted=(self._outer.replica, number) in settled.counted,
            counted=sorted(name for name, made_in in settled.counted if made_in == number),
            late=sorted(name for name, made_in in settled.counted if made_in != number),
            refused=settled.refused,
            missed=missed,
            next_round=self.replica.number,
            wire_bytes_sent=sent,
            wire_bytes_read=read,
            compute_s=compute_s,
            send_s=self._send_s,
            wait_s=wait_s,
            apply_s=max(0.0, outer_s - self._send_s - wait_s),
            utilisation=compute_s / (compute_s + outer_s),
            tokens=tokens,
            tokens_counted=sum(parts[0].tokens for parts in settled.messages),
            state_hash=None if on_gradients else format_hash(state),
        )

    def _spending(self) -> tuple[int, int, float]:
        """Bytes sent and read by this rank, and seconds it waited, so far."""
        meter = self._link.meter
        return meter.sent, meter.read, self._link.exchange.wait_s

    def _say_start(self, source: str, missed: int) -> None:
        self._event(
            "outer_start",
            replica=self._outer.replica,
            incarnation=self._link.exchange.identity.incarnation,
            source=source,
            round=self.replica.number,
            missed=missed,
            tokens=self._tokens_before,
        )


def _move_on(progress: Progress, config: TrainConfig, step: int, over_phases: bool = False) -> None:
    """Brings progress up to `step`; not over the end of its phase, unless told so."""
    while progress.step < step and progress.phase_index < len(config.phases):
        phase = config.phases[progress.phase_index]
        if progress.phase_step == phase.max_steps:
            return  # the loop ends the phase
        progress.advance(skipped=False)
        if over_phases and progress.phase_step == phase.max_steps:
            progress.end_phase()
