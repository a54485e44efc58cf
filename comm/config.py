"""What a weight log can be told. Torch-free, so that `gossamer validate` stays quick."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISH_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """How versions of the weights are published."""

    publish_dtype: str = "bfloat16"
    """dtype that the trainer's fp32 masters are rounded to before they are published."""
    anchor_every_versions: int = 50
    """A version this far from the last anchor holds an anchor beside its delta."""
    anchor_every_bytes: int = 0
    """So does one with this many bytes of deltas since the last anchor; 0 means never."""
    signing_key_path: str | None = None
    """File of the Ed25519 private key (`gossamer log keygen`) that signs frames and manifests."""
    zstd_level: int = 1
    """zstd level of the planes of a frame; higher is smaller and slower."""
    link_mbit: float | None = None
    """Speed of the link to the readers: codecs are chosen for time on it; None: for size."""
    num_threads: int = 1
    """Threads that find and code changes."""
    part_timeout_s: float = 60.0
    """How long a part waits for the other parts, or for the manifest, of its version."""
    poll_s: float = 0.02
    """Time between two looks at the store while waiting."""

    def __post_init__(self) -> None:
        if self.publish_dtype not in PUBLISH_DTYPES:
            names = ", ".join(PUBLISH_DTYPES)
            raise ValueError(f"publish_dtype must be one of {names}, not {self.publish_dtype!r}")
        if self.anchor_every_versions < 1:
            raise ValueError(
                f"anchor_every_versions must be at least 1, not {self.anchor_every_versions}"
            )
        if self.anchor_every_bytes < 0:
            raise ValueError(f"anchor_every_bytes must be 0 or more, not {self.anchor_every_bytes}")
        if not 1 <= self.zstd_level <= 22:
            raise ValueError(f"zstd_level must be from 1 to 22, not {self.zstd_level}")
        if self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {self.num_threads}")
        for field in ("part_timeout_s", "poll_s", "link_mbit"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, not {getattr(self, field)}")
