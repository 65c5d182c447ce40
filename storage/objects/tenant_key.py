"""Tenant key: 32 random bytes by which everyone who reads a tenant makes the same ids.

The ids of locations, functions and stacks are hashes keyed with it (`storage.hashing`). It is kept
in the store as `v1/{tenant}/key`, outside the folder of profiles. Whoever writes profiles makes it:
the agent's uploader before its first upload, and `import`. Of several that make one at the same
time the store keeps one. Readers never write.

A tenant that was written by an older version only has no key. Readers then use one that follows
from the tenant's name: everyone's ids are the same all the same, but whoever chooses the names of
functions could choose collisions. It ends with the first upload of a version that makes keys;
readers that start then use the new key, and nothing that was cached with another one.
"""

import hashlib
import logging
import secrets

from storage.objects.keys import ObjectMissing, ObjectStore, ObjectTooLarge, StoreRefused

KEY_BYTES = 32

_log = logging.getLogger(__name__)


def make_tenant_key(store: ObjectStore, tenant: str) -> None:
    """Write a key unless the tenant has one.

    Raises:
        StoreUnavailable: it is not known whether it has one.
        StoreRefused: it has none, and may not be written to.
    """
    store.put(_path(tenant), secrets.token_bytes(KEY_BYTES))


def read_tenant_key(store: ObjectStore, tenant: str) -> bytes:
    """Return the tenant's key; the one that follows from its name where it has none to read.

    Raises:
        StoreUnavailable: the store cannot be reached.
    """
    try:
        key = store.get(_path(tenant))
    except (ObjectMissing, ObjectTooLarge, StoreRefused) as error:
        _log.info("use guessable key tenant=%s error=%s", tenant, error)
        return fallback_key(tenant)
    if len(key) != KEY_BYTES:
        _log.warning("use guessable key, the stored one is damaged tenant=%s", tenant)
        return fallback_key(tenant)
    return key


def fallback_key(tenant: str) -> bytes:
    content = f"everflame key of tenant {tenant}".encode()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def _path(tenant: str) -> str:
    return f"v1/{tenant}/key"
