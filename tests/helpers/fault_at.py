"""Run `overnight` with a fault at an exact point: `fault_at.py FAULT PLACE run CONFIG ...`."""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PLACES = {
    "tokenizing": ("gpt.data.tokenize.pipeline", "map_in_order", 1),
    "first step": ("gpt.training.step", "linear_cross_entropy", 1),
    "training": ("gpt.training.step", "linear_cross_entropy", 13),
    "writing a checkpoint": ("gpt.training.checkpoint.writer", "write_checkpoint", 2),
    "evaluation": ("tasks.evaluate", "evaluate_model", 1),
}
"""Module, function, and number of the call."""


def stop_all():
    """Send SIGTERM to all processes of the command, like `timeout`."""
    os.killpg(os.getpgrp(), signal.SIGTERM)


def interrupt_all():
    """Send SIGINT to all processes of the command, like Ctrl-C in a terminal."""
    os.killpg(os.getpgrp(), signal.SIGINT)


def embedded_prefect():
    from flows.runtime.embedded_api import servers

    (server,) = servers
    return server


def kill_prefect():
    """Kill the embedded API with SIGKILL."""
    embedded_prefect().kill()
    embedded_prefect().wait()


def hang_prefect():
    """Stop the embedded API: it accepts connections but does not answer."""
    embedded_prefect().send_signal(signal.SIGSTOP)


FAULTS = {
    "stop": stop_all,
    "interrupt": interrupt_all,
    "kill prefect": kill_prefect,
    "hang prefect": hang_prefect,
}


def main():
    fault = FAULTS[sys.argv.pop(1)]
    module, name, nth = PLACES[sys.argv.pop(1)]
    from flows.runtime import environment

    prepare = environment.prepare

    def prepare_and_patch(root):
        prepare(root)
        patch_call(importlib.import_module(module), name, nth, fault)

    environment.prepare = prepare_and_patch
    from flows.cli.main import main as overnight

    overnight()


def patch_call(owner, name, nth, fault):
    real, calls = getattr(owner, name), 0

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == nth:
            fault()
        return real(*arguments, **named)

    setattr(owner, name, counted)


if __name__ == "__main__":
    main()
