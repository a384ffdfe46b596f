"""How the process that started a group and the group's processes on its machine talk: a Unix
socket, over which come records, log lines and errors, and one word goes back."""

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

IPC_ADDRESS = "OVERNIGHT_LINE"
"""Environment variable: the socket's path."""
STOP = "stop"


class IPCServer:
    """The end of whoever started the group."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="overnight-", ignore_cleanup_errors=True)
        self.address = str(Path(self._folder.name, "line"))
        self._listener = Listener(self.address, "AF_UNIX", backlog=64)
        self._connections: list[Connection] = []
        self._asked_to_stop = False
        threading.Thread(target=self._accept, name="group-line", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self._listener.accept()
                if self._asked_to_stop:
                    connection.send(STOP)
                self._connections.append(connection)

    @property
    def has_clients(self) -> bool:
        """Whether there is a process at the other end."""
        return bool(self._connections)

    def messages(self, timeout_seconds: float) -> Iterator[Any]:
        """What has come, waiting for the first at most so long."""
        for ready in wait(list(self._connections), timeout_seconds):
            assert isinstance(ready, Connection)
            try:
                yield ready.recv()
            except (EOFError, OSError):  # it ended; the launcher says how
                self._connections.remove(ready)

    def request_stop(self) -> None:
        if self._asked_to_stop:
            return
        self._asked_to_stop = True
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.send(STOP)

    def close(self) -> None:
        """Every process at the other end ends by this."""
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


class IPCClient(logging.Handler):
    """The end of one process of the group, which also hands on its log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        try:
            self._connection = Client(os.environ[IPC_ADDRESS], "AF_UNIX")
        except OSError:
            self._end()
        self._sending = threading.Lock()
        self._stop = threading.Event()
        threading.Thread(target=self._listen, name="group-line", daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self._connection.recv() == STOP:
                self._stop.set()
        self._end()

    def _end(self) -> NoReturn:
        """Nobody is there who could keep what is done here, or make use of another attempt."""
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
