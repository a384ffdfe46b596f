"""A run does not depend on its output being read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRINT_MUCH = """
import sys
from tasks.display import log_info
for _ in range(20_000):
    log_info("more than a pipe holds")
open(sys.argv[1], "w").close()
"""


def test_closed_output_pipe_does_not_end_the_process(tmp_path: Path) -> None:
    """Prefect's worker, which reads the lines, may be killed."""
    end = tmp_path / "end"
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT_MUCH, str(end)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert end.exists()
