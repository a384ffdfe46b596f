"""moto's server: an S3-compatible store on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from overnight_up import free_port, wait_for

BUCKET = "overnight"
SECRET = "a-secret-that-nobody-is-told"
KEYS = {
    "AWS_ACCESS_KEY_ID": "me",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def object_store() -> Iterator[str]:
    """The address of one with the empty bucket `BUCKET`, for whoever has `KEYS`."""
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

        def made() -> bool:
            try:
                client.create_bucket(Bucket=BUCKET)
            except Exception:
                return False
            return True

        wait_for("the S3 stand-in", made)
        yield url
    finally:
        process.kill()
        process.wait()
