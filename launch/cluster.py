"""The Ray cluster of a run: one started on this machine, or one that is there.

The one idea: a local cluster is given as many logical CPUs as the run asks for, so that a laptop
with two cores runs what a cluster would, only slower, and listens on loopback alone; Ray's own
chatter stays in its log files, which RUN_DIR/logs/ray points to.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.launch.config import RunConfig
from gossamer.launch.pool_wishes import read_wishes, wishes

SETTINGS = {
    # read by Ray when its modules are imported
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # by default Ray lets any other process of the machine go before its workers
    "RAY_worker_niceness": "0",
    # ranks and engines are processes with one thread each unless their owner says otherwise
    "OMP_NUM_THREADS": "1",
}
"""Environment of every process of a run, where its owner does not say otherwise."""
ADDRESS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With 0 Ray takes 127.0.0.1 for a machine's address, as it does by default on Windows and macOS:
no other machine reaches a local cluster."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for what it runs as a job."""


@contextmanager
def connect(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Joins the cluster that the config names, or starts one; leaves it afterwards."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # the driver of a Ray job joins the cluster that runs it
    address = config.cluster.address or ("auto" if JOB_VARIABLE in os.environ else None)
    is_loopback = not address and ADDRESS_VARIABLE not in os.environ
    if is_loopback:
        os.environ[ADDRESS_VARIABLE] = "0"
    import ray

    # workers of a cluster that is there inherit nothing of this process
    settings = {name: os.environ[name] for name in SETTINGS}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",  # else one that happens to run on this machine is joined
            num_cpus=None if address else _cpus_wanted(config, run_dir),
            include_dashboard=None if address else False,
            runtime_env={"env_vars": settings} if address else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray put an exit in its place
        if (node := ray._private.worker._global_node) is not None:  # None for a ray:// address
            link = run_dir / "logs" / "ray"
            link.unlink(missing_ok=True)
            link.symlink_to(node.get_logs_dir_path())
        yield
    finally:
        ray.shutdown()
        if is_loopback:
            del os.environ[ADDRESS_VARIABLE]


def _cpus_wanted(config: RunConfig, run_dir: Path) -> int:
    ranks = config.train.parallel.world_size * config.cluster.cpus_per_rank
    pools = config.rollout.all_pools if config.has_rollouts else ()
    wanted = wishes(read_wishes(run_dir), pools) if pools else {}
    engines = sum(wanted[pool.name].engines * (pool.num_cpus or 0.0) for pool in pools)
    return max(os.cpu_count() or 1, math.ceil(config.replicas * (ranks + engines)))
