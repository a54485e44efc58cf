"""What a run makes for itself before the first rank starts: problems, tokenizer, weight log.

The one idea: they are made once in the run's folder, so that every rank, every attempt, every
engine and every export reads the same bytes. No torch here.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from gossamer.comm.log import WeightLog
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.corpus import read_documents
from gossamer.trainer.task import Problem, TaskProblems, build_problems
from gossamer.trainer.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TOKENIZER_FILE, PROBLEMS_FILE, LOG_FOLDER = "tokenizer.json", "problems.json", "log"
SPLITS = ("train", "dev", "heldout")


def prepare_run(config: TrainConfig, run_dir: Path, name: str) -> None:
    """Makes problems.json (when there is a task), tokenizer.json and the weight log, if missing."""
    run_dir.mkdir(parents=True, exist_ok=True)
    WeightLog.open(run_dir / LOG_FOLDER, run_id=name, create=True)
    texts: list[str] = []
    if config.task is not None:
        if not (run_dir / PROBLEMS_FILE).is_file():
            problems = build_problems(config.task)
            splits = {s: [asdict(p) for p in getattr(problems, s)] for s in SPLITS}
            temporary = run_dir / f".{PROBLEMS_FILE}.{os.getpid()}"
            temporary.write_text(json.dumps(splits))
            temporary.replace(run_dir / PROBLEMS_FILE)
        texts = [problem.text for problem in load_problems(run_dir).train[:2000]]
    if config.model.path is not None:
        # a model is nothing without the tokenizer it learned with
        load_tokenizer(Path(config.model.path) / TOKENIZER_FILE).save(run_dir / TOKENIZER_FILE)
    elif not (run_dir / TOKENIZER_FILE).is_file():
        texts += read_documents(config.data.corpus_path, config.data.corpus_chars)
        train_tokenizer(texts, config.tokenizer).save(run_dir / TOKENIZER_FILE)


def load_problems(run_dir: Path) -> TaskProblems:
    """The run's problems, as prepare_run wrote them."""
    splits = json.loads((run_dir / PROBLEMS_FILE).read_text())
    return TaskProblems(**{s: [Problem(**fields) for fields in splits[s]] for s in SPLITS})


def load_run_tokenizer(run_dir: Path) -> Tokenizer:
    """The run's tokenizer, as prepare_run wrote it."""
    return load_tokenizer(run_dir / TOKENIZER_FILE)
