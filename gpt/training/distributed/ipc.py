"""How the process that starts a group talks to the group's processes on its machine: over a Unix
socket come records, log lines and errors, and a request to stop goes back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn

IPC_ADDRESS = "OVERNIGHT_IPC_ADDRESS"
"""Environment variable: the socket's path."""
STOP = "stop"


class IPCServer:
    """The end of the process that starts the group; a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="overnight-", ignore_cleanup_errors=True)
        self.address = str(Path(self._folder.name, "ipc"))
        self._listener = Listener(self.address, "AF_UNIX", backlog=64)
        self._connections: list[Connection] = []
        self._stop_requested = False
        threading.Thread(target=self._accept, name="group-ipc", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self._listener.accept()
                if self._stop_requested:
                    connection.send(STOP)
                self._connections.append(connection)

    @property
    def has_clients(self) -> bool:
        return bool(self._connections)

    def receive(self, timeout_seconds: float) -> Iterator[Any]:
        """Yield the messages that have arrived; wait at most `timeout_seconds` for the first."""
        for ready in wait(list(self._connections), timeout_seconds):
            assert isinstance(ready, Connection)
            try:
                yield ready.recv()
            except (EOFError, OSError):  # the process has ended; the launcher says how
                self._connections.remove(ready)

    def request_stop(self) -> None:
        if self._stop_requested:
            return
        self._stop_requested = True
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.send(STOP)

    def __enter__(self) -> IPCServer:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket, which ends every process that is connected to it."""
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


class IPCClient(logging.Handler):
    """The end of one process of the group; as a log handler, it also sends warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        try:
            self._connection = Client(os.environ[IPC_ADDRESS], "AF_UNIX")
        except OSError:
            self._exit()
        self._sending = threading.Lock()
        self._stop = threading.Event()
        threading.Thread(target=self._listen, name="group-ipc", daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self._connection.recv() == STOP:
                self._stop.set()
        self._exit()

    def _exit(self) -> NoReturn:
        """End this process and its launcher: the process that started them is gone, so a restart
        would be of no use."""
        os.kill(os.getppid(), signal.SIGTERM)  # torch's launcher
        os._exit(1)

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def send(self, message: Any) -> None:
        with self._sending:
            self._connection.send(message)

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        record.exc_info, record.exc_text = None, None
        self.send(record)
