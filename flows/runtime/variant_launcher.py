"""Training one config of a comparison in its own process.

A device error or the kernel's out-of-memory killer then ends only this config, and each config
starts with an empty device and has its own peak of memory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from flows.runtime.process_exit import die_with_parent, stop_process
from flows.runtime.variants import Variant
from gpt.errors import ComparisonError, Problem

STOP_SECONDS = 24.0
"""How long the process may take to stop; Prefect kills its parent after 29 s."""


def train_in_subprocess(variant: Variant, parent: Path) -> Path:
    """Train a variant in its own process and return its run folder.

    `parent` is the folder of the comparison. Anything that stops this process stops the other one
    first. Raises `ComparisonError` with the reason if the run does not finish.
    """
    assert variant.config
    result_file = parent / f"{variant.config.run.name}.json"
    result_file.unlink(missing_ok=True)
    request = {
        "path": variant.path,
        "overrides": variant.overrides,
        "root": str(variant.config.run.root),
        "parent": str(parent.resolve()),
        "result": str(result_file.resolve()),
    }
    command = [sys.executable, "-m", "flows.runtime.variant_process", json.dumps(request)]
    # A process that outlived this one would still hold the lock of the run.
    child = subprocess.Popen(command, preexec_fn=die_with_parent(signal.SIGKILL))
    try:
        code = child.wait()
    except BaseException:
        stop_process(child, STOP_SECONDS)
        raise
    result: dict[str, str] = {}
    with suppress(OSError, ValueError):
        result = json.loads(result_file.read_text(encoding="utf-8"))
    if code == 0 and "folder" in result:
        return Path(result["folder"])
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = result.get("failure") or f"its process ended with {end}"
    remedy = "fix this and re-run the same comparison; finished configs are skipped"
    raise ComparisonError(Problem(variant.name, "", reason, remedy))
