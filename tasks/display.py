"""What a person sees of a run: lines, and on a terminal a moving bar below them.

Every line also goes to the log of the Prefect run that it was told in, so that the run's page
says what the terminal said.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import TypeVar

from prefect.context import get_run_context
from prefect.exceptions import MissingContextError
from prefect.logging.handlers import APILogHandler
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar

from gpt.config.schema import RunConfig
from gpt.data.store import TransferProgress
from gpt.data.tokenize.pipeline import TokenizeProgress
from gpt.evaluation.progress import EvaluationProgress, ProgressGenerator, Result
from gpt.training.loop import StepRecord

Step = TypeVar("Step")


class _RunConsole(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the lines is gone, as a worker that was killed; the run is not. (Rich would
        end the process.)"""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _RunConsole(highlight=False, soft_wrap=True)

TOKENIZE_SECONDS = 5.0
"""Time between lines while tokenising, or carrying a data set."""
EVALUATE_SECONDS = 10.0
"""The same while evaluating."""
RECENT_STEPS = 20
"""Steps whose pace gives the time left: validations and checkpoints among them count too."""

_page = logging.getLogger("overnight.page")
_page.setLevel(logging.INFO)
_page.propagate = False
_page.addHandler(APILogHandler())


def log_info(line: str, *, level: int = logging.INFO) -> None:
    """Print a line, and log it to the Prefect run if this is one."""
    console.print(line, markup=False, style="yellow" if level >= logging.WARNING else None)
    try:
        get_run_context()
    except MissingContextError:
        return
    _page.log(level, line)


def log_warning(line: str) -> None:
    log_info(f"warning: {line}", level=logging.WARNING)


class _LibraryWarnings(logging.Handler):
    """Tells what the library warns of, as a batch that was too large, where the run is told."""

    def emit(self, record: logging.LogRecord) -> None:
        log_warning(record.getMessage())


logging.getLogger("gpt").addHandler(_LibraryWarnings(logging.WARNING))


@contextmanager
def print_to_stderr(wanted: bool) -> Iterator[None]:
    """Tell on standard error where standard output belongs to a program."""
    before = console.stderr
    console.stderr = wanted
    try:
        yield
    finally:
        console.stderr = before


def duration(seconds: float) -> str:
    """Seconds as 0:01:23."""
    return str(timedelta(seconds=round(seconds)))


def run_with_progress(steps: Generator[Step, None, Result], show: Callable[[Step], None]) -> Result:
    """What comes of `steps`, each shown."""
    while True:
        try:
            show(next(steps))
        except StopIteration as end:
            return end.value


