"""A digest that costs no memory: hashlib would map OpenSSL, 4 MB of the 60 the sampler may take.

Only the interpreter's own BLAKE2 is loaded, as `random` does with its SHA-2; hashlib is for builds
of Python that lack it.
"""

try:
    from _blake2 import blake2b
except ImportError:  # pragma: no cover - every CPython since 3.6 has it
    from hashlib import blake2b

__all__ = ["blake2b"]
