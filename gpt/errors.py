"""The errors a user can fix: subclasses of `GPTError`, one per part of the program.

An error carries one or more `Problem`s, each with four parts: the config key, file or command
option; the value found there; the rule it breaks; the remedy. The command line prints the message
alone and exits with code 2; a Prefect run ends as Failed with it and is not retried.

Bugs in the program are not here: those are assertions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One broken rule, shown as three lines: `key = value`, the rule, and `-> ` the remedy."""

    key: str
    """A config key, a file, or a command option."""
    value: str
    """What was found there; empty if there is nothing to show."""
    rule: str
    remedy: str

    @property
    def subject(self) -> str:
        return f"{self.key} = {self.value}" if self.value else self.key

    def __str__(self) -> str:
        return f"{self.subject}\n    {self.rule}\n    -> {self.remedy}"


class GPTError(Exception):
    """Base of all errors that a user can fix. Only its subclasses are raised."""

    headline = "overnight cannot continue"

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error needs at least one problem"
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        return f"{self.headline}: {count}\n" + "\n".join(f"  {p}" for p in self.problems)


class ConfigError(GPTError):
    """The config is invalid. Lists every problem found, not only the first."""

    headline = "the config is invalid"


class CorpusError(GPTError):
    """A Parquet source cannot be read or has nothing to train on."""

    headline = "the corpus cannot be used"


class DatasetError(GPTError):
    """Token shards or their manifest are missing, truncated or changed."""

    headline = "the tokenized dataset cannot be used"


class TokenizerError(GPTError):
    """The tokenizer's data files are missing or changed."""

    headline = "the tokenizer cannot be loaded"


class CheckpointError(GPTError):
    """A checkpoint is incomplete, damaged, or does not match the model, dataset or optimizer."""

    headline = "the checkpoint cannot be used"


class ComparisonError(GPTError):
    """No config of a comparison finished."""

    headline = "there is nothing to compare"


class GenerationError(GPTError):
    """The sampling settings are invalid."""

    headline = "no text can be generated"


class BenchmarkError(GPTError):
    """A benchmark file cannot be read or lacks required columns."""

    headline = "the benchmark cannot be run"


class ExchangeError(GPTError):
    """A model cannot be converted to or from another project's format."""

    headline = "the model cannot be converted"


class OutOfMemoryError(GPTError):
    """The device ran out of memory at the smallest batch size."""

    headline = "out of memory"


class NonFiniteLossError(GPTError):
    """Loss or gradients stayed non-finite after every rollback."""

    headline = "the loss is not finite"


class DistributedError(GPTError):
    """Ranks of a distributed run lost each other too often."""

    headline = "distributed training cannot continue"


class RunLockedError(GPTError):
    """Another process is using the run folder."""

    headline = "the run is locked"


class RegistryError(GPTError):
    """A registered model does not exist or cannot be downloaded."""

    headline = "the registered model cannot be used"


class WatchError(GPTError):
    """A folder cannot be watched, or there is no server to send events to."""

    headline = "the folder cannot be watched"


class TrackingError(GPTError):
    """The tracking server cannot be reached, or there is nothing to send."""

    headline = "the run cannot be tracked"


class ServiceError(GPTError):
    """Servers, workers or deployments cannot be started or are already running."""

    headline = "the service cannot be started"


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or the name of an error that has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
