"""Who takes part in a run's rounds, and what one that joins must know.

The one idea: the store where replicas meet is all that they share. The first one leaves its recipe
and what it prepared there. Each share of the data has a file that says who reads it, and since a
store creates a file once, no two read the same.

    recipe.json                        the recipe, without what is one replica's own
    recipe/tokenizer.json, ...         what the first replica made before it started
    members/00002.json                 who reads share 2 of the data
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from gossamer.comm.manifest import file_hash
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.seal import Seal
from gossamer.comm.store import Store, open_store
from gossamer.launch.config import RunConfig
from gossamer.launch.recipe import load_recipe
from gossamer.trainer.prepare import PROBLEMS_FILE, prepare_run
from gossamer.trainer.run_folder import inside, share_files
from gossamer.trainer.tokenizer import SETTINGS_FILES, TEMPLATE_FILE, TOKENIZER_FILE

ROUNDS_FOLDER = "rounds"
RECIPE_FILE = "recipe.json"
PREPARED = (*SETTINGS_FILES, TEMPLATE_FILE, PROBLEMS_FILE, TOKENIZER_FILE)
"""Of these the tokenizer comes last: a folder that has it has all."""


def rounds_url(outer: OuterConfig, run_dir: Path) -> str:
    """Where the replicas of a run meet."""
    return outer.url or inside(run_dir, ROUNDS_FOLDER)


def open_rounds(config: RunConfig, run_dir: Path) -> Store | None:
    """The store of the run's rounds; None for a run that has none."""
    outer = config.train.outer
    if outer is None or outer.exchange != "log":
        return None
    return open_store(rounds_url(outer, run_dir), create=True)


def prepare_member(config: RunConfig, run_dir: Path) -> None:
    """Makes what a run needs before it starts, or takes what the first replica made.

    Raises ValueError where another member reads this one's share of the data.
    """
    store = open_rounds(config, run_dir)
    if store is not None:
        if store.size(RECIPE_FILE) is not None:
            _take_prepared(store, run_dir, Seal.of(config.train.outer))
        enlist(store, config)
    prepare_run(config.train, run_dir, config.name)
    share_files(run_dir, *PREPARED)
    if store is not None:
        leave_recipe(store, config, run_dir)


def leave_recipe(store: Store, config: RunConfig, run_dir: Path) -> None:
    """Puts the recipe and what `prepare_run` made in `run_dir`, unless another did; signed, where
    the replicas sign."""
    if store.size(RECIPE_FILE) is not None:
        return
    files = {name: (run_dir / name).read_bytes() for name in PREPARED if (run_dir / name).is_file()}
    for name, data in files.items():
        store.put(f"recipe/{name}", data)
    recipe = asdict(config)
    for own in ("cluster", "replicas", "fleet"):
        del recipe[own]
    del recipe["train"]["checkpoint"]["url"]
    for own in ("url", "signing_key_path", "public_keys_path"):
        del recipe["train"]["outer"][own]
    hashes = {name: file_hash(data) for name, data in files.items()}
    entry = {"recipe": recipe, "files": list(files), "hashes": hashes}
    store.put(RECIPE_FILE, Seal.of(config.train.outer).pack(entry, RECIPE_FILE))


def enlist(store: Store, config: RunConfig) -> None:
    """Notes which share of the data the replica reads. Raises ValueError where another does."""
    assert config.train.outer is not None
    name, share = config.train.outer.replica, config.train.data.replica_index
    if _take_share(store, share, name):
        return
    reader = readers(store)[share]
    if reader != name:
        raise ValueError(
            f"train.data.replica_index is {share}, but {reader} reads that share of the data;"
            " expected one that no member of these rounds reads, below train.data.num_replicas"
        )


def readers(store: Store) -> dict[int, str]:
    """Who reads each share of the data that is read."""
    names = [name for name in store.list("members/") if name.endswith(".json")]
    return {int(Path(name).stem): json.loads(store.get(name))["replica"] for name in names}


def joining(log: str, overrides: list[str], name: str | None) -> tuple[RunConfig, str, bool]:
    """The config of one more replica of the run that meets in `log`, its name, and if it returns.

    `name`: a member to take the place of; None: a new one, that reads a share of its own. Raises
    FileNotFoundError where nobody left a recipe, ValueError where no share is left, SignatureError
    where the members sign and `overrides` name no key that they trust.
    """
    store = open_store(log)
    try:
        left = store.get(RECIPE_FILE)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{log} has no {RECIPE_FILE}; expected the rounds of a run that `gossamer train` began"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RECIPE_FILE
        path.write_text(json.dumps(json.loads(left)["recipe"]))
        config = load_recipe(str(path), overrides)  # before a share is taken
        Seal.of(config.train.outer).unpack_first(left, RECIPE_FILE)
        share = next((at for at, reader in readers(store).items() if reader == name), None)
        returns = share is not None
        own = [f"train.outer.url={json.dumps(log)}"]
        if not any(each.startswith("train.data.replica_index=") for each in overrides):
            if share is None:
                share = _find_share(store, config.train.data.num_replicas, name)
            name = name or f"replica-{share}"
            own.append(f"train.data.replica_index={share}")
        if name is not None:
            own.append(f"train.outer.replica={name}")
        config = load_recipe(str(path), [*own, *overrides])
        assert config.train.outer is not None, "rounds are those of a run with train.outer"
        return config, config.train.outer.replica, returns


def _find_share(store: Store, num_shares: int, name: str | None) -> int:
    """A share of the data that nobody reads, from now on that of `name` (None: replica-SHARE)."""
    for share in range(num_shares):
        if _take_share(store, share, name or f"replica-{share}"):
            return share
    names = ", ".join(readers(store).values())
    raise ValueError(
        f"all {num_shares} shares of the data are read, by {names}; expected --name of one that is"
        " gone, or a run begun with more train.data.num_replicas"
    )


def _take_share(store: Store, share: int, name: str) -> bool:
    return store.put(f"members/{share:05d}.json", json.dumps({"replica": name}).encode())


def _take_prepared(store: Store, run_dir: Path, seal: Seal) -> None:
    """What the first replica prepared, into `run_dir`."""
    entry = seal.unpack_first(store.get(RECIPE_FILE), RECIPE_FILE)
    for name in entry["files"]:
        path = run_dir / Path(name).name
        if not path.exists():
            data = store.get(f"recipe/{name}")
            if seal.verifier is not None and file_hash(data) != entry["hashes"].get(name):
                raise ValueError(
                    f"recipe/{name} is not the file that {RECIPE_FILE} was signed with"
                )
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(data)
            temporary.replace(path)
