"""What a user sees of a run: log lines, and on a terminal a progress bar below them.

Every line also goes to the log of the current Prefect run, so that its page shows the same.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import TypeVar

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpt.config.schema import RunConfig
from gpt.data.store import Transfer
from gpt.data.tokenize.pipeline import TokenizeProgress
from gpt.evaluation.progress import ProgressGenerator
from gpt.training.metrics import StepRecord

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_PER_LINE = 5.0
"""Time between lines of a long stage where there is no terminal for a bar."""
RECENT_SECONDS = 1800.0
"""The remaining time is estimated from the progress in this time."""


class _RunConsole(Console):
    def on_broken_pipe(self) -> None:
        """Continue without output if its reader is gone, such as a worker that was killed. (Rich
        would end the process.)"""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _RunConsole(highlight=False, soft_wrap=True)

_prefect_log = logging.getLogger("overnight.page")
_prefect_log.setLevel(logging.INFO)
_prefect_log.propagate = False
_prefect_log.addHandler(APILogHandler())


def is_in_prefect_run() -> bool:
    return bool(TaskRunContext.get() or FlowRunContext.get())


def log_info(line: str, *, level: int = logging.INFO) -> None:
    """Print a line, and log it to the current Prefect run if there is one."""
    console.print(line, markup=False, style="yellow" if level >= logging.WARNING else None)
    if is_in_prefect_run():
        _prefect_log.log(level, line)


def log_warning(line: str) -> None:
    log_info(f"warning: {line}", level=logging.WARNING)


class _LibraryWarnings(logging.Handler):
    """Forwards warnings of the library, such as a batch that does not fit."""

    def emit(self, record: logging.LogRecord) -> None:
        log_warning(record.getMessage())


logging.getLogger("gpt").addHandler(_LibraryWarnings(logging.WARNING))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int, str], str]]:
    """Show a bar below the lines on a terminal; nothing elsewhere. Yield a function that updates
    it (done, total, text) and returns how much time is left, e.g. "  0:01:23 left"."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )

    def update(done: int, total: int, text: str) -> str:
        bar.update(task, completed=done, total=total)
        seconds = bar.tasks[0].time_remaining
        left = "" if seconds is None else f"  {timedelta(seconds=round(seconds))} left"
        bar.update(task, text=f"{text}{left}")
        return left

    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=RECENT_SECONDS,
    ) as bar:
        task = bar.add_task(name, total=None, text="")
        yield update


def _run_with_progress(
    name: str,
    steps: Generator[Item, None, Result],
    describe: Callable[[Item], tuple[int, int, str]],
) -> Result:
    """Run a generator to its result. Show what `describe` says of each item (done, total, text) as
    a bar, or as a line every `SECONDS_PER_LINE` where there is no terminal."""
    last_line = time.monotonic()
    with _bar(name) as update:
        while True:
            try:
                done, total, text = describe(next(steps))
            except StopIteration as stop:
                return stop.value
            left, now = update(done, total, text), time.monotonic()
            if now - last_line >= SECONDS_PER_LINE and not console.is_terminal:
                log_info(f"{name} {done / max(1, total):4.0%}  {text}{left}")
                last_line = now


def show_tokenizing(steps: Generator[TokenizeProgress, None, Result]) -> Result:
    def describe(progress: TokenizeProgress) -> tuple[int, int, str]:
        rate = (progress.tokens - progress.tokens_reused) / max(1e-9, progress.seconds)
        text = f"{progress.tokens:,} tokens  {rate:,.0f} tokens/s"
        return progress.rows_done, progress.rows_total, text

    return _run_with_progress("tokenizing", steps, describe)


def show_transfer(name: str, steps: Transfer[Result]) -> Result:
    def describe(progress: tuple[int, int]) -> tuple[int, int, str]:
        done, total = progress
        return done, total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"

    return _run_with_progress(name, steps, describe)


def show_evaluation(steps: ProgressGenerator[Result]) -> Result:
    return _run_with_progress("evaluating", steps, lambda p: (p.completed, p.total, p.description))


@contextmanager
def train_display(config: RunConfig) -> Iterator[Callable[[StepRecord], None]]:
    """Yield a function that updates the bar, and logs a line every `log_interval` steps, for the
    first and the last."""
    last_step, interval = config.training.max_steps, config.training.log_interval
    seconds_per_token: list[float] = []

    def show(record: StepRecord) -> None:
        counter = f"step {record.step:>{len(str(last_step))}}/{last_step}"
        if record.loss is not None:
            if record.tokens_per_second:
                seconds_per_token.append(1 / record.tokens_per_second)
            rate = 1 / fmean(seconds_per_token) if seconds_per_token else 0.0
            text = f"loss {record.loss:.4f}  {rate:,.0f} tokens/s"
            left = update(record.step, last_step, text)
            if record.step in (1, last_step) or record.step % interval == 0:
                log_info(
                    f"{counter}  loss {record.loss:.4f}  lr {record.learning_rate:.1e}"
                    f"  {rate:,.0f} tokens/s{_format_device_use(record)}{left}"
                )
                seconds_per_token.clear()
        if heldout := record.validation:
            log_info(
                f"{counter}  validation loss {heldout.loss:.4f}  "
                f"perplexity {heldout.perplexity:,.1f}  bits per byte {heldout.bits_per_byte:.4f}"
            )

    with _bar("training") as update:
        yield show


def _format_device_use(record: StepRecord) -> str:
    """Format the model FLOPs utilisation (n/a for an unknown GPU) and the peak memory."""
    mfu = "n/a" if record.mfu is None else f"{record.mfu:.1%}"
    memory = f"  {record.peak_memory_bytes / 2**30:.1f} GiB" if record.peak_memory_bytes else ""
    return f"  mfu {mfu}{memory}"
