"""Recipes: YAML plus `a.b=c` overrides, checked key by key into frozen dataclasses.

The one idea: OmegaConf merges and interpolates, and never leaves this file; what the rest of the
program sees has types, and an error names the key and what was expected there.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.launch.config import RunConfig
from gossamer.trainer.data.config import SourceConfig

SHIPPED = Path(__file__).parent / "recipes"


SECRET = re.compile(
    r"://[^/@\s]*:[^/@\s]+@"
    r"|[?&](sig\w*|code|[\w-]*(key|token|secret|password|credential|signature)[\w-]*|X-Amz-\w+)=",
    re.IGNORECASE,
)
"""What a URL with a secret in it looks like."""


class RecipeError(ValueError):
    """A recipe that cannot be read or cannot be right."""


def load_recipe(recipe: str, overrides: list[str]) -> RunConfig:
    """Reads a YAML file, or one of the shipped recipes by name, and applies `a.b=c` overrides.

    Raises RecipeError in one sentence that names the key, or the file.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = _find(recipe)
    try:
        recipe_config = OmegaConf.load(path)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise RecipeError(f"override {override!r}: expected KEY=VALUE (train.seed=2)")
            # read as OmegaConf reads files: plain YAML 1.1 takes 3e-4 for text
            read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(recipe_config, key, read["value"], merge=False, force_add=True)
        plain = OmegaConf.to_container(recipe_config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, OSError, IndexError, TypeError) as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        refuse_secrets(plain, "")
        return build_config(RunConfig, plain, "")
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def refuse_secrets(value: object, where: str) -> None:
    """Raises ValueError for a URL with a password in it: configs are written down and shown."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_secrets(inner, _join(where, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            refuse_secrets(inner, f"{where}[{i}]")
    elif isinstance(value, str) and SECRET.search(value):
        raise ValueError(
            f"{where} holds a secret; expected a plain URL, and secrets in the environment"
        )


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Paths that mean the same to every process: trainer ranks run in a folder of Ray's."""
    train = config.train
    data, told = train.data, train.tokenizer
    if data.corpus_path is not None:
        data = replace(data, corpus_path=str(Path(data.corpus_path).absolute()))
    sources = tuple(_with_absolute_path(source) for source in data.sources)
    if told.path is not None:
        told = replace(told, path=str(Path(told.path).absolute()))
    if told.chat_template is not None:
        told = replace(told, chat_template=str(Path(told.chat_template).absolute()))
    train = replace(train, data=replace(data, sources=sources), tokenizer=told)
    if train.model.path is not None:
        folder = str(Path(train.model.path).absolute())
        train = replace(train, model=replace(train.model, path=folder))
    if train.log.signing_key_path is not None:
        key = str(Path(train.log.signing_key_path).absolute())
        train = replace(train, log=replace(train.log, signing_key_path=key))
    placement = train.parallel.placement
    if placement.path is not None:
        placement = replace(placement, path=str(Path(placement.path).absolute()))
        train = replace(train, parallel=replace(train.parallel, placement=placement))
    if train.checkpoint.url is not None and "://" not in train.checkpoint.url:
        root = str(Path(train.checkpoint.url).absolute())
        train = replace(train, checkpoint=replace(train.checkpoint, url=root))
    if (outer := train.outer) is not None:
        if outer.url and "://" not in outer.url:
            outer = replace(outer, url=str(Path(outer.url).absolute()))
        if outer.signing_key_path is not None:
            outer = replace(outer, signing_key_path=str(Path(outer.signing_key_path).absolute()))
        if outer.public_keys_path is not None:
            outer = replace(outer, public_keys_path=str(Path(outer.public_keys_path).absolute()))
        train = replace(train, outer=outer)
    rollout = config.rollout
    if rollout.public_key_path is not None:
        key = str(Path(rollout.public_key_path).absolute())
        rollout = replace(rollout, public_key_path=key)
    return replace(config, train=train, rollout=rollout)


def _with_absolute_path(source: SourceConfig) -> SourceConfig:
    path = Path(source.path)
    if source.kind == "hf" and not path.exists():  # a name on the hub
        return source
    return replace(source, path=str(path.absolute()))


def dump_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved config, JSON (which is YAML too), where load_recipe can read it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(asdict(config), indent=1) + "\n")
    temporary.replace(path)


def build_config(cls: type, values: object, where: str) -> Any:  # noqa: ANN401
    """Builds dataclass `cls` from plain `values`; raises ValueError naming the key."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the recipe'} is {values!r}; expected keys and values")
    known = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {sorted(known)}"
            raise ValueError(f"unknown key {_join(where, key)}; {hint}")
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in values:
            raise ValueError(f"{_join(where, field.name)} is missing; it has no default")
    built = {key: _convert(known[key], value, _join(where, key)) for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _convert(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401
    """`value` as type `hint`: dataclass, tuple of dataclasses, mapping, scalar or None."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(hint, value, where)
    if is_dataclass(hint):
        return build_config(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; expected a list")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; expected keys and values")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r}; expected {hint.__name__}")
    return value


def _find(recipe: str) -> Path:
    for path in (Path(recipe), SHIPPED / recipe, SHIPPED / f"{recipe}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    raise RecipeError(f"recipe {recipe} is not a file; shipped recipes are {', '.join(shipped)}")


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
