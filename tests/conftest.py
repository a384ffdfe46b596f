"""Shared by the tests: a small real Parquet, a config for it, stores that nobody else sees.

The environment is set before anything imports prefect or mlflow, which read it as they load.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from browser import browser

__all__ = ["browser"]  # for every test that asks for it

PREFECT_HOME = tempfile.TemporaryDirectory(prefix="overnight-prefect-", ignore_cleanup_errors=True)
PREFECT_SETTINGS = {
    "PREFECT_HOME": PREFECT_HOME.name,
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
    del os.environ[_name]
os.environ |= PREFECT_SETTINGS
# The tensors of tests are small: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

TINY_CONFIG = """
[run]
name = "tiny"
root = "{root}"

[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 32

[data]
source = "{source}"
validation_fraction = 0.2

[training]
batch_size = 2
grad_acc = 2
max_steps = 12
dtype = "float32"
checkpoint_interval = 5
log_interval = 4

[evaluation]
interval = 6
tokens = 256
prompts = ["The"]
sample_tokens = 4
"""


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python manual's topics: some eighty documents of real text."""
    import polars

    path = tmp_path_factory.mktemp("corpus") / "topics.parquet"
    polars.DataFrame({"text": [topics[name] for name in sorted(topics)]}).write_parquet(path)
    return path


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for the session, so that the text is tokenised once and MLflow's store made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny_config(tmp_path: Path, parquet: Path, tiny_root: Path) -> Path:
    """A config that trains in a second, as TOML."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_CONFIG.format(root=tiny_root.as_posix(), source=parquet.as_posix()))
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def mlflow_client(tiny_root: Path) -> Any:
    """A client of the store under `tiny_root`, which a run makes."""
    from tasks.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{tiny_root / 'mlflow' / 'mlflow.db'}")
