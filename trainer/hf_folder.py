"""The weights of a Hugging Face folder: read by name, written in shards.

The one idea: a tensor is found through the index and read from its place in a mapped file, so that
a rank reads the bytes of its own experts and no others; what is written gets the same layout.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


class HFFolder:
    """Tensors by checkpoint name.

    Raises FileNotFoundError for a folder without safetensors or with a shard missing, ValueError,
    naming the file, for one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_by_name: dict[str, str] = {}
        if (folder / INDEX).is_file():
            try:
                self._file_by_name = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / INDEX} is not an index of shards: {error}") from error
            for file in sorted(set(map(str, self._file_by_name.values()))):
                if Path(file).name != file:
                    raise ValueError(f"{folder / INDEX} names {file}; expected files beside it")
                if not (folder / file).is_file():
                    raise FileNotFoundError(f"{folder / file} is missing; {INDEX} names it")
        elif (folder / WHOLE).is_file():
            self._file_by_name = dict.fromkeys(self._keys(WHOLE), WHOLE)
        else:
            raise FileNotFoundError(f"{folder} has neither {WHOLE} nor {INDEX}; expected one")
        self.names = self._file_by_name.keys()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file, each read when it is asked for."""
        names_by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if name not in self._file_by_name:
                raise ValueError(f"{self.folder} holds no tensor {name}, which the model has")
            names_by_file[self._file_by_name[name]].append(name)
        for file, held in names_by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as shard:
                    for name in held:
                        yield name, _unquantised(shard.get_tensor(name), name)
            except SafetensorError as error:
                raise ValueError(f"{self.folder / file} cannot be read: {error}") from error

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills `tensors`, in their own dtypes, from the tensors of the same names."""
        for name, found in self.tensors(tensors):
            target = tensors[name]
            if found.shape != target.shape:
                raise ValueError(
                    f"{self.folder} holds {name} of shape {tuple(found.shape)}; the config says"
                    f" {tuple(target.shape)}"
                )
            target.copy_(found)

    def _keys(self, file: str) -> list[str]:
        try:
            with safe_open(self.folder / file, framework="pt") as shard:
                return list(shard.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file} cannot be read: {error}") from error


def _unquantised(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise ValueError(f"{name} is {tensor.dtype} in its file; expected bfloat16 or wider")
    return tensor


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `tensors` as model.safetensors, or as shards of about `shard_bytes` and an index.

    Holds one shard in memory; a folder that is not whole has neither of the two names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total_bytes = held_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        save_file(held, folder / f".{WHOLE}.{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / f".{WHOLE}.0").replace(folder / WHOLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f".{WHOLE}.{i}").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / f".{INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True))
    (folder / f".{INDEX}").replace(folder / INDEX)
