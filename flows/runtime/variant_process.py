"""Training one config of a comparison in its own process.

A device error or the kernel's out-of-memory killer then ends only this config, and each config
starts with an empty device and has its own peak of memory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from flows.runtime import environment
from flows.runtime.process_exit import die_with_parent, stop_process
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
    parent = parent.resolve()
    result_file = parent / f"{variant.config.run.name}.json"
    result_file.unlink(missing_ok=True)
    folders = [str(path) for path in (variant.config.run.root, parent, result_file)]
    request = json.dumps([variant.path, variant.overrides, *folders])
    # A process that outlived this one would still hold the lock of the run.
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.runtime.variant_process", request],
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        code = child.wait()
    except BaseException:
        stop_process(child, STOP_SECONDS)
        raise
    result = json.loads(result_file.read_bytes()) if result_file.exists() else {}
    if code == 0 and "folder" in result:
        return Path(result["folder"])
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = result.get("failure") or f"its process ended with {end}"
    remedy = "fix this and re-run the same comparison; finished configs are skipped"
    raise ComparisonError(Problem(variant.name, "", reason, remedy))


def main() -> None:
    """Run the flow `pretrain` as the request says, and write the run folder or the failure."""
    tune_gc()
    path, overrides, root, parent, result_file = json.loads(sys.argv[1])
    environment.prepare(Path(root))
    from flows.runtime.local_run import run_pretrain
    from tasks.display import log_info

    code, result = 0, {}
    try:
        outcome = run_pretrain(path, overrides, parent=Path(parent))
        log_info(f"{outcome.name}: validation loss {outcome.report.loss:.4f}")
        result["folder"] = str(outcome.folder)
    except GPTError as error:
        print(error, file=sys.stderr)
        code, result["failure"] = 2, str(error)
    except Exception as error:
        traceback.print_exc()
        code, result["failure"] = 1, f"{type(error).__name__}: {error}"
    write_text(Path(result_file), json.dumps(result))
    sys.exit(code)


if __name__ == "__main__":
    main()
