"""What readers can be asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiler.agent.reader import Read
from profiler.processes.facts_reader import FactsReader
from symbolizer.identify import FileReader, Identifier
from symbolizer.identities import Identities
from symbolizer.runtimes.thread_names import read_thread_names
from symbolizer.runtimes.written_code import WrittenCode
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.variants import CodeFile
from symbolizer.unwind.table import UnwindCache


def kinds(cache: Path) -> Mapping[str, Read]:
    """Return what reads an item of each kind. Tables are kept in `cache`."""
    identifier = Identifier(Identities(cache / "files"))
    files = FileReader(UnwindCache(cache / "unwind"), identifier)
    symbolizer = Symbolizer(cache, identifier=identifier)
    return {
        "file": files.identify,
        "table": files.build_table,
        "mount": files.find_mount,
        "process": FactsReader().read,
        "written_code": WrittenCode().read,
        "thread_names": read_thread_names,
        "names": lambda values: _names(symbolizer, values),
    }


def _names(symbolizer: Symbolizer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is at the `offsets` of a file, see `FileNames`; each place once.

    `mapping` is for `Identifier.opened`, None for images of the kernel.
    """
    file = CodeFile(*(values[field] for field in CodeFile._fields))
    names = symbolizer.names(file, values["offsets"], values["mapping"])
    return {**names._asdict(), "places": list(dict.fromkeys(names.places))}
