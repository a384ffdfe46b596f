"""The registry in a real MLflow store: which version is the champion, whatever is interrupted."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from registry_data import STEPS, finished_run, report
from safetensors.torch import load_file
from servers import MlflowServer

from flows.cli.model_choice import find_model, read_model_facts
from gpt.errors import RegistryError
from tasks.tracking import journal, mlflow_settings, registry, runs
from tasks.tracking.mlflow_api import MlflowClient, Tag
from tasks.tracking.model_lookup import local_path
from tasks.tracking.runs import register_last_model, sync_run


@pytest.fixture
def without_serving_files(monkeypatch):
    """Skips the files that only serving needs."""

    def write(folder, *_):
        folder.mkdir()
        (folder / "MLmodel").write_text("flavors: {}\n")

    monkeypatch.setattr(registry, "write_pyfunc_model", write)


@pytest.fixture
def name(request):
    """A registered model for this test alone; the store is shared by the session."""
    return request.node.name.translate(str.maketrans("[]", "--"))


@pytest.fixture
def client(tiny_root, mlflow_client) -> MlflowClient:
    return mlflow_client


def registered(root, name, evaluation, **settings):
    finished = finished_run(root, evaluation, **settings)
    return finished, register_last_model(finished.run, name)


def versions(client, name):
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))


def aliases(client, name):
    return {alias: int(v) for alias, v in client.get_registered_model(name).aliases.items()}


@pytest.mark.usefixtures("without_serving_files")
def test_first_model_becomes_champion(tiny_root, client, name):
    finished, done = registered(tiny_root, name, report())
    assert (done.version, done.alias, done.step) == ("1", "champion", 20)
    assert "the first model" in done.reason
    [version] = versions(client, name)
    assert aliases(client, name) == {"champion": 1}
    assert version.run_id == finished.run.run_id
    assert version.tags == {
        Tag.UID: journal.read_metadata(finished.folder).uid,
        Tag.STEP: "20",
        Tag.LOSS: f"{report().loss:.6f}",
        Tag.AGAINST: "",
        Tag.ALIAS: "champion",
        Tag.REASON: done.reason,
    }


@pytest.mark.parametrize(
    ("challenger", "alias", "reason"),
    [
        (report(-0.1, seed=2), "champion", "better: loss"),
        (report(+0.1, seed=2), "challenger", "worse: loss"),
        (report(seed=2), "challenger", "no significant difference"),
        (report(-0.1, text="b"), "challenger", "evaluated on other text"),
    ],
    ids=["better", "worse", "equal", "other-text"],
)
@pytest.mark.usefixtures("without_serving_files")
def test_only_a_better_model_replaces_the_champion(
    tiny_root, client, name, challenger, alias, reason
):
    registered(tiny_root, name, report())
    _, done = registered(tiny_root, name, challenger)
    assert (done.version, done.alias) == ("2", alias)
    assert reason in done.reason
    expected = {"champion": 2, "previous-champion": 1}
    assert aliases(client, name) == (
        expected if alias == "champion" else {"champion": 1, "challenger": 2}
    )


@pytest.mark.usefixtures("without_serving_files")
def test_registering_a_run_twice_keeps_version_and_decision(tiny_root, client, name):
    registered(tiny_root, name, report())
    finished, done = registered(tiny_root, name, report(-0.1, seed=2))
    assert register_last_model(finished.run, name) == done
    (finished.folder / journal.SYNC_STATE_FILE).unlink()
    assert register_last_model(finished.run, name) == done
    assert len(versions(client, name)) == 2
    # Registered again after a better one, it takes no alias back.
    registered(tiny_root, name, report(-0.2, seed=3))
    (finished.folder / journal.SYNC_STATE_FILE).unlink()
    assert register_last_model(finished.run, name) == done
    assert aliases(client, name) == {"champion": 3, "previous-champion": 2}


@pytest.mark.usefixtures("without_serving_files")
def test_interruption_at_any_call_gives_the_same_result(tiny_root, client, name, monkeypatch):
    calls = (
        *("create_logged_model", "log_outputs", "log_model_artifact", "log_model_artifacts"),
        *("finalize_logged_model", "create_registered_model", "create_model_version"),
        *("set_model_version_tag", "set_registered_model_alias"),
    )
    finished = finished_run(tiny_root, report())
    metadata = journal.read_metadata(finished.folder)
    (finished.folder / journal.SYNC_STATE_FILE).unlink()
    journal.write_metadata(finished.folder, metadata.model_copy(update={"registered_model": name}))
    lost = 0

    def fail_first_response(call):
        """Run the call, but lose the response of each different call the first time."""
        real, seen = getattr(MlflowClient, call), set()

        def once(self, *arguments, **named):
            answer = real(self, *arguments, **named)
            key = str([each for each in arguments if "/" not in str(each)])
            if key not in seen:
                seen.add(key)
                raise ConnectionError(call)
            return answer

        monkeypatch.setattr(MlflowClient, call, once)

    for call in calls:
        fail_first_response(call)
    while lost < 100:
        try:
            runs.sync_folder(finished.folder, finished.run.uri)
            break
        except ConnectionError:
            lost += 1
    assert len(calls) < lost < 100
    monkeypatch.undo()
    [version] = versions(client, name)
    assert (aliases(client, name), version.tags[Tag.ALIAS]) == ({"champion": 1}, "champion")
    state = journal.read_sync_state(finished.folder)
    outputs = client.get_run(state.run_id).outputs.model_outputs
    assert sorted(o.step for o in outputs) == list(STEPS)
    assert sorted(m.model_id for m in state.models.values()) == sorted(o.model_id for o in outputs)


@pytest.mark.parametrize("how", ["file", "version", "alias"])
@pytest.mark.usefixtures("without_serving_files")
def test_missing_champion_promotes_no_version(tiny_root, client, name, how):
    registered(tiny_root, name, report())
    [version] = versions(client, name)
    if how == "file":
        (find_model(f"models:/{name}@champion", tiny_root) / "report.json").write_text("{}")
    elif how == "version":
        registered(tiny_root, name, report(+0.1, seed=3))
        client.delete_model_version(name, version.version)
    else:
        client.delete_registered_model_alias(name, "champion")
    _, done = registered(tiny_root, name, report(-0.1, seed=2))
    assert done.alias == "challenger"
    assert (
        "report.json is missing" in done.reason
        if how == "file"
        else "there is no champion to compare with" in (done.reason)
    )
    assert "alias" in done.reason
    assert aliases(client, name)["challenger"] == int(done.version)


def test_checkpoints_are_logged_models_with_metrics(tiny_root, client, name):
    finished, _ = registered(tiny_root, name, report())
    run = client.get_run(finished.run.run_id)
    models = [client.get_logged_model(o.model_id) for o in run.outputs.model_outputs]
    first, last = sorted(models, key=lambda model: int(model.params["step"]))
    assert (first.name, last.name) == ("step-10", "step-20")
    assert last.params == {"step": "20", "tokens_seen": "1280"}
    assert last.tags["overnight.folder"].endswith("checkpoints/step-00000020")
    assert {m.key: m.value for m in first.metrics} == {"val/loss": 6.0, "val/bits_per_byte": 2.0}
    final = {m.key: m.value for m in last.metrics}
    assert final["val/loss"] == 5.0
    assert final["final/loss"] == pytest.approx(report().loss)
    dataset = journal.read_metadata(finished.folder).dataset
    for model in models:
        assert {str(model.status), model.source_run_id} == {"READY", run.info.run_id}
        for metric in model.metrics:
            assert (metric.dataset_name, metric.dataset_digest) == (dataset.name, dataset.digest)
    # The run's own curve has no duplicate points.
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/loss")] == list(STEPS)

    stored = local_path(last.artifact_location)
    files = {path.relative_to(stored).as_posix() for path in stored.rglob("*") if path.is_file()}
    assert {"MLmodel", "model.safetensors", "config.json", "report.json"} <= files
    assert "code/gpt/model/generate.py" in files
    assert {Path(file).suffix for file in files} <= {
        *(".py", ".typed", ".csv", ".toml", ".json", ".txt", ".yaml", ".safetensors", ""),
    }, "no file that could be a pickle"
    assert not local_path(first.artifact_location).exists(), "the weights are stored once"
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {
        *("config.json", "dataset", "report.json")
    }
    requirements = (stored / "requirements.txt").read_text().split()
    assert all("==" in line for line in requirements)


def test_new_evaluation_replaces_report_and_keeps_decision(tiny_root, client, name):
    from gpt.evaluation.report_store import REPORT_FILE, read_report_file, save_report
    from tasks.evaluate import collect_models
    from tasks.tracking.runs import attach_artifacts

    finished, done = registered(tiny_root, name, report())
    save_report(finished.folder, finished.config, report(text="b"))
    attach_artifacts(finished.run, {}, models=collect_models(finished.folder, STEPS[-1]))
    assert register_last_model(finished.run, name) == done
    [version] = versions(client, name)
    stored = find_model(f"models:/{name}/1", tiny_root)
    assert read_report_file(stored / REPORT_FILE).slice_fingerprint == "b"
    assert len(client.get_run(version.run_id).outputs.model_outputs) == len(STEPS)


@pytest.mark.usefixtures("without_serving_files")
def test_model_names(tiny_root, client, name, tmp_path):
    finished, _ = registered(tiny_root, name, report())
    model = find_model(f"models:/{name}@champion", tiny_root)
    assert find_model(f"models:/{name}/1", tiny_root) == model
    facts = read_model_facts(model)
    assert (facts.name, facts.step, facts.report) == ("t", 20, report())
    assert facts.dataset == finished.dataset
    for wrong, message in {
        f"models:/{name}": "not the name of a registered model",
        f"models:/{name}@unknown": f"no alias unknown\n.*models:/{name}@champion",
        f"models:/{name}/7": f"no version 7\n.*models:/{name}/1",
        "models:/no-such@champion": f"no registered model no-such .*\n.*{name}",
    }.items():
        with pytest.raises(RegistryError, match=message):
            find_model(wrong, tiny_root)
    with pytest.raises(RegistryError, match="no run has registered a model yet"):
        find_model("models:/gpt@champion", tmp_path)
    assert not list(tmp_path.iterdir())
    (model / "model.safetensors").unlink()
    with pytest.raises(RegistryError, match=r"there is no model\.safetensors"):
        find_model(f"models:/{name}/1", tiny_root)


@pytest.mark.usefixtures("without_serving_files")
def test_unreachable_server_receives_the_model_later_and_serves_downloads(tmp_path, monkeypatch):
    server = MlflowServer(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    finished, done = registered(tmp_path, "gpt", report())
    assert done is None
    with pytest.raises(RegistryError, match="cannot be reached"):
        find_model("models:/gpt@champion", tmp_path)
    server.start()
    try:
        assert "registered as gpt version 1, champion" in sync_run(finished.folder, "")
        assert "is already up to date" in sync_run(finished.folder, "")
        second, done = registered(tmp_path, "gpt", report(-0.1, seed=2), seed=7)
        assert done.alias == "champion"
        assert "better: loss" in done.reason
        model = find_model("models:/gpt@champion", tmp_path)
        assert model.is_relative_to(tmp_path / "models")
        theirs = load_file(model / "model.safetensors")
        ours = load_file(second.folder / "checkpoints" / "step-00000020" / "model.safetensors")
        assert theirs.keys() == ours.keys()
        assert all((theirs[key] == ours[key]).all() for key in ours)
        assert read_model_facts(model).report == report(-0.1, seed=2)
        shutil.rmtree(tmp_path / "server" / "artifacts")
        assert find_model("models:/gpt@champion", tmp_path) == model, "downloaded once"
        with pytest.raises(RegistryError, match="no model"):
            find_model("models:/gpt/1", tmp_path)
        assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [model.name]
    finally:
        server.kill()


class SlowStore(BaseHTTPRequestHandler):
    """Proxy of a server with a distant store: the response to the first weights takes long."""

    behind = ""
    taken: ClassVar[list[str]] = []

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(f"{self.behind}{self.path}", body or None, method=self.command)
        request.add_header("Content-Type", self.headers.get("Content-Type", "application/json"))
        if self.command == "PUT" and self.path.endswith(".safetensors"):
            self.taken.append(self.path)
            time.sleep(7 if len(self.taken) == 1 else 0)
        try:
            status, content = 200, urlopen(request).read()
        except HTTPError as error:
            status, content = error.code, error.read()
        self.send_response(status)
        self.end_headers()
        with suppress(BrokenPipeError):  # the client gave up
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815


@pytest.mark.usefixtures("without_serving_files")
def test_upload_of_weights_has_a_longer_timeout(tmp_path, server, monkeypatch):
    monkeypatch.setitem(mlflow_settings.SETTINGS, mlflow_settings.REQUEST_TIMEOUT, "5")
    monkeypatch.setenv(mlflow_settings.REQUEST_TIMEOUT, "5")
    monkeypatch.setattr(SlowStore, "behind", server.uri)
    before = ThreadingHTTPServer(("127.0.0.1", 0), SlowStore)
    Thread(target=before.serve_forever, daemon=True).start()
    try:
        _, done = registered(
            tmp_path, "gpt", report(), uri=f"http://127.0.0.1:{before.server_port}"
        )
        assert done.alias == "champion"
        assert len(SlowStore.taken) == len(set(SlowStore.taken)) > 0, "no upload is repeated"
        assert os.environ[mlflow_settings.REQUEST_TIMEOUT] == "5"
    finally:
        before.shutdown()
        before.server_close()
