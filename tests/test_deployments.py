"""prefect.yaml as Prefect reads it, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.flows import load_flow_from_entrypoint
from service import free_port
from test_cli import overnight

from flows.environment import COMPUTE, service_environment
from flows.service import POOL, Settings, only_service, published

ROOT = Path(__file__).resolve().parent.parent
PROJECT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {each["name"]: each for each in PROJECT["deployments"]}


def test_prefect_takes_it() -> None:
    read = PrefectYamlModel.model_validate(PROJECT)
    assert [each.name for each in read.deployments] == list(DEPLOYMENTS)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_each_says_what_it_is_and_takes_the_one_slot(name: str) -> None:
    each = DEPLOYMENTS[name]
    assert each["description"]
    assert each["tags"]
    assert each["concurrency_limit"]["limit"] == 1
    assert each["work_pool"]["name"] == POOL
    assert each["work_pool"]["job_variables"]["env"] == COMPUTE


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_each_gives_its_flow_what_it_takes(name: str) -> None:
    each = DEPLOYMENTS[name]
    flow = load_flow_from_entrypoint(str(ROOT / each["entrypoint"]))
    parameters = each["parameters"]
    flow.validate_parameters({"overrides": {}} | parameters)
    for path in parameters.get("configs") or [parameters["config"]]:
        assert (ROOT / path).is_file()


def test_no_schedule_is_on_before_somebody_switches_it_on() -> None:
    schedules = [s for each in DEPLOYMENTS.values() for s in each.get("schedules", ())]
    assert [(schedule["slug"], schedule["active"]) for schedule in schedules] == [
        ("nightly", False)
    ]


def test_up_outside_of_a_checkout_is_refused(tmp_path: Path) -> None:
    done = overnight("up", cwd=tmp_path)
    assert done.returncode == 2
    assert "prefect.yaml" in done.stderr
    assert "change into the checkout" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_password_in_a_named_address_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = "postgresql://me:secret@db/mlflow"
    settings = Settings(tmp_path / "runs", "127.0.0.1", free_port(), 5000, mlflow_named=named)
    assert settings.environment["MLFLOW_TRACKING_URI"] == named
    with only_service(settings), published(settings):
        written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
        assert any(settings.api_url in text for text in written)
        assert not any("secret" in text for text in written)
        assert service_environment(settings.root).keys() >= {"PREFECT_API_URL"}
    assert service_environment(settings.root) == {}
