"""Masked matrices as columns of what is kept: against a plain compacted vector, bit for bit."""

from dataclasses import dataclass

import gossamer.trainer.sparsity.kept as kept_module
import numpy as np
import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.config import OuterConfig, SparseLocoConfig
from gossamer.comm.outer.exchange import Identity, Settled
from gossamer.comm.outer.mean import mean_of, median_factors
from gossamer.comm.outer.message import Message, pack_message, unpack_message
from gossamer.comm.outer.rule import OUTER_RULES, build_rule
from gossamer.trainer.sparsity.kept import Columns, KeptExchange, KeptRule, column_name
from hypothesis import given, settings
from hypothesis import strategies as st

NAME = "layers.0.mlp.experts.1.up_proj.weight"
LOCO = SparseLocoConfig(density=1 / 16)


@dataclass
class Echo:
    """An exchange in which a replica hears its own message, as it came over the wire."""

    shapes: dict
    identity = Identity(run_id="r", replica="a")

    def next_round(self):
        return 0

    def send(self, message):
        self.frame = pack_message(message)

    def settle(self, number):
        found = unpack_message(self.frame, self.shapes)
        return Settled(round=0, messages=[[found]], counted=frozenset(), refused={}, written_by="a")


def lay(monkeypatch, mask, cuts, since=0):
    """Columns of each rank of a replica that owns the rows between two of `cuts`; their shapes."""
    owned = list(zip([0, *cuts], [*cuts, len(mask)], strict=True))
    ranks = [Columns({NAME: tuple(mask.shape)}, lambda _, f, s=s: mask[f:s]) for _, s in owned]
    texts = []
    monkeypatch.setattr(kept_module, "gather_texts", lambda text: texts.append(text) or [])
    for columns, (first, _) in zip(ranks, owned, strict=True):
        columns.lay([(NAME, first)], since)
    monkeypatch.setattr(kept_module, "gather_texts", lambda _: texts[: len(ranks)])
    laid = [columns.lay([(NAME, f)], since) for columns, (f, _) in zip(ranks, owned, strict=True)]
    assert all(shapes == laid[0] for shapes in laid)
    return list(zip(ranks, owned, strict=True)), laid[0]


def crossed(sent, columns, shapes, receivers):
    """What each of `receivers` hears of what was sent, over a real frame."""
    echo = Echo(shapes)
    message = Message(
        run_id="r", round=0, replica="a", base_hash="0" * 16, inner_steps=1, tokens=1, sent=sent
    )
    KeptExchange(echo, columns).send(message)
    for (receiver, _), found in ((r, KeptExchange(echo, r[0]).settle(0)) for r in receivers):
        yield receiver, found.messages[0][0].sent


