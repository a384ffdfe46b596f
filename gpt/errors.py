"""What can go wrong through no fault of the program: one tree of errors, all telling alike.

Every error carries `Problem`s: where, what was found there, which rule it breaks, and what to do
about it. A user sees the message alone (exit code 2, no traceback); a Prefect run is Failed with
it. Mistakes of the programmer are not here: they assert.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One broken rule. `key` is a config key, a file or a command; `value` is what stood there."""

    key: str
    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        found = f"{self.key} = {self.value}" if self.value else self.key
        return f"{found}\n    {self.rule}\n    -> {self.remedy}"


class GPTError(Exception):
    """Base of all errors that a user can mend; never raised itself."""

    headline = "cannot go on"

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error without a problem says nothing"
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        return f"{self.headline}: {count}\n" + "\n".join(f"  {p}" for p in self.problems)


class ConfigError(GPTError):
    """A configuration that cannot work; holds every problem that was found, not the first."""

    headline = "the config cannot work"


class CorpusError(GPTError):
    """A Parquet source that cannot be read, or holds nothing to train on."""

    headline = "the corpus cannot be used"


class DatasetError(GPTError):
    """Token shards or their manifest that are missing, cut short or altered."""

    headline = "the tokenised data set cannot be used"


class TokenizerError(GPTError):
    """The tokenizer's data files that are missing or altered."""

    headline = "the tokenizer cannot be loaded"


class CheckpointError(GPTError):
    """A checkpoint that is incomplete, damaged, or of another model, data set or optimizer."""

    headline = "the checkpoint cannot be used"


class ComparisonError(GPTError):
    """A comparison in which no config came to an end."""

    headline = "there is nothing to compare"


class GenerationError(GPTError):
    """Settings of sampling with which no text can be written."""

    headline = "no text can be generated"


class BenchmarkError(GPTError):
    """A benchmark's file that cannot be read, or that lacks what is scored."""

    headline = "the benchmark cannot be run"


class ExchangeError(GPTError):
    """A model that cannot be brought into another format, or from there into ours."""

    headline = "the model cannot be exchanged"


class OutOfMemoryError(GPTError):
    """The device ran out of memory at the smallest batch that can be tried."""

    headline = "out of memory"


class NonFiniteLossError(GPTError):
    """Losses or gradients that are not finite, again and again from every checkpoint there is."""

    headline = "the numbers went wrong"


class DistributedError(GPTError):
    """Devices that train together and lost one another too often."""

    headline = "the devices cannot go on together"


class RunLockedError(GPTError):
    """Another process is working in the run's folder."""

    headline = "the run is taken"


class RegistryError(GPTError):
    """A name of a registered model that stands for none, or for one that cannot be fetched."""

    headline = "the registered model cannot be used"


class WatchError(GPTError):
    """A folder that cannot be watched, or nobody to tell of it."""

    headline = "cannot watch"


class TrackingError(GPTError):
    """A tracking server that cannot be reached, or has nothing to be told."""

    headline = "the run cannot be tracked"


class ServiceError(GPTError):
    """Servers, worker or deployments that cannot be started, or are running already."""

    headline = "the service cannot be started"
