"""BLAKE2 and SHA-256 without hashlib, which maps OpenSSL: 4 MB of the 60 that the sampler may take.

Only the interpreter's own functions are loaded, as `random` does. Builds of Python without them
fall back to hashlib.
"""

import sys

try:
    from _blake2 import blake2b
except ImportError:  # pragma: no cover - every CPython since 3.6 has it
    from hashlib import blake2b

try:
    if sys.version_info >= (3, 12):
        from _sha2 import sha256
    else:
        from _sha256 import sha256  # type: ignore[import-not-found] # typeshed leaves it out
except ImportError:  # pragma: no cover - left out by some distributions
    from hashlib import sha256

__all__ = ["blake2b", "sha256"]
