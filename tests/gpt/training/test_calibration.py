"""The calibration measures on any device, is stored whole or not at all, and narrows the hours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from overnight_command import ROOT, overnight
from waiting import wait_for

from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.hardware.calibration import Measurement, read_calibration, write_calibration
from gpt.hardware.gpus import GPUS, find_gpu
from gpt.hardware.target_gpu import InstalledGPU
from gpt.preflight import time
from gpt.preflight.calibration import compare_measurement
from gpt.preflight.time import Throughput, estimate_throughput, nominal_throughput
from gpt.training.calibration import measure_card

CARD = InstalledGPU("NVIDIA GeForce RTX 4070", 12_282 * 2**20, 0, "uuid", "580.00")


def load(name: str, root: Path) -> RunConfig:
    return load_config(str(ROOT / "configs" / f"{name}.toml"), [f"run.root={root}"])


def measured_steps(config: RunConfig, factor: float) -> Measurement:
    """Steps at a multiple of the estimate."""
    gpu = find_gpu("rtx-4070")
    assert gpu is not None
    rate = nominal_throughput(config, gpu).tokens_per_second
    assert rate is not None
    name, spread = f"training, width {config.model.n_embd}", 0.01
    value = factor * rate
    return Measurement(
        name=name, value=value, unit="tokens/s", config=config, steps=20, spread=spread
    )


def test_cpu_is_measured(tmp_path: Path) -> None:
    measured = list(measure_card(torch.device("cpu"), tmp_path, is_small=True))
    names = " ".join(each.name for each in measured)
    for part in ("product", "attention", "bandwidth", "launches", "gpt2", "nanochat"):
        assert part in names
    assert all(each.value > 0 for each in measured)
    steps = [each for each in measured if each.config]
    assert len(steps) == 2
    assert all(each.steps > 2 and each.spread > 0 for each in steps)


def test_command_measures_once_and_shows_the_result_again(tmp_path: Path) -> None:
    arguments = ("calibrate", "--device", "cpu", "--root", tmp_path)
    first, again = overnight(*arguments), overnight(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    assert "memory bandwidth" in first.stdout
    assert again.stdout == first.stdout
    assert len(list((tmp_path / "calibration").iterdir())) == 1


def test_device_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = overnight("calibrate", "--device", "cuda:9", "--root", tmp_path)
    assert done.returncode == 2
    assert "cuda:9" in done.stderr


def test_killed_writer_leaves_a_whole_calibration(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from gpt.hardware.calibration import Measurement, write_calibration
from gpt.hardware.target_gpu import InstalledGPU
card = {CARD!r}
measured = tuple(Measurement(name=str(n), value=n, unit="W") for n in range(2000))
while True:
    write_calibration(Path({str(tmp_path)!r}), card, measured)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for("a calibration", lambda: read_calibration(tmp_path, CARD))
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert len(read_calibration(tmp_path, CARD)) == 2000


def test_calibrated_card_has_narrower_hours_around_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gpu = load("gpt-576", tmp_path), find_gpu("rtx-4070")

    def estimate(driver: str = "580.00") -> Throughput:
        installed = InstalledGPU(CARD.name, CARD.memory_bytes, 0, CARD.uuid, driver)
        monkeypatch.setattr(time, "installed_gpus", lambda: (installed,))
        return estimate_throughput(config, gpu)

    model = estimate()
    assert "fitted to published runs" in model.basis
    shapes = [load(name, tmp_path) for name in ("gpt-768-gpt2", "gpt-480")]
    write_calibration(tmp_path, CARD, tuple(measured_steps(shape, 0.8) for shape in shapes))
    calibrated = estimate()
    assert "measured on this card by overnight calibrate; error" in calibrated.basis
    assert model.tokens_per_second is not None
    assert calibrated.tokens_per_second == pytest.approx(0.8 * model.tokens_per_second, rel=0.03)
    assert calibrated.slowest < calibrated.tokens_per_second < calibrated.fastest  # type: ignore[operator]
    assert calibrated.fastest / calibrated.slowest < model.fastest / model.slowest
    assert estimate(driver="590.10") == model
    other = estimate_throughput(config, find_gpu("rtx-4070-ti"))
    assert "measured" not in other.basis


def test_shapes_that_disagree_widen_the_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "installed_gpus", lambda: (CARD,))
    shapes = [load(name, tmp_path) for name in ("gpt-768-gpt2", "gpt-480")]
    ranges = []
    for factors in ((0.9, 0.9), (0.8, 1.0)):
        measured = map(measured_steps, shapes, factors)
        write_calibration(tmp_path, CARD, tuple(measured))
        found = estimate_throughput(load("gpt-576", tmp_path), find_gpu("rtx-4070"))
        ranges.append(found.fastest / found.slowest)
    assert ranges[0] < ranges[1]


def test_other_dtype_and_damaged_file_leave_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "installed_gpus", lambda: (CARD,))
    config, gpu = load("gpt-576", tmp_path), find_gpu("rtx-4070")
    write_calibration(tmp_path, CARD, (measured_steps(config, 0.5),))
    training = config.training.model_copy(update={"dtype": "float32"})
    in_float32 = config.model_copy(update={"training": training})
    assert "fitted" in estimate_throughput(in_float32, gpu).basis
    (path,) = (tmp_path / "calibration").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert "fitted" in estimate_throughput(config, gpu).basis


def test_rows_show_data_sheet_estimate_and_published_runs(tmp_path: Path) -> None:
    gpu = find_gpu("rtx-4070")
    bandwidth = Measurement(name="memory bandwidth", value=252.0, unit="GB/s")
    assert list(compare_measurement(bandwidth, gpu)) == [
        ("memory bandwidth", "252 GB/s", "data sheet 504: 50%")
    ]
    steps = measured_steps(load("gpt-768-gpt2", tmp_path), 1.0)
    steps = steps.model_copy(update={"peak_bytes": 2**33})
    rate, peak = compare_measurement(steps, gpu)
    assert "published 56,075" in rate[2]
    assert "estimate" in rate[2]
    assert peak[1] == "8.0 GiB"
    (unknown,) = compare_measurement(bandwidth, None)
    assert unknown[2] == ""
    assert len(list(compare_measurement(steps, GPUS[0]))) == 2
