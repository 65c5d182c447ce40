"""BLAKE2 without hashlib, which would map OpenSSL: 4 MB of the 60 MB that the sampler may take.

Only the interpreter's own BLAKE2 is loaded, as `random` does with SHA-2. Builds of Python without
it fall back to hashlib.
"""

try:
    from _blake2 import blake2b
except ImportError:  # pragma: no cover - every CPython since 3.6 has it
    from hashlib import blake2b

__all__ = ["blake2b"]
