"""The token files and their manifest: written, read, verified. numpy and the standard library.

A shard is llm.c's format: 256 int32 (magic 20240520, version 1, the number of tokens, zeros),
then that many uint16 ids, all little-endian. A data set is a folder of shards with a manifest,
written last: where there is a manifest, there is a whole data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gpt.artifacts import DatasetManifest, Shard
from gpt.errors import DatasetError, Problem
from gpt.files import PARTIAL, compute_sha256, write_text

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MANIFEST = "manifest.json"
CHECKED = "checked.json"
"""Remembers by size and times which shards have passed their SHA-256."""
READ_TOKENS = 1 << 20

REMEDY = "delete the folder and run again: the data set is rebuilt from its sources"


# --- writing -------------------------------------------------------------------------------------


class ShardWriter:
    """Cuts one stream of ids into files of `tokens_per_shard`: `train-00000.bin`, and so on.

    A file has a temporary name until its bytes are on the disk. Holds no more than what one
    `write` was given. `close` finishes the last file; as a context manager, an exception leaves
    the unfinished file behind under its temporary name. With `kept_tokens` it goes on behind the
    first so many tokens of the stream that lies in the folder, and drops the rest of it.
    """

    def __init__(
        self, folder: Path, split: str, tokens_per_shard: int, kept_tokens: int = 0
    ) -> None:
        assert tokens_per_shard >= 1
        self._folder, self._split, self._capacity = folder, split, tokens_per_shard
        self._done: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._count = 0
        self._take_up(kept_tokens)

    def write(self, ids: NDArray[Any]) -> None:
        """Append ids. Raises `ValueError` for one that uint16 cannot hold (it would wrap)."""
        if not ids.size:
            return
        if ids.dtype != np.uint16 and (
            int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.uint16).max
        ):
            raise ValueError(f"ids must be 0 to 65535, not {ids.min()} to {ids.max()}")
        tokens = ids.astype("<u2", copy=False)
        while tokens.size:
            room = self._capacity - self._count
            self._append(tokens[:room])
            tokens = tokens[room:]
            if self._count == self._capacity:
                self._finish()

    def flush(self) -> None:
        """Hand everything to the operating system: killed after that, nothing is lost."""
        if self._file:
            self._file.flush()

    def close(self) -> tuple[Shard, ...]:
        """Finish the last file and return all of them, in order."""
        if self._file:
            self._finish()
        return tuple(self._done)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._file:
            with contextlib.suppress(OSError):  # a full disk refuses the rest once more
                self._file.close()

    def _take_up(self, tokens: int) -> None:
        """Hash what is kept, delete what is not, and open the last file at its end."""
        whole, rest = divmod(tokens, self._capacity)
        files = stream_files(self._folder, self._split)
        for path in files[whole + (rest > 0) :]:
            path.unlink()
        for file in files[:whole]:
            path = file.rename(self._folder / self._name)
            shard = Shard(name=path.name, tokens=self._capacity, sha256=compute_sha256(path))
            self._done.append(shard)
        if not rest:
            return
        partial = files[whole].rename(self._folder / (self._name + PARTIAL))
        self._file = partial.open("r+b")
        self._file.truncate(HEADER_BYTES + TOKEN_BYTES * rest)
        self._file.write(build_header(self._capacity))
        self._file.seek(0)
        while block := self._file.read(1 << 20):
            self._hash.update(block)
        self._count = rest

    @property
    def _name(self) -> str:
        return shard_name(self._split, len(self._done))

    def _append(self, tokens: NDArray[np.uint16]) -> None:
        if not self._file:
            self._file = (self._folder / (self._name + PARTIAL)).open("wb")
            self._hash = hashlib.sha256()
            self._count = 0
            self._put(build_header(self._capacity))
        self._put(np.ascontiguousarray(tokens).data.cast("B"))
        self._count += tokens.size

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file
        self._file.write(data)
        self._hash.update(data)

    def _finish(self) -> None:
        assert self._file
        partial = self._folder / (self._name + PARTIAL)
        if short := self._count < self._capacity:
            self._file.seek(0)
            self._file.write(build_header(self._count))
        self._file.flush()
        with ThreadPoolExecutor(1) as beside:
            on_disk = beside.submit(os.fsync, self._file.fileno())
            # The header stands first and holds the count: only a short file is hashed anew.
            digest = compute_sha256(partial) if short else self._hash.hexdigest()
            on_disk.result()
        self._file.close()
        partial.replace(self._folder / self._name)
        self._done.append(Shard(name=self._name, tokens=self._count, sha256=digest))
        self._file, self._count = None, 0


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.bin"


def stream_files(folder: Path, split: str) -> list[Path]:
    """The files of a stream in order, the last perhaps unfinished; up to the first gap."""
    files: list[Path] = []
    while True:
        whole = folder / shard_name(split, len(files))
        partial = whole.with_name(whole.name + PARTIAL)
        if whole.is_file():
            files.append(whole)
        elif partial.is_file():
            files.append(partial)
        else:
            return files


def build_header(tokens: int) -> bytes:
    """The 1,024 bytes before the ids."""
    values = np.zeros(256, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


def write_manifest(manifest: DatasetManifest) -> None:
    """Write `manifest.json` into the folder that it names; its presence says complete.

    The folder itself is left out of the file, so that a data set can be moved.
    """
    text = manifest.model_dump_json(indent=2, exclude={"folder"})
    write_text(manifest.folder / MANIFEST, text)


# --- reading -------------------------------------------------------------------------------------


def open_shard(path: Path, shard: Shard) -> np.memmap[Any, np.dtype[np.uint16]]:
    """The ids of a shard, mapped and read-only. `path` is the file's.

    Raises `DatasetError` when the file is missing, is no token file, or when header, length and
    manifest disagree.
    """
    problem = _length_problem(path, shard) or _header_problem(path, shard)
    if problem:
        raise DatasetError(problem)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(shard.tokens,))


def read_stream(
    folder: Path, split: str, tokens_per_shard: int, first: int, count: int
) -> Iterator[NDArray[np.uint16]]:
    """Ids `first` to `first + count` of a stream, finished or not, about a million at a time.

    Fewer when the files hold fewer; headers are not asked.
    """
    while count > 0:
        index, offset = divmod(first, tokens_per_shard)
        size = min(count, tokens_per_shard - offset, READ_TOKENS)
        path = folder / shard_name(split, index)
        if not path.is_file():
            path = path.with_name(path.name + PARTIAL)
        try:
            ids = np.fromfile(path, "<u2", size, offset=HEADER_BYTES + TOKEN_BYTES * offset)
        except OSError:
            return
        yield ids
        if ids.size < size:
            return
        first, count = first + size, count - size


def read_manifest(folder: Path) -> DatasetManifest:
    """The manifest of a complete data set, its folder being where it lies now.

    Raises `DatasetError` when there is none or it cannot be read, and names every shard that is
    missing or has the wrong length. Contents are not hashed here: see `verify_shards`.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_manifest(path.read_bytes(), folder)
    except FileNotFoundError:
        problem = Problem(str(path), "", "is missing: the data set is not complete", REMEDY)
    except OSError as error:
        problem = Problem(str(path), "", f"cannot be read: {error.strerror}", "make it readable")
    except ValidationError as error:
        rule = f"is no manifest of this version: {error.error_count()} fields are wrong"
        problem = Problem(str(path), "", rule, REMEDY)
    else:
        problems = [
            found for s in _shards(manifest) if (found := _length_problem(folder / s.name, s))
        ]
        if problems:
            raise DatasetError(*problems)
        return manifest
    raise DatasetError(problem)


