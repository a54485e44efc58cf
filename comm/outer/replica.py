"""One rank of a replica, round after round.

The one idea: the shared weights change in one place, `_apply`, by what the exchange says a round is
made of; so a replica that was there, one that comes late and one that comes back all go the same
way and hold the same bits.

    theta_r = inner steps from theta          # the trainer's
    delta   = theta - theta_r
    send      the rule's choice of delta      # which keeps the rest
    settle    whose messages count
    theta   = rule(theta, their mean)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, replace

from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.codec.part import Rows
from gossamer.comm.names import KEPT_FLOAT32
from gossamer.comm.outer.anchor import NO_HASH, Anchors, fill
from gossamer.comm.outer.config import AveragingConfig, OuterConfig
from gossamer.comm.outer.exchange import Exchange, RefusedError, Settled
from gossamer.comm.outer.mean import mean_of, median_factors
from gossamer.comm.outer.message import Message, Sent
from gossamer.comm.outer.rule import Averaging, Key, OuterRule, buffer_of, build_rule
from gossamer.comm.run import Run
from gossamer.comm.state_hash import format_hash, hash_elements, run_seed
from torch import float32, zeros_like

SHARED_PREFIX = "outer state of "
"""Of a rule's shared buffers in an anchor."""
MASK_PREFIX, WINDOW_PREFIX = "mask of ", "window of "
"""Rows beside those of weights, averaged whole: which elements live, and what may decide it."""
WINDOW_TOKENS = WINDOW_PREFIX + "tokens"
"""A vector that is added up: how many tokens each expert of all replicas saw in the window."""


