import numpy as np
import pytest
import torch
from gossamer.trainer.batch import Document, TokenBatch, first_fit, pack, permutation
from hypothesis import given, settings
from hypothesis import strategies as st

DOCUMENTS = [
    Document(token_ids=[5, 6, 7]),
    Document(token_ids=[8, 9, 10, 11], learn_from=2),
    Document(token_ids=[12]),
]


def test_pack_by_hand():
    batch, learned = pack(DOCUMENTS, [[0, 2], [1]], seq_len=5)
    assert batch.token_ids_BS.tolist() == [[5, 6, 7, 12, 0], [8, 9, 10, 11, 0]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert batch.weights_BS.tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert learned == [(0, slice(0, 2)), (0, slice(3, 3)), (1, slice(1, 3))]
    assert batch.token_ids_BS.dtype == batch.position_ids_BS.dtype == torch.int64
    assert batch.weights_BS.dtype == torch.float32


def test_first_fit_by_hand():
    assert first_fit([3, 4, 2, 1, 5], 5) == [[0, 2], [1, 3], [4]]
    assert first_fit([], 5) == []
    with pytest.raises(ValueError, match="6 tokens does not fit seq_len 5"):
        first_fit([2, 6], 5)


def _plain_first_fit(lengths, capacity):
    rows = []
    for item, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[i] for i in row) + length <= capacity:
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


@given(st.lists(st.integers(1, 12), max_size=60))
def test_first_fit_is_first_fit(lengths):
    assert first_fit(lengths, 12) == _plain_first_fit(lengths, 12)


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=20), st.integers(1, 5))
def test_split_loses_nothing(lengths, parts):
    documents = [Document(token_ids=range(1, length + 1)) for length in lengths]
    batch, _ = pack(documents, first_fit(lengths, 8), seq_len=8)
    num_rows = batch.token_ids_BS.shape[0]
    pieces = [batch.split(index, parts) for index in range(parts)]
    for whole, *cut in zip(
        batch.to_tensors(), *(piece.to_tensors() for piece in pieces), strict=True
    ):
        assert len({piece.shape for piece in cut}) == 1
        joined = torch.cat(cut)
        assert torch.equal(joined[:num_rows], whole)
        assert not joined[num_rows:].any()
        assert joined.dtype == whole.dtype


def test_to_tensors_and_back():
    batch, _ = pack(DOCUMENTS, [[0], [1]], seq_len=4)
    again = TokenBatch.from_tensors(batch.to_tensors())
    assert all(map(torch.equal, again.to_tensors(), batch.to_tensors()))
    with pytest.raises(ValueError):
        TokenBatch.from_tensors(batch.to_tensors()[:2])


def test_permutation_is_one_and_depends_on_every_word():
    order = permutation(50, 1, 2)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, permutation(50, 1, 2))
    assert not np.array_equal(order, permutation(50, 1, 3))
    assert not np.array_equal(order, permutation(50, 0, 2))
    assert not np.array_equal(permutation(50, 1), permutation(50, 1, 0))
    assert permutation(6, 0, 0).tolist() == [3, 2, 0, 5, 4, 1]  # a saved run depends on it


def _tiny_moe(attention):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        attn_implementation=attention,
        experts_implementation="eager",  # grouped_mm refuses float64
    )
    return Qwen3MoeForCausalLM(config).eval().double()


# eager attention takes its softmax in float32, whatever the model's precision
@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])
def test_model_sees_packed_documents_apart(attention, tolerance):
    torch.set_num_threads(1)
    model = _tiny_moe(attention)
    random = np.random.default_rng(0)
    documents = [Document(token_ids=random.integers(3, 32, n).tolist()) for n in (7, 1, 5, 11)]
    batch, _ = pack(documents, [[0, 1, 2], [3]], seq_len=16)
    with torch.no_grad():
        packed_BSV = model(
            input_ids=batch.token_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
        ).logits
        for row, start, document in ((0, 0, 0), (0, 7, 1), (0, 8, 2), (1, 0, 3)):
            token_ids = torch.tensor([documents[document].token_ids])
            alone_SV = model(input_ids=token_ids, use_cache=False).logits[0]
            stop = start + token_ids.shape[1]
            torch.testing.assert_close(
                packed_BSV[row, start:stop], alone_SV, atol=tolerance, rtol=0
            )
        # without the restarts the second document does see the first: the test can fail
        running = torch.arange(16).expand(2, 16)
        mixed_BSV = model(
            input_ids=batch.token_ids_BS, position_ids=running, use_cache=False
        ).logits
    assert (mixed_BSV[0, 8:13] - packed_BSV[0, 8:13]).abs().max() > 1e-4
