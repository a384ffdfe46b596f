"""Real Dask and Ray clusters on loopback: the same shards, also when a worker dies."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from corpus_data import TEXTS, build_dataset, make_config, write_parquet
from prefect.settings import PREFECT_API_URL, temporary_settings
from waiting import free_port, scaled

from gpt.data.tokenize import pipeline, units
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.errors import ConfigError, CorpusError
from tasks.cluster import runner
from tasks.cluster.runner import resolve_cluster
from tasks.tokenize_parquet import find_or_tokenize, tokenize_parquet

pytestmark = pytest.mark.slow

# Ray reads these when it is imported. Its own token would be written to the home folder.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(sys.path),
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
KINDS = ("dask", "ray")
SECONDS = scaled(30)


@contextmanager
def programs(log):
    """Start programs; kill them and their children at the end."""
    started = []

    def start(*command):
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=out, stderr=out, env=ENVIRONMENT
            )
        started.append(process)
        return psutil.Process(process.pid)

    try:
        yield start
    finally:
        for process in reversed(started):
            with suppress(psutil.NoSuchProcess):  # killed by a test
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def wait_for(condition):
    until = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)
    return found


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class DaskCluster:
    def __init__(self, start, folder):
        port = free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        common = ("--host", "127.0.0.1", "--no-dashboard")
        start("-m", "dask", "scheduler", "--port", port, *common)
        wait_for(lambda: answers(port))
        worker = ("-m", "dask", "worker", self.address, "--nthreads", 1, "--no-nanny", *common)
        self.workers = [start(*worker, "--local-directory", folder) for _ in range(2)]

    def busy_worker(self):
        return self.workers[0]


class RayCluster:
    def __init__(self, start, folder):
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        ours = ("--port", port, "--ray-client-server-port", free_port(), "--num-cpus", 2)
        quiet = ("--include-dashboard=false", "--disable-usage-stats", "--block")
        place = ("--node-ip-address", "127.0.0.1", "--object-store-memory", 150_000_000)
        self._head = start("-m", "ray.scripts.scripts", "start", "--head", *ours, *place, *quiet)
        wait_for(lambda: answers(port))

    def busy_worker(self):
        for process in self._head.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if process.cmdline()[:1] == ["ray::encode_unit"]:
                    return process
        return None


@pytest.fixture(scope="module", params=KINDS)
def running(request, tmp_path_factory):
    """The kind of a running cluster of two workers, and the cluster."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = {"dask": DaskCluster, "ray": RayCluster}[request.param]
    with programs(folder / "log") as start:
        yield request.param, kind(start, folder)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """About a dozen units, each of which takes a worker some time."""
    monkeypatch.setattr(units, "UNIT_BYTES", 500_000)
    texts = [f"{i} {text * 60}" for i, text in enumerate(TEXTS * 6)]
    return write_parquet(tmp_path / "a.parquet", texts, row_group_size=100)


@pytest.fixture
def no_local_workers(monkeypatch):
    def refused(*_):
        raise AssertionError("nothing is to be encoded in processes of this machine")

    return lambda: monkeypatch.setattr(pipeline, "open_pool", refused)


def run_to_end(steps):
    """Run to the end: the last progress report and the manifest."""
    while True:
        try:
            last = next(steps)
        except StopIteration as end:
            return last, end.value


def without_folder(manifest):
    return manifest.model_dump(exclude={"folder"})


def test_cluster_builds_the_same_dataset(tmp_path, source, running, no_local_workers):
    kind, at = running
    settings = {"tokens_per_shard": 1_000_000, "drop_duplicates": True}
    here = build_dataset(tmp_path / "here", source, **settings)
    no_local_workers()
    config = make_config(tmp_path / "there", source, runner=kind, cluster=at.address, **settings)
    assert without_folder(find_or_tokenize(config)) == without_folder(here)


def test_killed_worker_does_not_change_the_dataset(tmp_path, source, running, no_local_workers):
    kind, at = running
    settings = {"tokens_per_shard": 1_000_000, "engine": "tiktoken"}
    here = build_dataset(tmp_path / "here", source, **settings)
    no_local_workers()
    config = make_config(tmp_path / "there", source, runner=kind, cluster=at.address, **settings)
    steps = tokenize_corpus(config, resolve_cluster(config.data))
    victim = None
    while victim is None:  # few units are pending until the next step
        done = next(step for step in steps if step.rows_done)
        victim = at.busy_worker()
    assert done.rows_done < done.rows_total
    victim.send_signal(signal.SIGKILL)
    psutil.wait_procs([victim], timeout=SECONDS)
    last, manifest = run_to_end(steps)
    assert last.rows_done == last.rows_total
    assert without_folder(manifest) == without_folder(here)


@pytest.mark.parametrize("kind", KINDS)
def test_local_cluster_leaves_no_process(tmp_path, source, kind, no_local_workers):
    here = build_dataset(tmp_path / "here", source)
    no_local_workers()
    before = set(psutil.Process().children(recursive=True))
    there = find_or_tokenize(make_config(tmp_path / "there", source, runner=kind, workers=2))
    assert without_folder(there) == without_folder(here)
    # Not the children of processes that ran before, e.g. of a browser.
    left = {
        each
        for each in set(psutil.Process().children(recursive=True)) - before
        if before.isdisjoint(each.parents())
    }
    # Python's resource tracker ends with the process that started it.
    ours = [each for each in left if "resource_tracker" not in " ".join(each.cmdline())]
    assert not psutil.wait_procs(ours, timeout=scaled(10))[1]


