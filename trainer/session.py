"""A rank's session: everything the loop holds, built once and put back from a checkpoint.

The one idea: what must outlive a rank goes through the saver, what crosses to rollout engines
through the log; the rest is rebuilt from the config.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gossamer.parallel.dims import build_dims
from gossamer.trainer.changes import Changes
from gossamer.trainer.config import PhaseConfig, TrainConfig
from gossamer.trainer.data.mixture import task_source
from gossamer.trainer.engine import build_engine
from gossamer.trainer.evaluate import greedy_exact_match
from gossamer.trainer.feed import Feed
from gossamer.trainer.metrics import EventLog, WandbMirror
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.moe.trace import RoutingTrace
from gossamer.trainer.optim import lr_at
from gossamer.trainer.outer import OuterSync
from gossamer.trainer.placement import PlacedExperts
from gossamer.trainer.prepare import load_problems, load_run_tokenizer
from gossamer.trainer.publishing import Publishing
from gossamer.trainer.replacement import LivePlacement
from gossamer.trainer.rl.grpo import PolicyBatch
from gossamer.trainer.rl.reference import Reference
from gossamer.trainer.rl.rollouts import RolloutSource, RolloutStatistics
from gossamer.trainer.saving import Progress, RunPlace, Saver, checkpoint_root, open_whole
from gossamer.trainer.sparsity.run import SparseRun
from gossamer.trainer.step.determinism import be_deterministic
from gossamer.trainer.step.flops import measured_peak
from gossamer.trainer.step.heldout import HeldoutText
from gossamer.trainer.step.profile import StepProfiler
from gossamer.trainer.update import UpdateResult, update


class Session:
    """One rank of a replica. Rank 0 alone reads data, talks to engines and writes numbers."""

    def __init__(
        self,
        config: TrainConfig,
        place: RunPlace,
        rollouts: RolloutSource | None,
        on_checkpoint: Callable[[int], None],
    ) -> None:
        if config.deterministic:
            be_deterministic(config.seed)
        self.config, self.place, self.progress = config, place, Progress()
        self._on_checkpoint = on_checkpoint
        self._is_first_rank = dist.get_rank() == 0
        checkpoint, self._torn = open_whole(place.resume_from) if place.resume_from else (None, {})

        tokenizer = load_run_tokenizer(place.run_dir)
        problems = load_problems(place.run_dir) if config.task else None
        self.dims = build_dims(config.parallel)
        hf = hf_config(config.model, tokenizer.hf_fields())
        self.model = build_model(config.model, hf, self.dims, config.seed)
        self.engine = build_engine(self.model, self.dims, config.parallel, config.optim)
        self._experts = PlacedExperts(self.model, self.engine, self.dims)
        self._live_placement = LivePlacement(config.parallel, self._experts, self.dims)
        self._publishing = Publishing(
            config, place, self.dims, self.engine, self.model, self._event
        )
        every_steps = config.metrics.changes_every_steps
        self._changes = Changes(every_steps, self._publishing.rows, self._event)
        self._reference = Reference(config, hf, self.dims, self._publishing.log)
        data_state = checkpoint.state["data"] if checkpoint else None
        self._feed = Feed(config, tokenizer, problems, rollouts, data_state)
        self._dev = task_source(tokenizer, problems.dev if problems else [], 1.0, True)
        self._rollout_statistics: RolloutStatistics | None = None
        self._clock_s = self._wait_s = self._lr = 0.0
        self._is_saving = False
        self._open_books()
        self._saver = self._build_saver()
        self._sparse: SparseRun | None = None
        if config.sparsity is not None:
            self._sparse = SparseRun(config, self.model, self.engine, self._event)
            self._saver.parts["sparsity"] = self._sparse
        if config.parallel.placement.path is not None:
            moved = self._experts.place_file(Path(config.parallel.placement.path))
            self._event("placement", reason="file", is_moved=True, **moved)
        if self._sparse is not None and checkpoint:
            self._sparse.restore(checkpoint.state.get("sparsity"))
        if checkpoint:
            self.progress = self._saver.restore(checkpoint)
        elif self._sparse is not None:
            self._sparse.begin()
        self._outer = self._build_outer()
        if self._outer is not None:
            self._outer.begin(self.progress, checkpoint)

    def _build_saver(self) -> Saver:
        return Saver(
            self.config.checkpoint,
            checkpoint_root(self.config.checkpoint.url, self.place.run_dir),
            self._publishing.epoch,
            self.engine,
            self.model,
            self._publishing.log,
            self._on_saved,
            tuple(self._torn),
            self._flush_books,
        )

    def _flush_books(self) -> None:
        """What a checkpoint contains is in the books before it counts."""
        self._events.flush()

    def _build_outer(self) -> OuterSync | None:
        if self.config.outer is None:
            return None
        place, dims, feed = self.place, self.dims, self._feed
        outer = OuterSync(
            self.config, place, dims, self.engine, self.model, feed, self._event, self._sparse
        )
        self._saver.parts["outer"] = outer
        return outer

    # --- the loop's steps -----------------------------------------------------------------------

    def start(self) -> None:
        """Says who runs; a run that resumes inside a grpo phase publishes where it stands."""
        total, active = self.model.num_parameters()
        is_measured = self.config.metrics.peak_flops is None
        if is_measured:
            dtype = getattr(torch, self.config.parallel.compute_dtype)
            self._peak_flops = measured_peak(dtype)
        self._event(
            "run_start",
            name=self.place.name,
            seed=self.config.seed,
            attempt=self.place.attempt,
            phases=[asdict(phase) for phase in self.config.phases],
            params=total,
            active_params=active,
            data=self.dims.data,
            ep_size=self.dims.expert,
            zero_stage=self.config.parallel.zero_stage,
            world_size=self.dims.world_size,
            peak_flops=self._peak_flops,
            peak_source="measured" if is_measured else "config",
            step=self.progress.step,
        )
        for url, reason in self._torn.items():
            self._event("checkpoint_torn", checkpoint=url, reason=reason, step=self.progress.step)
        phase = self.phase()
        if phase is not None and self.progress.phase_step:
            self.publish(phase)
            self._changes.begin(self.progress.step)
        self._heldout = HeldoutText(self.config, self._feed)
        self._clock_s = time.perf_counter()

    def phase(self) -> PhaseConfig | None:
        """The current phase; None when all are done."""
        index = self.progress.phase_index
        return self.config.phases[index] if index < len(self.config.phases) else None

    def begin_phase(self, phase: PhaseConfig) -> None:
        """Before a phase's first update: a grpo phase publishes and measures where it starts."""
        self._event("phase", phase=phase.name, kind=phase.kind, step=self.progress.step)
        self._changes.begin(self.progress.step)
        if phase.kind == "grpo":
            self.publish(phase)
            self.progress.reference_version = self._publishing.version
            self._measure_heldout()
        self._clock_s = time.perf_counter()

    def update(self, phase: PhaseConfig) -> UpdateResult:
        """Draws the next batch and learns from it. Raises what a checkpoint's write raised."""
        self._saver.poll()
        self._is_saving = self._saver.is_writing
        gate = self.config.model.moe.dense_to_sparse
        is_evomoe = self.config.model.router == "dense_to_sparse"
        # not the engine's own count: one that joined a run's replicas took few of them itself
        updates = self.progress.step - self.progress.skips
        is_due = 0 < gate.diversify_steps == updates
        if is_evomoe and is_due and not self.progress.skips_in_row:  # else it is done
            self.checkpoint()
            self._saver.diversify(gate.masked_share, self.config.seed)
        start_s = time.perf_counter()
        batch, self._rollout_statistics = self._feed.draw(phase, self.progress.phase_step)
        self._wait_s = time.perf_counter() - start_s
        if self.config.rl.kl_coef and isinstance(batch, PolicyBatch):
            batch = self._reference.scored(batch, self.progress.reference_version)
        if self._outer is not None:
            self._outer.drew(batch)
        self._lr, step = lr_at(phase, self.progress.lr_step), self.progress.step + 1
        if self._sparse is not None:
            self._lr *= self._sparse.lr_factor
        self._profiler.begin_step(step)
        result = update(
            self.model, self.engine, self.dims, batch, self._lr, self.config, self._trace, updates
        )
        self._profiler.end_step(step)
        self.progress.advance(result.skipped)
        most = self.config.optim.max_skips
        if self.progress.skips_in_row > most:
            raise FloatingPointError(
                f"the gradient was not finite in {most + 1} updates in a row, up to step {step};"
                f" expected at most optim.max_skips={most}"
            )
        if self._outer is not None:
            self._outer.updated(result)
        self._masks_told = {}
        if self._sparse is not None:
            self._masks_told = self._sparse.updated(result, self.progress.step)
        self._reconsider_placement(phase, result)
        return result

    def sync_replicas(self, phase: PhaseConfig) -> None:
        """The round with the other replicas and new masks, where they are due."""
        if self._outer is not None:
            # its time is no part of the step's
            self._clock_s += self._outer.sync(self.progress, phase)
        if self._sparse is not None:
            self._sparse.change()

    def _reconsider_placement(self, phase: PhaseConfig, result: UpdateResult) -> None:
        """Live placement; after a move the log needs an anchor, for rows have other owners."""
        log, anchor_s = self.config.log, 0.0
        if phase.kind == "grpo" and log.link_mbit is not None:
            bits = 8 * getattr(torch, log.publish_dtype).itemsize * self.model.num_parameters()[0]
            anchor_s = bits / (log.link_mbit * 1e6)
        step = self.progress.step
        decision = self._live_placement.after_update(step, result.expert_load, anchor_s)
        if decision is not None:
            self._event("placement", step=step, **decision)
            if decision["is_moved"]:
                self._publishing.start_over()
                self._changes.begin(step)

    def publish(self, phase: PhaseConfig) -> None:
        """Publishes the weights as the log's next version and asks for the batches it allows."""
        if phase.kind != "grpo":
            return
        version = self._publishing.publish(self.progress.step)
        if self._feed.rollouts:
            steps = range(self.progress.phase_step, phase.max_steps)
            before = self.config.phases[: self.progress.phase_index]
            number = sum(each.kind == "grpo" for each in before)
            self._feed.rollouts.ask_ahead(version, steps, number)

    def record(self, phase: PhaseConfig, result: UpdateResult) -> None:
        """Writes the update's numbers."""
        now_s = time.perf_counter()
        step_s, self._clock_s = now_s - self._clock_s, now_s
        fields = asdict(result)
        if self.progress.step % self.config.metrics.expert_load_every_steps:
            del fields["expert_load"], fields["layers"]
        if self._rollout_statistics is not None:
            fields |= asdict(self._rollout_statistics)
        self._event(
            "train_step",
            attempt=self.place.attempt,
            phase=phase.name,
            step=self.progress.step,
            phase_step=self.progress.phase_step,
            lr=self._lr,
            skips=self.progress.skips,
            step_s=step_s,
            wait_s=self._wait_s,
            saving=self._is_saving,
            tokens_per_s=result.tokens / step_s,
            mfu=result.flops / (step_s * self._peak_flops),
            **fields,
            **self._masks_told,
        )
        self._changes.after_update(self.progress.step, phase.name)

    def evaluate(self, phase: PhaseConfig) -> None:
        """Every heldout.every_steps, outside RL: the loss on text that is never trained on."""
        found = self._heldout.measure(self.model, self.dims, phase, self.progress.step)
        if found is not None:
            self._clock_s += found["eval_s"]  # it is no part of the next step's time
            self._event("eval", **found)

    def is_phase_done(self, phase: PhaseConfig) -> bool:
        """Out of steps, or good enough on the dev problems."""
        done = self.progress.phase_step >= phase.max_steps
        is_due = self.progress.phase_step % phase.eval_every_steps == 0 or done
        if phase.kind == "next_token" and phase.until_exact_match is not None and is_due:
            start_s = time.perf_counter()
            exact = greedy_exact_match(self.model, self.dims, self._dev, self.config.data.seq_len)
            self._clock_s += time.perf_counter() - start_s  # as in `evaluate`
            self._event_eval("dev", exact, len(self._dev.documents))
            done = done or exact >= phase.until_exact_match
        return done

    def end_phase(self, phase: PhaseConfig) -> None:
        """After a phase's last update: measure, move on, and write it all down."""
        is_last = self.progress.phase_index + 1 == len(self.config.phases)
        if is_last and self._sparse is not None and self._sparse.finish():
            self.publish(phase)  # weights moved once more
        if phase.kind == "grpo":
            self._measure_heldout()
        self.progress.end_phase()
        self.checkpoint()
        self._saver.wait()

    def is_checkpoint_due(self) -> bool:
        return self._saver.is_due(self.progress.step)

    def checkpoint(self) -> None:
        """Begins to write the whole state. Refuses when a later attempt has begun."""
        self._saver.save(self.progress, self._feed.state(), self._publishing.version)

    def _on_saved(self, saved: dict[str, Any]) -> None:
        self._event("checkpoint", **saved)
        self._on_checkpoint(saved["step"])

    def finish(self) -> None:
        """Has every engine, if there are any, prove that it holds the trainer's own last bits."""
        if any(phase.kind == "grpo" for phase in self.config.phases):
            self._publishing.audit(self.progress.step, self._feed.rollouts)
        if self._outer is not None:
            self._outer.leave()
            self.checkpoint()  # of one that came when all was over; else it is there already
            self._saver.wait()
        self._profiler.close()
        self._event("run_end", reason="finished", step=self.progress.step)
        if self._is_first_rank:
            self._events.flush()
            self._wandb.close()

    # --- parts ----------------------------------------------------------------------------------

    def _open_books(self) -> None:
        """Metrics, and what else is written of a run while it runs."""
        config, place, rank = self.config, self.place, self.dims.rank
        self._peak_flops = (config.metrics.peak_flops or 0.0) * self.dims.world_size
        steps, moe = config.metrics.profile_steps, config.model.moe
        self._profiler = StepProfiler(place.run_dir / "profile", rank, steps)
        self._trace: RoutingTrace | None = None
        if moe.trace_path:
            self._trace = RoutingTrace(place.run_dir / moe.trace_path, rank, moe.trace_steps)
        if self._is_first_rank:
            self._events = EventLog(place.run_dir)
            self._wandb = WandbMirror(place.run_dir, place.name, config.metrics, asdict(config))

    def _measure_heldout(self) -> None:
        found = self._feed.heldout_exact_match()
        if found is not None:
            self._event_eval("heldout", *found)

    def _event_eval(self, name: str, exact_match: float, problems: int) -> None:
        self._event(
            "eval",
            name=name,
            step=self.progress.step,
            version=self._publishing.version,
            exact_match=exact_match,
            problems=problems,
        )

    def _event(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        if self._is_first_rank:
            self._events.write(event, fields)
            self._wandb.write(event, self.progress.step, fields)