def verify_shards(manifest: DatasetManifest) -> None:
    """Read every shard and compare its SHA-256; `DatasetError` names all that were altered."""
    problems = []
    for shard in _shards(manifest):
        path = manifest.folder / shard.name
        found = _length_problem(path, shard) or _hash_problem(path, shard)
        if found:
            problems.append(found)
    if problems:
        raise DatasetError(*problems)
    record_verified(manifest)


def verify_if_changed(manifest: DatasetManifest) -> None:
    """`verify_shards`, but only where a shard's size or times are not those under which it passed
    before: milliseconds, unless something was written, moved between disks or copied."""
    try:
        known = json.loads((manifest.folder / CHECKED).read_bytes())
    except (OSError, ValueError):
        known = None
    try:
        if known == _checked(manifest):
            return
    except OSError:
        pass
    verify_shards(manifest)


def record_verified(manifest: DatasetManifest) -> None:
    """For `verify_if_changed`: all shards have the manifest's SHA-256 now. Not written where
    nothing can be."""
    with contextlib.suppress(OSError):
        write_text(manifest.folder / CHECKED, json.dumps(_checked(manifest), indent=1))


def _checked(manifest: DatasetManifest) -> dict[str, list[Any]]:
    stamps = {}
    for shard in _shards(manifest):
        status = (manifest.folder / shard.name).stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        stamps[shard.name] = [shard.sha256, *stamp]
    return stamps


class _Manifest(DatasetManifest):
    """The manifest as it stands in the file, where no folder is named."""

    folder: Path = Path()


def parse_manifest(text: bytes, folder: Path) -> DatasetManifest:
    """With the folder where it lies. Raises pydantic's `ValidationError`."""
    manifest = _Manifest.model_validate_json(text)
    # Its values have just been checked, and there can be 100,000s of them.
    values = {name: getattr(manifest, name) for name in DatasetManifest.model_fields}
    return DatasetManifest.model_construct(**values | {"folder": folder})


def _shards(manifest: DatasetManifest) -> tuple[Shard, ...]:
    return manifest.train.shards + manifest.validation.shards


def _length_problem(path: Path, shard: Shard) -> Problem | None:
    expected = HEADER_BYTES + TOKEN_BYTES * shard.tokens
    try:
        found = path.stat().st_size
    except OSError as error:
        return Problem(str(path), "", f"cannot be read: {error.strerror}", REMEDY)
    if found == expected:
        return None
    rule = f"must be {expected} bytes long for the manifest's {shard.tokens} tokens"
    return Problem(str(path), f"{found} bytes", rule, REMEDY)


def _header_problem(path: Path, shard: Shard) -> Problem | None:
    with path.open("rb") as file:
        found = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")[:3].tolist()
    if found == [MAGIC, VERSION, shard.tokens]:
        return None
    rule = f"a token file begins with {MAGIC}, {VERSION} and its {shard.tokens} tokens"
    return Problem(str(path), ", ".join(map(str, found)), rule, REMEDY)


def _hash_problem(path: Path, shard: Shard) -> Problem | None:
    found = compute_sha256(path)
    if found == shard.sha256:
        return None
    return Problem(str(path), found, f"must have the manifest's SHA-256 {shard.sha256}", REMEDY)