def test_error_on_a_worker_is_raised_here(tmp_path, source, monkeypatch, running):
    kind, at = running
    config = make_config(tmp_path / "runs", source, runner=kind, cluster=at.address)
    steps = tokenize_corpus(config, resolve_cluster(config.data))
    monkeypatch.setattr("gpt.data.sources.CorpusFile.size_bytes", lambda _: 1)
    with pytest.raises(CorpusError, match=r"a\.parquet\n.* bytes instead of 1 \(on "):
        list(steps)


@pytest.mark.usefixtures("prefect_server")
def test_units_are_task_runs_of_the_flow_run(tmp_path):
    import prefect
    from prefect.client.orchestration import get_client

    config = make_config(
        tmp_path / "runs", write_parquet(tmp_path / "a.parquet"), runner="dask", workers=1
    )

    @prefect.flow
    def tokenizing():
        tokenize_parquet(config)
        return prefect.runtime.flow_run.id

    flow_run = tokenizing()

    def find_unit_runs():
        with get_client(sync_client=True) as client:
            runs = client._client.post("/task_runs/filter", json={}).json()
        ours = [run for run in runs if run["flow_run_id"] == flow_run]
        return [run for run in ours if run["name"].startswith("tokenize-unit")]

    (unit,) = wait_for(find_unit_runs)
    assert unit["task_key"].startswith("tokenize_unit")


@pytest.mark.parametrize("kind", ["ray"])  # it wraps what a worker raises; Dask does not
def test_workers_without_prefect_api_run_the_plain_function(
    tmp_path, source, monkeypatch, caplog, kind
):
    here = build_dataset(tmp_path / "here", source)
    nowhere = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setattr(
        runner, "_prefect_api_url", lambda: temporary_settings({PREFECT_API_URL: nowhere})
    )
    monkeypatch.setattr(runner, "FlowRunContext", SimpleNamespace(get=lambda: "a flow run"))
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "0")
    there = find_or_tokenize(make_config(tmp_path / "there", source, runner=kind, workers=2))
    assert without_folder(there) == without_folder(here)
    assert caplog.text.count("cannot reach Prefect's API") == 1


# --- mistakes, reported before anything starts ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_missing_package_is_explained(tmp_path, source, monkeypatch, kind):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"data\.runner = {kind}\n.*not installed\n.*\[{kind}\]"):
        find_or_tokenize(make_config(tmp_path / "runs", source, runner=kind))
    assert not (tmp_path / "runs").exists()


ADDRESSES = {"dask": ["{}:{}", "tcp://{}:{}", "tls://{}:{}"], "ray": ["{}:{}", "ray://{}:{}"]}


@pytest.mark.parametrize(
    ("kind", "form"), [(kind, form) for kind, forms in ADDRESSES.items() for form in forms]
)
def test_address_without_listener_is_explained(tmp_path, source, kind, form):
    address = form.format("127.0.0.1", free_port())
    with pytest.raises(ConfigError, match=rf"data\.cluster = {address}\n.*nothing answers there"):
        find_or_tokenize(make_config(tmp_path / "runs", source, runner=kind, cluster=address))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("address", ["here", "tcp://:8786", "host:many"])
def test_invalid_address_is_explained(tmp_path, source, address):
    with pytest.raises(ConfigError, match="has no host and port"):
        find_or_tokenize(make_config(tmp_path / "runs", source, runner="dask", cluster=address))


@pytest.mark.parametrize(
    ("kind", "scheme"), [("dask", "ray"), ("dask", "http"), ("dask", "ucx"), ("ray", "tcp")]
)
def test_address_with_wrong_scheme_is_explained(tmp_path, source, kind, scheme):
    rule = rf"{scheme}:// is not a {kind.capitalize()} address\n.*tcp://host:8786 for Dask"
    with pytest.raises(ConfigError, match=rule):
        find_or_tokenize(
            make_config(tmp_path, source, runner=kind, cluster=f"{scheme}://localhost:8786")
        )


def test_server_that_is_not_a_cluster_is_explained(tmp_path, source, monkeypatch):
    monkeypatch.setattr(runner, "CONNECT_SECONDS", 1.0)

    def hang_up():
        with suppress(OSError):
            while True:
                other.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=hang_up, daemon=True).start()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match="cannot open the dask cluster"):
            find_or_tokenize(make_config(tmp_path / "runs", source, runner="dask", cluster=address))
        other.shutdown(socket.SHUT_RDWR)
    assert not list(Path(tmp_path / "runs").rglob("*.bin*"))


@pytest.mark.parametrize("kind", KINDS)
def test_silent_port_is_explained(tmp_path, source, monkeypatch, kind):
    """A web server, e.g. Dask's dashboard, waits for a request."""
    monkeypatch.setattr(runner, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"{address}\n.*does not answer as a cluster"):
            find_or_tokenize(make_config(tmp_path, source, runner=kind, cluster=address))
