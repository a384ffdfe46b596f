"""Python's garbage collector, kept from walking over what was imported."""

from __future__ import annotations

import atexit
import functools
import gc

OBJECTS_A_PASS = 200_000
"""Python's own 700 makes a hundred passes of the imports alone."""


@functools.cache
def spare_imports() -> None:
    """Collect less often, and not once more as the process ends.

    Prefect, torch and MLflow are a million objects that live as long as the process: of the 5.6 s
    in which the flow is imported and a process of it ends, the collector took 2.2 s. To be called
    before they are imported; later it spares the end alone.
    """
    gc.set_threshold(OBJECTS_A_PASS, 30, 30)
    atexit.register(gc.freeze)
