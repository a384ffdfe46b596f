"""Inject faults: errors, kills and damaged files, at a given call of a given process.

Processes are forked from a server that has imported what they need, so that starting one takes a
fraction of a second.
"""

import errno
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import torch as safetensors_torch

FILE_EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}


if __name__ == "tests.helpers.faults":  # in the fork server, whose path is the project folder
    tests = Path(__file__).parents[1]
    sys.path[:0] = sorted({str(path.parent) for path in tests.rglob("*.py")})

PRELOADED = ["tests.helpers.faults"]
"""Modules imported by the fork server, which all test modules of a process share."""


def forkserver_context(*modules):
    """Return a multiprocessing context whose children start with `modules` imported."""
    PRELOADED.extend(modules)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def count_file_calls(folder, at):
    """Call `at(n)` before the n-th call of this process that changes files below `folder`.

    Uses Python's audit hooks; each fsync counts as well.
    """
    calls = 0

    def next_call():
        nonlocal calls
        calls += 1
        at(calls)

    def audit(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            next_call()

    sys.addaudithook(audit)
    real = os.fsync

    def fsync(descriptor):
        next_call()
        real(descriptor)

    os.fsync = fsync


def die_while_saving(nth, share):
    """Kill this process at its n-th safetensors file, after a `share` of its bytes."""
    real, calls = safetensors_torch.save_file, 0

    def save_file(tensors, path, *rest):
        nonlocal calls
        calls += 1
        real(tensors, path, *rest)
        if calls == nth:
            os.truncate(path, int(share * Path(path).stat().st_size))
            kill_self()

    return save_file


def disk_error(number=errno.ENOSPC):
    return OSError(number, os.strerror(number))


@contextmanager
def failing(monkeypatch, owner, name, error, times):
    """Make `owner.name` raise for the first `times` calls; yield the list of failed calls."""
    real, failed = getattr(owner, name), []

    def limited(*arguments, **named):
        if len(failed) < times:
            failed.append(arguments)
            raise error
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        yield failed


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def delete(path):
    path.unlink()
