"""Run the tests of this folder once per card, on a stub driver that computes nothing.

    python tests/cuda/run_on_cards.py [--card NAME]... [--jobs N] [arguments of pytest]

The environment must have torch's CUDA build and the packages of the tests; `make test-cuda` makes
one. A process has one card from its start to its end, so that there is a pytest for each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_driver import build_driver
from cards import CARDS, card_environment

HERE = Path(__file__).resolve().parent
NO_TESTS_COLLECTED = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--card", action="append", choices=CARDS, help="default: all of them")
    parser.add_argument("--jobs", type=int, default=1, help="cards at a time (default: 1)")
    options, pytest_arguments = parser.parse_known_args()
    if not any(Path(argument.partition("::")[0]).exists() for argument in pytest_arguments):
        pytest_arguments.append(str(HERE))
    driver = build_driver()

    def run(card: str) -> int:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *pytest_arguments]
        environment = card_environment(card, driver)
        if options.jobs == 1:
            print(f"--- {card}", flush=True)
            return subprocess.run(command, env=environment).returncode
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"--- {card}\n{done.stdout}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        codes = set(pool.map(run, options.card or CARDS))
    return max(codes - {NO_TESTS_COLLECTED}, default=0)


if __name__ == "__main__":
    sys.exit(main())
