"""A replica: one gang of trainer ranks, run by Ray Train inside one actor.

The one idea: `fit` blocks, so it lives in an actor of its own; it makes one attempt and reports how
it ended. Whether there is another attempt is not its business (launch/attempts.py).
"""

from __future__ import annotations

import os
from typing import Any

import ray
from gossamer.comm.log import StaleWriterError
from gossamer.launch.config import ClusterConfig
from gossamer.launch.engine_actor import write_pid
from gossamer.launch.lifecycle import Failure
from gossamer.trainer.config import TrainConfig

WOULD_FAIL_AGAIN = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, NameError, StaleWriterError),
)
"""Another attempt mends processes, machines, networks and disks, not these; and a run that another
driver goes on with is not to be taken back."""


class _PoolClient:
    """RolloutSource over the pool actor's handle, of one attempt: once another has begun, what was
    still on its way is refused."""

    def __init__(self, pool: Any, attempt: int) -> None:  # noqa: ANN401
        self._pool, self._attempt = pool, attempt

    def submit(self, batch: str, units: list, oldest_version: int) -> None:
        ray.get(self._pool.submit.remote(batch, units, oldest_version, self._attempt))

    def collect(self, batch: str) -> list:
        return ray.get(self._pool.collect.remote(batch, self._attempt))

    def audit(self, version: int) -> dict[str, str]:
        return ray.get(self._pool.audit.remote(version, self._attempt))


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
    place = settings["place"].here()
    write_pid(place.run_dir, f"rank-{context.get_world_rank()}")
    # DeepSpeed asks for them
    os.environ.setdefault("LOCAL_RANK", str(context.get_local_rank()))
    pool = settings["pool"]
    session = Session(
        settings["config"],
        place,
        _PoolClient(pool, place.attempt) if pool is not None else None,
        on_checkpoint=lambda step: ray.train.report({"step": step}),
    )
    train(session)


class Replica:
    """Runs one attempt."""

    def fit(
        self,
        config: TrainConfig,
        cluster: ClusterConfig,
        place: Any,  # noqa: ANN401, a RunPlace
        pool: Any,  # noqa: ANN401, an actor's handle
    ) -> Failure | None:
        """Returns None once all phases are done, or what made a rank fail."""
        from gossamer.launch.gloo import GlooConfig
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        place = place.here()
        write_pid(place.run_dir, "replica")
        settings = {
            "config": config,
            "place": place,
            "pool": pool,
            "cpus_per_rank": cluster.cpus_per_rank,
        }
        trainer = TorchTrainer(
            run_rank,
            train_loop_config=settings,
            torch_config=GlooConfig(),
            scaling_config=ScalingConfig(
                num_workers=config.parallel.world_size,
                resources_per_worker={"CPU": cluster.cpus_per_rank},
                label_selector=dict(cluster.labels) or None,  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=f"attempt-{place.attempt}",
                storage_path=str(place.run_dir.resolve() / "ray_train"),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return failure_of(error)
        return None


def failure_of(error: BaseException) -> Failure:
    """What an attempt died of: of many ranks' errors the one that made the others fail."""
    alone = {None: getattr(error, "controller_failure", error)}
    by_rank = getattr(error, "worker_failures", None) or alone
    # Ray Train wraps what a rank raised, and what became of its process
    inner = {rank: getattr(each, "_base_exc", each) for rank, each in by_rank.items()}
    causes = {rank: getattr(each, "health_check_failure", each) for rank, each in inner.items()}
    for rank, cause in causes.items():
        if isinstance(cause, WOULD_FAIL_AGAIN):
            return Failure(_told(rank, cause), is_final=True)
    for rank, cause in causes.items():
        if isinstance(cause, ray.exceptions.RayError):
            return Failure(f"the process of trainer rank {rank} was killed or crashed")
    # a rank that lost another one says so in RuntimeErrors of torch
    ours = [pair for pair in causes.items() if type(pair[1]) is not RuntimeError]
    return Failure(_told(*(ours or list(causes.items()))[0]))


def _told(rank: int | None, cause: BaseException) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    said = lines[-1] if lines else type(cause).__name__
    return said if rank is None else f"rank {rank}: {said}"
