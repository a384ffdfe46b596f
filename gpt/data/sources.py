"""Source files: from `data.source` to a list of files, and a hash that identifies each one.

Local files are identified by their SHA-256, cached by size and times so that an unchanged file is
not read again. A file at a URL (`s3://`, `hf://`, or any other that fsspec supports) is identified
by the metadata of its store, without downloading anything.
"""

import contextlib
import glob
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.errors import CorpusError, Problem
from gpt.files import compute_sha256, write_text

HASHES = "source-hashes.json"
SETTLED_SECONDS = 0.05
"""A file changed more recently could change again without a new timestamp."""
GET_AGAIN = "copy or download it again, or remove it from data.source"


@dataclass(frozen=True)
class CorpusFile:
    """A file of `data.source`, local or at a URL."""

    name: str
    filesystem: Any = field(default=None, compare=False)
    """The fsspec file system of a URL; None for a local file."""
    key: str = ""
    """Equal if two names refer to the same file."""
    folder: str = field(default="", compare=False)
    """Base of a relative name; default: the working directory."""

    @property
    def partitions(self) -> dict[str, str]:
        """The `key=value` folders in the path (Hive partitioning)."""
        parts = [part.partition("=") for part in Path(self.name).parts[:-1]]
        return {key: value for key, equals, value in parts if equals and key}

    def open(self) -> Any:
        """Return what pyarrow can open: a path or a file object."""
        return self.filesystem.open(self.name, "rb") if self.filesystem else str(self._path)

    @property
    def _path(self) -> Path:
        return Path(self.folder, self.name)

    def read_magic(self) -> tuple[bytes, bytes]:
        """Return the first and last four bytes. Raises `OSError`."""
        with self.filesystem.open(self.name) if self.filesystem else self._path.open("rb") as file:
            head = file.read(4)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4))
            return head, file.read(4)

    def size_bytes(self) -> int:
        if self.filesystem:
            return int(self.filesystem.info(self.name).get("size") or 0)
        return self._path.stat().st_size

    def stamp(self) -> str:
        """Return a cheap value that changes when the file does. Raises `CorpusError`."""
        try:
            if self.filesystem:
                return str(self.filesystem.ukey(self.name))
            status = Path(self.name).stat()
        except OSError as error:
            raise CorpusError(describe_unreadable(self, error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise CorpusError(Problem(self.name, "", "is not a regular file", "name Parquet files"))
        return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def describe_unreadable(file: CorpusFile, error: OSError) -> Problem:
    """Explain why a file cannot be opened."""
    path = Path(file.folder, file.name)
    if not file.filesystem and path.is_symlink() and not path.exists():
        rule = f"is a link to {os.readlink(path)}, which does not exist"  # noqa: PTH115
        return Problem(file.name, "", rule, "fix the link, or remove it from data.source")
    rule = f"cannot be read: {error.strerror or error}"
    return Problem(file.name, "", rule, "make it readable, or remove it from data.source")


def find_sources(patterns: Sequence[str]) -> tuple[CorpusFile, ...]:
    """List the files of `data.source`: paths, globs (`**` at any depth), directories (all
    `*.parquet` below), and URLs of these.

    Keeps the given order, sorts within each entry, and drops duplicates. Files are not opened, so
    dangling links are included. Raises `CorpusError` for all entries that match nothing.
    """
    found: dict[str, CorpusFile] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        try:
            files = _find_remote(pattern) if "://" in pattern else _find_local(pattern)
        except CorpusError as error:
            problems += error.problems
            continue
        for file in files:
            found.setdefault(file.key, file)
        if not files:
            problems.append(_describe_no_match(pattern))
    if problems:
        raise CorpusError(*problems)
    return tuple(found.values())


def _find_local(pattern: str) -> list[CorpusFile]:
    paths = _match(Path(pattern).expanduser())
    return [CorpusFile(str(path), key=os.path.realpath(path)) for path in paths]


def _match(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(_list_parquet(path))
    if path.exists() or path.is_symlink():
        return [path]
    # Path.glob takes no absolute pattern.
    matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    return [file for match in matched if match != path for file in _match(match)]


def _list_parquet(folder: Path) -> Iterator[Path]:
    """Yield every `*.parquet` file at any depth, including links.

    Raises `CorpusError` for a folder that cannot be listed: skipping it silently would change the
    dataset.
    """

    def refuse(error: OSError) -> None:
        rule = f"cannot be listed: {error.strerror}"
        remedy = "make it readable, or remove it from data.source"
        raise CorpusError(Problem(str(error.filename), "", rule, remedy)) from error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if name.endswith(".parquet"):
                yield Path(place, name)


def _find_remote(pattern: str) -> list[CorpusFile]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if glob.has_magic(path):
            names = filesystem.glob(path)
        elif filesystem.isdir(path):
            names = [name for name in filesystem.find(path) if name.endswith(".parquet")]
        else:
            names = [path] if filesystem.exists(path) else []
    except (ImportError, ValueError) as error:
        rule = f"fsspec cannot open this URL: {error}"
        remedy = "install the package it names, or download the files and use their paths"
        raise CorpusError(Problem("data.source", pattern, rule, remedy)) from error
    except Exception as error:  # each filesystem raises its own errors
        rule = f"cannot be reached: {type(error).__name__}: {error}"
        remedy = "check the URL, the network and the credentials, or use local files"
        raise CorpusError(Problem("data.source", pattern, rule, remedy)) from error
    prefix = pattern.partition("://")[0]
    return [CorpusFile(name, filesystem, f"{prefix}://{name}") for name in sorted(names)]


def _describe_no_match(pattern: str) -> Problem:
    if "://" in pattern:
        rule, remedy = "nothing exists at this URL", "check the spelling"
    elif Path(pattern).expanduser().is_dir():
        rule, remedy = "has no *.parquet files", "use a directory with Parquet files below it"
    elif glob.has_magic(pattern):
        rule, remedy = "matches no files", f"fix the pattern; it is relative to {Path.cwd()}"
    else:
        rule, remedy = "no such file", f"fix the path; it is relative to {Path.cwd()}"
    return Problem("data.source", pattern, rule, remedy)


@dataclass(frozen=True)
class FileIdentity:
    """A file's stamp and the SHA-256 of its bytes at that time."""

    stamp: str
    sha256: str


class FileIdentities:
    """The identity of every readable file, and the problems of the others.

    Hashes are taken from the `cache` file if the stamp is unchanged; new ones are added to it.
    """

    def __init__(self, files: Iterable[CorpusFile], cache: Path) -> None:
        self.by_file: dict[CorpusFile, FileIdentity] = {}
        self.problems: list[Problem] = []
        known = _read_hashes(cache)
        hashes = known.copy()
        for file in files:
            try:
                self.by_file[file] = _identify(file, hashes)
            except CorpusError as error:
                self.problems += error.problems
        if hashes != known:
            with contextlib.suppress(OSError):  # the folder is read-only
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_text(cache, json.dumps(hashes, indent=1, sort_keys=True))


def _identify(file: CorpusFile, hashes: dict[str, Any]) -> FileIdentity:
    """Look the file up in `hashes`, or hash it and add it there."""
    began, stamp = time.time(), file.stamp()
    if file.filesystem:
        digest = hashlib.sha256(f"{file.key} {stamp}".encode()).hexdigest()
        return FileIdentity(stamp, digest)
    entry = hashes.get(file.key, {})
    if entry.get("stamp") != stamp:
        path = Path(file.name)
        try:
            entry = {"stamp": stamp, "sha256": compute_sha256(path)}
            status = path.stat()
        except OSError as error:
            raise CorpusError(describe_unreadable(file, error)) from error
        if began - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
            hashes[file.key] = entry
    return FileIdentity(stamp, entry["sha256"])


def _read_hashes(cache: Path) -> dict[str, Any]:
    """Read the cache; a damaged one counts as empty."""
    try:
        known = json.loads(cache.read_bytes())
        return {key: entry for key, entry in known.items() if {"stamp", "sha256"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}
