"""Tune Python's garbage collector for a process that imports very many objects.

`python -m gpt.gc_tuning MODULE ARGUMENTS` runs `python -m MODULE ARGUMENTS` with these thresholds.
It keeps the collection at exit, which joins the threads of torch's process groups.
"""

import atexit
import functools
import gc
import runpy
import sys

THRESHOLDS = (200_000, 30, 30)
"""Python's default, 700 objects, collects a hundred times during the imports alone."""


@functools.cache
def tune_gc() -> None:
    """Collect garbage less often, and not at exit.

    Prefect, torch and MLflow create a million objects that live as long as the process: of the
    5.6 s that importing the flow and exiting take, 2.2 s were garbage collection. Call this before
    importing them; a later call only shortens the exit.
    """
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)


if __name__ == "__main__":
    gc.set_threshold(*THRESHOLDS)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
