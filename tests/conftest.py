"""Shared by the tests: a small real Parquet, a config for it, stores of their own.

The environment is set before anything imports prefect or mlflow, which read it as they load.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import pytest
from browser import browser
from filelock import FileLock
from servers import server
from waiting import scaled

from gpt.gc_tuning import tune_gc

__all__ = ["browser", "server"]  # fixtures of the helpers

PREFECT_HOME = tempfile.TemporaryDirectory(prefix="overnight-prefect-", ignore_cleanup_errors=True)
PREFECT_SETTINGS = {
    "PREFECT_HOME": PREFECT_HOME.name,
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(round(scaled(60))),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}
tune_gc()
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
    del os.environ[_name]
os.environ |= PREFECT_SETTINGS
os.environ.setdefault("PYTEST_TIMEOUT", str(round(scaled(240))))  # for pytest-timeout: hung tests
# Ignored by what is started in the background, and then by all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tensors of tests are small: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

PREFECT_SERVER_TESTS = (
    *("test_signals.py", "test_pretrain.py", "test_compare.py", "test_deployments.py"),
    "test_clusters.py::test_units_are_task_runs",
)
"""What uses the suite's Prefect server, which one process starts once for all of them."""
SLOW_FIRST = (
    *("prefect", "test_service", "test_mlflow_page", "test_unreachable_servers", "test_kills"),
    *("test_other_stores", "test_retrain", "test_two_hosts", "test_distributed", "test_clusters"),
    *("test_checkpoint", "test_huggingface", "test_loop", "test_divergence"),
)
"""The groups that take longest, so that none of them is begun last."""


def group_of(nodeid: str) -> str:
    """Tests that one process does, where several share them: those of a file, for its fixtures."""
    test = nodeid.rpartition("/")[2]
    return "prefect" if test.startswith(PREFECT_SERVER_TESTS) else test.partition(".")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        group = group_of(item.nodeid)
        return SLOW_FIRST.index(group) if group in SLOW_FIRST else len(SLOW_FIRST)

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose own groups do nothing under pytest 9.2
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # ours is the order
    return ByGroup(config, log)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes that share the tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def mlflow_database(shared_folder: Path) -> Path:
    """MLflow's store as a first run makes it, to be copied: making one takes some seconds."""
    from tasks.tracking.runs import create_sqlite_store

    database = shared_folder / "mlflow.db"
    create_sqlite_store(database)
    return database


FIRST_START = """
import sys
from pathlib import Path
from flows.runtime.environment import prepare
prepare(Path(sys.argv[1]))
from flows.runtime.embedded_api import start_api
if error := start_api():
    raise error
"""


@pytest.fixture(scope="session")
def prefect_database(shared_folder: Path) -> Path:
    """Prefect's database as a first run makes it, to be copied: making one takes many seconds."""
    database = shared_folder / "prefect.db"
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    with FileLock(shared_folder / "prefect.lock"):
        if not database.exists():
            root = shared_folder / "first-start"
            starting = [sys.executable, "-c", FIRST_START, str(root)]
            here = Path(__file__).resolve().parents[1]
            subprocess.run(starting, cwd=here, env=outside, check=True, timeout=scaled(60))
            with closing(sqlite3.connect(root / "prefect" / "prefect.db")) as made:
                made.execute("VACUUM INTO ?", (str(database),))
    return database


@pytest.fixture
def new_root(tmp_path: Path, mlflow_database: Path, prefect_database: Path) -> Path:
    """A root that nothing has run in: both databases are there, and nothing in them."""
    root = tmp_path / "runs"
    for database in (mlflow_database, prefect_database):
        (root / database.stem).mkdir(parents=True)
        shutil.copy(database, root / database.stem)
    return root


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python manual's topics: some eighty documents of real text."""
    import polars

    path = tmp_path_factory.mktemp("corpus") / "topics.parquet"
    polars.DataFrame({"text": [topics[name] for name in sorted(topics)]}).write_parquet(path)
    return path


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """One root for the session, so that the text is tokenized once."""
    root = tmp_path_factory.mktemp("runs")
    (root / "mlflow").mkdir()
    shutil.copy(mlflow_database, root / "mlflow")
    return root


@pytest.fixture
def tiny_config(tmp_path: Path, parquet: Path, tiny_root: Path) -> Path:
    """A config that trains in a second, as TOML."""
    path = tmp_path / "tiny.toml"
    template = (Path(__file__).parent / "helpers" / "pipeline.toml").read_text()
    path.write_text(template.format(root=tiny_root.as_posix(), source=parquet.as_posix()))
    return path


@pytest.fixture(scope="session")
def prefect_server(
    tmp_path_factory: pytest.TempPathFactory, prefect_database: Path
) -> Iterator[None]:
    """A real Prefect server with a database of its own."""
    from prefect.testing import utilities

    folder = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, folder / "prefect-test.db")  # where the harness has its own
    with (
        patch.object(utilities, "mkdtemp", lambda: str(folder)),
        utilities.prefect_test_harness(server_startup_timeout=round(scaled(60))),
    ):
        yield


@pytest.fixture
def mlflow_client(tiny_root: Path) -> Any:
    """A client of the store under `tiny_root`."""
    from tasks.tracking.mlflow_api import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{tiny_root / 'mlflow' / 'mlflow.db'}")