@settings(deadline=None)
@given(
    num_rows=st.integers(1, 200),
    num_columns=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    rule=st.sampled_from(["averaging", "sparseloco"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_what_any_rank_sends_comes_to_any_other_whole(
    num_rows, num_columns, density, rule, seed, data
):
    bands = range(64, num_rows, 64)
    cuts = st.sets(st.sampled_from(bands)) if bands else st.just(set())
    mine, theirs = data.draw(cuts), data.draw(cuts)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, num_columns, generator=generator) < density
    mask[64:128] &= seed % 2 == 0  # sometimes a band of which nothing is kept
    delta = torch.randn(mask.shape, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        senders, shapes = lay(patch, mask, sorted(mine))
        receivers, _ = lay(patch, mask, sorted(theirs))
        expected, heard = torch.zeros(mask.shape), torch.zeros(mask.shape)
        runs = {}
        for columns, (first, stop) in senders:
            rows = Rows(NAME, tuple(mask.shape), first, delta[first:stop].contiguous())
            sent = KeptRule(build_rule(OuterConfig(rule=rule, sparseloco=LOCO)), columns).send(
                rows, 0
            )
            if sent is None:
                assert not mask[first:stop].any()
                continue
            expected[first:stop] = mean_of([(sent, 1.0)], rows, 1)
            for receiver, found in crossed([sent], columns, shapes, receivers):
                runs.setdefault(first, set()).add((found[0].run, found[0].norm))
                begin, end = next(cut for each, cut in receivers if each is receiver)
                own = Rows(NAME, tuple(mask.shape), begin, torch.zeros(end - begin, num_columns))
                heard[begin:end] += mean_of([(found[0], 1.0)], own, 1)
        assert torch.equal(heard, expected) and not expected[~mask].any()
        if rule == "averaging":
            assert torch.equal(expected, delta.where(mask, 0.0))
        assert all(len(each) == 1 for each in runs.values())  # all ranks judge it alike


def relaid(element_of, places):
    """A column of what is remembered of each element."""
    return torch.tensor([[element_of.get(int(i), 0.0)] for i in places], dtype=torch.float32)


@pytest.mark.parametrize("name", OUTER_RULES)
def test_a_rule_among_what_is_kept_is_that_rule_on_a_compacted_tensor(name, monkeypatch):
    """Over rounds, the masks changing in the middle: choices, values, buffers. The plain way keeps
    what each element has in a dict."""
    exchange = "collective" if name == "dgc" else "log"
    config = OuterConfig(
        rule=name, exchange=exchange, inner_steps=1 if name == "dgc" else 30, sparseloco=LOCO
    )
    generator = torch.Generator().manual_seed(3)
    shape, plain, memory = (128, 96), build_rule(config), {}
    masks = [torch.rand(shape, generator=generator) < d for d in (0.6, 0.6, 0.3)]
    own = rule = None
    for number in range(6):
        mask = masks[number // 2]
        ((columns, _),), _ = lay(monkeypatch, mask, [], since=number // 2)
        if rule is not None and number % 2 == 0:  # as SharedMasks does when masks change
            for values in own.values():
                values.masked_fill_(~mask, 0.0)
        if rule is None:
            rule = KeptRule(build_rule(config), columns)
        again = KeptRule(build_rule(config), columns)
        again.own.update({key: values.clone() for key, values in (own or {}).items()})
        rule, own = again, again.own  # as after a checkpoint
        delta = torch.randn(shape, generator=generator)
        places = np.flatnonzero(mask.numpy())
        column = delta.view(-1)[mask.view(-1)].view(-1, 1)
        plain.own = {
            (prefix + "w", 0): relaid(element_of, places) for prefix, element_of in memory.items()
        }
        expected = plain.send(Rows("w", (len(places), 1), 0, column), number)
        for (buffer, _), values in plain.own.items():
            elements = zip(places.tolist(), values.view(-1).tolist(), strict=True)
            memory[buffer.removesuffix("w")] = dict(elements)
        sent = rule.send(Rows(NAME, shape, 0, delta), number)
        assert sent.coded.run.name == column_name(number // 2, NAME)
        assert (sent.coded.run.payload, sent.norm) == (expected.run.payload, expected.norm)
        if expected.positions is None:
            assert np.array_equal(sent.values[places], expected.values)
        else:
            assert np.array_equal(sent.positions, places[expected.positions])
            assert np.array_equal(sent.values, expected.values)
            assert len(sent.values) <= max(1, round(0.0626 * len(places))) or name == "dgc"
        assert {buffer.removesuffix(NAME) for buffer, _ in own} == memory.keys()
        for (buffer, _), values in own.items():
            element_of = memory[buffer.removesuffix(NAME)]
            assert torch.equal(values.view(-1)[mask.view(-1)], relaid(element_of, places).view(-1))
            assert not values[~mask].any()


def test_a_message_is_clipped_alike_wherever_it_is_read(monkeypatch):
    """The median is over norms of the sender's rows, of which a receiver may own a few."""
    mask = torch.rand(192, 32, generator=torch.Generator().manual_seed(1)) < 0.2
    ((columns, _),), shapes = lay(monkeypatch, mask, [])
    receivers, _ = lay(monkeypatch, mask, [64, 128])
    rule, heard = KeptRule(build_rule(OuterConfig(rule="averaging")), columns), {}
    for scale in (1.0, 1.0, 50.0):
        sent = rule.send(Rows(NAME, (192, 32), 0, torch.full((192, 32), scale)), 0)
        for receiver, found in crossed([sent], columns, shapes, receivers):
            heard.setdefault(id(receiver), []).append(found)
    for messages in heard.values():
        assert median_factors(messages, 3.0) == [[1.0], [1.0], [pytest.approx(3 / 50)]]


def test_matrices_of_others_and_without_masks_are_left_alone(monkeypatch):
    mask = torch.ones(64, 8, dtype=torch.bool)
    ((columns, _),), shapes = lay(monkeypatch, mask, [])
    rule = KeptRule(build_rule(OuterConfig(rule="averaging")), columns)
    dense = rule.send(Rows("norm", (8,), 0, torch.ones(8)), 0)
    sent = rule.send(Rows(NAME, (64, 8), 0, torch.ones(64, 8)), 0)
    assert columns.whole(dense) is dense
    assert columns.whole(sent.coded).values.tolist() == [1.0] * 512
    elsewhere = Columns({NAME: (64, 8)}, lambda *_: mask)
    monkeypatch.setattr(kept_module, "gather_texts", lambda _: [f'[["{NAME}", 0, [512]]]'])
    assert elsewhere.lay([], 0) == shapes and elsewhere.whole(sent.coded) is None
