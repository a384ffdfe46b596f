"""`overnight doctor` finds each fault that can be created here, and names its remedy."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flows.service import doctor
from flows.service.doctor import FAULT, GOOD, NOTE, Finding
from flows.service.settings import ServiceSettings
from gpt.hardware.calibration import Measurement, write_calibration
from gpt.hardware.target_gpu import InstalledGPU

ROOT = Path(__file__).resolve().parents[3]
RTX_4070 = InstalledGPU("GeForce RTX 4070", 12 * 2**30, 2**30, "uuid", "535.1")


def settings(root: Path, **named: str) -> ServiceSettings:
    return ServiceSettings(root, "127.0.0.1", 1, 2, **named)


def is_fault(finding: Finding, found: str, remedy: str) -> None:
    assert finding.level == FAULT
    assert found in finding.found
    assert remedy in finding.remedy


def test_healthy_machine_has_no_fault(tmp_path: Path) -> None:
    levels = {f.what: f.level for f in doctor.check_machine(settings(tmp_path), has_server=False)}
    assert levels.pop("Prefect's server") == NOTE
    assert levels.pop("GPU") in (GOOD, NOTE)
    assert set(levels.values()) == {GOOD}
    assert set(levels) == {"Python", "packages", "memory", "disk", "folder", "MLflow", "clock"}


def test_old_python_is_a_fault() -> None:
    is_fault(doctor.check_python("3.9.1"), "3.9.1", "newer Python")


def test_missing_and_wrong_packages_are_faults() -> None:
    wanted = ["numpy>=99", "no-such-package>=1", "rich", 'pytest>=99; extra == "test"']
    missing = list(doctor.check_packages(wanted))
    assert {f.what: f.found for f in missing}["no-such-package"].startswith("missing")
    assert {f.what for f in missing} == {"numpy", "no-such-package"}
    for finding in missing:
        is_fault(finding, "needs", "pip install -c constraints.txt")


def test_gpu_that_torch_cannot_use_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_gpus", lambda: (RTX_4070,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    is_fault(doctor.check_gpu(), "GeForce RTX 4070, driver 535.1", "build for CPUs")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    is_fault(doctor.check_gpu(), "cannot use", "update the driver to one for CUDA 12.8")


def test_gpu_in_use_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_gpus", lambda: (RTX_4070,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA GeForce RTX 4070")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2 * 2**30, 12 * 2**30))
    is_fault(doctor.check_gpu(), "2.0 of 12.0 GiB free", "nvidia-smi")


def test_doctor_points_to_calibrate_until_the_driver_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed_gpus", lambda: (RTX_4070,))
    (finding,) = doctor.check_calibration(tmp_path)
    assert finding.level == NOTE
    assert "overnight calibrate" in finding.remedy
    write_calibration(tmp_path, RTX_4070, (Measurement(name="power limit", value=200, unit="W"),))
    (finding,) = doctor.check_calibration(tmp_path)
    assert finding.level == GOOD
    newer = InstalledGPU("GeForce RTX 4070", 12 * 2**30, 2**30, "uuid", "580.9")
    monkeypatch.setattr(doctor, "installed_gpus", lambda: (newer,))
    (finding,) = doctor.check_calibration(tmp_path)
    assert finding.level == NOTE


def test_low_memory_is_a_fault() -> None:
    is_fault(doctor.check_memory(2**30), "1.0 GiB free, needs 2", "data.workers")


def test_full_disk_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FREE_DISK_BYTES", 2**80)
    is_fault(doctor.check_disk(tmp_path / "runs"), str(tmp_path), "free some space")


def test_read_only_folder_is_a_fault() -> None:
    is_fault(doctor.check_writable(Path("/proc/overnight")), "is not writable", "chown")


def test_broken_tracking_store_is_a_fault(tmp_path: Path, mlflow_database: Path) -> None:
    intact = f"sqlite:///{mlflow_database}"
    assert doctor.check_tracking_store(intact) == Finding("MLflow", GOOD, intact)
    broken = tmp_path / "mlflow.db"
    broken.write_bytes(mlflow_database.read_bytes()[:5_000] + b"\xff" * 9_000)
    is_fault(doctor.check_tracking_store(f"sqlite:///{broken}"), "does not work", "overnight sync")


def test_unreachable_tracking_server_is_a_fault() -> None:
    finding = doctor.check_tracking_store("http://127.0.0.1:1")
    is_fault(finding, "http://127.0.0.1:1 does not work", "unset MLFLOW_TRACKING_URI")


def test_password_is_redacted() -> None:
    finding = doctor.check_tracking_store("postgresql://me:secret@127.0.0.1:1/mlflow")
    assert finding.level == FAULT
    assert "secret" not in finding.found
    assert "me:***@127.0.0.1" in finding.found


@pytest.mark.parametrize(
    ("url", "found", "remedy"),
    [
        ("http://127.0.0.1:1/api", "does not answer", "overnight up"),
        ("http://127.0.0.1:1", "does not end in /api", "http://127.0.0.1:1/api"),
    ],
)
def test_unreachable_prefect_server_is_a_fault(
    tmp_path: Path, url: str, found: str, remedy: str
) -> None:
    (finding,) = doctor.check_prefect_server(settings(tmp_path, external_prefect=url))
    is_fault(finding, found, remedy)


def test_clock_set_back_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    ahead = time.time() + 3600
    os.utime(tmp_path / "train", (ahead, ahead))
    (tmp_path / "train" / "run").mkdir()
    os.utime(tmp_path / "train" / "run", (ahead, ahead))
    is_fault(doctor.check_file_times(tmp_path), "1:00:00 newer", "timedatectl")
    is_fault(doctor.check_server_clock("Wed, 01 Jan 2020 00:00:00 GMT"), "ahead of", "timedatectl")


def test_folder_without_prefect_yaml_is_a_fault(tmp_path: Path) -> None:
    (finding,) = doctor.check_deployments(None, tmp_path / "prefect.yaml")  # type: ignore[arg-type]
    is_fault(finding, "no ", "checkout")
