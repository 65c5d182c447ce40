"""Digests: equal to hashlib's, and without what it loads."""

import hashlib
import subprocess
import sys

from symbolizer.digest import blake2b, sha256


def test_digests_are_those_of_hashlib() -> None:
    assert sha256(b"text").hexdigest() == hashlib.sha256(b"text").hexdigest()
    keyed = {"digest_size": 8, "key": b"key"}
    assert blake2b(b"text", **keyed).digest() == hashlib.blake2b(b"text", **keyed).digest()


def test_the_sampler_does_without_openssl() -> None:
    """Which takes 3 to 4 MB of its 60, for functions that the interpreter has itself."""
    code = (
        "import sys, profiler.agent.agent, profiler.commands.record, storage.formats.pprof\n"
        "print([name for name in ('hashlib', 'ssl', 'secrets') if name in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert found.stdout == "[]\n"
