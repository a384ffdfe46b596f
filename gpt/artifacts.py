"""Records passed between stages: small, frozen, and stored as JSON.

They never hold a tensor, a module or an open file; they name the folder that has the data.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Artifact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFile(Artifact):
    """A Parquet file of a dataset."""

    path: str
    size_bytes: int
    sha256: str
    rows: int


class SkippedFile(Artifact):
    """A file skipped because of `data.on_bad_file = "skip"`, and why."""

    path: str
    reason: str


class Shard(Artifact):
    """A token file in the dataset's folder."""

    name: str
    tokens: int
    sha256: str


class Split(Artifact):
    """The training or validation split. `tokens` includes one end-of-text token per document."""

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    text_bytes: int


class DatasetManifest(Artifact):
    """A tokenized dataset. The manifest is written last, so a folder that has one is complete.

    `fingerprint` hashes the bytes of the sources and every setting that affects the tokens.
    """

    fingerprint: str
    folder: Path = Path()
    """Where the dataset is; not stored in the file, so that it can be moved."""
    tokenizer: str
    ranks_sha256: str
    text_column: str
    validation_fraction: float
    sources: tuple[SourceFile, ...]
    train: Split
    validation: Split
    skipped: dict[str, int]
    """Rows skipped, by reason: "null", "empty", and by settings "where", "short", "long",
    "duplicate", "max_tokens"."""
    skipped_files: tuple[SkippedFile, ...] = ()
    settings: dict[str, str | int | float | bool | None] = {}
    """Other values of [data] that affect the tokens."""
    engine: str = "tiktoken"
    """The encoder used; all encoders give the same tokens."""
    notes: tuple[str, ...] = ()
    """Notes for the user, e.g. why the build fell back to the slower encoder."""
    document_lengths: tuple[int, ...] = ()
    """Histogram of document lengths: entry k counts documents of 2^(k-1) to 2^k - 1 tokens,
    excluding end-of-text."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.train.shards + self.validation.shards


class CheckpointRef(Artifact):
    """A complete checkpoint: a folder with weights, optimizer state and position in the data."""

    folder: Path
    step: int
    tokens_seen: int
    finished: bool
    """Whether this is the last step of the config."""


class Sample(Artifact):
    prompt: str
    text: str


class HellaSwagResult(Artifact):
    """Accuracy at choosing the right one of four endings (gpt.evaluation.benchmarks)."""

    examples: int
    accuracy: float
    """Fraction of examples whose right ending has the highest log-likelihood; chance is 0.25."""
    accuracy_error: float | None
    """Standard error of `accuracy`; None for one example."""
    normalized_accuracy: float
    """The same by log-likelihood per byte of the ending: the number usually reported."""
    normalized_accuracy_error: float | None
    fingerprint: str
    """16 hexadecimal digits; equal for results on the same examples."""


class LambadaResult(Artifact):
    """Accuracy at predicting the last word of a passage (gpt.evaluation.benchmarks)."""

    examples: int
    accuracy: float
    """Fraction of examples in which every token of the last word is the most likely one."""
    accuracy_error: float | None
    """Standard error of `accuracy`; None for one example."""
    perplexity: float
    """exp of the mean negative log-likelihood per last word (not per token)."""
    fingerprint: str
    """16 hexadecimal digits; equal for results on the same examples."""


class HeldoutLoss(Artifact):
    """The loss of a model on a text. Fields added later have defaults, so that older reports can
    still be read."""

    tokens: int
    """Predicted tokens."""
    loss: float
    """Mean cross-entropy, nats per token."""
    perplexity: float
    bits_per_byte: float
    """Over the UTF-8 bytes of the predicted tokens (end-of-text has none), so that models with
    different tokenizers can be compared."""
    standard_error: float | None = None
    """Of `loss`, nats: the sample standard deviation of the sequence losses divided by the square
    root of their number; None for a single sequence. It is rather too small, because sequences of
    one document are similar. It says how much another slice would differ; between two models on
    the same slice most of that cancels (`gpt.evaluation.significance`)."""
    loss_by_position: tuple[float, ...] = ()
    """Mean loss in each sixteenth of the context, in order."""
    sequence_losses: tuple[float, ...] = ()
    """Mean loss of each sequence, in order; two models on the same slice are compared by these."""
    slice_fingerprint: str = ""
    """Hash of the predicted tokens in order, 16 hexadecimal digits: equal for two results on the
    same tokens, whatever the context length of the models."""


class EvaluationReport(HeldoutLoss):
    """The evaluation of one checkpoint on a fixed slice of the validation tokens."""

    step: int
    samples: tuple[Sample, ...]
    hellaswag: HellaSwagResult | None = None
    lambada: LambadaResult | None = None
