"""When numbers go wrong: what counts as wrong, and how often a run may go back.

A step with a loss or gradient that is not finite is skipped. `CONSECUTIVE_SKIPS` of them in a row,
weights that are not finite, or a loss spike send the run back to a sound checkpoint and over the
batches that did it, as PaLM's training did by hand (Chowdhery et al. 2022, arXiv:2204.02311,
section 5.1). A spike is a loss more than `training.spike_sigma` standard deviations above the mean
of the last `WINDOW` losses: the rule, window and 6 deviations of OLMo-core's SkipStepOptimizer
(github.com/allenai/OLMo-core), which skips such a step where we go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from pydantic import BaseModel, ConfigDict, TypeAdapter

from gpt.files import write_text

WINDOW = 128
CONSECUTIVE_SKIPS = 3
RECOVERIES_FILE = "recoveries.json"


class Recovery(BaseModel):
    """One return to a checkpoint. `sequences_passed_over`: first and one after the last position
    in the training data that is never trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    back_to_step: int
    reason: str
    sequences_passed_over: tuple[int, int]


_Recoveries = TypeAdapter(tuple[Recovery, ...])


def read_recoveries(folder: Path) -> tuple[Recovery, ...]:
    """Of the run in `folder`, oldest first."""
    try:
        return _Recoveries.validate_json((folder / RECOVERIES_FILE).read_bytes())
    except FileNotFoundError:
        return ()


def write_recoveries(folder: Path, recoveries: tuple[Recovery, ...]) -> None:
    write_text(folder / RECOVERIES_FILE, _Recoveries.dump_json(recoveries, indent=2).decode())


class SpikeDetector:
    """Judges one step after the other. `losses` are the last ones of an earlier start."""

    def __init__(self, spike_sigma: float, losses: Iterable[float] = ()) -> None:
        self._spike_sigma = spike_sigma
        self._losses = deque(losses, maxlen=WINDOW)
        self._bad_since: int | None = None

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(self._losses)

    def skipped(self, position: int) -> int | None:
        """Tell of a skipped step whose sequences began at `position`. Gives the position at which
        the run of skipped steps began once that is too long, else None."""
        if self._bad_since is None:
            self._bad_since, self._in_a_row = position, 0
        self._in_a_row += 1
        return self._bad_since if self._in_a_row >= CONSECUTIVE_SKIPS else None

    def taken(self, loss: float) -> str | None:
        """Tell of a step with finite numbers; what makes its loss a spike, else None."""
        self._bad_since = None
        if self._spike_sigma and len(self._losses) == WINDOW:
            mean, deviation = fmean(self._losses), stdev(self._losses)
            if loss > mean + self._spike_sigma * deviation:
                return (
                    f"loss {loss:.4f} is a spike: the last {WINDOW} have a mean of {mean:.4f} and "
                    f"a standard deviation of {deviation:.4f}"
                )
        self._losses.append(loss)
        return None

    def forget(self) -> None:
        """Judge no spike until `WINDOW` new losses are there."""
        self._losses.clear()
