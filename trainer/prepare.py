"""What a run makes for itself before the first rank starts: problems, tokenizer, weight log.

The one idea: they are made once in the run's folder, so that every rank, every attempt, every
engine and every export reads the same bytes. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from gossamer.comm.log import WeightLog
from gossamer.comm.outer.seal import Seal
from gossamer.comm.signing import Signer
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.corpus import first_chars, read_documents
from gossamer.trainer.data.reader import build_reader, source_texts
from gossamer.trainer.run_folder import LOG_FOLDER, inside
from gossamer.trainer.task import (
    Problem,
    TaskProblems,
    answer_ids,
    build_problems,
    prompt_ids,
)
from gossamer.trainer.tokenizer import (
    PLAIN_TEMPLATE,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

PROBLEMS_FILE = "problems.json"
SPLITS = ("train", "dev", "heldout")


def prepare_run(config: TrainConfig, run_dir: Path, name: str) -> None:
    """Makes problems.json (when there is a task), tokenizer.json and the weight log, if missing.

    Raises ValueError for a task, tokenizer or data source that cannot be right.
    """
    for source in config.data.sources:
        build_reader(source)  # rather now than on a rank
    if (key := config.log.signing_key_path) is not None:
        _check_key(key, "log.signing_key_path")
        Signer.from_file(key)
    if config.outer is not None:
        for field in ("signing_key_path", "public_keys_path"):
            if (path := getattr(config.outer, field)) is not None:
                _check_key(path, f"outer.{field}")
        Seal.of(config.outer)
    run_dir.mkdir(parents=True, exist_ok=True)
    WeightLog.open(inside(run_dir, LOG_FOLDER), create=True, name=name)
    texts: list[str] = []
    if config.task is not None:
        if not (run_dir / PROBLEMS_FILE).is_file():
            problems = build_problems(config.task)
            splits = {s: [asdict(p) for p in getattr(problems, s)] for s in SPLITS}
            temporary = run_dir / f".{PROBLEMS_FILE}.{os.getpid()}"
            temporary.write_text(json.dumps(splits))
            temporary.replace(run_dir / PROBLEMS_FILE)
        texts = [problem.text for problem in load_problems(run_dir).train[:2000]]
    _prepare_tokenizer(config, run_dir, texts)
    if config.task is not None:
        check_lengths(config, load_problems(run_dir), load_run_tokenizer(run_dir))


def _check_key(path: str, field: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{field}: {path} is missing; `gossamer log keygen` makes one")


def check_lengths(config: TrainConfig, problems: TaskProblems, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a row that is too short for a problem, before anything is trained."""
    trained = [*problems.train, *problems.dev]
    prompts = [len(prompt_ids(tokenizer, problem)) for problem in trained]
    most = max(prompts) + config.rl.max_new_tokens
    if any(phase.kind == "grpo" for phase in config.phases) and most > config.rl.seq_len:
        raise ValueError(
            f"rl.seq_len is {config.rl.seq_len}; expected at least {most}: a prompt of"
            f" {max(prompts)} tokens and rl.max_new_tokens={config.rl.max_new_tokens}"
        )
    answers = [len(answer_ids(tokenizer, problem)) for problem in trained]
    most = max(map(sum, zip(prompts, answers, strict=True)))
    is_read = any(phase.kind == "next_token" for phase in config.phases)
    if is_read and config.data.task_share > 0 and most > config.data.seq_len:
        raise ValueError(
            f"data.seq_len is {config.data.seq_len}; expected at least {most}, as many tokens as a"
            " problem and its answer have"
        )


def _prepare_tokenizer(config: TrainConfig, run_dir: Path, texts: list[str]) -> None:
    """Takes a foreign tokenizer, or trains one on `texts` and what the run reads, if missing."""
    told, path = config.tokenizer, run_dir / TOKENIZER_FILE
    # a model is nothing without the tokenizer it learned with
    folder = told.path or config.model.path
    if folder is not None:
        if not (Path(folder) / TOKENIZER_FILE).is_file():
            raise ValueError(
                f"{folder} has no {TOKENIZER_FILE}; expected one, such as"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes"
            )
        tokenizer = load_tokenizer(Path(folder) / TOKENIZER_FILE)
    elif path.is_file():
        return
    else:
        tokenizer = train_tokenizer([*texts, *_corpus(config)], told)
    if told.chat_template is not None:
        try:
            tokenizer.chat_template = Path(told.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"tokenizer.chat_template: {told.chat_template} cannot be read; expected a Jinja"
                f" template ({error})"
            ) from error
    if tokenizer.chat_template is None and any(p.kind == "sft" for p in config.phases):
        if not tokenizer.is_own:
            raise ValueError(
                f"{folder} has no chat template; expected tokenizer.chat_template, a file with one"
            )
        tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save(path)


def _corpus(config: TrainConfig) -> Iterator[str]:
    """Text of all that the run reads, of each source at its share."""
    sources, train_chars = config.data.sources, config.tokenizer.train_chars
    if not sources or config.data.corpus_path is not None:
        yield from read_documents(config.data.corpus_path, config.data.corpus_chars)
    total = sum(source.share for source in sources)
    for source in sources:
        yield from first_chars(source_texts(source), int(train_chars * source.share / total) + 1)


def load_problems(run_dir: Path) -> TaskProblems:
    """The run's problems, as prepare_run wrote them."""
    splits = json.loads((run_dir / PROBLEMS_FILE).read_text())
    return TaskProblems(**{s: [Problem(**fields) for fields in splits[s]] for s in SPLITS})


def load_run_tokenizer(run_dir: Path) -> Tokenizer:
    """The run's tokenizer, as prepare_run wrote it."""
    return load_tokenizer(run_dir / TOKENIZER_FILE)
