"""Training one config of a comparison in its own process.

A device error or the kernel's out-of-memory killer then ends only this config, and each config
starts with an empty device and has its own peak of memory.

The comparison calls `train_in_subprocess`, which starts `python -m flows.runtime.variant_process`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.runtime import environment
from flows.runtime.process_exit import die_with_parent
from flows.runtime.variants import Variant
from gpt.errors import ComparisonError, GPTError, Problem
from gpt.files import write_text
from gpt.gc_tuning import tune_gc

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
        _stop(child)
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


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(STOP_SECONDS)
    child.kill()
    child.wait()


# --- in the new process --------------------------------------------------------------------------


def main() -> None:
    tune_gc()
    request = json.loads(sys.argv[1])
    code, result = _train(request)
    write_text(Path(request["result"]), json.dumps(result))
    sys.exit(code)


def _train(request: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    environment.prepare(Path(request["root"]))
    from flows.runtime.local_run import run_pretrain
    from tasks.display import log_info

    parent = Path(request["parent"])
    try:
        outcome = run_pretrain(request["path"], request["overrides"], False, parent)
    except GPTError as error:
        print(error, file=sys.stderr)
        return 2, {"failure": str(error)}
    except Exception as error:
        traceback.print_exc()
        return 1, {"failure": f"{type(error).__name__}: {error}"}
    log_info(f"{outcome.name}: validation loss {outcome.report.loss:.4f}")
    return 0, {"folder": str(outcome.folder)}


if __name__ == "__main__":
    main()
