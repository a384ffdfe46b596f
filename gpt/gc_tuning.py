"""Python's garbage collector, kept from walking over what was imported.

`python -m gpt.gc_tuning MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` with that, except at its
end: the threads of torch's process groups are joined by the collector's last pass.
"""

from __future__ import annotations

import atexit
import functools
import gc
import runpy
import sys

THRESHOLDS = (200_000, 30, 30)
"""Python's own first one, 700 objects, makes a hundred passes of the imports alone."""


@functools.cache
def tune_gc() -> None:
    """Collect less often, and not once more as the process ends.

    Prefect, torch and MLflow are a million objects that live as long as the process: of the 5.6 s
    in which the flow is imported and a process of it ends, the collector took 2.2 s. To be called
    before they are imported; later it spares the end alone.
    """
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)


def main() -> None:
    gc.set_threshold(*THRESHOLDS)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
