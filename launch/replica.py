"""A replica: one gang of trainer ranks, run by Ray Train inside one actor.

The one idea: `fit` blocks, so it lives in an actor of its own; it makes one attempt and reports how
it ended. Whether there is another attempt is the controller's business, from the run's folder.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from gossamer.launch.config import ClusterConfig
from gossamer.launch.engine_actor import write_pid
from gossamer.trainer.config import TrainConfig


class _PoolClient:
    """RolloutSource over the pool actor's handle."""

    def __init__(self, pool: Any) -> None:  # noqa: ANN401
        self._pool = pool

    def submit(self, batch: str, units: list, oldest_version: int) -> None:
        ray.get(self._pool.submit.remote(batch, units, oldest_version))

    def collect(self, batch: str) -> list:
        return ray.get(self._pool.collect.remote(batch))

    def audit(self, version: int) -> dict[str, str]:
        return ray.get(self._pool.audit.remote(version))


def run_rank(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs: a session, and the loop over it."""
    import warnings

    import ray.train
    import torch
    from gossamer.trainer.loop import train
    from gossamer.trainer.session import Session

    # deprecations inside DeepSpeed and torchdata, which are not ours to mend
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(max(1, int(settings["cpus_per_rank"])))
    context = ray.train.get_context()
    write_pid(settings["place"].run_dir, f"rank-{context.get_world_rank()}")
    # DeepSpeed asks for them
    os.environ.setdefault("LOCAL_RANK", str(context.get_local_rank()))
    pool = settings["pool"]
    session = Session(
        settings["config"],
        settings["place"],
        _PoolClient(pool) if pool is not None else None,
        on_checkpoint=lambda step: ray.train.report({"step": step}),
    )
    train(session)


class Replica:
    """Runs one attempt."""

    def fit(self, config: TrainConfig, cluster: ClusterConfig, place: Any, pool: Any) -> None:  # noqa: ANN401
        """Returns when all phases are done; raises what made a rank fail."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        settings = {
            "config": config,
            "place": place,
            "pool": pool,
            "cpus_per_rank": cluster.cpus_per_rank,
        }
        TorchTrainer(
            run_rank,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.parallel.world_size,
                resources_per_worker={"CPU": cluster.cpus_per_rank},
            ),
            run_config=RunConfig(
                name=f"attempt-{place.attempt}",
                storage_path=str(place.run_dir.resolve() / "ray_train"),
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()
