"""Run `overnight` and, at one place of it, send SIGTERM to all processes of the command.

    python tests/stop_at.py PLACE run CONFIG ...

Starts no earlier or later than that place is reached, so a test of it needs no luck.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PLACES = {
    "tokenising": ("gpt.data.corpus", "in_order", 1),
    "first step": ("gpt.training.stepper", "summed_loss", 1),
    "training": ("gpt.training.stepper", "summed_loss", 13),
    "writing a checkpoint": ("gpt.training.checkpoint_writer", "write_checkpoint", 2),
    "evaluation": ("tasks.evaluate", "evaluation_of", 1),
}
"""Module, function, and which of its calls."""


def main():
    module, name, nth = PLACES[sys.argv.pop(1)]
    from flows import environment

    prepare = environment.prepare

    def then_patch(root):
        prepare(root)
        stop_at_call(importlib.import_module(module), name, nth)

    environment.prepare = then_patch
    from flows.__main__ import main as overnight

    overnight()


def stop_at_call(owner, name, nth):
    real, calls = getattr(owner, name), 0

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == nth:
            os.killpg(os.getpgrp(), signal.SIGTERM)
        return real(*arguments, **named)

    setattr(owner, name, counted)


if __name__ == "__main__":
    main()