class Replica:
    """The rows of one rank in float32 on the CPU, its rule, and the rounds behind them.

    `rows` are copied. With `number` they are a checkpoint's, from before that round (put its
    buffers into `rule.own`, `rule.shared` and `pending`). Without, they are a new replica's: the
    anchor before round `anchor` of `anchors` takes their place (None: the newest; ranks of one
    replica must agree), or, where there is none, they make the first.
    """

    def __init__(
        self,
        config: OuterConfig,
        exchange: Exchange,
        rows: Iterable[Rows],
        anchors: Anchors | None = None,
        number: int | None = None,
        anchor: int | None = None,
    ) -> None:
        self.rule: OuterRule = build_rule(config)
        self.number = number or 0
        """Rounds behind the rows: the next one's number."""
        self.rows: dict[Key, Rows] = {key_of(each): _copied(each) for each in rows}
        self._config = config
        self._exchange = exchange
        self._anchors = anchors
        # exported buffers (a routing bias) are averaged whole, whatever the rule
        self._whole = Averaging(replace(config, averaging=AveragingConfig()))
        self.pending: dict[int, list[Sent]] = {}
        """By round: what was sent and may count yet, so that it is not in the buffers."""
        self.on_applied: Callable[[int], None] | None = None
        """Called with the rounds behind the rows after each; may change rows and buffers, the same
        on all replicas."""
        if number is None and anchors is not None and not self.rule.on_gradients:
            self._start(anchors, anchor)

    def round(
        self,
        trained: Iterable[Rows],
        tokens_before: int,
        tokens: int,
        inner_steps: int,
        idle: Container[str] = (),
    ) -> Settled:
        """One round: sends what the inner steps changed, applies what counts.

        `trained` are the same rows after the steps (for a rule on gradients, the gradients, which
        end as the mean in `rows`). Tokens [tokens_before, tokens_before + tokens) of this replica's
        stream were trained. Of the tensors in `idle`, experts that saw no token, nothing is sent,
        and what changed in them is forgotten. The new weights are in `rows`. Raises RefusedError,
        StaleWriterError, QuorumError; ValueError for what is not finite. After an error the buffers
        are no good any more: go on from a checkpoint or the newest anchor.
        """
        number = self.number
        if self._config.absence == "hand_over" and self._anchors is not None:
            self._inherit(self._anchors.inherit())
        # a gradient that is 0 may still have velocity that waits
        skipped = () if self.rule.on_gradients else idle
        sent = [self._send(rows) for rows in trained if rows.name not in skipped]
        self.pending[number] = [each for each in sent if each is not None]
        self._exchange.send(
            Message(
                **asdict(self._exchange.identity),
                round=number,
                base_hash=self.part_hash(),
                inner_steps=inner_steps,
                tokens_before=tokens_before,
                tokens=tokens,
                sent=self.pending[number],
            )
        )
        settled = self._exchange.settle(number)
        reason = settled.refused.get(self._exchange.identity.replica)
        if reason is not None:
            raise RefusedError(f"round {number} does not count this replica: {reason}")
        self._apply(settled)
        return settled

    def catch_up(self, until: int | None = None) -> int:
        """Applies rounds that were settled without this replica; returns how many it missed.

        To be called before every round: one that was late may be several behind. Ranks of one
        replica must agree `until` which round, `exchange.next_round()` as rank 0 sees it.
        """
        until = self._exchange.next_round() if until is None else until
        missed = max(0, until - self.number)
        for number in range(self.number, until):
            self._apply(self._exchange.settle(number))
        if missed:
            self.rule.absent(missed)
        return missed

    def leave(self) -> None:
        """Ends this replica's part for good, where there are anchors: nobody waits for it any more,
        and with absence `hand_over` another takes on what waits in its error buffers."""
        if self._anchors is None:
            return
        is_left = self._config.absence == "hand_over"
        errors = [
            replace(self.rows[key], values=values)
            for key, values in self.rule.own.items()
            if is_left and key in self.rows
        ]
        self._anchors.leave(self.number, errors)

    def part_hash(self) -> str:
        """Hash of this rank's rows; those of all ranks add up to the whole weights'."""
        if self.rule.on_gradients:
            return NO_HASH
        return format_hash(sum(_hash_of(each) for each in self.rows.values()))

    def _rule_of(self, name: str) -> OuterRule:
        is_beside = name.endswith(KEPT_FLOAT32) or name.startswith((MASK_PREFIX, WINDOW_PREFIX))
        return self._whole if is_beside and not self.rule.on_gradients else self.rule

    def _divisor(self, name: str, num_messages: int) -> int | None:
        """See mean_of."""
        if name == WINDOW_TOKENS:
            return 1
        # a gradient of zeros is not sent, and counts like any other
        is_shared = self._config.aggregation == "replicas" or name.startswith(WINDOW_PREFIX)
        return num_messages if is_shared else None

    def _send(self, trained: Rows) -> Sent | None:
        if self.rule.on_gradients:
            self.rows[key_of(trained)] = trained
            return self.rule.send(trained, self.number)
        shared = self.rows[key_of(trained)]
        delta = replace(shared, values=shared.values - trained.values.to("cpu", float32))
        return self._rule_of(shared.name).send(delta, self.number)

    def _apply(self, settled: Settled) -> None:
        """One outer step on every row; settles what became of this replica's own messages."""
        messages = [[sent for part in each for sent in part.sent] for each in settled.messages]
        factors = median_factors(messages, self._config.clip_to_median)
        pieces: dict[str, list[tuple[Sent, float]]] = defaultdict(list)
        for message, clipped in zip(messages, factors, strict=True):
            for sent, factor in zip(message, clipped, strict=True):
                is_count = sent.run.name == WINDOW_TOKENS
                pieces[sent.run.name].append((sent, 1.0 if is_count else factor))
        for rows in self.rows.values():
            mean = mean_of(pieces[rows.name], rows, self._divisor(rows.name, len(messages)))
            self._rule_of(rows.name).step(rows, mean)
        self.number = settled.round + 1
        self._take_back(settled)
        if self.on_applied is not None:
            self.on_applied(self.number)
        is_mine = settled.written_by == self._exchange.identity.replica
        if self._anchors and is_mine and self.number % self._config.anchor_every_rounds == 0:
            self._put_anchor(self._anchors)

    def _take_back(self, settled: Settled) -> None:
        """Own messages that counted are done with; those that no round will count come back."""
        me = self._exchange.identity.replica
        for number in list(self.pending):
            may_count_yet = number == settled.round and self._config.late == "next"
            if (me, number) in settled.counted:
                del self.pending[number]
            elif not may_count_yet:
                for sent in self.pending.pop(number):
                    self._rule_of(sent.run.name).take_back(sent)

    def _inherit(self, pieces: dict[str, list[Sent]]) -> None:
        for rows in self.rows.values():
            found = [(sent, 1.0) for sent in pieces.get(rows.name, [])]
            if found:
                buffer_of(rows, self.rule.own).add_(mean_of(found, rows, 1))

    def _start(self, anchors: Anchors, number: int | None) -> None:
        """Everyone begins with the same weights, however they came to theirs."""
        number = anchors.newest() if number is None else number
        if number is None:
            self._put_anchor(anchors)
        self.number = number or 0
        pieces = anchors.read(self.number)
        for key, rows in self.rows.items():
            fill(rows, pieces.get(rows.name, []))
            shared = replace(rows, name=SHARED_PREFIX + rows.name, values=zeros_like(rows.values))
            if shared.name in pieces:
                fill(shared, pieces[shared.name])
                self.rule.shared[key] = shared.values

    def _put_anchor(self, anchors: Anchors) -> None:
        shared = [
            replace(self.rows[key], name=SHARED_PREFIX + key[0], values=values)
            for key, values in self.rule.shared.items()
        ]
        anchors.put(self.number, [*self.rows.values(), *shared], self.part_hash())
        anchors.sweep(self._config.keep_anchors)


def key_of(rows: Rows) -> Key:
    """What a rule's buffers of these rows go by."""
    return rows.name, rows.row_start


def shapes_of(rows: Iterable[Rows]) -> dict[str, tuple[int, ...]]:
    """The shapes that messages and anchors may speak of."""
    shapes = {each.name: tuple(each.shape) for each in rows}
    return shapes | {SHARED_PREFIX + name: shape for name, shape in shapes.items()}


def _copied(rows: Rows) -> Rows:
    return replace(rows, values=rows.values.detach().to("cpu", float32, copy=True).contiguous())


def _hash_of(rows: Rows) -> int:
    num_rows = len(rows.values) if len(rows.shape) > 1 else 1
    run = Run(rows.name, "float32", tuple(rows.shape), rows.row_start, num_rows)
    return hash_elements(tensor_bits(rows.values), run_seed(run))
