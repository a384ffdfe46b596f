"""What a person sees of a run is not what it depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TELL_MUCH = """
import sys
from tasks.display import log_info
for _ in range(20_000):
    log_info("more than a pipe holds")
open(sys.argv[1], "w").close()
"""


def test_lines_that_nobody_reads_any_more_end_nothing(tmp_path: Path) -> None:
    """As when Prefect's worker, which reads them, was killed."""
    end = tmp_path / "end"
    process = subprocess.Popen(
        [sys.executable, "-c", TELL_MUCH, str(end)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert end.exists()
