"""Deterministic mode: what may not repeat bit for bit is refused instead of run.

The one idea: torch knows which of its kernels do not repeat; the rest is seeds, and the number of
threads, because a sum is cut by threads.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def be_deterministic(seed: int) -> None:
    """Call on each rank before anything is computed; holds for the whole process."""
    # cuBLAS reads it when it starts; a user's own setting stays
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
