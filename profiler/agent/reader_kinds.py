"""What readers can be asked for."""

from collections.abc import Mapping
from pathlib import Path

from profiler.agent.reader import Read
from profiler.processes.facts import FactsReader
from symbolizer.identify import FileReader
from symbolizer.unwind.table import UnwindCache


def kinds(cache: Path) -> Mapping[str, Read]:
    """Return what reads an item of each kind. Tables are kept in `cache`."""
    files = FileReader(UnwindCache(cache / "unwind"))
    return {
        "file": files.identify,
        "table": files.build_table,
        "mount": files.find_mount,
        "process": FactsReader().read,
    }
