"""`overnight compare` with real processes, a real Prefect API and a real MLflow store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect.settings import PREFECT_API_URL
from waiting import scaled

from flows.runtime.variants import expand_variants
from gpt.config.loading import load_config
from gpt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


@pytest.fixture
def config_paths(tiny_config: Path, tmp_path: Path, new_root: Path) -> list[Path]:
    """Three configs that differ only in width; all have the same name."""
    text = tiny_config.read_text().replace("max_steps = 12", f"max_steps = {STEPS}")
    root = load_config(tiny_config).run.root
    text = text.replace(root.as_posix(), new_root.as_posix())
    paths = []
    for width in (8, 16, 24):
        path = tmp_path / f"width-{width}.toml"
        path.write_text(text.replace("n_embd = 16", f"n_embd = {width}"))
        paths.append(path)
    return paths


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flows.cli.main", "compare", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Use the test session's Prefect server, so that no command has to start one."""
    return os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()}


def overnight(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=scaled(300),
        check=False,
    )


def final_checkpoint_times(root: Path) -> dict[str, int]:
    """Return when the final checkpoint of each run was written, by config name."""
    return {
        path.parent.parent.name.rpartition("-")[0]: path.stat().st_mtime_ns
        for path in root.glob(f"train/*/checkpoints/step-*{STEPS}")
    }


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_comparison_resumes_after_kill_and_leaves_out_failed_config(
    config_paths: list[Path], tmp_path: Path
) -> None:
    broken = config_paths[1]
    # The preflight reports the missing device, and the other configs are trained.
    broken.write_text(broken.read_text() + '\n[hardware]\ndevice = "cuda:7"\n')
    root = tmp_path / "runs"

    process = subprocess.Popen(command(*config_paths), cwd=ROOT, env=environment())
    deadline = time.monotonic() + scaled(200)
    while "width-24" not in {path.name.rpartition("-")[0] for path in root.glob("train/*")}:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()  # in the second run, or just before it
    process.wait()
    first = final_checkpoint_times(root)
    assert "width-8" in first

    done = overnight(*config_paths)
    assert done.returncode == 1, done.stderr  # a config has no result
    assert "cuda:7" in done.stderr
    assert "Traceback" not in done.stderr
    assert "width-8: already finished" in done.stdout
    assert "width-16 has no result" in done.stdout
    assert final_checkpoint_times(root)["width-8"] == first["width-8"]
    [page] = root.glob("compare/*/comparison.html")
    html = page.read_text()
    assert all(f"<td>width-{width}</td>" in html for width in (8, 24))
    assert "<strong>width-16</strong>" in html

    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "overnight"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.info.run_name for run in children} == {"width-8", "width-24"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "validation loss" in parent.data.tags["mlflow.note.content"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"comparison.html", "comparison.md", "loss-by-tokens.svg"} <= files
    points = [
        {
            key: [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        for run in children
    ]
    assert points[0] == points[1]
    assert points[0]["train/loss"] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_sigterm_stops_the_subprocess_with_a_checkpoint(
    config_paths: list[Path], tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    process = subprocess.Popen(
        command(*config_paths[:2], "--tokens", 128 * 5_000),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if "  lr " in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(scaled(30)) == 143, rest
    finally:
        process.kill()
        process.communicate()  # closes the pipe
    assert "re-run the same command" in rest
    assert "Traceback" not in rest
    [run] = root.glob("train/*")
    assert list(run.glob("checkpoints/step-*/COMPLETE"))
    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    assert {found.info.status for found in client.search_runs(ids)} == {"KILLED"}


def expand(paths: list[Path], overrides=None, tokens=None, seeds=1):
    return expand_variants([str(path) for path in paths], overrides or {}, tokens, seeds)


def test_variants_have_names_seeds_and_lengths(config_paths: list[Path]) -> None:
    found = expand(config_paths[:2], tokens=1_000, seeds=2)
    assert [e.config and e.config.run.name for e in found] == [
        "width-8",
        "width-16",
        "width-8-seed1338",
        "width-16-seed1338",
    ]
    assert [(e.name, e.config and e.config.training.seed) for e in found[:3]] == [
        ("width-8", 1337),
        ("width-16", 1337),
        ("width-8", 1338),
    ]
    assert {e.config.training.max_steps for e in found if e.config} == {8}  # 128 tokens per step
    warm = expand(config_paths[:2], {"schedule": {"warmup_steps": 3}}, tokens=250)
    assert [e.config and e.config.schedule.warmup_steps for e in warm] == [1, 1]  # 2 steps of 6


def test_configs_with_different_data_are_refused(config_paths: list[Path]) -> None:
    text = config_paths[0].read_text()
    config_paths[0].write_text(
        text.replace("validation_fraction = 0.2", "validation_fraction = 0.3")
    )
    with pytest.raises(ConfigError, match=r"--set data\.validation_fraction=") as refused:
        expand(config_paths)
    assert len(refused.value.problems) == 2
    assert expand(config_paths, {"data": {"validation_fraction": 0.25}})


def test_invalid_configs_are_refused(config_paths: list[Path]) -> None:
    with pytest.raises(ConfigError, match="at least two configs"):
        expand(config_paths[:1])
    with pytest.raises(ConfigError, match="n_head"):  # all of them are invalid
        expand(config_paths[:2], {"model": {"n_head": 5}})
    with pytest.raises(ConfigError, match="1 problem") as refused:  # the same problem once
        expand(config_paths[:2], {"evaluation": {"lambda": "x"}})
    assert "did you mean lambada?" in str(refused.value)
    [bad, good] = expand([config_paths[0], config_paths[1]], {"model": {"n_head": 16}})
    assert (bad.config, bool(good.config)) == (None, True)
