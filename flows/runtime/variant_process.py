"""The process of one config of a comparison: `python -m flows.runtime.variant_process JSON`.

`flows.runtime.variant_launcher` starts it. It runs the flow `pretrain` and writes the result into a
file.
"""

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
