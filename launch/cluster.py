"""The Ray cluster of a run: one started on this machine, or one that is there.

The one idea: a local cluster is given as many logical CPUs as the run asks for, so that a laptop
with two cores runs what a cluster would, only slower; Ray's own chatter stays in its log files,
which RUN_DIR/logs/ray points to.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.launch.config import RunConfig


@contextmanager
def connect(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Joins the cluster that the config names, or starts one; leaves it afterwards."""
    # read by Ray when its modules are imported
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # by default Ray lets any other process of the machine go before its workers
    os.environ.setdefault("RAY_worker_niceness", "0")
    # ranks and engines are processes with one thread each unless their owner says otherwise
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    address = config.cluster.address
    try:
        ray.init(
            address=address or "local",  # else one that happens to run on this machine is joined
            num_cpus=None if address else _cpus_wanted(config),
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        if (node := ray._private.worker._global_node) is not None:  # None for a ray:// address
            link = run_dir / "logs" / "ray"
            link.unlink(missing_ok=True)
            link.symlink_to(node.get_logs_dir_path())
        yield
    finally:
        ray.shutdown()


def _cpus_wanted(config: RunConfig) -> int:
    ranks = config.train.parallel.world_size * config.cluster.cpus_per_rank
    engines = config.rollout.engines * config.rollout.num_cpus if config.has_rollouts else 0
    return max(os.cpu_count() or 1, math.ceil(config.replicas * (ranks + engines)))
