from gossamer.trainer.checkpoint import list_checkpoints, prune_checkpoints


def test_what_a_killed_attempt_left_half_written_is_removed(tmp_path):
    for name in ("step-00000004-e0001", ".step-00000008-e0001", "step-00000008-e0002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00000.safetensors").touch()
    prune_checkpoints(tmp_path, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000004-e0001",
        "step-00000008-e0002",
    ]
    assert len(list(tmp_path.iterdir())) == 2
