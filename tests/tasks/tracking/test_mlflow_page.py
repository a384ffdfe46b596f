"""Three model sizes compared in MLflow's own UI."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from browser import WINDOW, requested_hosts
from servers import MlflowServer, with_store
from training_data import make_token_dataset
from waiting import scaled

from gpt.artifacts import HeldoutLoss
from gpt.config.loading import load_config
from gpt.training.metrics import StepRecord
from gpt.training.run_dir import open_run_dir
from tasks.tracking.journal import METRICS_FILE, read_metrics
from tasks.tracking.runs import RunRef, open_recorder, open_run, track_run_status

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FLOORS = {480: 3.42, 576: 3.36, 720: 3.28}
"""Width -> asymptote of its synthetic loss curve."""
NAMES = [f"gpt-{width}" for width in FLOORS]
LOSSES = ("train/loss", "val/loss")
WORKFLOW = "workflowType=machine_learning"
"""URL parameter of the switch between GenAI and model training at the top of the page."""
STEPS, EVERY = 3250, 50
PATIENCE_SECONDS = scaled(60)


def loss(width: int, step: int) -> float:
    return FLOORS[width] + (10.8 - FLOORS[width]) * math.exp(-step / 300)


def track_run(width: int, root: Path) -> RunRef:
    """Track a complete run without training."""
    config = load_config(CONFIGS / f"gpt-{width}.toml", {"run": {"root": str(root)}})
    dataset = make_token_dataset(root / "datasets" / "pages")
    run = open_run(config, dataset, open_run_dir(config, dataset))
    with track_run_status(run), open_recorder(run) as recorder:
        for step in range(0, STEPS + 1, EVERY):
            seen, rate = step * config.tokens_per_step, 0.02 * (1 - step / STEPS)
            if step:
                trained = loss(width, step) + 0.03 * math.sin(step)
                recorder.log_step(
                    StepRecord(
                        step,
                        seen,
                        rate,
                        loss=trained,
                        grad_norm=1 + 10 / step,
                        tokens_per_second=60_000 + 100 * math.cos(step),
                        mfu=0.41 + 0.001 * math.cos(step),
                        peak_memory_bytes=width * 16_000_000,
                        batch_size=16,
                        skipped_steps=0,
                        recoveries=0,
                    )
                )
            if step % (5 * EVERY) == 0:
                held = loss(width, step) + 0.02
                validation = HeldoutLoss(
                    tokens=10_000, loss=held, perplexity=math.exp(held), bits_per_byte=held / 3.2
                )
                recorder.log_step(StepRecord(step, seen, rate, validation=validation))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> list[RunRef]:
    root = tmp_path_factory.mktemp("sizes")
    with_store(root / "mlflow", mlflow_database)
    return [track_run(width, root) for width in FLOORS]


@pytest.fixture(scope="module")
def server(runs: list[RunRef]) -> Iterator[MlflowServer]:
    server = MlflowServer(runs[0].folder.parent.parent / "mlflow")
    server.start()
    yield server
    server.kill()


CHARTS = """
const cards = document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]');
return Object.fromEntries([...cards].map(card => [card.querySelector("h4").innerText, {
    drawn: [...card.querySelectorAll(".trace path.js-line")]
        .filter(line => line.getBoundingClientRect().width > 50)
        .map(line => line.style.stroke),
    legend: [...card.innerText.matchAll(/^gpt-\\d+ .*$/gm)].map(match => match[0]),
    curves: Object.fromEntries([...card.querySelectorAll(".js-plotly-plot")]
        .flatMap(plot => plot.data)
        .map(curve => [curve.name, curve.x.map((step, i) => [step, curve.y[i]])])),
}]))
"""
"""By chart title: colours of the drawn lines, legend, and the points of each run."""
ROWS = "return [...document.querySelectorAll('tr')].map(row => row.innerText.split(/\\s+/))"
CLOSE_ASSISTANT = '[data-component-id="mlflow.assistant.chat_panel.close"]'
DIFFERENCES_ONLY = "//*[text()='Show diff only']/preceding::button[@role='switch'][1]"


def wait_for(browser: Any, found: Any) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, PATIENCE_SECONDS, 0.5).until(found)


def close_assistant(browser: Any) -> None:
    """Close the panel that MLflow opens on a first visit and that covers a quarter of the page."""
    wait_for(browser, lambda _: browser.find_elements("css selector", CLOSE_ASSISTANT))[0].click()


def points(run: RunRef, key: str) -> list[list[float]]:
    lines, _ = read_metrics(run.folder / METRICS_FILE)
    return [[line.step, line.metrics[key]] for line in lines if key in line.metrics]


def test_curves_of_three_runs_share_a_chart(
    browser: Any, server: MlflowServer, runs: list[RunRef], tmp_path: Path
) -> None:
    browser.set_window_size(*WINDOW)
    browser.get(f"{server.uri}/#/experiments/1/runs?compareRunsMode=CHART&{WORKFLOW}")
    close_assistant(browser)

    def drawn(_: Any) -> Any:
        charts = browser.execute_script(CHARTS)
        ready = [key for key in LOSSES if key in charts and len(charts[key]["drawn"]) >= len(runs)]
        return charts if len(ready) == len(LOSSES) else None

    try:
        charts = wait_for(browser, drawn)
    finally:
        browser.save_screenshot(str(tmp_path / "curves.png"))
    for key in LOSSES:
        assert charts[key]["curves"] == {
            name: points(run, key) for name, run in zip(NAMES, runs, strict=True)
        }
        assert set(charts[key]["legend"]) == {f"{name} ({key})" for name in NAMES}
    assert requested_hosts(browser) == {urlsplit(server.uri).netloc}


def test_page_shows_parameters_that_differ(
    browser: Any, server: MlflowServer, runs: list[RunRef], tmp_path: Path
) -> None:
    browser.set_window_size(*WINDOW)
    ids, experiments = (quote(json.dumps(x)) for x in ([run.run_id for run in runs], ["1"]))
    browser.get(f"{server.uri}/#/compare-runs?runs={ids}&experiments={experiments}")

    def rows(_: Any) -> Any:
        return {name: values for name, *values in browser.execute_script(ROWS) if values}

    wait_for(browser, lambda _: "model.n_layer" in rows(_))
    wait_for(browser, lambda _: browser.find_elements("css selector", ".parcoords .axis-title"))
    browser.find_element("xpath", DIFFERENCES_ONLY).click()
    wait_for(browser, lambda _: "model.n_layer" not in rows(_))
    browser.save_screenshot(str(tmp_path / "differences.png"))

    left = rows(browser)
    assert left["model.n_embd"] == ["480", "576", "720"]
    assert left["run.name"] == list(NAMES)
    assert {name for name in left if "." in name} == {
        *("model.n_embd", "run.name", "peak_lr.embedding", "peak_lr.head", "overnight.uid")
    }
    titles = browser.find_elements("css selector", ".parcoords .axis-title")
    assert {"model.n_embd", "val/loss"} <= {title.text for title in titles}
    assert requested_hosts(browser) == {urlsplit(server.uri).netloc}
