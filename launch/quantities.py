"""Numbers as people read them, with their unit: bytes in powers of 1000, durations, counts."""

from __future__ import annotations

MISSING = "–"


def format_count(value: float | None) -> str:
    """21300000 -> '21.3 M'; counts below 10000 are written in full."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value < 10_000 else _scaled(value)


def format_bytes(value: float | None) -> str:
    """42600000 -> '42.6 MB'."""
    if value is None:
        return MISSING
    return f"{value:.0f} B" if value < 1000 else _scaled(value) + "B"


def _scaled(value: float) -> str:
    power = 1
    while value >= 999.5 * 1000**power and power < 4:
        power += 1
    return f"{value / 1000**power:.3g} {' kMGT'[power]}"


def format_duration(seconds: float | None) -> str:
    """272 -> '4 min 32 s'."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"


def format_number(value: float | None, digits: int = 4) -> str:
    return MISSING if value is None else f"{value:.{digits}g}"


def format_percent(share: float | None) -> str:
    """0.1234 -> '12.3 %'."""
    return MISSING if share is None else f"{100 * share:.3g} %"
