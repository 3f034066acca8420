from __future__ import annotations


def size(bytes_: int) -> str:
    """In the largest binary unit of which there is at least one, with three digits: `4.5 KiB`, `144 MiB`."""
    value, unit = float(bytes_), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
