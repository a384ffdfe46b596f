"""PostgreSQL for Prefect and MLflow, and an S3 bucket for artifacts, by settings alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars
import pytest
from overnight_up import SMALL, Service, small
from servers import BUCKET, KEYS, SECRET, object_store
from waiting import free_port

from tasks.tracking.mlflow_api import MlflowClient

SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVERS, reason="needs Debian's postgresql"),
]


def unprivileged_user(folder: Path) -> dict[str, Any]:
    """Arguments for subprocess.run: PostgreSQL refuses to run as root."""
    if os.getuid():
        return {}
    shutil.chown(folder, "postgres")
    return {"user": "postgres", "group": "postgres"}


@pytest.fixture
def postgres() -> Iterator[str]:
    """A server with two empty databases: user, password, host and port of its address."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, port = Path(name), free_port()
        run: dict[str, Any] = {"check": True, "capture_output": True, **unprivileged_user(folder)}
        (password := folder / "password").write_text(SECRET)
        password.chmod(0o644)
        data = str(folder / "data")
        subprocess.run(
            [
                *(SERVERS[-1] / "initdb", "-D", data, "-U", "me", "--auth=scram-sha-256"),
                *("--pwfile", password, "--no-sync"),
            ],
            **run,
        )
        settings = f"-p {port} -k {name} -c fsync=off -c listen_addresses=127.0.0.1"
        control = (SERVERS[-1] / "pg_ctl", "-D", data, "-l", f"{name}/log")
        subprocess.run([*control, "-w", "-o", settings, "start"], **run)
        try:
            for database in ("prefect", "mlflow"):
                create = (SERVERS[-1] / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "me")
                secret = {"env": os.environ | {"PGPASSWORD": SECRET}}
                subprocess.run([*create, database], **run, **secret)
            yield f"me:{SECRET}@127.0.0.1:{port}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **run)


@pytest.fixture
def service(tmp_path: Path, parquet: Path, postgres: str) -> Iterator[Service]:
    with object_store() as url:
        service = Service(tmp_path, parquet, (free_port(), free_port()))
        service.environment |= KEYS | {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{postgres}/mlflow",
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/artifacts",
            "MLFLOW_S3_ENDPOINT_URL": url,
        }
        service.start()
        yield service
        service.kill()


def test_run_and_retraining_with_postgresql_and_s3(
    service: Service, postgres: str, tmp_path: Path
) -> None:
    incoming = service.project / "incoming"
    incoming.mkdir()
    shutil.copy(service.project / "data" / "sample.parquet", incoming / "first.parquet")
    source = {"data": {**SMALL["data"], "source": "incoming/*.parquet"}}

    first = service.wait_for_end(service.start_run("pretrain/tiny", **source))
    assert first.state_name == "Completed", first.state
    again = service.start_run_with("retrain/nightly", "configs/tiny.toml", small(**source))
    assert service.wait_for_end(again).state_name == "Completed"
    polars.DataFrame(
        {"text": [f"Text {n} that is new, and of no use." for n in range(200)]}
    ).write_parquet(incoming / "second.parquet")
    second = service.start_run_with("retrain/nightly", "configs/tiny.toml", small(**source))
    assert service.wait_for_end(second).state_name == "Completed"

    client = MlflowClient(service.mlflow_uri)
    versions = client.search_model_versions("name = 'gpt'")
    assert len(versions) == 2, "the retraining on the same data registers no version"
    champion = client.get_model_version_by_alias("gpt", "champion")
    assert champion.source.startswith(("models:/", "mlflow-artifacts:/"))
    exported = service.run("export", "models:/gpt@champion", str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    assert not (service.root / "mlflow" / "mlflow.db").exists()
    assert not (service.root / "prefect" / "prefect.db").exists()

    for path in (p for p in service.project.rglob("*") if p.is_file() and "data" not in p.parts):
        if SECRET.encode() in path.read_bytes():
            raise AssertionError(f"{path} contains the secret")
    assert SECRET not in service.log.read_text()
    service.interrupt()
