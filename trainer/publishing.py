"""A rank's part of the weight log: versions out, and the proof that engines hold them.

The one idea: what is published are the masters, rounded once, by their logical names; which rank
owns which rows is the engine's affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.distributed as dist
from gossamer.comm.log import WeightLog
from gossamer.comm.names import published_dtype
from gossamer.comm.publisher import Published, Publisher, Rows
from gossamer.comm.signing import Signer
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Engine
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.model import MoEModel
from gossamer.trainer.proof import trainer_state_hash
from gossamer.trainer.rl.rollouts import RolloutBatches
from gossamer.trainer.run_folder import LOG_FOLDER, inside
from gossamer.trainer.saving import RunPlace, owned_buffers


class Publishing:
    """Every rank has one and makes the same calls. Claims the log's next writer epoch."""

    def __init__(
        self,
        config: TrainConfig,
        place: RunPlace,
        dims: ParallelDims,
        engine: Engine,
        model: MoEModel,
        event: Callable[..., None],
    ) -> None:
        """`event` is called with the name and fields of what happened, on rank 0."""
        self._engine, self._model, self._event = engine, model, event
        self._is_first_rank = dims.rank == 0
        self._dtype = getattr(torch, config.log.publish_dtype)
        self._published: Published | None = None
        self.log = WeightLog.open(inside(place.run_dir, LOG_FOLDER))
        takeover = place.attempt > 1 or place.resume_from is not None
        self.epoch = self._claim_epoch(takeover)
        key = config.log.signing_key_path
        signer = Signer.from_file(key) if key else None
        self._publisher = Publisher(
            self.log, dims.rank, dims.world_size, self.epoch, config.log, signer
        )

    @property
    def version(self) -> int | None:
        """The last version that this attempt published."""
        return self._published.version if self._published else None

    def publish(self, step: int) -> int:
        """Publishes the weights as they are after `step` as the log's next version."""
        is_takeover = self._published is None and self.log.head() is not None
        dist.barrier()  # every rank has looked at the head before part 0 may move it
        start_s = time.perf_counter()
        published = self._published = self._publisher.publish(
            self.rows(), step, step if is_takeover else None
        )
        if self._is_first_rank:
            manifest = self.log.manifest(published.version)
            parts = manifest.delta or manifest.anchor
            self._event(
                "publish",
                version=published.version,
                step=step,
                kind="delta" if manifest.delta else "anchor",
                frame_bytes=sum(part.nbytes for part in parts),
                full_bytes=manifest.full_bytes,
                density=manifest.num_changed / manifest.num_elements,
                export_s=published.export_s,
                find_s=published.find_s,
                encode_s=published.encode_s,
                put_s=published.put_s,
                wait_s=published.wait_s,
                publish_s=time.perf_counter() - start_s,
            )
        return published.version

    def start_over(self) -> None:
        """The next version is an anchor: rows have other owners."""
        self._publisher.start_over()

    def audit(self, step: int, rollouts: RolloutBatches | None) -> None:
        """Has every engine, if there are any, prove that it holds the masters' own last bits."""
        published = self._published
        if published is not None and published.step == step:
            version = published.version
        else:  # learned from text since, or resumed from the very last checkpoint
            version = self.publish(step)
        expected = trainer_state_hash(self.rows())
        if rollouts:
            for engine, found in rollouts.audit(version).items():
                self._event(
                    "audit",
                    engine=engine,
                    version=version,
                    state_hash=found,
                    trainer_state_hash=expected,
                    equal=found == expected,
                )

    def rows(self) -> Iterator[Rows]:
        """What this rank owns, rounded as it is published. A collective call."""
        for owned in chain(self._engine.owned(with_moments=False), owned_buffers(self._model)):
            seen = owned.master if owned.weight is None else owned.weight
            values = seen.to(published_dtype(owned.name, self._dtype)).contiguous()
            yield Rows(owned.name, owned.shape, owned.row_start, values)

    def _claim_epoch(self, takeover: bool) -> int:
        """One epoch for all ranks, claimed by the first; a later attempt takes over."""
        epoch = torch.tensor(self.log.claim_epoch(takeover) if self._is_first_rank else 0)
        dist.broadcast(epoch, src=0)
        return int(epoch)
