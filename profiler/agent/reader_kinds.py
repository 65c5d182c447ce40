"""What readers can be asked for."""

from collections.abc import Mapping
from pathlib import Path

from profiler.agent.reader import Read


def kinds(cache: Path) -> Mapping[str, Read]:
    """Return what reads an item of each kind. Tables are kept in `cache`."""
    assert cache.is_absolute()
    return {}