class TokenizeDisplay:
    def __init__(self, progress: Bar, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._last_line = time.monotonic()

    def show(self, progress: TokenizeProgress) -> None:
        share = progress.rows_done / max(1, progress.rows_total)
        done = progress.rows_done - progress.rows_reused
        left = progress.seconds * (progress.rows_total - progress.rows_done) / max(1, done)
        pace = (progress.tokens - progress.tokens_reused) / max(1e-9, progress.seconds)
        text = f"{progress.tokens:,} tokens  {pace:,.0f} tokens/s  {duration(left)} left"
        self._progress.update(
            self._task, completed=progress.rows_done, total=progress.rows_total, text=text
        )
        now = time.monotonic()
        if now - self._last_line >= TOKENIZE_SECONDS and not console.is_terminal:
            log_info(f"tokenising {share:4.0%}  {text}")
            self._last_line = now


class TransferDisplay:
    """Of a data set on its way to or from a store."""

    def __init__(self, verb: str, progress: Bar, task: TaskID) -> None:
        self._verb, self._progress, self._task = verb, progress, task
        self._began = self._last_line = time.monotonic()

    def run_with_progress(self, carrying: Generator[TransferProgress, None, Result]) -> Result:
        return run_with_progress(carrying, self._show)

    def _show(self, carried: TransferProgress) -> None:
        now = time.monotonic()
        done, total = carried.bytes_done, carried.bytes_total
        left = (now - self._began) * (total - done) / max(1, done)
        text = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {duration(left)} left"
        self._progress.update(self._task, completed=done, total=total, text=text)
        if now - self._last_line >= TOKENIZE_SECONDS and not console.is_terminal:
            log_info(f"{self._verb} {text}")
            self._last_line = now


class TrainDisplay:
    def __init__(self, config: RunConfig, progress: Bar, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._last_step = config.training.max_steps
        self._interval = config.training.log_interval
        self._ends = deque([time.monotonic()], maxlen=RECENT_STEPS + 1)
        self._seconds_a_token: list[float] = []

    def show(self, record: StepRecord) -> None:
        """One record: the bar always, a line every `log_interval` steps and at the ends."""
        counter = f"step {record.step:>{len(str(self._last_step))}}/{self._last_step}"
        if record.loss is not None:
            self._show_step(record, record.loss, counter)
        if record.validation:
            held = record.validation
            log_info(
                f"{counter}  validation loss {held.loss:.4f}  perplexity {held.perplexity:,.1f}"
                f"  bits per byte {held.bits_per_byte:.4f}"
            )

    def _show_step(self, record: StepRecord, loss: float, counter: str) -> None:
        self._ends.append(time.monotonic())
        if record.tokens_per_second:
            self._seconds_a_token.append(1 / record.tokens_per_second)
        pace = 1 / fmean(self._seconds_a_token) if self._seconds_a_token else 0.0
        seconds_a_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        left = duration(seconds_a_step * (self._last_step - record.step))
        text = f"loss {loss:.4f}  {pace:,.0f} tokens/s  {left} left"
        self._progress.update(self._task, completed=record.step, text=text)
        if record.step in (1, self._last_step) or record.step % self._interval == 0:
            log_info(
                f"{counter}  loss {loss:.4f}  lr {record.learning_rate:.1e}"
                f"  {pace:,.0f} tokens/s{_device_use(record)}  {left} left"
            )
            self._seconds_a_token.clear()


class EvaluateDisplay:
    def __init__(self, progress: Bar, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._last_line = time.monotonic()

    def run_with_progress(self, running: ProgressGenerator[Result]) -> Result:
        """The result of what runs, told of on the way: a bar on a terminal, elsewhere a line every
        `EVALUATE_SECONDS`."""
        return run_with_progress(running, self._show)

    def _show(self, progress: EvaluationProgress) -> None:
        name, completed, total = progress.description, progress.completed, progress.total
        self._progress.update(self._task, completed=completed, total=total, text=name)
        now = time.monotonic()
        if now - self._last_line >= EVALUATE_SECONDS and not console.is_terminal:
            log_info(f"evaluating: {name} {completed:,} of {total:,}")
            self._last_line = now


def _device_use(record: StepRecord) -> str:
    """Model FLOPs utilisation (n/a for a card that is not listed) and peak memory."""
    mfu = "n/a" if record.mfu is None else f"{record.mfu:.1%}"
    memory = f"  {record.peak_memory_bytes / 2**30:.1f} GiB" if record.peak_memory_bytes else ""
    return f"  mfu {mfu}{memory}"


@contextmanager
def tokenize_display() -> Iterator[TokenizeDisplay]:
    with _bar("tokenising") as (progress, task):
        yield TokenizeDisplay(progress, task)


@contextmanager
def transfer_display(verb: str) -> Iterator[TransferDisplay]:
    with _bar(verb) as (progress, task):
        yield TransferDisplay(verb, progress, task)


@contextmanager
def evaluate_display() -> Iterator[EvaluateDisplay]:
    with _bar("evaluating") as (progress, task):
        yield EvaluateDisplay(progress, task)


@contextmanager
def train_display(config: RunConfig) -> Iterator[TrainDisplay]:
    with _bar("training", config.training.max_steps) as (progress, task):
        yield TrainDisplay(config, progress, task)


@contextmanager
def _bar(name: str, total: int | None = None) -> Iterator[tuple[Bar, TaskID]]:
    """A bar below the lines on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Bar(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield progress, progress.add_task(name, total=total, text="")
