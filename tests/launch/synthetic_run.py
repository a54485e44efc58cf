"""A run that never was: metrics.jsonl as a warm start, an RL phase, a kill and a resume leave it.

The numbers follow shapes seen in real runs (loss decay, rising reward, one to four per cent of
bf16 weights changed a step), so that a report made from them can be looked at.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

PARAMS, FULL_BYTES = 21_300_000, 42_600_000
LAYERS, EXPERTS, WARM_STEPS, ANCHOR_EVERY = 4, 16, 120, 25


class SyntheticRun:
    def __init__(self, run_dir: Path, seed: int = 0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self.time_s = 1_760_000_000.0
        self.version = -1
        self.random = random.Random(seed)

    def add(self, event: str, after_s: float = 0.0, **fields: object) -> None:
        self.time_s += after_s
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "time_s": self.time_s, **fields}) + "\n")

    def start(self, attempt: int) -> None:
        self.add("pools", pools=["engine"])
        for i in range(2):
            self.add("engine", engine=f"engine-{i}", what="start", version=None)
        self.add(
            "run_start",
            after_s=1.0,
            name="rl-sums",
            seed=7,
            attempt=attempt,
            phases=[
                {"name": "warm_start", "max_steps": WARM_STEPS},
                {"name": "rl", "max_steps": 60},
            ],
            params=PARAMS,
            active_params=6_100_000,
            ep_size=2,
            zero_stage=1,
            world_size=2,
        )

    def expert_load(self, tokens: int, progress: float) -> list[list[int]]:
        loads = []
        for layer in range(LAYERS):
            skew = (0.9 - 0.75 * progress) * (1.3 if layer == 0 else 0.8)
            weights = [
                math.exp(skew * math.sin(1.7 * e + layer) + self.random.gauss(0, 0.06))
                for e in range(EXPERTS)
            ]
            loads.append([round(2 * tokens * w / sum(weights)) for w in weights])
        return loads

    def train_step(self, phase: str, step: int, loss: float, progress: float, **more: object):
        step_s = self.random.uniform(0.55, 0.7) if phase == "warm_start" else 2.1
        wait_s = step_s * (0.03 if phase == "warm_start" else self.random.uniform(0.15, 0.4))
        tokens = 8192 if phase == "warm_start" else self.random.randint(9000, 14000)
        self.add(
            "train_step",
            after_s=step_s,
            phase=phase,
            step=step,
            loss=loss,
            lr=3e-4 if phase == "warm_start" else 2e-5,
            grad_norm=abs(self.random.gauss(0.8, 0.2)),
            tokens=tokens,
            tokens_per_s=tokens / step_s,
            step_s=step_s,
            wait_s=wait_s,
            expert_load=self.expert_load(tokens, progress),
            **more,
        )

    def warm_start(self) -> None:
        for step in range(1, WARM_STEPS + 1):
            loss = 1.1 + 2.9 * math.exp(-step / 30) + self.random.gauss(0, 0.04)
            self.train_step("warm_start", step, loss, 0.5 * step / WARM_STEPS)
        self.add("checkpoint", step=WARM_STEPS, version=None, bytes=3 * 4 * PARAMS, write_s=1.4)

    def publish(self, step: int, anchor: bool = False) -> None:
        self.version += 1
        density = 0.012 + 0.03 * math.exp(-step / 20) + abs(self.random.gauss(0, 0.002))
        frame_bytes = round(FULL_BYTES * 0.78) if anchor else round(PARAMS * density * 1.15)
        self.add(
            "publish",
            after_s=0.5,
            version=self.version,
            step=step,
            kind="anchor" if anchor else "delta",
            frame_bytes=frame_bytes,
            full_bytes=FULL_BYTES,
            density=1.0 if anchor else density,
            encode_s=0.31,
            publish_s=0.44,
        )

    def commit(self, engine: str) -> None:
        self.add(
            "engine",
            after_s=self.random.uniform(0.1, 0.6),
            engine=engine,
            what="commit",
            version=self.version,
            bytes=900_000,
            stage_s=0.2,
            pause_s=self.random.uniform(0.004, 0.011),
            density=0.02,
        )

    def audit(self, engine: str, equal: bool = True) -> None:
        ours = f"{self.version:016x}"
        self.add(
            "audit",
            engine=engine,
            version=self.version,
            state_hash=ours if equal else "f" * 16,
            trainer_state_hash=ours,
            equal=equal,
        )

    def eval(self, step: int, name: str = "heldout", after_s: float = 0.8) -> None:
        match = 0.14 + 0.62 * (1 - math.exp(-step / 25)) + self.random.gauss(0, 0.012)
        self.add(
            "eval",
            after_s=after_s,
            name=name,
            step=step,
            version=self.version,
            exact_match=round(match, 4),
            problems=512,
        )

    def rl(self, first: int, last: int, engines: tuple[str, ...] = ("engine-0", "engine-1")):
        for step in range(first, last + 1):
            for engine in engines:
                self.add(
                    "engine",
                    after_s=0.6,
                    engine=engine,
                    what="generate",
                    version=self.version,
                    samples=256,
                    tokens=5200,
                    generate_s=1.1,
                )
            reward = 0.12 + 0.65 * (1 - math.exp(-step / 22)) + self.random.gauss(0, 0.035)
            self.train_step(
                "rl",
                step,
                self.random.gauss(-0.004, 0.012),
                0.5 + step / 200,
                reward_mean=reward,
                reward_std=0.4,
                clip_share=0.02,
                staleness_mean=0.5,
            )
            self.publish(step, anchor=(self.version + 1) % ANCHOR_EVERY == 0)
            for engine in engines:
                self.commit(engine)
            if step % 10 == 0:
                self.eval(step)
                for engine in engines:
                    self.audit(engine)
                self.add(
                    "checkpoint", step=step, version=self.version, bytes=12 * PARAMS, write_s=1.4
                )


def write_run(run_dir: Path) -> SyntheticRun:
    """Warm start, 23 RL steps, an engine lost and replaced, a kill, a resume from step 20, 60."""
    run = SyntheticRun(run_dir)
    run.start(attempt=1)
    run.warm_start()
    run.publish(0, anchor=True)
    for engine in ("engine-0", "engine-1"):
        run.commit(engine)
    run.eval(0)
    run.rl(1, 12)
    run.add("engine", engine="engine-1", what="dead", version=None)
    run.rl(13, 16, engines=("engine-0",))
    run.add("engine", after_s=1.0, engine="engine-2", what="replaced", version=None)
    run.rl(17, 23, engines=("engine-0", "engine-2"))
    run.time_s += 14.0
    run.start(attempt=2)
    run.publish(20, anchor=True)
    run.rl(21, 60)
    run.add("run_end", reason="done")
    return run
