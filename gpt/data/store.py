"""Where finished data sets are kept for other machines: a folder that they share, or an object
store behind an address that fsspec knows.

A data set lies there as it lies below `run.root`, under the same name: shards and journal first,
the manifest last, so that where there is a manifest, there is a whole data set. What is fetched
counts only with the manifest's SHA-256; training reads it from the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gpt.artifacts import DatasetManifest, Shard
from gpt.config.schema import RunConfig
from gpt.data.shards import CHECKED, MANIFEST, parse_manifest
from gpt.data.tokenize.build import dataset_lock, explain_full_disk, publish_dataset
from gpt.data.tokenize.plan import DatasetPlan, make_plan
from gpt.errors import DatasetError, Problem
from gpt.files import FULL_DISK, PARTIAL, compute_sha256, sync

FETCHED = f".fetched{PARTIAL}"
"""Ending of the folder that is being filled; what is whole in it is kept for the next start."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransferProgress:
    """How much of a data set has been brought there or here."""

    bytes_done: int
    bytes_total: int


class DatasetStore:
    """The folder or address of `data.store`. Raises `DatasetError` where fsspec cannot open it."""

    def __init__(self, address: str) -> None:
        import fsspec

        self.address = address.rstrip("/")
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(self.address)
        except Exception as error:  # a package that is missing, credentials that are wrong
            rule = f"cannot be opened: {type(error).__name__}: {error}"
            remedy = "check the address and the credentials, and install the package that it needs"
            raise DatasetError(Problem("data.store", address, rule, remedy)) from error

    def make(self, name: str) -> None:
        """The folder of a data set, where a store has folders."""
        self._filesystem.makedirs(self._at(name), exist_ok=True)

    def place(self, name: str) -> str:
        """As a person writes it."""
        return f"{self.address}/{name}"

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of a data set that lies there, by name; nothing where none does."""
        self._filesystem.invalidate_cache()
        try:
            files = self._filesystem.ls(self._at(name), detail=True)
        except FileNotFoundError:
            return {}
        return {
            file["name"].rpartition("/")[2]: int(file["size"] or 0)
            for file in files
            if file["type"] == "file"
        }

    def read(self, name: str, file: str) -> bytes:
        return bytes(self._filesystem.cat_file(self._at(name, file)))

    def get(self, name: str, file: str, path: Path) -> None:
        self._filesystem.get_file(self._at(name, file), str(path))
        sync(path)

    def put(self, path: Path, name: str, file: str) -> None:
        """A reader sees the whole of a file or, while it is written, a length that is not its."""
        self._filesystem.put_file(str(path), self._at(name, file))

    def put_whole(self, path: Path, name: str, file: str) -> None:
        """A reader sees the whole of it, or nothing."""
        self.put(path, name, file + PARTIAL)
        self._filesystem.mv(self._at(name, file + PARTIAL), self._at(name, file))

    def _at(self, *names: str) -> str:
        return "/".join([self._path.rstrip("/"), *names])


# --- fetched -------------------------------------------------------------------------------------


def download_dataset(
    config: RunConfig,
) -> Generator[TransferProgress, None, DatasetManifest | None]:
    """The data set of `config` from `data.store`, below `run.root` then; None where it is not in
    the store, or where that cannot be reached, which is logged.

    Killed, it goes on with the file that it was at. Raises `DatasetError` for a copy in the store
    that is damaged, for a full disk, and where fsspec cannot open such a store.
    """
    store, plan = DatasetStore(config.data.store), make_plan(config)
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(plan.folder.parent), dataset_lock(plan.folder):
        if found := plan.find_existing():
            return found
        try:
            manifest = _manifest_there(store, plan)
            return (yield from _fetched(store, plan, manifest)) if manifest else None
        except DatasetError:
            raise
        except Exception as error:  # every store has errors of its own
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise
            told = f"{type(error).__name__}: {error}"
            logger.warning("%s cannot be read: %s", store.place(plan.folder.name), told)
            return None


def _manifest_there(store: DatasetStore, plan: DatasetPlan) -> DatasetManifest | None:
    name = plan.folder.name
    if MANIFEST not in store.sizes(name):
        return None
    try:
        manifest = parse_manifest(store.read(name, MANIFEST), plan.folder)
    except ValidationError as error:
        rule = f"is no manifest of this version: {error.error_count()} fields are wrong"
        raise DatasetError(_damaged(store, name, MANIFEST, rule)) from error
    if manifest.fingerprint != plan.fingerprint:
        rule = f"must be of the data set {plan.fingerprint}, not {manifest.fingerprint}"
        raise DatasetError(_damaged(store, name, MANIFEST, rule))
    return None if manifest.skipped_files and plan.data.on_bad_file == "fail" else manifest


def _fetched(
    store: DatasetStore, plan: DatasetPlan, manifest: DatasetManifest
) -> Generator[TransferProgress, None, DatasetManifest]:
    name = plan.folder.name
    folder = plan.folder.with_name(name + FETCHED)
    folder.mkdir(exist_ok=True)
    shards = {s.name: s for s in (*manifest.train.shards, *manifest.validation.shards)}
    sizes = {file: size for file, size in store.sizes(name).items() if file != MANIFEST}
    if lost := sorted(shards.keys() - sizes.keys()):
        raise DatasetError(*(_damaged(store, name, file, "is missing") for file in lost))
    done, total = 0, sum(sizes.values())
    for file, size in sizes.items():
        if not file.endswith(PARTIAL):
            _fetch(store, name, file, shards.get(file), folder / file)
        done += size
        yield TransferProgress(done, total)
    published = publish_dataset(folder, plan.folder, manifest)
    plan.identities.save()
    return published


def _fetch(store: DatasetStore, name: str, file: str, shard: Shard | None, path: Path) -> None:
    if shard and path.exists() and compute_sha256(path) == shard.sha256:
        return
    store.get(name, file, path)
    if shard and (found := compute_sha256(path)) != shard.sha256:
        path.unlink()
        rule = f"must have the manifest's SHA-256 {shard.sha256}, not {found}"
        raise DatasetError(_damaged(store, name, file, rule))


def _damaged(store: DatasetStore, name: str, file: str, rule: str) -> Problem:
    remedy = f"delete {store.place(name)}: the data set is made anew and put there"
    return Problem(store.place(f"{name}/{file}"), "", rule, remedy)


# --- put there -----------------------------------------------------------------------------------


def upload_dataset(
    manifest: DatasetManifest, address: str
) -> Generator[TransferProgress, None, bool]:
    """Bring a data set into the store; True where something of it was not there yet.

    Files that lie there whole are not sent again. A store that cannot be reached is logged: the
    data set is complete here, and the next run tries again. Raises `DatasetError` where fsspec
    cannot open such a store.
    """
    store, name = DatasetStore(address), manifest.folder.name
    try:
        there = store.sizes(name)
        if MANIFEST in there:
            return False
        sizes = {
            path: path.stat().st_size
            for path in sorted(manifest.folder.iterdir())
            if path.is_file() and path.name not in (MANIFEST, CHECKED) and path.name[0] != "."
        }
        store.make(name)
        done, total = 0, sum(sizes.values())
        for path, size in sizes.items():
            if there.get(path.name) != size:
                store.put(path, name, path.name)
            done += size
            yield TransferProgress(done, total)
        store.put_whole(manifest.folder / MANIFEST, name, MANIFEST)
    except Exception as error:  # every store has errors of its own
        told = f"{type(error).__name__}: {error}"
        logger.warning("%s could not be written: %s", store.place(name), told)
        logger.warning("the data set is complete in %s; the next run tries again", manifest.folder)
        return False
    return True
