"""One process at a time in a run's folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gpt.errors import Problem, RunLockedError
from gpt.files import write_text

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock-holder.json"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run of this folder; again in the same process, without effect.

    The system lets go of the lock when its process ends, however that ends, so what a killed one
    left behind does not count. Raises `RunLockedError` with the holder's pid and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK_FILE, is_singleton=True, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunLockedError(_held(folder)) from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):  # a full disk: the lock itself needs no room
            write_text(folder / HOLDER_FILE, json.dumps(holder))
        yield
    finally:
        lock.release()


def _held(folder: Path) -> Problem:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):  # it has the lock and is about to say who it is
        who = "another process"
    return Problem(
        str(folder),
        "",
        f"{who} is working on this run",
        "wait for it or stop it; for a second run beside it, give another run.name or --fresh",
    )
