"""What messages bring for a change of masks: gradients are averaged, tokens counted."""

from dataclasses import replace

import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.replica import WINDOW_PREFIX, WINDOW_TOKENS
from toy_replicas import CONFIG, TOKENS, initial_rows, open_replica

NAME = next(iter(each.name for each in initial_rows()))
WINDOW = WINDOW_PREFIX + NAME


def trained(replica, tokens, gradient):
    """Weights as they were, and what a replica saw in the window."""
    seen = {WINDOW_TOKENS: torch.tensor(tokens), WINDOW: torch.full((64, 64), gradient)}
    for rows in list(replica.rows.values()):
        yield replace(rows, values=seen.get(rows.name, rows.values))


@pytest.mark.parametrize("aggregation", ["senders", "replicas"])
@pytest.mark.parametrize("rule", ["diloco", "sparseloco"])
def test_one_without_a_token_counts_in_the_mean_and_tokens_add_up(tmp_path, rule, aggregation):
    beside = [
        Rows(WINDOW, (64, 64), 0, torch.zeros(64, 64)),
        Rows(WINDOW_TOKENS, (2,), 0, torch.zeros(2)),
    ]
    # a norm may be as great as the median, the lower of two: counts are no norms
    config = replace(CONFIG, rule=rule, aggregation=aggregation, clip_to_median=1.0)
    a, b = (
        open_replica(tmp_path, replace(config, replica=name), rows=initial_rows() + beside)
        for name in "ab"
    )
    settle, a._exchange.settle = a._exchange.settle, lambda number: 1 / 0
    with pytest.raises(ZeroDivisionError):  # it has sent, and waits for nobody
        a.round(trained(a, [30.0, 0.0], 1.0), 0, TOKENS, 1)
    b.round(trained(b, [4.0, 2.0], 0.0), 0, TOKENS, 1)
    a._exchange.settle = settle
    a.catch_up(1)
    for each in (a, b):
        assert each.rows[WINDOW_TOKENS, 0].values.tolist() == [34.0, 2.0]
        assert (each.rows[WINDOW, 0].values == 0.5).all()
