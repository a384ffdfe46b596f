"""What `overnight calibrate` measured, stored by the device's UUID and the driver's version."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gpt.artifacts import Artifact
from gpt.config.schema import RunConfig
from gpt.files import write_text
from gpt.hardware.target_gpu import InstalledGPU


class Measurement(Artifact):
    name: str
    value: float
    unit: str
    config: RunConfig | None = None
    """The config whose training steps were measured."""
    steps: int = 0
    spread: float = 0.0
    """Relative standard deviation of the seconds of single steps."""
    peak_bytes: int | None = None
    """Peak of torch's allocations in these steps; None on a CPU."""


Measurements = tuple[Measurement, ...]
_ADAPTER = TypeAdapter(Measurements)


def read_calibration(root: Path, device: InstalledGPU) -> Measurements:
    """Return what was measured with this driver; nothing if it cannot be read."""
    try:
        return _ADAPTER.validate_json(_path(root, device).read_bytes())
    except (OSError, ValidationError):
        return ()


def write_calibration(root: Path, device: InstalledGPU, measurements: Measurements) -> None:
    path = _path(root, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _ADAPTER.dump_json(measurements, indent=1).decode())


def _path(root: Path, device: InstalledGPU) -> Path:
    return root / "calibration" / f"{device.uuid}-{device.driver}.json"
