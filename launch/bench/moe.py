"""`gossamer bench moe`: a training step of one MoE layer, ours beside others', in one run.

The one idea: ours and a peer take turns in the same processes, with the same weights and inputs,
and what is compared is the median of their ratios, turn by turn, with its interval; so a busy
machine makes the interval wide, not the result wrong. Every number can be worked out again from
`pairs_s`, which the rows hold.

A row is one contestant at one layer: `experts`, `top_k`, `ep`, `dtype`, `impl`; `tokens_per_s` of
all ranks; `peak_bytes` of a rank; for peers `ratio`, our tokens a second over theirs, between
`ratio_low` and `ratio_high` with `confidence`, and `pairs_s`, our and their seconds.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.launch.bench.sync import machine

COMMAND = "gossamer bench moe"
LAYERS = ((8, 2), (32, 4), (64, 8))
"""(experts, top-k)"""
EXPERT_PARALLEL = (1, 2)
DTYPES, QUICK_DTYPES = ("float32", "bfloat16"), ("float32",)
QUICK_SIZES = {"hidden": 64, "width": 32, "tokens": 64}
PAIRS, QUICK_PAIRS = 11, 9
CONFIDENCE = 0.95
LEVEL = 0.97
"""A ratio from here on counts as level."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "KINETO_LOG_LEVEL": "9",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Of a rank: one thread, DeepSpeed on the CPU, no talk of the profiler."""
INCLUDES = (
    "forward and backward of one layer (router, dispatch, experts, combine; gradients of weights"
    " and input), the router's gradient summed over ranks, AdamW (fused), gradients dropped"
)


def bench_moe(json_path: Path, quick: bool) -> None:
    """Measures one world after another and writes the JSON. One thread a rank, gloo, loopback."""
    load = os.getloadavg()[0]
    rows = [row for ep in EXPERT_PARALLEL for row in run_world(ep, quick)]
    result = {
        "command": " ".join([COMMAND, *["--quick"] * quick]),
        "machine": machine(),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "includes": INCLUDES,
        "rows": finish(rows),
    }
    partial = json_path.with_name(f".{json_path.name}")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(json_path)


def run_world(ep: int, quick: bool) -> list[dict[str, Any]]:
    """What `ep` ranks measured. Raises RuntimeError if one of them fails."""
    sizes = QUICK_SIZES if quick else {}
    cases = [
        {"experts": experts, "top_k": top_k, "dtype": dtype, **sizes}
        for dtype in (QUICK_DTYPES if quick else DTYPES)
        for experts, top_k in LAYERS
    ]
    settings = json.dumps({"ep": ep, "cases": cases, "pairs": QUICK_PAIRS if quick else PAIRS})
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "gossamer.launch.bench.moe_world", str(r), folder, settings],
                env={**os.environ, **ENVIRONMENT}
                | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ep)},
                stdout=subprocess.DEVNULL,  # DeepSpeed talks
            )
            for r in range(ep)
        ]
        try:
            if any(rank.wait() for rank in ranks):
                raise RuntimeError(f"a rank of the benchmark at EP={ep} failed; see above")
        finally:
            for rank in ranks:
                rank.kill()
        return json.loads(Path(folder, "rows.json").read_text())


def finish(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their rates and ratios; ours is the median of all its turns in a layer."""
    ours_s: list[float] = []
    for row in reversed(rows):  # ours comes first of its layer
        tokens = row["tokens"] * row["ep"]
        if row["pairs_s"]:
            mine_s, theirs_s = zip(*row["pairs_s"], strict=True)
            ours_s += mine_s
            row["tokens_per_s"] = tokens / median(theirs_s)
            ratios = [theirs / mine for mine, theirs in row["pairs_s"]]
            row["ratio"], row["ratio_low"], row["ratio_high"] = median_interval(ratios)
            row["confidence"] = CONFIDENCE
        else:
            row["tokens_per_s"] = tokens / median(ours_s)
            ours_s = []
    return rows


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high): the narrowest pair of ordered values, as far from either end, between
    which the true median lies with CONFIDENCE, whatever the distribution; six values at least."""
    ordered, n = sorted(values), len(values)
    outside, below = 0.0, 0
    while (outside := outside + math.comb(n, below) / 2**n) <= (1 - CONFIDENCE) / 2:
        below += 1
    if not below:
        raise ValueError(f"{n} values give no interval; expected at least 6")
    return median(ordered), ordered[below - 1], ordered[n - below]
