"""What passes between the stages: small frozen records, printable and readable back.

Never a tensor, a module or an open file: each names the folder where the heavy thing lies.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Artifact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFile(Artifact):
    """One Parquet file that went into a data set."""

    path: str
    size_bytes: int
    sha256: str
    rows: int


class SkippedFile(Artifact):
    """A file that data.on_bad_file = "skip" left out, and why."""

    path: str
    reason: str


class Shard(Artifact):
    """One token file inside the data set's folder."""

    name: str
    tokens: int
    sha256: str


class Split(Artifact):
    """The training or the validation side. `tokens` counts one end-of-text a document."""

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    text_bytes: int


class DatasetManifest(Artifact):
    """A tokenised data set: written last into its folder, so that its presence means complete.

    `fingerprint` is the hash of the sources' bytes and of every setting that changes the tokens.
    """

    fingerprint: str
    folder: Path
    tokenizer: str
    ranks_sha256: str
    text_column: str
    validation_fraction: float
    sources: tuple[SourceFile, ...]
    train: Split
    validation: Split
    skipped: dict[str, int]
    """Rows left out, by reason: "null", "empty", and those that were asked for: "where", "short",
    "long", "duplicate", "max_tokens"."""
    skipped_files: tuple[SkippedFile, ...] = ()
    settings: dict[str, str | int | float | bool | None] = {}
    """The values of [data] that decide the tokens, beside those above."""
    engine: str = "tiktoken"
    """Which encoder was used; it does not decide the tokens."""
    notes: tuple[str, ...] = ()
    """What a person should know, as why the faster engine was given up."""
    document_lengths: tuple[int, ...] = ()
    """Documents by length: entry k counts those of 2^(k-1) to 2^k - 1 tokens, without their
    end-of-text."""


class CheckpointRef(Artifact):
    """A complete checkpoint: a folder with weights, optimizer and position."""

    folder: Path
    step: int
    tokens_seen: int
    finished: bool
    """Whether this is the last step that the config asked for."""


class Sample(Artifact):
    prompt: str
    text: str


class HellaSwagResult(Artifact):
    """Which of four endings a model finds likeliest (gpt.evaluation.benchmarks)."""

    examples: int
    accuracy: float
    """Share of examples whose right ending has the highest log-likelihood; chance is 0.25."""
    accuracy_error: float | None
    """Standard error of `accuracy`; None for one example."""
    normalized_accuracy: float
    """The same by log-likelihood a byte of the ending: the figure that is usually quoted."""
    normalized_accuracy_error: float | None
    fingerprint: str
    """Equal for two results on the same examples: 16 hexadecimal digits."""


class LambadaResult(Artifact):
    """How well a model predicts the last word of a passage (gpt.evaluation.benchmarks)."""

    examples: int
    accuracy: float
    """Share of examples in which every token of the last word is the likeliest one."""
    accuracy_error: float | None
    """Standard error of `accuracy`; None for one example."""
    perplexity: float
    """exp of the mean negative log-likelihood of a last word (of the word, not of a token)."""
    fingerprint: str
    """Equal for two results on the same examples: 16 hexadecimal digits."""


class EvaluationReport(Artifact):
    """The morning's numbers for one checkpoint on one fixed slice of validation tokens. What came
    in later has a default, so that older reports can be read."""

    step: int
    tokens: int
    """Predicted tokens in the slice."""
    loss: float
    """Mean cross-entropy, nats a token."""
    perplexity: float
    bits_per_byte: float
    samples: tuple[Sample, ...]
    standard_error: float | None = None
    """Of `loss`, nats, over the sequences of the slice (gpt.evaluation.heldout)."""
    loss_by_position: tuple[float, ...] = ()
    """Mean loss in equal parts of the context, the beginning first."""
    slice_fingerprint: str = ""
    """Equal for two reports on the same tokens."""
    sequence_losses: tuple[float, ...] = ()
    """Mean loss of each sequence of the slice, nats, in order: what two models on the same slice
    are compared by."""
    hellaswag: HellaSwagResult | None = None
    lambada: LambadaResult | None = None
