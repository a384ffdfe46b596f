"""The errors a user can fix: subclasses of `GPTError`, one per part of the program.

An error carries one or more `Problem`s, each with four parts: the config key, file or command
option; the value found there; the rule it breaks; the remedy. The command line prints the message
alone and exits with code 2; a Prefect run ends as Failed with it and is not retried.

Bugs in the program are not here: those are assertions.
"""

from dataclasses import dataclass
from typing import ClassVar


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

    headline: ClassVar[str]

    def __init_subclass__(cls, headline: str) -> None:
        cls.headline = headline

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error needs at least one problem"
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        return f"{self.headline}: {count}\n" + "\n".join(f"  {p}" for p in self.problems)


class ConfigError(GPTError, headline="the config is invalid"):
    """The config is invalid. Lists every problem found, not only the first."""


class CorpusError(GPTError, headline="the corpus cannot be used"):
    """A Parquet source cannot be read or has nothing to train on."""


class DatasetError(GPTError, headline="the tokenized dataset cannot be used"):
    """Token shards or their manifest are missing, truncated or changed."""


class TokenizerError(GPTError, headline="the tokenizer cannot be loaded"):
    """The tokenizer's data files are missing or changed."""


class CheckpointError(GPTError, headline="the checkpoint cannot be used"):
    """A checkpoint is incomplete, damaged, or does not match the model, dataset or optimizer."""


class ComparisonError(GPTError, headline="there is nothing to compare"):
    """No config of a comparison finished."""


class GenerationError(GPTError, headline="no text can be generated"):
    """The sampling settings are invalid."""


class BenchmarkError(GPTError, headline="the benchmark cannot be run"):
    """A benchmark file cannot be read or lacks required columns."""


class ExchangeError(GPTError, headline="the model cannot be converted"):
    """A model cannot be converted to or from another project's format."""


class OutOfMemoryError(GPTError, headline="out of memory"):
    """The device ran out of memory at the smallest batch size."""


class NonFiniteLossError(GPTError, headline="the loss is not finite"):
    """Loss or gradients stayed non-finite after every rollback."""


class DistributedError(GPTError, headline="distributed training cannot continue"):
    """Ranks of a distributed run lost each other too often."""


class RunLockedError(GPTError, headline="the run is locked"):
    """Another process is using the run folder."""


class RegistryError(GPTError, headline="the registered model cannot be used"):
    """A registered model does not exist or cannot be downloaded."""


class WatchError(GPTError, headline="the folder cannot be watched"):
    """A folder cannot be watched, or there is no server to send events to."""


class TrackingError(GPTError, headline="the run cannot be tracked"):
    """The tracking server cannot be reached, or there is nothing to send."""


class ServiceError(GPTError, headline="the service cannot be started"):
    """Servers, workers or deployments cannot be started or are already running."""


class StorageError(GPTError, headline="a file or folder cannot be used"):
    """A disk is full or read-only, or a folder may not be written."""


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or the name of an error that has none.

    At most 300 characters: those of servers can fill a page.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
