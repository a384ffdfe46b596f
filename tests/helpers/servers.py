"""Real servers on the loopback interface: MLflow and an object store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import free_port, scaled, wait_for

START_SECONDS = scaled(30)


class MlflowServer:
    """A real `mlflow server` on the SQLite store of a folder, which can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        store = f"sqlite:///{self._folder}/mlflow.db"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(self._port)),
                *("--artifacts-destination", str(self._folder / "artifacts")),
            ],
            # Without its runners of background jobs, which are further processes.
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("the MLflow server did not start")

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def with_store(folder: Path, mlflow_database: Path) -> Path:
    folder.mkdir()
    shutil.copy(mlflow_database, folder)
    return folder


@pytest.fixture
def server(tmp_path: Path, mlflow_database: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(with_store(tmp_path / "server", mlflow_database))
    server.start()
    yield server
    server.kill()


BUCKET = "overnight"


SECRET = "a-secret-password"


KEYS = {
    "AWS_ACCESS_KEY_ID": "me",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def object_store() -> Iterator[str]:
    """Start an S3 server with the empty bucket `BUCKET` and the credentials `KEYS`; its URL."""
    import boto3

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRET,
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )

        def create_bucket() -> bool:
            try:
                client.create_bucket(Bucket=BUCKET)
            except Exception:
                return False
            return True

        wait_for("the S3 server", create_bucket)
        yield url
    finally:
        process.kill()
        process.wait()
