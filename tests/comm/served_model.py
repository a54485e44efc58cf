"""What an inference engine makes of a checkpoint, for tests: fused, stacked, sliced, packed."""

import torch
from gossamer.comm.engines.pieces import Packed, Runtime, Spec
from torch import nn

NUM_LAYERS, EXPERTS, VOCAB, WIDTH, INNER = 2, 4, 20, 8, 12
MATRICES = {"q": (8, WIDTH), "k": (4, WIDTH), "v": (4, WIDTH), "o": (WIDTH, 8)}
EXPERT = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}


def checkpoint_shapes():
    shapes = {"model.embed.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}attn.{name}.weight": shape for name, shape in MATRICES.items()}
        shapes[f"{prefix}decay"] = (6,)
        for expert in range(EXPERTS):
            for name, shape in EXPERT.items():
                shapes[f"{prefix}experts.{expert}.{name}.weight"] = shape
    return shapes


def checkpoint(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in checkpoint_shapes().items()
    }


def specs_of(state):
    return {name: Spec(tuple(each.shape), each.dtype) for name, each in state.items()}


class ServedModel(nn.Module):
    """Rank `rank` of `ranks`; experts are sliced, or dealt out whole with `by_expert`."""

    def __init__(self, rank=0, ranks=1, by_expert=False, dtype=torch.bfloat16):
        super().__init__()
        self.rank, self.ranks, self.by_expert = rank, ranks, by_expert
        held = EXPERTS // ranks if by_expert else EXPERTS
        inner = INNER if by_expert else INNER // ranks

        def zeros(*shape):
            return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.embed = zeros(VOCAB // ranks, WIDTH)
        self.norm = zeros(WIDTH)
        self.layers = nn.ModuleList(nn.Module() for _ in range(NUM_LAYERS))
        for layer in self.layers:
            layer.qkv = zeros(16 // ranks, WIDTH)
            layer.o = zeros(WIDTH, 8 // ranks)
            layer.w13 = zeros(held, 2 * inner, WIDTH)
            layer.w2 = zeros(held, WIDTH, inner)
            layer.decay = nn.Parameter(torch.zeros(6), requires_grad=False)
            # which of the held experts an expert is, as vLLM keeps it
            index = [e - rank * held if e // held == rank else -1 for e in range(EXPERTS)]
            layer.register_buffer("expert_map", torch.tensor(index if by_expert else range(held)))

    def part(self, tensor, axis):
        return tensor.chunk(self.ranks, axis)[self.rank]

    def load_weights(self, weights):
        for name, tensor in weights:
            words = name.split(".")
            if words[1] == "embed":
                self.embed.data.copy_(self.part(tensor, 0))
            elif words[1] == "norm":
                self.norm.data.copy_(tensor)
            else:
                self.load_layer(self.layers[int(words[2])], words[3:], tensor)

    def load_layer(self, layer, words, tensor):
        if words[0] == "decay":
            layer.decay.data.copy_(-torch.exp(tensor.float()))
        elif words[0] == "experts":
            place = int(layer.expert_map[int(words[1])])
            if place >= 0:
                self.load_expert(layer, place, words[2], tensor)
        elif words[1] == "o":
            layer.o.data.copy_(self.part(tensor, 1))
        else:
            sizes = [8 // self.ranks, 4 // self.ranks, 4 // self.ranks]
            rows = dict(zip("qkv", layer.qkv.data.split(sizes), strict=True))
            rows[words[1]].copy_(self.part(tensor, 0))

    def load_expert(self, layer, place, name, tensor):
        axis = 1 if name == "down" else 0
        tensor = tensor if self.by_expert else self.part(tensor, axis)
        if name == "down":
            layer.w2.data[place].copy_(tensor)
        else:
            layer.w13.data[place].chunk(2)["gate up".split().index(name)].copy_(tensor)

    def state(self):
        buffers = {name: each for name, each in self.named_buffers() if each.is_floating_point()}
        return {**dict(self.named_parameters()), **buffers}


def in_pairs(loaded):
    """Experts as a matrix kernel wants them: padded, in blocks of 4 rows, columns in pairs."""
    packed = {}
    for name, tensor in loaded.items():
        rows, columns = -(-tensor.shape[1] // 4) * 4, -(-tensor.shape[2] // 8) * 8
        padded = tensor.new_zeros(len(tensor), rows, columns)
        padded[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        blocks = padded.view(len(tensor), rows // 4, 4, columns // 2, 2).transpose(2, 3)
        packed[name] = blocks.reshape(len(tensor), rows, columns)
    return packed


def runtime_of(model, packs=False):
    """The model as a Runtime; with `packs`, its experts are packed once and for all."""
    packed = []
    for i, layer in enumerate(model.layers if packs else []):
        each = {"w13": layer.w13, "w2": layer.w2}
        shapes = {f"layers.{i}.{name}": tuple(tensor.shape) for name, tensor in each.items()}
        for name, tensor in in_pairs({name: tensor.data for name, tensor in each.items()}).items():
            each[name].data = tensor
        packed.append(Packed(shapes, in_pairs))
    return Runtime(model.state(), model.load_weights, packed)


def loaded(state, rank=0, ranks=1, by_expert=False, packs=False, dtype=torch.bfloat16):
    """Run-time tensors of an engine that was started on `state`."""
    model = ServedModel(rank, ranks, by_expert, dtype)
    model.load_weights(state.items())
    return runtime_of(model, packs).tensors
