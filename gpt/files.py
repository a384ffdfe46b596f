"""Files that are complete or not there at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that `path` holds the old text or the new, never a part."""
    writing = path.with_name(f".writing-{path.name}")
    writing.write_text(text, encoding="utf-8")
    sync(writing)
    writing.replace(path)
    sync(path.parent)
