"""One config of a comparison, trained in a process of its own: what takes that process down, as an
error of the device or the kernel's out-of-memory killer, takes no other config with it, and each
begins with an empty device and has a peak of memory of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from flows.runtime.process_exit import die_with_parent
from flows.runtime.variants import Variant
from gpt.errors import ComparisonError, Problem

STOP_SECONDS = 24.0
"""For a child that was asked to stop; Prefect kills its parent 29 s after asking."""


def train_in_subprocess(variant: Variant, parent: Path) -> Path:
    """The folder of the entrant's finished run. What stops this process stops that one first.

    Raises `ComparisonError` with the reason where the run came to no end.
    """
    assert variant.config
    result = parent / f"{variant.config.run.name}.json"
    result.unlink(missing_ok=True)
    asked = {
        "path": variant.path,
        "overrides": variant.overrides,
        "root": str(variant.config.run.root),
        "parent": str(parent.resolve()),
        "result": str(result.resolve()),
    }
    command = [sys.executable, "-m", "flows.runtime.variant_process", json.dumps(asked)]
    # One that lived on would hold the run that the next comparison goes on with.
    child = subprocess.Popen(command, preexec_fn=die_with_parent(signal.SIGKILL))
    try:
        code = child.wait()
    except BaseException:
        _stop(child)
        raise
    return _folder_told(variant, result, code)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(STOP_SECONDS)
    child.kill()
    child.wait()


def _folder_told(variant: Variant, result: Path, code: int) -> Path:
    try:
        told: dict[str, str] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    if code == 0 and "folder" in told:
        return Path(told["folder"])
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = told.get("failure") or f"its process ended with {how}"
    raise ComparisonError(
        Problem(variant.name, "", reason, "mend that; the same comparison goes on from there")
    )
