"""How the process that starts a group talks to the group's processes on its machine.

They send records, log lines and errors to a Unix datagram socket, which loses nothing and mixes
nothing up when one of them is killed. A file beside the socket asks them to stop. The end of their
standard input, which they share, says that the process that started them is gone.
"""

import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

IPC_FOLDER = "OVERNIGHT_IPC_FOLDER"
"""Environment variable: the folder of the socket, the stop file and the worker's settings."""
SOCKET, STOP = "socket", "stop"
MAX_MESSAGE_BYTES = 2**20


class IPCServer:
    """The end of the process that starts the group; a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="overnight-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.folder / SOCKET))

    def receive(self, timeout_seconds: float) -> Any:
        """Return the next message, or None if there is none within `timeout_seconds`."""
        self._socket.settimeout(timeout_seconds)
        try:
            return pickle.loads(self._socket.recv(MAX_MESSAGE_BYTES))
        except TimeoutError:
            return None

    def request_stop(self) -> None:
        (self.folder / STOP).touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._folder.cleanup()


class IPCClient(logging.Handler):
    """The end of one process of the group; as a log handler, it also sends warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.folder = Path(os.environ[IPC_FOLDER])
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        threading.Thread(target=_exit_with_starter, name="group-ipc", daemon=True).start()

    def stop_requested(self) -> bool:
        return (self.folder / STOP).exists()

    def send(self, message: Any) -> None:
        self._socket.sendto(pickle.dumps(message), str(self.folder / SOCKET))

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        record.exc_info, record.exc_text = None, None
        self.send(record)


def _exit_with_starter() -> None:
    """End this process and its launcher when the process that started them is gone: a restart would
    be of no use."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getppid(), signal.SIGTERM)  # torch's launcher
    os._exit(1)
