"""Parquet files that appear in a folder: each is told once, when it is whole.

A file is whole when its size and time are the same at two looks and its footer can be read; so one
that is still being copied is waited for. A look does not wait: who looks, decides how often.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class NewFileScanner:
    """What of a folder is known. `known` is by path, to the stamp under which a file was taken
    for known: one that is written anew arrives again."""

    folder: Path
    pattern: str = "*.parquet"
    known: dict[str, str] = field(default_factory=dict)
    _last: dict[str, str] = field(default_factory=dict)
    """Stamps at the last look."""
    _broken: dict[str, str] = field(default_factory=dict)
    """Stamps under which a file was told to be broken."""

    def mark_existing_as_seen(self) -> int:
        """All that is there now, whole or not; how many. One that changes after that arrives."""
        self.known |= self._stamps()
        return len(self.known)

    def scan(self) -> tuple[list[Path], dict[Path, str]]:
        """The files that have become whole since the last look, which are known from now on; and
        those that stand still and cannot be read, each told once, with the reason. Raises `OSError`
        where the folder cannot be read."""
        whole: list[Path] = []
        broken: dict[Path, str] = {}
        now = self._stamps()
        for name, stamp in now.items():
            still = self._last.get(name) == stamp
            if self.known.get(name) == stamp or not still:
                continue
            if reason := why_not_whole(Path(name)):
                if self._broken.get(name) != stamp:
                    broken[Path(name)] = reason
                    self._broken[name] = stamp
                continue
            if self._stamp(Path(name)) == stamp:  # it did not change while it was read
                whole.append(Path(name))
                self.known[name] = stamp
        self._last = now
        return whole, broken

    def _stamps(self) -> dict[str, str]:
        next(self.folder.iterdir(), None)  # rglob says nothing of a folder that is away
        found = {str(path): self._stamp(path) for path in self._matches()}
        return {name: stamp for name, stamp in sorted(found.items()) if stamp}

    def _matches(self) -> Iterator[Path]:
        """Not hidden ones: that is how many programs name a file that they are still writing."""
        return (path for path in self.folder.rglob(self.pattern) if not path.name.startswith("."))

    @staticmethod
    def _stamp(path: Path) -> str:
        """Empty for what is no file, or gone by now."""
        with contextlib.suppress(OSError):
            if path.is_file():
                status = path.stat()
                return f"{status.st_size}:{status.st_mtime_ns}"
        return ""


def why_not_whole(path: Path) -> str:
    """Why the footer of a Parquet file cannot be read; empty where it can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""
