"""What the ranks of a replica read, however many they are, and on from where others stopped."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.launch.recipe import build_config
from gossamer.trainer import feed as feed_module
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.data.source import is_heldout
from gossamer.trainer.feed import Feed, of_first_rank
from gossamer.trainer.prepare import load_run_tokenizer, prepare_run

TEXTS = [f"{number:03}{'abc' * (number % 9)}" for number in range(100)]
CHATS = [
    [{"role": "user", "content": f"what {n}"}, {"role": "assistant", "content": f"{n:04}"}]
    for n in range(60)
]
SETTINGS = {
    "model": {"hf": {"model_type": "qwen3_moe"}},
    "tokenizer": {"vocab_size": 259},
    "heldout": {"every_steps": 1, "num_rows": 3, "permille": 100},
    "phases": [
        {"name": "text", "kind": "next_token", "max_steps": 8, "lr": 0.1},
        {"name": "chat", "kind": "sft", "max_steps": 8, "lr": 0.1},
    ],
}


def settings(folder: Path) -> dict:
    sources = [
        {"kind": "jsonl", "path": f"{folder}/texts.jsonl"},
        {"kind": "jsonl", "path": f"{folder}/chats.jsonl", "messages_field": "messages"},
    ]
    # epochs of about 5 and 2 batches, of several windows
    data = {"seq_len": 64, "num_rows": 6, "task_share": 0.0, "buffer_tokens": 500}
    return {**SETTINGS, "data": {**data, "sources": sources}}


def draw(folder: str, num: int, state: dict | None) -> dict:
    """The rows of this rank of `num` batches of both phases, and the state after each pair."""
    config = build_config(TrainConfig, settings(Path(folder)), "train")
    feed = Feed(config, load_run_tokenizer(Path(folder)), None, None, state)
    drawn: dict = {"rows": [], "states": [], "heldout": []}
    for _ in range(num):
        for phase in config.phases:
            batch, _ = feed.draw(phase, 0)
            mine = batch.split(dist.get_rank(), dist.get_world_size())
            drawn["rows"].append(torch.stack([t.double() for t in mine.to_tensors()]))
        drawn["states"].append(json.dumps(feed.state()))
    for phase in config.phases:
        drawn["heldout"].append(feed.heldout(phase.kind).token_ids_BS)
    return drawn


def rows_of(ranks: list[dict]) -> list[torch.Tensor]:
    """The batches that the ranks make up, without the rows that only fill them up."""
    parts = zip(*(rank["rows"] for rank in ranks), strict=True)
    return [torch.cat(part, dim=1)[:, :6] for part in parts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, field, values in (("texts", "text", TEXTS), ("chats", "messages", CHATS)):
        lines = "".join(json.dumps({field: value}) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(lines)
    prepare_run(build_config(TrainConfig, settings(folder), "train"), folder, "test")
    return folder


def test_another_number_of_ranks_reads_on_bit_for_bit(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=0, world_size=1)
    try:
        whole = [draw(str(folder), 12, None)]
    finally:
        dist.destroy_process_group()
    expected, states = rows_of(whole), [json.loads(state) for state in whole[0]["states"]]
    for start, ranks in ((3, 2), (7, 4)):  # 4 ranks share 6 rows: two of them get one that is empty
        drawn = run_world(draw, ranks, str(folder), 5, states[start - 1])
        for batch, other in zip(rows_of(drawn), expected[2 * start :], strict=False):
            assert torch.equal(batch, other)
        assert drawn[0]["states"] == whole[0]["states"][start : start + 5]
        assert {rank["states"][0] for rank in drawn[1:]} == {"null"}
        for rank in drawn:
            for batch, other in zip(rank["heldout"], whole[0]["heldout"], strict=True):
                assert torch.equal(batch, other)
    assert max(len(state) for state in whole[0]["states"]) < 2500
    tokenizer = load_run_tokenizer(folder)
    read = [tokenizer.decode(ids) for batch in expected[::2] for ids in documents_of(batch)]
    kept = [text for text in TEXTS if not is_heldout(text, 100)]
    assert len(kept) < len(TEXTS)
    for epoch in range(2):
        assert sorted(read[epoch * len(kept) : (epoch + 1) * len(kept)]) == kept


def documents_of(batch: torch.Tensor) -> list[list[int]]:
    """Token ids of the documents of a batch, row by row."""
    token_ids_BS, position_ids_BS, _ = batch.long()
    documents: list[list[int]] = []
    for ids, places in zip(token_ids_BS.tolist(), position_ids_BS.tolist(), strict=True):
        for token, place in zip(ids, places, strict=True):
            if place == 0 and token:
                documents.append([])
            if token:
                documents[-1].append(token)
    return documents


def wait_longer_than_gloo(store: str) -> dict:
    """What each rank got of a call that takes twice the group's timeout."""
    dist.destroy_process_group()
    rank, patience = int(os.environ["RANK"]), timedelta(seconds=1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience
    )

    def slow() -> str:
        time.sleep(2.5)
        return "it came"

    with mock.patch.object(feed_module, "MEET_S", 0.3):
        found = {"slow": of_first_rank(slow if rank == 0 else None)}
        found["fast"] = of_first_rank((lambda: 7) if rank == 0 else None)
    return found


def test_other_ranks_wait_for_the_first_longer_than_a_collective_may(tmp_path):
    found = run_world(wait_longer_than_gloo, 2, str(tmp_path / "store"))
    assert found == [{"slow": "it came", "fast": 7}, {"slow": None, "fast": None}]


def test_what_the_first_rank_raises_is_raised(folder):
    def fail() -> None:
        raise ValueError("no prompt was answered")

    with mock.patch.object(dist, "get_world_size", lambda: 2):
        with mock.patch.object(dist, "broadcast", lambda *_, src: None):
            with pytest.raises(ValueError, match="no prompt was answered"):
                of_first_rank(fail)
