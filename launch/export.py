"""Exports a run's newest checkpoint as a normal Hugging Face folder.

The one idea: the bytes are those that would be published, the masters rounded to the log's dtype.
"""

from __future__ import annotations

from pathlib import Path

from gossamer.launch.config import RunConfig
from gossamer.launch.controller import newest_checkpoint


def export_run(config: RunConfig, run_dir: Path, out: Path) -> Path:
    """Writes `out` and returns it. Raises FileNotFoundError when the run has no checkpoint."""
    import torch
    from gossamer.comm.names import published_dtype
    from gossamer.trainer.checkpoint import Checkpoint
    from gossamer.trainer.model import export_hf, hf_config
    from gossamer.trainer.prepare import load_run_tokenizer

    folder = newest_checkpoint(run_dir)
    if folder is None:
        raise FileNotFoundError(f"{run_dir} holds no whole checkpoint to export")
    checkpoint = Checkpoint(folder)
    dtype = getattr(torch, config.train.log.publish_dtype)
    weights = {
        name: checkpoint.read(name, 0, shape[0]).master.to(published_dtype(name, dtype))
        for name, shape in checkpoint.shapes.items()
    }
    tokenizer = load_run_tokenizer(run_dir)
    hf = hf_config(config.train.model, tokenizer.hf_fields())
    export_hf(out, hf, weights, tokenizer.write_hf)
    return out
