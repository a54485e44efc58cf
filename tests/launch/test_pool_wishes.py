"""What follows from what is wanted; the file of wishes. Pure."""

import pytest
from gossamer.launch.config import PoolConfig, RolloutConfig
from gossamer.launch.pool_wishes import (
    WISHES_FILE,
    Add,
    Held,
    Leave,
    Wish,
    asked_for,
    read_wishes,
    reconcile,
    wishes,
    write_wishes,
)
from hypothesis import given
from hypothesis import strategies as st

POOLS = ("near", "far")
URLS = tuple(f"http://host{i}:8000" for i in range(4))
WANTED = st.fixed_dictionaries(
    {
        pool: st.builds(
            Wish,
            engines=st.integers(0, 4),
            urls=st.lists(st.sampled_from(URLS), unique=True).map(tuple),
        )
        for pool in POOLS
    }
)


@st.composite
def holdings(draw) -> list[Held]:
    engines = draw(st.lists(st.sampled_from(("near", "far", "gone")), max_size=8))
    servers = draw(st.lists(st.tuples(st.sampled_from(POOLS), st.sampled_from(URLS)), unique=True))
    kinds = [(pool, None) for pool in engines] + servers
    order = draw(st.permutations(range(len(kinds))))
    return [
        Held(number=number, pool=pool, url=url)
        for number, (pool, url) in zip(order, kinds, strict=True)
    ]


def carried_out(held: list[Held], actions: list[Add | Leave]) -> list[Held]:
    leaving = {action.number for action in actions if isinstance(action, Leave)}
    added = [action for action in actions if isinstance(action, Add)]
    first = max((place.number for place in held), default=-1) + 1
    return [place for place in held if place.number not in leaving] + [
        Held(number=first + i, pool=add.pool, url=add.url) for i, add in enumerate(added)
    ]


@given(WANTED, holdings())
def test_what_is_held_becomes_what_is_wanted(wanted, held):
    actions = reconcile(wanted, held)
    after = carried_out(held, actions)
    for pool in (*POOLS, "gone"):
        wish = wanted.get(pool, Wish(engines=0))
        own = [place for place in after if place.pool == pool]
        assert sum(place.url is None for place in own) == wish.engines
        assert sorted(p.url for p in own if p.url is not None) == sorted(wish.urls)
    assert reconcile(wanted, after) == []
    # nothing is stopped for another to be started, and the newest go first
    for pool in POOLS:
        before = sorted(p.number for p in held if p.pool == pool and p.url is None)
        kept = sorted(p.number for p in after if p.pool == pool and p.url is None)
        assert kept[: len(before)] == before[: wanted[pool].engines]


ROLLOUT = RolloutConfig(pools=(PoolConfig(name="near", engines=2), PoolConfig(name="far")))


def now(run_dir) -> dict[str, Wish]:
    return wishes(read_wishes(run_dir), ROLLOUT.all_pools)


def test_a_wish_is_written_whole_and_read_again(tmp_path):
    assert now(tmp_path) == {"near": Wish(engines=2), "far": Wish(engines=2)}
    words = ["near=3", f"far+={URLS[0]}/", f"far+={URLS[1]}", "far=0"]
    asked = asked_for(words, now(tmp_path))
    write_wishes(tmp_path, asked)
    assert now(tmp_path) == {
        "near": Wish(engines=3),
        "far": Wish(engines=0, urls=URLS[:2]),
    }
    write_wishes(tmp_path, asked_for([f"far-={URLS[0]}"], now(tmp_path)))
    assert now(tmp_path)["far"].urls == URLS[1:2]
    before = read_wishes(tmp_path)
    write_wishes(tmp_path, now(tmp_path))
    assert read_wishes(tmp_path) != before  # the same wish again is another one
    assert [path.name for path in tmp_path.iterdir()] == [WISHES_FILE]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("near", "expected POOL=N"),
        ("nera=2", "POOL one of near, far"),
        ("near=two", "expected a number of engines"),
        ("near+=host:8000", r"expected http\(s\)://host"),
        ("near+=http://me:secret@host", "holds more than http"),
        ("near-=http://host", "expected one of none"),
    ],
)
def test_a_word_that_is_no_wish_is_refused(tmp_path, word, sentence):
    with pytest.raises(ValueError, match=sentence):
        asked_for([word], now(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"pools": 2}', '{"pools": {"near": 3}}',
             '{"pools": {"nera": {"engines": 1, "urls": []}}}',
             '{"pools": {"near": {"engines": -1, "urls": []}}}',
             '{"pools": {"near": {"engines": 1, "urls": ["x"]}}}']
)  # fmt: skip
def test_a_file_that_is_no_wish_is_named(tmp_path, text):
    (tmp_path / WISHES_FILE).write_text(text)
    with pytest.raises(ValueError, match="pools.json of the run: .* expected"):
        now(tmp_path)


def test_nobody_wishes_for_no_engine_at_all(tmp_path):
    with pytest.raises(ValueError, match="no engine would be left"):
        write_wishes(tmp_path, asked_for(["near=0", "far=0"], now(tmp_path)))


def test_a_pool_is_as_the_recipe_has_it():
    rollout = RolloutConfig(
        engine="vllm", engines=3, num_gpus=0.5, labels={"zone": "a"},
        pools=(PoolConfig(name="near"), PoolConfig(name="far", urls=URLS[:1], labels={})),
    )  # fmt: skip
    near, far = rollout.all_pools
    assert (near.engine, near.engines, near.num_cpus, near.num_gpus) == ("vllm", 3, 1.0, 0.5)
    assert near.labels == {"zone": "a"} and far.labels == {} and far.engines == 0
    (only,) = RolloutConfig(engines=4).all_pools
    assert (only.name, only.engines) == ("engine", 4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pools": (PoolConfig(name="a", engines=0),)}, "hold no engine"),
        ({"pools": (PoolConfig(name="a"), PoolConfig(name="a"))}, "each name once"),
        ({"num_gpus": -1.0}, "rollout.num_gpus is -1.0"),
        ({"num_gpus": 1.5}, "num_gpus of pool engine is 1.5; expected a part of 1"),
        ({"max_behind": 0}, "rollout.max_behind is 0"),
        ({"engine_options": {"seed": 1}}, "engine_options of pool engine are {'seed': 1}"),
        ({"audit_every_versions": -1}, "rollout.audit_every_versions is -1"),
    ],
)
def test_what_cannot_be_right_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        RolloutConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"engines": -1}, "engines of pool a is -1"),
        ({"num_gpus": 2.5}, "num_gpus of pool a is 2.5"),
        ({"labels": {"zone": 3}}, "labels of pool a: zone=3"),
        ({"urls": ("host",)}, r"'host': expected http\(s\)"),
        ({"urls": (URLS[0], URLS[0] + "/")}, "expected each once"),
    ],
)
def test_a_pool_that_cannot_be_right_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        PoolConfig(**{"name": "a", **fields})
