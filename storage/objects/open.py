"""Open a store by its URL: a directory or a bucket."""

import os
from pathlib import Path

from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectStore, StoreRefused
from storage.objects.tenant import TenantStore


def default_store_url() -> str:
    """Return EVERFLAME_STORE, else a folder that the user may write to."""
    place = "/var/lib/everflame" if os.geteuid() == 0 else "~/.local/share/everflame"
    return os.environ.get("EVERFLAME_STORE") or str(Path(place).expanduser())


def open_tenant(url: str = "", endpoint: str | None = None) -> TenantStore:
    """Return the profiles in the store at a URL; see `open_store`."""
    return TenantStore(open_store(url, endpoint))


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
