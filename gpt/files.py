"""Files that are complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""Ending of what is not complete; nothing reads it."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk that takes no more answers."""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; a power cut may take them before.

    Windows has no such call for folders and needs none.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def compute_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces; about 1 GB/s."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """The whole of `text` in UTF-8 under `path`, or what was there before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill, which is `path` once the block ends, every file on the disk; after
    an exception there is nothing. Raises `FileExistsError` where `path` is there and not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)
