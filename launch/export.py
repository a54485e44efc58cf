"""Exports a checkpoint of a run as a normal Hugging Face folder.

The one idea: the bytes are those that would be published, the masters rounded to the log's dtype;
they are read from wherever the checkpoint lies, a tensor at a time, and written in shards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.launch.config import RunConfig

if TYPE_CHECKING:
    from gossamer.trainer.checkpoint import Checkpoint


def export_run(config: RunConfig, run_dir: Path, out: Path, step: int | None = None) -> Path:
    """Writes `out` and returns it: the checkpoint of `step`, or the newest that is whole.

    Holds one tensor and one shard of the folder. Raises FileNotFoundError when the run has no such
    checkpoint, ValueError when none of those it has is as it was written.
    """
    import torch
    from gossamer.comm.names import published_dtype
    from gossamer.trainer.hf_folder import write_shards
    from gossamer.trainer.model import hf_config, write_config
    from gossamer.trainer.prepare import load_run_tokenizer
    from gossamer.trainer.sparsity.export import SparseCheckpoint

    checkpoint = _open_whole(config.train.checkpoint.url, run_dir, step)
    dtype = getattr(torch, config.train.log.publish_dtype)
    tokenizer = load_run_tokenizer(run_dir)
    hf = hf_config(config.train.model, tokenizer.hf_fields())
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.write_hf(out)
    sparse = SparseCheckpoint(checkpoint)
    weights = (
        (name, sparse.weight(name).to(published_dtype(name, dtype))) for name in checkpoint.shapes
    )
    write_shards(out, weights)
    sparse.write_masks(out)
    write_config(out, hf, dtype)
    return out


def _open_whole(url: str | None, run_dir: Path, step: int | None) -> Checkpoint:
    """The newest checkpoint, of `step` if given, whose weights are as they were written."""
    from gossamer.trainer.checkpoint import MASTER, Checkpoint, list_checkpoints, resume_order
    from gossamer.trainer.saving import checkpoint_root

    root = checkpoint_root(url, run_dir)
    found = list_checkpoints(root)
    steps = sorted({resume_order(url)[1] for url in found})
    if step is not None and found and step not in steps:
        raise FileNotFoundError(
            f"{root} holds no checkpoint of step {step}; expected one of {steps}"
        )
    faults = []
    for url in reversed([url for url in found if step in (None, resume_order(url)[1])]):
        try:
            checkpoint = Checkpoint(url)
            checkpoint.verify(kind=MASTER)
        except (ValueError, FileNotFoundError) as error:
            print(f"gossamer: passing over {url}: {error}", file=sys.stderr)
            faults.append(str(error))
        else:
            return checkpoint
    if faults:
        raise ValueError(f"no checkpoint in {root} is whole: {faults[0]}")
    raise FileNotFoundError(f"{root} holds no whole checkpoint to export")
