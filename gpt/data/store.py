"""Share finished datasets between machines through a folder or an fsspec URL (`data.store`).

A stored dataset has the name and files it has below `run.root`. Its manifest is uploaded last, so a
folder that has one is complete. Downloaded shards must have the SHA-256 of the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.shards import CHECKED, MANIFEST, describe_invalid_manifest, parse_manifest
from gpt.data.tokenize.build import dataset_lock, explain_full_disk, publish_dataset
from gpt.data.tokenize.plan import DatasetPlan, make_plan
from gpt.errors import DatasetError, Problem
from gpt.files import FULL_DISK, PARTIAL, compute_sha256, sync

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")
DOWNLOADING = f".fetched{PARTIAL}"
"""Suffix of the folder of a download; its complete files are used again after an interruption."""

logger = logging.getLogger(__name__)


Transfer = Generator[tuple[int, int], None, Result]
"""Yields the bytes done and the bytes in total."""


def open_store(url: str) -> AbstractFileSystem:
    """Return a file system whose paths begin at `data.store`: `dataset/file`.

    Raises `DatasetError` if fsspec cannot open it.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url.rstrip("/"))
        return fsspec.filesystem("dir", path=root, fs=filesystem, skip_instance_cache=True)
    except Exception as error:  # a missing package, wrong credentials
        rule = f"cannot be opened: {type(error).__name__}: {error}"
        remedy = "check the URL and the credentials, and install the package that it needs"
        raise DatasetError(Problem("data.store", url, rule, remedy)) from error


def _list_sizes(store: AbstractFileSystem, name: str) -> dict[str, int]:
    """Return the size in bytes of each file of a dataset; empty if it is not stored."""
    store.invalidate_cache()
    try:
        files = store.ls(name, detail=True)
    except FileNotFoundError:
        return {}
    return {
        PurePosixPath(file["name"]).name: int(file["size"] or 0)
        for file in files
        if file["type"] == "file"
    }


def download_dataset(config: RunConfig) -> Transfer[DatasetManifest | None]:
    """Download the dataset of `config` from `data.store` to `run.root`.

    Returns None if it is not stored or the store cannot be reached; the latter is logged. After an
    interruption, complete files are not downloaded again. Raises `DatasetError` for a damaged copy,
    a full disk, and a store that fsspec cannot open.
    """
    store, plan = open_store(config.data.store), make_plan(config)
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(plan.folder.parent), dataset_lock(plan.folder):
        if found := plan.find_existing():
            return found
        try:
            return (yield from _download(store, plan))
        except DatasetError:
            raise
        except Exception as error:  # each filesystem raises its own errors
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise
            url, reason = _stored_at(plan), f"{type(error).__name__}: {error}"
            logger.warning("%s cannot be read: %s; building the dataset locally", url, reason)
            return None


def _read_manifest(store: AbstractFileSystem, plan: DatasetPlan) -> DatasetManifest | None:
    try:
        text = store.cat_file(f"{plan.folder.name}/{MANIFEST}")
        manifest = parse_manifest(text, plan.folder)
    except ValidationError as error:
        rule = describe_invalid_manifest(error)
        raise DatasetError(_damaged_copy(plan, MANIFEST, rule)) from error
    if manifest.fingerprint != plan.fingerprint:
        rule = f"has fingerprint {manifest.fingerprint} instead of {plan.fingerprint}"
        raise DatasetError(_damaged_copy(plan, MANIFEST, rule))
    return None if manifest.skipped_files and plan.data.on_bad_file == "fail" else manifest


def _download(store: AbstractFileSystem, plan: DatasetPlan) -> Transfer[DatasetManifest | None]:
    name = plan.folder.name
    sizes = _list_sizes(store, name)
    if sizes.pop(MANIFEST, None) is None or not (manifest := _read_manifest(store, plan)):
        return None
    folder = plan.folder.with_name(name + DOWNLOADING)
    folder.mkdir(exist_ok=True)
    checksums = {shard.name: shard.sha256 for shard in manifest.shards}
    if missing := sorted(checksums.keys() - sizes.keys()):
        raise DatasetError(*(_damaged_copy(plan, file, "is missing") for file in missing))
    done, total = 0, sum(sizes.values())
    for file, size in sizes.items():
        path, sha256 = folder / file, checksums.get(file)
        is_done = bool(sha256) and path.exists() and compute_sha256(path) == sha256
        if not file.endswith(PARTIAL) and not is_done:
            store.get_file(f"{name}/{file}", str(path))
            sync(path)
            if sha256 and (found := compute_sha256(path)) != sha256:
                path.unlink()
                rule = f"has SHA-256 {found} instead of the manifest's {sha256}"
                raise DatasetError(_damaged_copy(plan, file, rule))
        done += size
        yield done, total
    return publish_dataset(folder, plan.folder, manifest)


def _stored_at(plan: DatasetPlan) -> str:
    return f"{plan.data.store.rstrip('/')}/{plan.folder.name}"


def _damaged_copy(plan: DatasetPlan, file: str, rule: str) -> Problem:
    remedy = f"delete {_stored_at(plan)}; the next run builds the dataset and uploads it"
    return Problem(f"{_stored_at(plan)}/{file}", "", rule, remedy)


def upload_dataset(manifest: DatasetManifest, url: str) -> Transfer[bool]:
    """Upload a dataset to the store; return whether anything was uploaded.

    Complete files are not uploaded again. If the store cannot be reached, this is logged, and the
    next run tries again. Raises `DatasetError` for a store that fsspec cannot open.
    """
    store, name = open_store(url), manifest.folder.name
    try:
        stored = _list_sizes(store, name)
        if MANIFEST in stored:
            return False
        sizes = {
            path: path.stat().st_size
            for path in sorted(manifest.folder.iterdir())
            if path.is_file() and path.name not in (MANIFEST, CHECKED) and path.name[0] != "."
        }
        store.makedirs(name, exist_ok=True)
        done, total = 0, sum(sizes.values())
        for path, size in sizes.items():
            if stored.get(path.name) != size:  # until it is complete, a file may have fewer bytes
                store.put_file(str(path), f"{name}/{path.name}")
            done += size
            yield done, total
        partial = f"{name}/{MANIFEST}{PARTIAL}"
        store.put_file(str(manifest.folder / MANIFEST), partial)
        store.mv(partial, f"{name}/{MANIFEST}")
    except Exception as error:  # each filesystem raises its own errors
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s/%s cannot be written: %s", url.rstrip("/"), name, reason)
        logger.warning("the dataset is complete in %s; the next run uploads it", manifest.folder)
        return False
    return True
