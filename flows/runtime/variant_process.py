"""The process of one config of a comparison: `python -m flows.runtime.variant_process JSON`,
started by `flows.runtime.variant_launcher`. It runs the flow `pretrain` and writes its result into
a file."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.runtime import environment
from gpt.errors import GPTError
from gpt.files import write_text
from gpt.gc_tuning import tune_gc


def main() -> None:
    tune_gc()
    asked = json.loads(sys.argv[1])
    code, told = _run(asked)
    write_text(Path(asked["result"]), json.dumps(told))
    sys.exit(code)


def _run(asked: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    environment.prepare(Path(asked["root"]))
    from flows.runtime.local_run import run_pretrain
    from tasks.display import log_info

    try:
        outcome = run_pretrain(asked["path"], asked["overrides"], False, Path(asked["parent"]))
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
