import itertools

import numpy as np
import pytest
import torch
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.device import integer_view
from gossamer.comm.engines.images import Scatter, bind
from gossamer.comm.engines.layout import learn
from gossamer.comm.engines.pieces import LayoutError, Packed, Spec
from gossamer.comm.live import LiveWeights
from served_model import ServedModel, checkpoint, in_pairs, loaded, runtime_of, specs_of

EXPERT = "model.layers.1.experts.3.down.weight"
DECAY = "model.layers.0.decay"
WAYS = [
    {"rank": rank, "ranks": ranks, "by_expert": by_expert, "packs": packs}
    for ranks, by_expert, packs in itertools.product([1, 2], [False, True], [False, True])
    for rank in range(ranks)
]


def follow(state, way, dtype=torch.bfloat16):
    """A model that was loaded with `state`, its runtime, and what LiveWeights gets."""
    model = ServedModel(way["rank"], way["ranks"], way["by_expert"], dtype)
    model.load_weights(state.items())
    runtime = runtime_of(model, way["packs"])
    specs = specs_of(state)
    return runtime, *bind(specs, learn(specs, runtime), runtime)


def move(tensors, mirrors, state):
    """Writes `state` as LiveWeights does: every other tensor whole, the rest where it differs."""
    for i, (name, values) in enumerate(state.items()):
        live, new = tensor_bits(tensors[name]), tensor_bits(values)
        where = None if i % 2 else np.flatnonzero(live != new).astype(np.uint32)
        patterns = new.copy() if where is None else new[where]
        live[slice(None) if where is None else where] = patterns
        if name in mirrors:
            mirrors[name].write(where, 0, patterns)
    for mirror in mirrors.values():
        mirror.settle()


def assert_same(runtime, expected):
    for name, tensor in runtime.tensors.items():
        assert torch.equal(integer_view(tensor), integer_view(expected[name])), name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_what_is_written_is_what_the_loader_would_have_left(way):
    runtime, tensors, mirrors = follow(checkpoint(0), way)
    assert_same(runtime, loaded(checkpoint(0), **way))  # learning leaves all as it was
    for seed in (1, 2):
        move(tensors, mirrors, checkpoint(seed))
        assert_same(runtime, loaded(checkpoint(seed), **way))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_elements_of_other_sizes_are_found(dtype):
    state, after = checkpoint(0, dtype), checkpoint(1, dtype)
    for each in (state, after):  # e4m3 would have to be computed with
        del each[DECAY], each[DECAY.replace("0", "1")]
    runtime, tensors, mirrors = follow(state, WAYS[-1], dtype)
    move(tensors, mirrors, after)
    assert_same(runtime, loaded(after, **WAYS[-1], dtype=dtype))


def test_only_what_lies_in_order_is_a_view():
    _, tensors, mirrors = follow(checkpoint(0), {**WAYS[0], "packs": False})
    assert sorted(mirrors) == [DECAY, DECAY.replace("0", "1")]
    runtime, tensors, mirrors = follow(checkpoint(0), {**WAYS[0], "packs": True})
    assert all(".experts." in name or "decay" in name for name in mirrors)
    tensors["model.layers.0.attn.k.weight"].fill_(3)
    assert (runtime.tensors["layers.0.qkv"][8:12] == 3).all()


def test_tables_are_kept_once_for_all_layers_and_experts():
    state = checkpoint(0)
    layout = learn(specs_of(state), runtime_of(ServedModel(), packs=True))
    pieces = [piece for found in layout.pieces.values() for piece in found]
    assert len({id(piece.rows) for piece in pieces if len(piece.rows) == 12}) <= 2
    assert sorted(layout.computed) == [DECAY, DECAY.replace("0", "1")]


@pytest.mark.parametrize("name", [EXPERT, DECAY, "model.layers.0.attn.o.weight"])
def test_an_audit_reads_what_the_engine_computes_with(name):
    way = {"rank": 1, "ranks": 2, "by_expert": False, "packs": True}
    runtime, tensors, mirrors = follow(checkpoint(0), way)
    move(tensors, mirrors, checkpoint(1))
    live = LiveWeights(tensors, mirrors)
    assert live.audit() == LiveWeights(checkpoint(1)).audit()
    held_by = {EXPERT: "layers.1.w2", DECAY: "layers.0.decay"}.get(name, "layers.0.o")
    integer_view(runtime.tensors[held_by])[0] ^= 1
    assert live.audit() != LiveWeights(checkpoint(1)).audit()


