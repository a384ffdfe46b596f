"""Find new Parquet files in a folder, each as soon as it is complete.

A file is complete if it has not changed since the last scan and its footer can be read. A file that
is still being copied is found by a later scan.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from gpt.errors import first_line


@dataclass
class NewFileScanner:
    folder: Path
    pattern: str = "*.parquet"
    known: dict[str, str] = field(default_factory=dict)
    """Path -> size and time of the files seen so far. A file that changes is new again."""
    _last: dict[str, str] = field(default_factory=dict)
    _broken: dict[str, str] = field(default_factory=dict)

    def mark_existing_as_seen(self) -> int:
        """Mark all current files as known, complete or not, and return their number."""
        self.known |= self._list_stamps()
        return len(self.known)

    def scan(self) -> tuple[list[Path], dict[Path, str]]:
        """Return new complete files, and files that no longer change but cannot be read, with the
        reason. Each is returned once. Raises `OSError` if the folder cannot be read."""
        complete: list[Path] = []
        broken: dict[Path, str] = {}
        stamps = self._list_stamps()
        for name, stamp in stamps.items():
            path = Path(name)
            if self.known.get(name) == stamp or self._last.get(name) != stamp:
                continue
            error = _find_footer_error(path)
            if error and self._broken.get(name) != stamp:
                broken[path] = error
                self._broken[name] = stamp
            elif not error and _stamp(path) == stamp:  # unchanged while it was read
                complete.append(path)
                self.known[name] = stamp
        self._last = stamps
        return complete, broken

    def _list_stamps(self) -> dict[str, str]:
        next(self.folder.iterdir(), None)  # raises if the folder is gone; rglob does not
        # Hidden files are skipped: many programs use them for files that they are still writing.
        paths = (p for p in self.folder.rglob(self.pattern) if not p.name.startswith("."))
        stamps = {str(path): _stamp(path) for path in sorted(paths)}
        return {name: stamp for name, stamp in stamps.items() if stamp}


def _stamp(path: Path) -> str:
    """Return size and time of a file; empty if it is not a regular file or is gone."""
    with contextlib.suppress(OSError):
        if path.is_file():
            status = path.stat()
            return f"{status.st_size}:{status.st_mtime_ns}"
    return ""


def _find_footer_error(path: Path) -> str:
    """Return why the footer of a Parquet file cannot be read; empty if it can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        return first_line(error)
    return ""
