"""What a log holds, from manifests and the heads of frames alone; as JSON can tell it.

The one idea: a frame's table says in clear what changed where, by which steps and how it was coded,
so nobody needs the weights, or the payload, to look.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gossamer.comm.codec.kernels import DIRECT_STEPS
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError, total_bytes
from gossamer.comm.reader import read_head
from gossamer.comm.run import Model, Run


def list_versions(
    log: WeightLog, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """{"run_id", "url", "versions": [...], "folds": [...]}, oldest first."""
    versions, folds = log.versions(), log.folds()
    rows = []
    for version in versions:
        manifest = log.manifest(version)
        rows.append(
            asdict(manifest)
            | {
                "delta_bytes": total_bytes(manifest.delta),
                "anchor_bytes": total_bytes(manifest.anchor),
                "density": manifest.num_changed / manifest.num_elements,
            }
        )
        on_progress(len(rows), len(versions))
    return {
        "run_id": log.run_id,
        "url": log.url,
        "versions": rows,
        "folds": [
            {"first": first, "last": last, "delta_bytes": total_bytes(log.fold(first, last).delta)}
            for first, last in folds
        ],
    }


def inspect_version(log: WeightLog, version: int | None = None) -> dict[str, Any]:
    """What the delta of `version` (default: the head) changed, or what its anchor holds.

    "codecs" holds bytes, runs and coded elements by codec, "steps" how many elements moved by how
    many neighbouring values, "tensors" the rest. Raises LogError.
    """
    version = log.head() if version is None else version
    if version is None:
        raise LogError(f"the log at {log.url} is empty")
    manifest = log.manifest(version)
    kind = "delta" if manifest.delta else "anchor"
    heads = [read_head(log, ref) for ref in getattr(manifest, kind)]
    runs = [run for head in heads for run in head.runs]
    tensors: dict[str, dict[str, Any]] = {}
    codecs: dict[str, Counter] = defaultdict(Counter)
    for run in sorted(runs, key=lambda run: run.name):
        nbytes = sum(run.block_nbytes)
        tensor = tensors.setdefault(run.name, _tensor(run))
        tensor["coded"] += run.count
        tensor["nbytes"] += nbytes
        tensor["codecs"][run.codec] = tensor["codecs"].get(run.codec, 0) + nbytes
        codecs[run.codec].update(runs=1, coded=run.count, nbytes=nbytes)
    frame_bytes = total_bytes(getattr(manifest, kind))
    return {
        "run_id": log.run_id,
        "version": version,
        "kind": kind,
        "step": manifest.step,
        "writer_epoch": manifest.writer_epoch,
        "state_hash": manifest.state_hash,
        "num_tensors": manifest.num_tensors,
        "num_elements": manifest.num_elements,
        "num_changed": manifest.num_changed,
        "full_bytes": manifest.full_bytes,
        "frame_bytes": frame_bytes,
        "table_bytes": frame_bytes - sum(each["nbytes"] for each in codecs.values()),
        "codecs": {name: dict(each) for name, each in sorted(codecs.items())},
        "steps": _steps(runs),
        "tensors": list(tensors.values()),
    }


def _tensor(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "dtype": run.dtype,
        "shape": list(run.shape),
        "num_elements": math.prod(run.shape),
        "coded": 0,
        "nbytes": 0,
        "codecs": {},
    }


def _steps(runs: list[Run]) -> dict[str, int]:
    """How many elements moved by how many neighbours, of the runs that have a model.

    "+1" is away from zero for floats; all beyond the symbols of their own are "more".
    """
    models: dict[int, Model] = {id(run.model): run.model for run in runs if run.model}
    steps: dict[str, float] = defaultdict(float)
    for model in models.values():
        for count, row in zip(model.counts, model.steps, strict=True):
            for symbol, frequency in enumerate(row):
                is_direct = symbol < DIRECT_STEPS
                sign, size = "-+"[symbol % 2], symbol // 2 + 1
                steps[f"{sign}{size}" if is_direct else "more"] += count * frequency / sum(row)
    return {name: round(count) for name, count in steps.items() if round(count)}
