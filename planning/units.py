"""Bytes as people read them."""


def in_units(size: float) -> str:
    """Bytes with a decimal prefix: 1.50 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:.0f} bytes"
