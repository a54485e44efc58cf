"""The memory of a Ray cluster as a store: `ray://NAME`.

The one idea: one named actor knows every file, and does one call at a time, so a name is created
once. Large files lie in Ray's object store, owned by the actor; readers fetch them from there.

It outlives the process that made it, but not the actor's node: keep a log elsewhere to keep it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from gossamer.comm.store import StoreError, checked_name
from ray.exceptions import RayError

NAMESPACE = "gossamer"
LARGE_BYTES = 100_000


class _Files:
    """What the actor runs. A large file is a list that holds the reference to its bytes."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, bytes | list[ray.ObjectRef]]] = {}

    def put(self, name: str, data: np.ndarray, overwrite: bool) -> bool:
        if name in self._files and not overwrite:
            return False
        held = data.tobytes() if len(data) < LARGE_BYTES else [ray.put(data)]
        self._files[name] = len(data), held
        return True

    def get(self, name: str) -> bytes | list[ray.ObjectRef] | None:
        return self._files.get(name, (0, None))[1]

    def list(self, prefix: str) -> list[str]:
        depth = prefix.count("/")
        names = (name for name in self._files if name.count("/") == depth)
        return sorted(name for name in names if name.startswith(prefix))

    def size(self, name: str) -> int | None:
        return self._files.get(name, (None, None))[0]

    def delete(self, name: str) -> None:
        self._files.pop(name, None)


class RayStore:
    """Files in the actor NAME of the Ray cluster that this process is part of, or can find."""

    def __init__(self, url: str, create: bool = False) -> None:
        self.url = url.rstrip("/")
        self._files: Any  # the actor's handle
        name = checked_name(self.url.removeprefix("ray://"), "ray://")
        try:
            if not ray.is_initialized():
                ray.init(address="auto", log_to_driver=False)
            if create:
                kept = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
                self._files = (
                    ray.remote(_Files).options(name=name, namespace=NAMESPACE, **kept).remote()
                )
            else:
                self._files = ray.get_actor(name, namespace=NAMESPACE)
        except ConnectionError as error:
            raise StoreError(f"store {url}: no Ray cluster is running here") from error
        except ValueError as error:
            raise FileNotFoundError(f"store {url} is not in the Ray cluster") from error

    def put(self, name: str, data: bytes, overwrite: bool = False) -> bool:
        """See Store.put."""
        checked_name(name, self.url)
        return self._call(self._files.put, name, np.frombuffer(data, np.uint8), overwrite)

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Store.get."""
        held = self._call(self._files.get, checked_name(name, self.url))
        if held is None:
            raise FileNotFoundError(f"{name} is missing from store {self.url}")
        if isinstance(held, bytes):
            return held[start:stop]
        return self._wait(held[0])[start:stop].tobytes()

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        checked_name(prefix + "x", self.url)
        return self._call(self._files.list, prefix)

    def size(self, name: str) -> int | None:
        """See Store.size."""
        return self._call(self._files.size, checked_name(name, self.url))

    def delete(self, name: str) -> None:
        """See Store.delete."""
        self._call(self._files.delete, checked_name(name, self.url))

    def _call(self, method: Any, *given: object) -> Any:  # noqa: ANN401
        return self._wait(method.remote(*given))

    def _wait(self, reference: ray.ObjectRef) -> Any:  # noqa: ANN401, whatever was put
        try:
            return ray.get(reference)
        except RayError as error:
            raise StoreError(f"store {self.url} does not answer: {error}") from error
