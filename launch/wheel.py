"""A wheel of this very installation, for clusters that have Gossamer's dependencies but not it.

The one idea: the wheel names no dependency. Ray installs a wheel into a folder beside the job with
all that it requires, so one that requires torch would bring torch to every node again.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOMS = ("comm", "launch", "parallel", "trainer")
EPOCH = (1980, 1, 1, 0, 0, 0)


def build_wheel(folder: Path) -> Path:
    """Writes the wheel into `folder`; its version ends in a hash of its files, for Ray caches
    wheels by name."""
    files = dict(_sources())
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name} {len(data)}\n".encode() + data)
    version = metadata.version("gossamer").partition("+")[0] + f"+{digest.hexdigest()[:12]}"
    info = f"gossamer-{version}.dist-info"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: gossamer\nVersion: {version}\n".encode()
    )
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = _entry_points().encode()
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"gossamer-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED)
    return path


def _sources() -> Iterator[tuple[str, bytes]]:
    """Files of the four rooms as they are installed here, by their names in the wheel."""
    for room in ROOMS:
        root = Path(__file__).parent.parent / room
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".py", ".yaml"):
                yield f"gossamer/{room}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _entry_points() -> str:
    """The command, and what makes vLLM's workers find us."""
    groups: dict[str, list[str]] = {}
    for each in metadata.distribution("gossamer").entry_points:
        groups.setdefault(each.group, []).append(f"{each.name} = {each.value}\n")
    return "".join(f"[{group}]\n{''.join(lines)}\n" for group, lines in groups.items())


def _digest(data: bytes) -> str:
    encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={encoded.decode()}"
