"""Process time of `overnight validate configs/*.toml --gpu rtx-4070`: the median of five.

python tests/benchmarks/bench_preflight.py
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main():
    configs = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.toml"))
    command = [sys.executable, "-m", "flows.cli.main", "validate", *configs, "--gpu", "rtx-4070"]
    seconds = [process_seconds(command) for _ in range(5)]
    times = ", ".join(f"{each:.2f}" for each in seconds)
    print(f"{len(configs)} configs: {statistics.median(seconds):.2f} s of process time ({times})")


def process_seconds(command):
    before = os.times()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


if __name__ == "__main__":
    main()