def test_indices_of_a_device_do_as_those_of_the_cpu():
    runtime, tensors, mirrors = follow(checkpoint(0), WAYS[-1])
    for mirror in (each for each in mirrors.values() if isinstance(each, Scatter)):
        mirror._held = [(p, integer_view(runtime.tensors[p.held_by])) for p, _ in mirror._held]
    move(tensors, mirrors, checkpoint(1))
    assert_same(runtime, loaded(checkpoint(1), **WAYS[-1]))
    assert LiveWeights(tensors, mirrors).audit() == LiveWeights(checkpoint(1)).audit()


def test_a_row_beyond_16_bits_has_an_address():
    spec = Spec((70_000, 3), torch.bfloat16)
    model = torch.nn.Module()
    model.table = torch.nn.Parameter(torch.zeros(70_000, 3, dtype=torch.bfloat16))
    runtime = runtime_of(ServedModel())
    runtime.tensors["table"] = model.table
    load = runtime.load
    runtime = type(runtime)(
        runtime.tensors,
        lambda weights: [
            model.table.data.copy_(each.flip(0)) if name == "table" else load([(name, each)])
            for name, each in weights
        ],
    )
    (piece,) = learn({"table": spec}, runtime).pieces["table"]
    assert piece.rows[0] == 69_999 * 3 and piece.rows[-1] == 0 and not piece.is_whole()


def test_a_loader_that_writes_elsewhere_is_refused_and_destroys_nothing():
    model = ServedModel()
    model.load_weights(checkpoint(0).items())
    runtime = runtime_of(model)

    def load(weights):
        for name, tensor in weights:
            model.load_weights([(name.replace("layers.0.attn.o", "layers.1.attn.o"), tensor)])

    runtime = type(runtime)(runtime.tensors, load)
    with pytest.raises(LayoutError, match="did not load"):
        learn(specs_of(checkpoint(0)), runtime)
    assert_same(runtime, loaded(checkpoint(0)))


def test_what_no_map_can_follow_is_refused():
    model = ServedModel()
    shapes = {"layers.0.decay": (6,)}
    runtime = runtime_of(model)
    doubled = Packed(shapes, lambda each: {name: 2 * tensor for name, tensor in each.items()})
    with pytest.raises(LayoutError, match=f"{DECAY} is changed and then packed"):
        learn(specs_of(checkpoint(0)), type(runtime)(runtime.tensors, runtime.load, [doubled]))
    changed = type(runtime)(runtime.tensors, runtime.load, [], {"layers.1.qkv"})
    with pytest.raises(LayoutError, match="layers.1.qkv is changed after loading"):
        learn(specs_of(checkpoint(0)), changed)
    model.layers[0].o.data = torch.zeros(8, 16, dtype=torch.bfloat16)[:, ::2]
    runtime = runtime_of(model)
    with pytest.raises(LayoutError, match="layers.0.o has gaps"):
        specs = specs_of(checkpoint(0))
        bind(specs, learn(specs, runtime), runtime)


def test_a_loader_that_keeps_a_changed_copy_besides_is_refused():
    model = ServedModel()
    runtime = runtime_of(model)

    def load(weights):
        model.load_weights(weights)
        if any("layers.1.attn.o" in name for name, _ in weights):
            model.layers[1].decay.data.copy_(2 * model.layers[1].o.data[0, :6])

    with pytest.raises(LayoutError, match="more of its tensors in layers.1.decay than it moves"):
        learn(specs_of(checkpoint(0)), type(runtime)(runtime.tensors, load))


def test_what_the_checkpoint_lacks_is_told():
    state = {name: each for name, each in checkpoint(0).items() if "embed" not in name}
    assert learn(specs_of(state), runtime_of(ServedModel())).untouched == ["embed"]
    assert in_pairs({"a": torch.arange(16.0).view(1, 2, 8)})["a"][0, 0, :4].tolist() == [0, 1, 8, 9]
