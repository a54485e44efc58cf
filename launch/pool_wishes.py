"""How many engines each pool is to have, and which servers: by the recipe, or by who asks later.

The one idea: a wish is a whole file of the run, pools.json, replaced at once, and what follows from
it is a pure function of what is wanted and what is there. So whoever writes it need not reach the
pool, and a pool that died with its driver finds the wish when it comes back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gossamer.comm.store import open_store
from gossamer.launch.config import PoolConfig, check_url
from gossamer.trainer.run_folder import where_of

WISHES_FILE = "pools.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Of one pool."""

    engines: int
    """That the pool starts and stops."""
    urls: tuple[str, ...] = ()
    """Of servers that run anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A place that a pool has."""

    number: int
    """Later ones have greater numbers."""
    pool: str
    url: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Add:
    """A place to be made."""

    pool: str
    url: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Leave:
    """A place to be left once its unit is done."""

    number: int


def reconcile(wanted: Mapping[str, Wish], held: Iterable[Held]) -> list[Add | Leave]:
    """What makes of the places that are held those that are wanted.

    Of too many the newest leave. Pools that are not wanted are left whole.
    """
    places = sorted(held, key=lambda place: place.number)
    actions: list[Add | Leave] = []
    for pool in dict.fromkeys([*wanted, *(place.pool for place in places)]):
        wish = wanted.get(pool, Wish(engines=0))
        engines = [each for each in places if each.pool == pool and each.url is None]
        servers = {each.url: each for each in places if each.pool == pool and each.url is not None}
        actions += [Leave(number=each.number) for each in engines[wish.engines :]]
        actions += [Add(pool=pool)] * max(0, wish.engines - len(engines))
        actions += [Leave(number=servers[url].number) for url in servers if url not in wish.urls]
        actions += [Add(pool=pool, url=url) for url in wish.urls if url not in servers]
    return actions


def read_wishes(run_dir: Path) -> bytes | None:
    """The file as it is, None where nobody wished. Raises StoreError."""
    try:
        return open_store(where_of(run_dir)).get(WISHES_FILE)
    except FileNotFoundError:
        return None


def wishes(asked: bytes | None, pools: Iterable[PoolConfig]) -> dict[str, Wish]:
    """What is wanted, by the file and, where it says nothing, the recipe's pools.

    Raises ValueError that names the file.
    """
    wanted = {p.name: Wish(engines=p.engines or 0, urls=tuple(p.urls)) for p in pools}
    try:
        for pool, wish in json.loads(asked)["pools"].items() if asked is not None else ():
            if pool not in wanted:
                raise ValueError(f"pool {pool} is none of {', '.join(wanted)}")
            wanted[pool] = _checked(wish)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{WISHES_FILE} of the run: {error!r}; expected what `gossamer engines` writes"
        ) from error
    return wanted


def write_wishes(run_dir: Path, wanted: Mapping[str, Wish]) -> None:
    """Replaces the wish as a whole. Raises ValueError for one that would leave no engine."""
    if not any(wish.engines or wish.urls for wish in wanted.values()):
        raise ValueError("no engine would be left; expected at least one, or `gossamer stop`")
    pools = {name: asdict(wish) for name, wish in wanted.items()}
    # the time makes it another wish: whoever asks again for what was given up gets it
    text = json.dumps({"asked_s": time.time(), "pools": pools}, indent=1)
    open_store(where_of(run_dir)).put(WISHES_FILE, text.encode(), overwrite=True)


def forget_wishes(run_dir: Path) -> None:
    """The recipe counts again."""
    open_store(where_of(run_dir)).delete(WISHES_FILE)


def asked_for(words: Iterable[str], wanted: Mapping[str, Wish]) -> dict[str, Wish]:
    """`wanted` with POOL=N, POOL+=URL and POOL-=URL. Raises ValueError naming the word."""
    found = dict(wanted)
    for word in words:
        name, equals, value = word.partition("=")
        sign = name[-1:] if name[-1:] in ("+", "-") else ""
        pool = name.removesuffix(sign)
        if not equals or pool not in found:
            raise ValueError(
                f"{word!r}: expected POOL=N, POOL+=URL or POOL-=URL, POOL one of {', '.join(found)}"
            )
        wish, urls = found[pool], found[pool].urls
        if sign == "+":
            found[pool] = Wish(engines=wish.engines, urls=(*urls, value.rstrip("/")))
        elif sign == "-":
            if value.rstrip("/") not in urls:
                raise ValueError(f"{word!r}: expected one of {', '.join(urls) or 'none'}")
            left = tuple(url for url in urls if url != value.rstrip("/"))
            found[pool] = Wish(engines=wish.engines, urls=left)
        elif value.isdecimal():
            found[pool] = Wish(engines=int(value), urls=urls)
        else:
            raise ValueError(f"{word!r}: expected a number of engines")
        _checked(asdict(found[pool]))
    return found


def _checked(wish: Mapping[str, object]) -> Wish:
    engines, urls = wish["engines"], wish["urls"]
    if type(engines) is not int or engines < 0 or not isinstance(urls, list | tuple):
        raise ValueError(f"{wish}: expected a number of engines and a list of urls")
    found = tuple(check_url(url) for url in urls)
    if len(set(found)) < len(found):
        raise ValueError(f"{wish}: expected each url once")
    return Wish(engines=engines, urls=found)
