"""Runs a function on N gloo ranks in fresh processes and returns what each rank returned."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE_S = 300.0


def run_world(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """function(*arguments) on every rank; results are tensors, numbers, strings, dicts of them."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            deadline_s = time.monotonic() + PATIENCE_S
            for process in ranks:
                process.join(max(0.0, deadline_s - time.monotonic()))
            hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        finally:  # whoever ends this test must not leave them to the next, or to the interpreter
            for process in ranks:
                if process.is_alive():
                    process.kill()
                    process.join()
        failures = [Path(folder, f"error-{rank}") for rank in range(world_size)]
        texts = [path.read_text() for path in failures if path.exists()]
        for rank, process in enumerate(ranks):
            if rank in hung:
                texts.append(f"rank {rank} hung")
            elif process.exitcode:
                texts.append(f"rank {rank} ended with exit code {process.exitcode}")
        assert not texts, "\n".join(texts)
        return [torch.load(Path(folder, f"{r}.pt"), weights_only=True) for r in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
        dist.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
    os._exit(0)  # gloo and DeepSpeed threads may outlive the function
