"""`gossamer bench sparsity`: plans at equal compute, several seeds, and what is above the noise.

The one idea: a difference counts only when every seed says so and it is larger than what a seed
changes. The model is tiny and sees little text, so this shows how the methods behave, not which is
best; no published claim of quality is checked here.

Columns: `loss` held-out, nats a token, at the end; `steps` at the dense arm's compute; `flops` of
the whole run as its metrics count them, the same for all arms but for rounding; `density` at the
end; `mean_density` over the steps; `flops_share` of a dense step of the whole model that a machine
which skips masked weights would do; `step_s` measured, and no shorter for a sparse arm:
masked weights are multiplied like others. `products` times what could be shorter on this machine,
`changes` what a change of masks takes, `messages` counts bytes that a replica sends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean
from typing import Any

from gossamer.launch.bench.sparsity_arms import QUESTIONS, QUICK, Sizes, arms
from gossamer.launch.bench.sparsity_messages import PLANS, RULES, count_messages
from gossamer.launch.bench.sparsity_products import time_changes, time_products
from gossamer.launch.bench.sparsity_train import in_this_process, train_arm
from gossamer.launch.bench.sync import machine
from gossamer.launch.summary import write_whole

COMMAND = "gossamer bench sparsity"
WORKERS = min(2, os.cpu_count() or 1)
Row = dict[str, Any]


def bench_sparsity(json_path: Path, quick: bool) -> None:
    """Measures what the JSON lacks, writes it after each training, and prints the verdicts.

    Raises ValueError for a JSON of other sizes, RuntimeError where a training failed.
    """
    sizes = QUICK if quick else Sizes()
    found = _opened(json_path, sizes, quick)
    for row in _trained(sizes, [(row["arm"], row["seed"]) for row in found["rows"]]):
        found["rows"].append(row)
        write_whole(json_path, json.dumps(found, indent=1))
    if not found["products"]:
        found["products"], found["changes"] = time_products(quick), time_changes(quick)
    found["messages"] = found.get("messages") or _counted(quick)
    found["noise"], found["verdicts"] = noise(found["rows"]), verdicts(found["rows"])
    found["load_average"] = round(os.getloadavg()[1], 1)
    write_whole(json_path, json.dumps(found, indent=1))
    print(f"noise, the widest range between seeds of one arm: {found['noise']:.4f} nats")
    for each in found["verdicts"]:
        by_seed = ", ".join(f"{difference:+.4f}" for difference in each["differences"])
        print(f"{each['question']} {each['verdict']}")
        print(f"    {each['arm']} - {each['other']}: {each['difference']:+.4f} ({by_seed})")


def noise(rows: list[Row]) -> float:
    """The widest range of losses between seeds of one arm."""
    losses = _losses(rows)
    return max(max(each.values()) - min(each.values()) for each in losses.values())


def verdicts(rows: list[Row]) -> list[Row]:
    """An answer to each question of which both arms are there: yes, no (the other is better), or
    `not above the noise`."""
    losses, found = _losses(rows), []
    for question, arm, other in QUESTIONS:
        seeds = sorted(losses.get(arm, {}).keys() & losses.get(other, {}).keys())
        if not seeds:
            continue
        differences = [losses[arm][seed] - losses[other][seed] for seed in seeds]
        difference = mean(differences)
        is_clear = (
            len(seeds) > 1
            and len({each > 0 for each in differences}) == 1
            and abs(difference) > noise(rows)
        )
        verdict = ("yes" if difference < 0 else "no") if is_clear else "not above the noise"
        found.append(
            {
                "question": question,
                "arm": arm,
                "other": other,
                "difference": difference,
                "differences": differences,
                "verdict": verdict,
            }
        )
    return found


def _losses(rows: list[Row]) -> dict[str, dict[int, float]]:
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["arm"], {})[row["seed"]] = row["loss"]
    return losses


def _opened(path: Path, sizes: Sizes, quick: bool) -> Row:
    """What the file holds already, or an empty one."""
    described = json.loads(json.dumps(asdict(sizes)))
    found: Row = {
        "command": " ".join([COMMAND, *["--quick"] * quick]),
        "machine": machine(),
        "sizes": described,
        "rows": [],
        "products": [],
        "changes": [],
    }
    if path.exists():
        old = json.loads(path.read_text())
        if (old.get("command"), old.get("sizes")) != (found["command"], described):
            raise ValueError(f"{path} holds other measurements; expected a new file")
        return old
    return found


def _trained(sizes: Sizes, done: list[tuple[str, int]]) -> Iterator[Row]:
    """What each arm and seed came to."""
    todo = [(a, s) for s in sizes.seeds for a in arms(sizes) if (a, s) not in done]
    for (arm, seed, _), answer in _answers(train_arm, [(*each, sizes) for each in todo]):
        yield {"arm": arm, "seed": seed, **answer}


def _counted(quick: bool) -> list[Row]:
    """Bytes of messages by plan and rule."""
    todo = [(*plan, rule) for plan in (PLANS[-1:] if quick else PLANS) for rule in RULES]
    return [
        {"plan": plan, "density": density, "rule": rule, "bytes": answer}
        for (plan, density, rule), answer in _answers(count_messages, todo)
    ]


def _answers(work: Callable[..., Any], todo: list[tuple]) -> Iterator[tuple[tuple, Any]]:
    """Each piece of work in a process of its own, forked, so that imports are paid for once."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Any, tuple, Path]] = {}
    left = list(enumerate(todo))
    with tempfile.TemporaryDirectory() as folder:
        while left or running:
            while left and len(running) < WORKERS:
                index, arguments = left.pop(0)
                answer = Path(folder, f"{index}.json")
                process = context.Process(
                    target=in_this_process, args=(answer, work, *arguments), daemon=True
                )
                process.start()
                running[process.sentinel] = process, arguments, answer
            for sentinel in wait(list(running)):
                process, arguments, answer = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"{work.__name__}{arguments} failed; see above")
                print(f"{arguments}; {len(left) + len(running)} to go", file=sys.stderr)
                yield arguments, json.loads(answer.read_text())
