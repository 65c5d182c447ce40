"""Stores for tests of which all or a part is compacted."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from storage.blocks import merges
from storage.blocks.compactor import Compactor
from storage.blocks.day import renew_day
from storage.blocks.manifest import HourManifest, Manifests
from storage.objects.keys import CPU, DEFAULT_TENANT, ObjectKey, ObjectStore
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.profile import ALWAYS


def compact(store: ObjectStore, folder: Path, *, has_rollups: bool = False) -> None:
    """Compact all objects that a store has by now; `folder` is the compactor's own."""
    store.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)
    tenant = TenantStore(store)
    with ThreadPoolExecutor(1) as executor:
        for type_ in {CPU, *tenant.types()}:
            compactor = Compactor(tenant, folder, executor, type_=type_)
            hours = list(compactor.occupied_hours())
            for hour in hours:
                compactor.fold(hour)
                if has_rollups:
                    merges.roll_up(compactor, hour)
            for day in sorted({hour[:10] for hour in hours}) if has_rollups else ():
                renew_day(compactor, day)


def merge(store: ObjectStore, folder: Path, hour: str) -> None:
    """Merge the parts of an hour, and delete the files that they were made of."""
    with ThreadPoolExecutor(1) as executor:
        compactor = Compactor(TenantStore(store), folder, executor)
        before = compactor.manifests.hour(hour).files
        merges.merge(compactor, hour)
    for file in before:
        store.delete(file.key)


def level0(store: ObjectStore) -> list[ObjectKey]:
    return [key for key, _ in TenantStore(store).list_window(ALWAYS)]


def delete(store: ObjectStore, keys: Iterable[ObjectKey]) -> None:
    for key in keys:
        store.delete(key.text)


def change_hour(
    store: ObjectStore, hour: str, edit: Callable[[HourManifest], HourManifest]
) -> None:
    """Change an hour's manifest, as no compactor would."""
    Manifests(store, DEFAULT_TENANT, CPU).change_hour(hour, edit)


replace = msgspec.structs.replace
