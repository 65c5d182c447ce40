"""Build ids: which files may be known by the build id that they claim.

Anybody can write any build id into a file, and linkers give one id to programs that differ in names
only. Names and identity must come from the file's own content: so one content has a build id, and
any other that claims it is known by a hash instead. Variants of one build that are more or less
stripped count as one content, as long as their owners trust each other: what one lacks in names is
taken from the others.
"""

import base64
import binascii
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_MAX_CLAIMS = 4_096
_MAX_CONTENTS = 16
_MAX_FUNCTIONS_BYTES = 4 << 20
"""Of all samples of functions: up to 11 KB each, 3 KB of most programs that are not stripped."""


class _Claim:
    """Who has a build id."""

    __slots__ = ("code_key", "contents", "functions", "owners", "symbols_owner")

    def __init__(self, code_key: str) -> None:
        self.code_key = code_key
        self.contents: set[str] = set()
        self.functions = ""
        self.owners: set[int] = set()
        self.symbols_owner: int | None = None


class BuildIds:
    """The build ids seen so far, the last used ones, and who has them.

    Attributes:
        misclaimed: how many files claimed the build id of another content.
    """

    def __init__(self) -> None:
        self.misclaimed = 0
        self._claims: OrderedDict[str, _Claim] = OrderedDict()
        self._functions_bytes = 0

    def of(self, result: Mapping[str, Any]) -> str:
        """Return a file's build id, or `hash-` and a hash if another content has it.

        `result` is what a reader has answered: a `symbolizer.identify.Identity`.
        """
        build_id, code_key = str(result["build_id"]), str(result["code_key"])
        content_key, functions = str(result["content_key"]), str(result["functions"])
        owner, has_symbols = int(result["owner"]), bool(result["has_symbols"])
        claim = self._claims.get(build_id)
        if claim is None:
            claim = self._claims[build_id] = _Claim(code_key)
        self._claims.move_to_end(build_id)
        if content_key in claim.contents:
            return build_id
        # Names are taken over from variants that root owns, or who owns all that have the id.
        is_trusted = not has_symbols or owner == 0 or claim.owners <= {owner}
        may_share = claim.symbols_owner in (None, 0, owner)
        if (
            claim.code_key != code_key
            or not (is_trusted and may_share)
            or contradict(claim.functions, functions)
        ):
            self.misclaimed += 1
            return f"hash-{content_key}"
        if has_symbols and len(functions) >= len(claim.functions):
            self._functions_bytes += len(functions) - len(claim.functions)
            claim.functions, claim.symbols_owner = functions, owner
        if len(claim.contents) < _MAX_CONTENTS:
            claim.contents.add(content_key)
            claim.owners.add(owner)
        self._evict()
        return build_id

    def _evict(self) -> None:
        while len(self._claims) > _MAX_CLAIMS or self._functions_bytes > _MAX_FUNCTIONS_BYTES:
            _, oldest = self._claims.popitem(last=False)
            self._functions_bytes -= len(oldest.functions)


def contradict(first: str, second: str) -> bool:
    """Return whether two samples of function names differ at an address that both have.

    Variants of one build that are more or less stripped do not. For the samples, see
    `symbolizer.identify.Identity.functions`.

    Raises:
        ValueError: one is not such a sample.
    """
    samples = [_parse(sample) for sample in (first, second)]
    if not all(map(len, samples)):
        return False  # as for nearly every file
    names: dict[int, tuple[set[int], set[int]]] = {}
    for nth, sample in enumerate(samples):
        for address, name in sample.tolist():
            names.setdefault(address, (set(), set()))[nth].add(name)
    return any(ours and theirs and not ours & theirs for ours, theirs in names.values())


def _parse(sample: str) -> npt.NDArray[np.uint32]:
    try:
        content = base64.b64decode(sample, validate=True)
    except binascii.Error as error:
        raise ValueError("cannot compare functions: the sample is damaged") from error
    return np.frombuffer(content, "<u4").reshape(-1, 2)
