"""Where experts live in training, and when they move."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTIVES = ("balance", "bytes")
SOURCES = ("even", "seen")
METHODS = ("contiguous", "eplb", "lpt", "ilp", "moetuner", "local", "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Which expert-parallel rank holds which experts. No placement changes a bit of what is
    learned."""

    path: str | None = None
    """A file of `gossamer place`: experts live as it says from the start on. None = expert e on
    rank e // (experts / EP)."""

    every_steps: int = 0
    """Solve anew every so many optimizer steps, from what was counted since, and move experts if
    that pays within as many steps. 0 = never."""

    objective: str = "balance"
    """What to solve for: `balance` = the busiest ranks' tokens; `bytes` = what dispatch sends
    across nodes, from a sample of each step's tokens."""

    sources: str = "even"
    """Whose bytes: `even` = any rank may hold a token, as with shuffled data; `seen` = the rank
    that held it."""

    method: str = "auto"
    """Solver, as `gossamer place --method`."""

    time_limit_s: float = 2.0
    """Of a solve, for which training waits."""

    def __post_init__(self) -> None:
        where = "parallel.placement"
        if self.every_steps < 0:
            raise ValueError(f"{where}.every_steps is {self.every_steps}; expected 0 or more")
        known = {"objective": OBJECTIVES, "sources": SOURCES, "method": METHODS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{where}.{name} is {getattr(self, name)}; expected one of {values}"
                )
        if not self.time_limit_s > 0:
            raise ValueError(f"{where}.time_limit_s is {self.time_limit_s}; expected above 0")

    @property
    def is_contiguous(self) -> bool:
        """Experts lie in order, always."""
        return self.path is None and self.every_steps == 0
