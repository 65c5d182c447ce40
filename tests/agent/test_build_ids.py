"""Who has a build id: what is remembered of that is bounded."""

import base64
import tracemalloc

from profiler.agent.build_ids import BuildIds


def result(number: int, functions_bytes: int = 0) -> dict[str, object]:
    """Return what a reader answers of a file with a build id of its own."""
    return {
        "build_id": f"{number:040x}",
        "code_key": f"code {number}",
        "content_key": f"content {number}",
        "functions": base64.b64encode(bytes(functions_bytes)).decode(),
        "has_symbols": bool(functions_bytes),
        "owner": 1000,
    }


def test_many_files_with_many_functions_take_a_few_megabytes() -> None:
    """Any user can make files with a build id of their own, and as many functions as count."""
    build_ids = BuildIds()
    tracemalloc.start()
    try:
        for number in range(4_096):
            build_ids.of(result(number, 8_192))
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert kept_bytes < 8 << 20


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    """Another content may have its build id then."""
    build_ids = BuildIds()
    for number in (0, 1):
        build_ids.of(result(number))
    for number in range(2, 4_097):
        build_ids.of(result(0))
        build_ids.of(result(number))
    other = {"code_key": "other code", "content_key": "other content"}

    assert build_ids.of(result(1) | other) == result(1)["build_id"]
    assert build_ids.of(result(0) | other) == "hash-other content"
    assert build_ids.misclaimed == 1
