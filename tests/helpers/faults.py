"""Faults, each one a line: what goes wrong, in which process, at which call.

Processes come from a fork server that has imported what they need, so that starting one again
takes a fraction of a second. Nothing of the project knows of any of this.
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


if __name__ == "tests.faults":  # in the fork server, which begins in the project's folder alone
    sys.path.insert(0, str(Path(__file__).parent))

PRELOADED = ["tests.faults"]
"""By the one fork server of a process of tests, whichever of its modules starts it."""


def processes(*modules):
    """A multiprocessing context whose children begin with `modules` imported."""
    PRELOADED.extend(modules)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def count_file_calls(folder, at):
    """From now on call `at(n)` before the n-th call of this process that changes files or folders
    below `folder`, as Python's audit hooks tell of them, and before each fsync."""
    calls = 0

    def next_call():
        nonlocal calls
        calls += 1
        at(calls)

    def heard(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            next_call()

    sys.addaudithook(heard)
    real = os.fsync

    def fsync(descriptor):
        next_call()
        real(descriptor)

    os.fsync = fsync


def die_while_saving(nth, share):
    """Kill this process at its n-th safetensors file, after `share` of that file's bytes."""
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
    """`owner.name` raises for the first `times` calls, then works; gives the list of refusals."""
    real, refused = getattr(owner, name), []

    def limited(*arguments, **named):
        if len(refused) < times:
            refused.append(arguments)
            raise error
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        yield refused


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def take_away(path):
    path.unlink()
