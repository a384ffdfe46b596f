"""Which files: paths, globs, directories and addresses to files, and what names their bytes.

Local files are told apart by their SHA-256, remembered under size and times so that an unchanged
one is not read again. A file behind an address (`s3://`, `hf://`, whatever fsspec knows) is told
apart by what its store says of it: no byte of it is fetched for that.
"""

from __future__ import annotations

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
"""A file changed less long ago could change again within one tick of its file system's clock."""
GET_AGAIN = "copy or download it again, or leave it out of data.source"


@dataclass(frozen=True)
class CorpusFile:
    """A file that data.source names; local, or behind an address."""

    name: str
    filesystem: Any = field(default=None, compare=False)
    """fsspec's, for an address."""
    key: str = ""
    """Equal for two names of one file."""
    folder: str = field(default="", compare=False)
    """Where a relative name begins; empty: where this process works."""

    @property
    def partitions(self) -> dict[str, str]:
        """Hive's `key=value` folders on the way to the file."""
        parts = [part.partition("=") for part in Path(self.name).parts[:-1]]
        return {key: value for key, equals, value in parts if equals and key}

    def open(self) -> Any:
        """What pyarrow opens."""
        return self.filesystem.open(self.name, "rb") if self.filesystem else str(self._path)

    @property
    def _path(self) -> Path:
        return Path(self.folder, self.name)

    def ends(self) -> tuple[bytes, bytes]:
        """Its first and last four bytes. Raises `OSError`."""
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
        """Changes whenever the file does; cheap to ask. Raises `CorpusError`."""
        try:
            if self.filesystem:
                return str(self.filesystem.ukey(self.name))
            status = Path(self.name).stat()
        except OSError as error:
            raise CorpusError(unreadable(self, error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise CorpusError(_no_file(self.name))
        return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def unreadable(file: CorpusFile, error: OSError) -> Problem:
    """Why a file cannot be opened, in the system's words."""
    path = Path(file.folder, file.name)
    if not file.filesystem and path.is_symlink() and not path.exists():
        rule = f"is a link to {os.readlink(path)}, where there is nothing"  # noqa: PTH115
        return Problem(file.name, "", rule, "mend the link, or leave it out of data.source")
    rule = f"cannot be read: {error.strerror or error}"
    return Problem(file.name, "", rule, "make it readable, or leave it out of data.source")


def _no_file(name: str) -> Problem:
    return Problem(name, "", "is no regular file", "name Parquet files")


# --- from data.source to files -------------------------------------------------------------------


def find_sources(patterns: Sequence[str]) -> tuple[CorpusFile, ...]:
    """Files, globs (`**` at any depth), directories (every `*.parquet` below) and addresses of the
    same kinds as files.

    In the order given, sorted within each, a file named twice taken once. Whether they can be
    opened is asked later: a dangling link is among them. Raises `CorpusError` with every entry
    that names nothing.
    """
    found: dict[str, CorpusFile] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        try:
            files = _remote(pattern) if "://" in pattern else _local(pattern)
        except CorpusError as error:
            problems += error.problems
            continue
        for file in files:
            found.setdefault(file.key, file)
        if not files:
            problems.append(_nothing(pattern))
    if problems:
        raise CorpusError(*problems)
    return tuple(found.values())


def _local(pattern: str) -> list[CorpusFile]:
    paths = _matches(Path(pattern).expanduser())
    return [CorpusFile(str(path), key=os.path.realpath(path)) for path in paths]


def _matches(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(_below(path))
    if path.exists() or path.is_symlink():
        return [path]
    # Path.glob takes no absolute pattern.
    matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    return [file for match in matched if match != path for file in _matches(match)]


def _below(folder: Path) -> Iterator[Path]:
    """Every `*.parquet` that is no folder, links too, at any depth. Raises `CorpusError` for a
    folder that cannot be listed: leaving its files out unsaid would be another data set."""

    def refuse(error: OSError) -> None:
        rule = f"cannot be listed: {error.strerror}"
        remedy = "make it readable, or leave it out of data.source"
        raise CorpusError(Problem(str(error.filename), "", rule, remedy)) from error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if name.endswith(".parquet"):
                yield Path(place, name)


def _remote(pattern: str) -> list[CorpusFile]:
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
        rule = f"fsspec cannot open such an address: {error}"
        remedy = "install the package that it names, or download the files and name those"
        raise CorpusError(Problem("data.source", pattern, rule, remedy)) from error
    except Exception as error:  # every store has errors of its own
        rule = f"cannot be reached: {type(error).__name__}: {error}"
        remedy = "check the address, the network and the credentials; or name local files"
        raise CorpusError(Problem("data.source", pattern, rule, remedy)) from error
    prefix = pattern.partition("://")[0]
    return [CorpusFile(name, filesystem, f"{prefix}://{name}") for name in sorted(names)]


def _nothing(pattern: str) -> Problem:
    if "://" in pattern:
        rule, remedy = "there is nothing at this address", "check its spelling"
    elif Path(pattern).expanduser().is_dir():
        rule, remedy = "holds no *.parquet file", "name a directory with Parquet files below it"
    elif glob.has_magic(pattern):
        rule, remedy = "matches no file", f"patterns start from {Path.cwd()}; mend this one"
    else:
        rule, remedy = "there is no such file", f"paths start from {Path.cwd()}; mend this one"
    return Problem("data.source", pattern, rule, remedy)


# --- what names their bytes ----------------------------------------------------------------------


@dataclass(frozen=True)
class FileIdentity:
    """A file's stamp and the hash of its bytes at that time."""

    stamp: str
    sha256: str


class FileIdentities:
    """The identity of each file that can be read, and what is wrong with the others.

    A hash is taken from `memory` where the stamp is the one it was made under.
    """

    def __init__(self, files: Iterable[CorpusFile], memory: Path) -> None:
        self.by_file: dict[CorpusFile, FileIdentity] = {}
        self.problems: list[Problem] = []
        self._memory, self._known = memory, _read_hashes(memory)
        self._fresh: dict[str, dict[str, str]] = {}
        for file in files:
            try:
                self.by_file[file] = self._identify(file)
            except CorpusError as error:
                self.problems += error.problems

    def _identify(self, file: CorpusFile) -> FileIdentity:
        began, stamp = time.time(), file.stamp()
        entry = self._known.get(file.key, {})
        if entry.get("stamp") != stamp:
            entry = {"stamp": stamp, "sha256": _sha256(file)}
            if _is_settled(file, began):
                self._fresh[file.key] = entry
        return FileIdentity(stamp, entry["sha256"])

    def save(self) -> None:
        """Remember the new ones for the next start."""
        if self._fresh:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            hashes = self._known | self._fresh
            write_text(self._memory, json.dumps(hashes, indent=1, sort_keys=True))


def _sha256(file: CorpusFile) -> str:
    if file.filesystem:
        return hashlib.sha256(f"{file.key} {file.stamp()}".encode()).hexdigest()
    try:
        return compute_sha256(Path(file.name))
    except OSError as error:
        raise CorpusError(unreadable(file, error)) from error


def _is_settled(file: CorpusFile, now: float) -> bool:
    if file.filesystem:
        return False
    status = Path(file.name).stat()
    return now - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS


def _read_hashes(cache: Path) -> dict[str, Any]:
    """Only a memory: one that cannot be read is as good as none."""
    try:
        known = json.loads(cache.read_bytes())
        return {key: entry for key, entry in known.items() if {"stamp", "sha256"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}
