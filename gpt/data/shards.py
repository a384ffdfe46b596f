"""Token shards and their manifest: write, read, verify. Needs numpy only.

A shard has llm.c's format: 256 int32 (magic 20240520, version 1, the number of tokens, zeros),
then that many uint16 token ids, all little-endian. A dataset is a folder of shards with a manifest
that is written last, so a folder that has a manifest is complete.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gpt.artifacts import DatasetManifest, Shard
from gpt.errors import DatasetError, Problem
from gpt.files import PARTIAL, compute_sha256, sync, write_text

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MANIFEST = "manifest.json"
CHECKED = "checked.json"
"""Size and times of the shards whose SHA-256 was verified."""
BLOCK_TOKENS = 1 << 20
"""Tokens read at once from a stream."""
REBUILD = "delete the folder and run again: the dataset is rebuilt from its sources"


# --- writing -------------------------------------------------------------------------------------


class ShardWriter:
    """Write a stream of token ids to shards of `tokens_per_shard`: `train-00000.bin`, and so on.

    A shard has a temporary name until it is flushed to disk, and keeps it if the `with` block
    raises. To continue a stream that lies in the folder, pass the number of tokens to keep of it
    as `resume_at`; the rest is dropped.
    """

    def __init__(self, folder: Path, split: str, tokens_per_shard: int, resume_at: int = 0) -> None:
        assert tokens_per_shard >= 1
        self._folder, self._split, self._capacity = folder, split, tokens_per_shard
        self._finished: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._count = 0
        self._resume(resume_at)

    def write(self, ids: NDArray[Any]) -> None:
        """Append token ids. Raises `ValueError` if one does not fit in uint16."""
        if not ids.size:
            return
        if ids.dtype != np.uint16 and (int(ids.min()) < 0 or int(ids.max()) > 0xFFFF):
            raise ValueError(f"ids must be 0 to 65535, not {ids.min()} to {ids.max()}")
        tokens = ids.astype("<u2", copy=False)
        while tokens.size:
            room = self._capacity - self._count
            self._append(tokens[:room])
            tokens = tokens[room:]
            if self._count == self._capacity:
                self._finish()

    def flush(self) -> None:
        """Pass everything to the operating system, so that killing the process loses nothing."""
        if self._file:
            self._file.flush()

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all shards in order."""
        if self._file:
            self._finish()
        return tuple(self._finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._file:
            with contextlib.suppress(OSError):  # a full disk fails here again
                self._file.close()

    def _resume(self, tokens: int) -> None:
        """Hash the shards to keep, delete the others, and open the last one at its end."""
        full, rest = divmod(tokens, self._capacity)
        files = _stream_files(self._folder, self._split)
        for path in files[full + (rest > 0) :]:
            path.unlink()
        for file in files[:full]:
            path = file.rename(self._folder / self._name)
            digest = compute_sha256(path)
            self._finished.append(Shard(name=path.name, tokens=self._capacity, sha256=digest))
        if not rest:
            return
        self._file = files[full].rename(self._folder / (self._name + PARTIAL)).open("r+b")
        self._file.truncate(HEADER_BYTES + TOKEN_BYTES * rest)
        self._file.write(build_header(self._capacity))
        self._file.seek(0)
        self._hash = hashlib.file_digest(self._file, "sha256")
        self._count = rest

    @property
    def _name(self) -> str:
        return _shard_name(self._split, len(self._finished))

    def _append(self, tokens: NDArray[np.uint16]) -> None:
        if not self._file:
            self._file = (self._folder / (self._name + PARTIAL)).open("wb")
            self._file.write(header := build_header(self._capacity))
            self._hash = hashlib.sha256(header)
        data = np.ascontiguousarray(tokens).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self._count += tokens.size

    def _finish(self) -> None:
        assert self._file
        partial = self._folder / (self._name + PARTIAL)
        if is_short := self._count < self._capacity:
            self._file.seek(0)
            self._file.write(build_header(self._count))
        self._file.close()
        sync(partial)
        # The header, hashed first, holds the token count: a short shard is hashed again.
        digest = compute_sha256(partial) if is_short else self._hash.hexdigest()
        partial.replace(self._folder / self._name)
        self._finished.append(Shard(name=self._name, tokens=self._count, sha256=digest))
        self._file, self._count = None, 0


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.bin"


def _stored_shard(folder: Path, split: str, index: int) -> Path:
    """Return the path of a shard, or its temporary path if it is not finished."""
    path = folder / _shard_name(split, index)
    return path if path.is_file() else path.with_name(path.name + PARTIAL)


def _stream_files(folder: Path, split: str) -> list[Path]:
    """List the shards of a stream in order, up to the first gap; the last may be unfinished."""
    paths = (_stored_shard(folder, split, index) for index in itertools.count())
    return list(itertools.takewhile(Path.is_file, paths))


def build_header(tokens: int) -> bytes:
    """Return the 1,024 bytes before the token ids."""
    values = np.zeros(256, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


def write_manifest(manifest: DatasetManifest) -> None:
    """Write `manifest.json` to the manifest's folder."""
    text = manifest.model_dump_json(indent=2, exclude={"folder"})
    write_text(manifest.folder / MANIFEST, text)


# --- reading -------------------------------------------------------------------------------------


def open_shard(path: Path, shard: Shard) -> np.memmap[Any, np.dtype[np.uint16]]:
    """Map the token ids of a shard, read-only.

    Raises `DatasetError` if the file is missing or its header or length does not match `shard`.
    """
    problem = _find_length_problem(path, shard)
    if not problem:
        found = np.fromfile(path, "<i4", 3).tolist()
        if found != [MAGIC, VERSION, shard.tokens]:
            rule = f"a token file starts with {MAGIC}, {VERSION} and its {shard.tokens} tokens"
            problem = Problem(str(path), ", ".join(map(str, found)), rule, REBUILD)
    if problem:
        raise DatasetError(problem)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(shard.tokens,))


def read_stream(
    folder: Path, split: str, tokens_per_shard: int, first: int, count: int
) -> Iterator[NDArray[np.uint16]]:
    """Yield ids `first` to `first + count` of a stream, finished or not, in blocks.

    Yields fewer if the files hold fewer. Headers are not checked.
    """
    while count > 0:
        index, offset = divmod(first, tokens_per_shard)
        size = min(count, tokens_per_shard - offset, BLOCK_TOKENS)
        path = _stored_shard(folder, split, index)
        try:
            ids = np.fromfile(path, "<u2", size, offset=HEADER_BYTES + TOKEN_BYTES * offset)
        except OSError:
            return
        yield ids
        if ids.size < size:
            return
        first, count = first + size, count - size


def read_manifest(folder: Path) -> DatasetManifest:
    """Read the manifest of a complete dataset; its folder is where it lies now.

    Raises `DatasetError` if it is missing or invalid, or for every shard that is missing or has the
    wrong length. Contents are not hashed; see `verify_shards`.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_manifest(path.read_bytes(), folder)
    except FileNotFoundError:
        problem = Problem(str(path), "", "is missing: the dataset is not complete", REBUILD)
    except OSError as error:
        problem = Problem(str(path), "", f"cannot be read: {error.strerror}", "make it readable")
    except ValidationError as error:
        problem = Problem(str(path), "", describe_invalid_manifest(error), REBUILD)
    else:
        found = [_find_length_problem(folder / s.name, s) for s in manifest.shards]
        if problems := [each for each in found if each]:
            raise DatasetError(*problems)
        return manifest
    raise DatasetError(problem)


def parse_manifest(text: bytes, folder: Path) -> DatasetManifest:
    """Parse a stored manifest that lies in `folder`. Raises pydantic's `ValidationError`."""
    return DatasetManifest.model_validate_json(text).model_copy(update={"folder": folder})


def describe_invalid_manifest(error: ValidationError) -> str:
    return f"is not a manifest of this version: {error.error_count()} fields are invalid"


# --- verifying -----------------------------------------------------------------------------------


def verify_shards(manifest: DatasetManifest) -> None:
    """Hash every shard. Raises `DatasetError` for all that differ from the manifest."""
    problems = []
    for shard in manifest.shards:
        path = manifest.folder / shard.name
        if problem := _find_length_problem(path, shard):
            problems.append(problem)
        elif (found := compute_sha256(path)) != shard.sha256:
            rule = f"must have the manifest's SHA-256 {shard.sha256}"
            problems.append(Problem(str(path), found, rule, REBUILD))
    if problems:
        raise DatasetError(*problems)
    record_verified(manifest)


def verify_if_changed(manifest: DatasetManifest) -> None:
    """Call `verify_shards` unless all sizes and times are those of the last verification.

    Takes milliseconds unless a shard was written, copied or moved to another disk.
    """
    with contextlib.suppress(OSError, ValueError):
        if json.loads((manifest.folder / CHECKED).read_bytes()) == _stamp_shards(manifest):
            return
    verify_shards(manifest)


def record_verified(manifest: DatasetManifest) -> None:
    """Record that all shards match the manifest now. Skipped if the folder is read-only."""
    with contextlib.suppress(OSError):
        write_text(manifest.folder / CHECKED, json.dumps(_stamp_shards(manifest), indent=1))


def _stamp_shards(manifest: DatasetManifest) -> dict[str, list[Any]]:
    stats = {shard: (manifest.folder / shard.name).stat() for shard in manifest.shards}
    return {
        shard.name: [shard.sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        for shard, status in stats.items()
    }


def _find_length_problem(path: Path, shard: Shard) -> Problem | None:
    expected = HEADER_BYTES + TOKEN_BYTES * shard.tokens
    try:
        found = path.stat().st_size
    except OSError as error:
        return Problem(str(path), "", f"cannot be read: {error.strerror}", REBUILD)
    if found == expected:
        return None
    rule = f"must be {expected} bytes long for the manifest's {shard.tokens} tokens"
    return Problem(str(path), f"{found} bytes", rule, REBUILD)
