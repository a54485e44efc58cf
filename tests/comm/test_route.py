"""The cheapest way through deltas, folds and anchors, beside a search over all ways."""

from types import SimpleNamespace

import pytest
from gossamer.comm.manifest import GoneError, LogError, PartRef
from gossamer.comm.route import best_hop, first_stop
from hypothesis import given
from hypothesis import strategies as st


class Log:
    """As much of a log as routes look at; costs are bytes, None where there is no such file."""

    url = "here"

    def __init__(self, deltas, anchors, folds, gone=()):
        self._folds, self._gone = folds, gone
        self._manifests = {
            version: self._manifest(version, version - 1, delta, anchor)
            for version, (delta, anchor) in enumerate(zip(deltas, anchors, strict=True))
        }

    def _manifest(self, version, base, delta, anchor):
        def refs(kind, cost):
            return [] if cost is None else [PartRef(f"{kind}-{base}-{version}", cost, "")]

        return SimpleNamespace(
            version=version,
            base_version=base if delta is not None else None,
            delta=refs("delta", delta),
            anchor=refs("anchor", anchor),
        )

    def manifest(self, version):
        if version in self._gone or version not in self._manifests:
            raise GoneError(f"manifest-{version} is missing")
        return self._manifests[version]

    def folds(self):
        return list(self._folds)

    def fold(self, first, last):
        return self._manifest(last, first, self._folds[first, last], None)

    def avoids(self, refs):
        return False

    def ways(self, live, head):
        """Bytes of the cheapest way from `live` to `head` by its first stop, by trying them all."""
        found = {}
        for stop in range(head + 1):
            hop = best_hop(self, live, stop)
            if hop is not None and (live is None or stop > live):
                rest = 0 if stop == head else min(self.ways(stop, head).values(), default=None)
                if rest is not None:
                    found[stop] = hop.nbytes + rest
        return found


COST = st.none() | st.integers(1, 9)


@given(st.data())
def test_no_way_is_cheaper(data):
    count = data.draw(st.integers(2, 6))
    log = Log(
        [None, *data.draw(st.lists(COST, min_size=count, max_size=count))],
        data.draw(st.lists(st.none() | st.integers(5, 25), min_size=count + 1, max_size=count + 1)),
        data.draw(
            st.dictionaries(
                st.tuples(st.integers(0, count), st.integers(0, count)).filter(
                    lambda ends: ends[1] - ends[0] >= 2
                ),
                st.integers(1, 20),
                max_size=3,
            )
        ),
        data.draw(st.sets(st.integers(0, count - 1), max_size=2)),
    )
    live = data.draw(st.integers(0, count - 1))
    ways = log.ways(live, count)
    if not ways:
        with pytest.raises(LogError, match="holds no anchor"):
            first_stop(log, live, count)
    else:
        assert ways[first_stop(log, live, count)] == min(ways.values())


def test_a_newcomer_begins_at_the_newest_anchor():
    log = Log([None, 1, 1, 1, 1], [30, None, 30, None, None], {(0, 4): 1})
    assert first_stop(log, None, 4) == 2
    with pytest.raises(LogError, match="holds no anchor up to version 1"):
        first_stop(Log([None, 1], [None, None], {}), None, 1)


def test_the_last_hop_counts_as_well():
    assert first_stop(Log([None, 6, 6], [99, None, 10], {}), 0, 2) == 2
    assert first_stop(Log([None, 5, 5], [99, None, 10], {}), 0, 2) == 1  # as cheap: by deltas
