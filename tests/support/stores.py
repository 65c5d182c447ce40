"""Stores for tests: directories with profiles at chosen minutes."""

import dataclasses
from pathlib import Path

from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey
from storage.objects.tenant import TenantStore
from storage.profile import Host, Profile, Window

START_NS = 1_780_000_000_000_000_000 // 3_600_000_000_000 * 3_600_000_000_000
MINUTE_NS = 60_000_000_000


def minutes(first: int, last: int) -> Window:
    return Window(START_NS + first * MINUTE_NS, START_NS + last * MINUTE_NS)


def at(
    profile: Profile, minute: int, host: str = "web-1", host_id: str = "00112233445566aa"
) -> Profile:
    """Move a profile to a minute after START_NS, on some host."""
    accounting = dataclasses.replace(profile.accounting, hosts=(Host(host, host_id),))
    return dataclasses.replace(profile, window=minutes(minute, minute + 1), accounting=accounting)


def put(store: DirectoryStore, profile: Profile) -> ObjectKey:
    content = pprof.encode(profile)
    return TenantStore(store).put_profile(profile, content)[0]


def directory(folder: Path, *profiles: Profile) -> DirectoryStore:
    store = DirectoryStore(folder)
    for profile in profiles:
        put(store, profile)
    return store
