"""A run's folder where it is a URL: what lies in the store, and what on each host.

The one idea: everything is made in a folder of the host, as ever. For a run at a URL that folder is
a working copy, which names the URL in a file; small files that all processes read are fetched into
it, what is large (weight log, checkpoints, rounds) is used where it lies. So no two hosts need see
one file system, and for a run in a plain folder nothing is different.

    config.json                         creating it makes the run
    files.json                          hashes of the small files that every process reads
    tokenizer.json, problems.json, ...  those files
    metrics/                            events (trainer/event_store.py)
    log/, checkpoints/, rounds/         as in a folder
    summary.json, report.html           put there whenever they are made
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from gossamer.comm.store import STORES, Store, open_store

CONFIG_FILE, FILES_FILE, LOG_FOLDER = "config.json", "files.json", "log"
URL_FILE = ".run_url"
CACHE_VARIABLE = "GOSSAMER_CACHE"
"""Where a host keeps working folders; default: gossamer in $XDG_CACHE_HOME or ~/.cache."""


def open_run(where: str | Path, create: bool = False) -> Path:
    """This host's folder of the run at `where`, a path or a URL, with the small files it has.

    `create`: a place that can be made is. Raises ValueError for a URL that cannot hold a run,
    FileNotFoundError for a place that does not exist, StoreError.
    """
    if not is_url(where):
        return Path(where)
    url = str(where).rstrip("/")
    scheme, _, place = url.partition("://")
    if scheme not in STORES or scheme == "ray" or not place:
        expected = ", ".join(f"{each}://" for each in STORES if each != "ray")
        raise ValueError(f"run folder {url}: expected a path, or a URL of {expected}")
    store = open_store(url, create)
    named = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    run_dir = _cache() / "runs" / named / (place.rpartition("/")[2] or "run")
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / URL_FILE, url.encode())
    _fetch(store, run_dir)
    return run_dir


def is_url(where: str | Path) -> bool:
    """Whether it is no plain path."""
    return "://" in str(where)


def url_of(run_dir: Path) -> str | None:
    """The URL of the run that `run_dir` is a working folder of; None where it is the run itself."""
    try:
        return (run_dir / URL_FILE).read_text()
    except FileNotFoundError:
        return None


def where_of(run_dir: Path) -> str:
    """What `open_run` takes on any host, and what a user types."""
    return url_of(run_dir) or str(run_dir)


def inside(run_dir: Path, part: str) -> str:
    """Path or URL of what all processes of the run share under that name."""
    return f"{where_of(run_dir)}/{part}"


def has_begun(run_dir: Path) -> bool:
    """Whether there is a run."""
    if (url := url_of(run_dir)) is not None:
        return open_store(url).size(CONFIG_FILE) is not None
    return (run_dir / CONFIG_FILE).exists()


def claim(run_dir: Path) -> bool:
    """Makes the run whose config.json is in `run_dir`; False where another did meanwhile."""
    if (url := url_of(run_dir)) is None:
        return True
    return open_store(url).put(CONFIG_FILE, (run_dir / CONFIG_FILE).read_bytes())


def share_files(run_dir: Path, *names: str) -> None:
    """Puts files of `run_dir` where other hosts find them; those that are missing are passed over.

    Every `open_run` from now on fetches them.
    """
    if (url := url_of(run_dir)) is None:
        return
    store, hashes = open_store(url), {}
    for name in names:
        if (run_dir / name).is_file():
            data = (run_dir / name).read_bytes()
            store.put(name, data, overwrite=True)
            hashes[name] = _hash(data)
    store.put(FILES_FILE, json.dumps(hashes, indent=1).encode(), overwrite=True)


def put_beside(run_dir: Path, name: str) -> str:
    """Puts one file that is read where it lies, as a report is; returns where that is."""
    if (url := url_of(run_dir)) is not None:
        open_store(url).put(name, (run_dir / name).read_bytes(), overwrite=True)
    return inside(run_dir, name)


def delete_run(run_dir: Path) -> None:
    """Deletes a run at a URL, its checkpoints apart; config.json last, so it may be done again.

    Raises ValueError where the store holds a config.json and no other part of a run.
    """
    from gossamer.comm.outer.retention import clear  # brings NumPy, which displays do without

    url = where_of(run_dir)
    store = open_store(url)
    writers, logged = store.list("metrics/"), store.list(f"{LOG_FOLDER}/")
    if not writers and not logged:
        raise ValueError(
            f"{url} holds a {CONFIG_FILE} but no metrics/ and no {LOG_FOLDER}/, so it is no run of"
            " gossamer's to overwrite; give another --run-dir"
        )
    clear(open_store(f"{url}/rounds", create=True))
    for writer in writers:
        for name in store.list(writer.removesuffix(".json") + "/"):
            store.delete(name)
    for name in [*store.list(f"{LOG_FOLDER}/parts/"), *logged, *writers]:
        store.delete(name)
    for name in sorted(store.list(""), key=lambda name: name == CONFIG_FILE):
        store.delete(name)


def _fetch(store: Store, run_dir: Path) -> None:
    """Makes the small files in `run_dir` those of the store."""
    try:
        config = store.get(CONFIG_FILE)
    except FileNotFoundError:  # what lies here is of a run that was deleted
        (run_dir / CONFIG_FILE).unlink(missing_ok=True)
        return
    _write(run_dir / CONFIG_FILE, config)
    try:
        listed = store.get(FILES_FILE)
    except FileNotFoundError:  # its driver died before it made any
        listed = b"{}"
    hashes, known = json.loads(listed), run_dir / FILES_FILE
    for name in json.loads(known.read_text()) if known.exists() else {}:
        if name not in hashes:
            (run_dir / Path(name).name).unlink(missing_ok=True)
    for name, expected in hashes.items():
        path = run_dir / Path(name).name
        if not path.is_file() or _hash(path.read_bytes()) != expected:
            data = store.get(name)
            if _hash(data) != expected:
                raise OSError(f"{where_of(run_dir)}/{name} is not what {FILES_FILE} says it is")
            _write(path, data)
    _write(known, listed)


def _cache() -> Path:
    if told := os.environ.get(CACHE_VARIABLE):
        return Path(told).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossamer"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; processes of one host may write it at once."""
    if path.is_file() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
