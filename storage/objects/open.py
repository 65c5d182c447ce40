"""Open a store by its URL, a directory or a bucket, and a tenant in it by its name."""

import os
from pathlib import Path

from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, ObjectStore, StoreRefused, is_tenant
from storage.objects.tenant import TenantStore


def default_store_url() -> str:
    """Return EVERFLAME_STORE, else a folder that the user may write to."""
    place = "/var/lib/everflame" if os.geteuid() == 0 else "~/.local/share/everflame"
    return os.environ.get("EVERFLAME_STORE") or str(Path(place).expanduser())


def default_tenant() -> str:
    """Return EVERFLAME_TENANT, else the tenant of whoever names none."""
    return os.environ.get("EVERFLAME_TENANT") or DEFAULT_TENANT


def open_tenant(url: str = "", endpoint: str | None = None, tenant: str = "") -> TenantStore:
    """Return the profiles of a tenant in the store at a URL; see `open_store`, `default_tenant`.

    Raises:
        StoreRefused: as `open_store`, or this cannot be a tenant's name.
    """
    return TenantStore(open_store(url, endpoint), checked_tenant(tenant))


def checked_tenant(name: str = "") -> str:
    """Return a tenant's name, that of `default_tenant` for an empty one.

    Raises:
        StoreRefused: it cannot be one.
    """
    asked = name or default_tenant()
    if not is_tenant(asked):
        raise StoreRefused(
            f"{asked!r} cannot be the name of a tenant",
            "use 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first;"
            f" correct {'--tenant' if name else 'EVERFLAME_TENANT'}",
        )
    return asked


def open_store(url: str = "", endpoint: str | None = None) -> ObjectStore:
    """Return the store at `file:///path`, a plain path or `s3://bucket/prefix`.

    The default is the user's own store. `endpoint` is the URL of an S3 server other than Amazon's.
    No request is sent yet.

    Raises:
        StoreRefused: the URL does not name a store, or the AWS profile does not exist.
    """
    url = url or default_store_url()
    scheme, has_scheme, rest = url.partition("://")
    if scheme == "s3" and has_scheme:
        # boto3 takes 40 MB, and the sampler opens no bucket: it is imported only for a bucket.
        from storage.objects.s3 import S3Store  # noqa: PLC0415

        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix, endpoint)
    path = rest if has_scheme and scheme == "file" else url
    if has_scheme and (scheme != "file" or not path.startswith("/")):
        raise StoreRefused(
            f"cannot open the store {url!r}", "give file:///path, a path or s3://bucket/prefix"
        )
    return DirectoryStore(Path(path).expanduser().absolute())
