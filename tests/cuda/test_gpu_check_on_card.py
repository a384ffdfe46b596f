"""The check for a day with a GPU runs to its end on a card, whatever it finds there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

from gpu_check import SECTIONS  # noqa: E402

from gpt.hardware.device import describe_device  # noqa: E402
from gpt.hardware.target_gpu import installed_gpus  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.timeout(3000)
def test_every_section_has_its_rows(tmp_path):
    command = [sys.executable, SCRIPT, "--small", "--limit", "3000", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {row["section"] for row in rows} == set(SECTIONS), done.stdout + done.stderr
    assert not [row for row in rows if row["what"] == "end"]
    # A driver that computes nothing gives no losses, but memory and times.
    found = {row["what"]: row["found"] for row in rows}
    assert "micro-batch of 2" in found["peak memory, nanochat 768"]
    for what in ("plain, width 768", "kernel launches", "one process by the launcher"):
        assert what in found
    assert (tmp_path / "gpu-check.md").read_text() in done.stdout


def test_calibration_is_found_by_the_card_that_torch_measured():
    card = describe_device(torch.device("cuda"))
    assert (card.uuid, card.driver) in [(gpu.uuid, gpu.driver) for gpu in installed_gpus()]
    assert card.driver
