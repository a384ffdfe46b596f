"""prefect.yaml as Prefect reads it, without a server."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from docker.types import HostConfig
from overnight_command import overnight
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from waiting import free_port

from flows.runtime.environment import COMPUTE, service_environment
from flows.service.settings import POOL, ServiceSettings, publish_service

ROOT = Path(__file__).resolve().parents[3]
PROJECT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {each["name"]: each for each in PROJECT["deployments"]}


def test_prefect_accepts_prefect_yaml() -> None:
    read = PrefectYamlModel.model_validate(PROJECT)
    assert [each.name for each in read.deployments] == list(DEPLOYMENTS)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_deployment_has_description_tags_and_pool(name: str) -> None:
    each = DEPLOYMENTS[name]
    assert each["description"]
    assert each["tags"]
    assert each["concurrency_limit"]["limit"] == 1
    assert each["work_pool"]["name"] == POOL
    assert each["work_pool"]["job_variables"]["env"] == COMPUTE


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_parameters_match_the_flow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # Prefect leaves the flow's folder first in it
    each = DEPLOYMENTS[name]
    flow = load_flow_from_entrypoint(str(ROOT / each["entrypoint"]))
    parameters = each["parameters"]
    flow.validate_parameters({"overrides": {}} | parameters)
    for path in parameters.get("configs") or [parameters["config"]]:
        assert (ROOT / path).is_file()


# --- in containers -------------------------------------------------------------------------------

KUBERNETES = "1.37"
"""Version of its schemas."""


def variant(kind: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / f"prefect-{kind}.yaml").read_text())


def template(kind: str) -> dict[str, Any]:
    return json.loads((ROOT / "deploy" / f"pool-{kind}.json").read_text())


def variables(kind: str) -> dict[str, Any]:
    """Return the job variables of the pool's deployments, which are all equal."""
    found = [each["work_pool"]["job_variables"] for each in variant(kind)["deployments"]]
    assert all(each == found[0] for each in found)
    return found[0]


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_container_deployments_equal_local_ones(kind: str) -> None:
    project = variant(kind)
    PrefectYamlModel.model_validate(project)
    pools = {each["work_pool"]["name"] for each in project["deployments"]}
    assert pools == {f"gpu-{kind}"}
    ours = [{k: v for k, v in each.items() if k != "work_pool"} for each in project["deployments"]]
    plain = [{k: v for k, v in each.items() if k != "work_pool"} for each in PROJECT["deployments"]]
    assert ours == plain
    (step,) = project["pull"]
    (folder,) = step.values()
    assert folder == {"directory": "/overnight"}
    assert COMPUTE.items() <= variables(kind)["env"].items()


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_pool_template_uses_each_of_its_variables_only(kind: str) -> None:
    pool = template(kind)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(pool["job_configuration"])))
    assert used == pool["variables"]["properties"].keys()
    validate(variables(kind), pool["variables"], raise_on_error=True)
    with pytest.raises(Exception, match="is not of type 'integer'"):
        validate({"gpus": "all"}, pool["variables"], raise_on_error=True)


def configuration(kind: str, of: Any, **changed: Any) -> Any:
    """Return what a real worker makes of the template and the deployments' variables."""
    values = variables(kind) | changed
    made = asyncio.run(of.from_template_and_values(template(kind), values))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="tonight"))
    return made


@pytest.mark.usefixtures("prefect_server")
def test_docker_worker_accepts_template() -> None:
    made = configuration("docker", DockerWorkerJobConfiguration, gpus=2)
    host = HostConfig(
        version="1.45",
        **{k: v for k, v in made.container_create_kwargs.items() if k != "stop_signal"},
    )
    (request,) = host["DeviceRequests"]
    assert (request["Count"], request["Capabilities"]) == (2, [["gpu"]])
    assert host["ShmSize"] == 2 * 1024**3
    assert made.image == "overnight:latest"
    assert made.volumes == ["./data:/overnight/data", "./runs:/overnight/runs"]


@pytest.mark.usefixtures("prefect_server")
def test_kubernetes_accepts_job() -> None:
    made = configuration("kubernetes", KubernetesWorkerJobConfiguration, gpus=8)
    job = made.job_manifest
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    # Prefect's worker needs these two in the pod, where Kubernetes ignores them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    container["resources"]["limit"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="limit"):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_kubernetes_accepts_cluster_manifest() -> None:
    found = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
    for each in found:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    names = {each["kind"]: each["metadata"]["name"] for each in found}
    claim = template("kubernetes")["variables"]["properties"]["volume_claim"]["default"]
    assert names["PersistentVolumeClaim"] == claim


def test_image_copies_existing_files() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [shlex.split(line, comments=True) for line in lines]
    copied = [path for words in instructions if words[:1] == ["COPY"] for path in words[1:-1]]
    assert {"gpt", "tasks", "flows", "configs", "prefect.yaml", "constraints.txt"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{path}" for path in copied} == {line for line in ignored if line.startswith("!")}


# --- what must not happen -----------------------------------------------------------------------


def test_schedules_are_off_by_default() -> None:
    schedules = [s for each in DEPLOYMENTS.values() for s in each.get("schedules", ())]
    assert [(schedule["slug"], schedule["active"]) for schedule in schedules] == [
        ("nightly", False)
    ]


def test_up_refuses_folder_without_prefect_yaml(tmp_path: Path) -> None:
    done = overnight("up", cwd=tmp_path)
    assert done.returncode == 2
    assert "prefect.yaml" in done.stderr
    assert "change into the checkout" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_password_of_external_server_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    external = "postgresql://me:secret@db/mlflow"
    settings = ServiceSettings(
        tmp_path / "runs", "127.0.0.1", free_port(), 5000, external_mlflow=external
    )
    assert settings.environment["MLFLOW_TRACKING_URI"] == external
    with publish_service(settings):
        written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
        assert any(settings.api_url in text for text in written)
        assert not any("secret" in text for text in written)
        assert service_environment(settings.root).keys() >= {"PREFECT_API_URL"}
    assert service_environment(settings.root) == {}
