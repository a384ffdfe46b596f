"""Lock the folder of a run against a second process."""

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
    """Hold the lock of a run folder; nested calls in one process are allowed.

    The operating system releases the lock when the process ends, even if it is killed. Raises
    `RunLockedError` with the holder's process id and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK_FILE, is_singleton=True, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunLockedError(_held_by(folder)) from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):  # a full disk; the lock itself needs no space
            write_text(folder / HOLDER_FILE, json.dumps(holder))
        yield
    finally:
        lock.release()


def _held_by(folder: Path) -> Problem:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):  # not written yet
        who = "another process"
    return Problem(
        str(folder),
        "",
        f"{who} is working on this run",
        "wait for it or stop it; to start a second run, give another run.name or --fresh",
    )
