"""The whole configuration of a run: its sections and every rule on a value; those between values
are in `gpt.config.rules`.

A config is TOML, merged with overrides while still a plain dict, then checked as a whole:
`load_config` reports every problem at once in one `ConfigError`. Values are frozen and strict
(no "512" for 512, unknown keys refused). Nothing here imports torch: an answer takes
milliseconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _listed(value: Any) -> Any:
    """One path as a list of one; strict pydantic wants the tuple itself after this."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Names the run's folder and its MLflow run."""
    root: Path = Path("runs")
    """Folder of everything that is written: data sets, checkpoints, MLflow, Prefect."""
    notify: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+/[^/]+$")], ...] = ()
    """Prefect blocks that are told how a run ended, as slack-webhook/me: any that notifies."""


class ModelSection(Section):
    architecture: Literal["gpt2", "nanochat"] = "gpt2"
    """gpt2: learned positions, LayerNorm, GELU, tied head. nanochat: rotary positions, RMSNorm,
    QK-norm, ReLU squared, untied head, capped logits."""
    n_layer: Annotated[int, Field(ge=1, le=1_000)]
    """Number of blocks."""
    n_head: Annotated[int, Field(ge=1, le=65_536)]
    """Attention heads a block; must divide n_embd."""
    n_embd: Annotated[int, Field(ge=1, le=65_536)]
    """Width of the residual stream."""
    block_size: Annotated[int, Field(ge=1, le=1_048_576)]
    """Context length, tokens."""
    vocab_size: Annotated[int, Field(ge=50_257, le=65_536)] = 50_304
    """Rows of the embedding; GPT-2's 50,257 ids padded to a multiple of 64."""
    dropout: Fraction = 0.0
    """Probability of dropping an activation; 0 for pretraining on data seen once."""
    bias: bool = False
    """Biases in linear layers and LayerNorms, as the original GPT-2 has them; gpt2 only."""


class DataSection(Section):
    source: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_listed),
        Field(min_length=1),
    ]
    """Parquet: a file, a glob, a directory (hive partitions too), an address such as
    hf://datasets/... or s3://..., or a list of those."""
    text_column: Annotated[str, Field(min_length=1)] = "text"
    """The column that holds the documents."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of documents kept out of training, chosen by a hash of their text."""
    tokens_per_shard: Annotated[int, Field(ge=1_000)] = 100_000_000
    """Most tokens in one shard file (2 bytes each)."""
    where: str = ""
    """Only rows for which this polars SQL condition holds, as language_score > 0.9; empty: all."""
    min_length: Annotated[int, Field(ge=0)] = 0
    """Fewest characters of a document; shorter ones are left out."""
    max_length: Count | None = None
    """Most characters of a document; longer ones are left out."""
    drop_duplicates: bool = False
    """Keep the first of documents whose text is exactly the same."""
    max_tokens: Count | None = None
    """Most tokens of the data set, both sides together: the document that would pass it and all
    after it are left out."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """fail: stop at a file that cannot be used. skip: leave it out, count it and say so."""
    engine: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """tiktoken, or gigatoken checked against it; auto: gigatoken where it is installed. The tokens
    are the same."""
    workers: Annotated[int, Field(ge=1, le=1_024)] | None = None
    """Processes that tokenise; left out: one for each CPU. The tokens are the same."""
    runner: Literal["local", "dask", "ray"] = "local"
    """Where files are tokenised: in processes of this machine, or on a Dask or Ray cluster that
    reads and writes the same paths. The tokens are the same."""
    cluster: str = ""
    """Address of the Dask scheduler or Ray cluster, as tcp://host:8786 or ray://host:10001; empty:
    one on this machine for as long as it is needed."""
    store: str = ""
    """Where finished data sets are kept for other machines, a folder or an address as
    s3://bucket/data: fetched from there instead of made, and put there; empty: nowhere else."""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw: for everything. muon: Muon for the matrices of the blocks, AdamW for the rest."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Highest learning rate, of Muon's matrices with muon; left out: by rule from width and tokens
    a step (gpt.schedule)."""
    embedding_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Highest learning rate of the embedding, with muon; left out: by rule."""
    head_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Highest learning rate of an untied head and of vectors, with muon; left out: by rule."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decay of the matrices (with muon: of Muon's); vectors have none."""
    beta1: Fraction = 0.9
    """AdamW's first-moment decay."""
    beta2: Fraction = 0.95
    """AdamW's second-moment decay."""
    momentum: Fraction = 0.95
    """Muon's momentum."""
    momentum_warmup_steps: Annotated[int, Field(ge=0)] = 300
    """Steps over which Muon's momentum rises from 0.85, at most a tenth of the run."""
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleSection(Section):
    name: Literal["cosine", "linear"] = "cosine"
    """cosine: half a cosine down to the last step. linear: constant, then straight down over the
    last cooldown_fraction of the steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    cooldown_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Share of the steps in which a linear schedule falls."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Learning rate at the last step, as a share of the highest."""


class TrainingSection(Section):
    batch_size: Count
    """Micro-batch, sequences: what is on the device at once."""
    grad_acc: Count
    """Micro-batches a step; tokens a step = batch_size * grad_acc * block_size."""
    max_steps: Count
    """Optimizer steps of the whole run."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Autocast type on CUDA (bfloat16 turns to float16 where the card lacks it); a CPU always
    computes in float32."""
    compile: bool = True
    """Compile the network and the loss; where there is no compiler, a line says so."""
    loss_chunk_rows: Count | None = None
    """Tokens whose logits exist at once; left out: 2,048 on CUDA, 512 on a CPU (128 uncompiled)."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in backward: less memory, about a
    third more work."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of the weights, the data order and dropout."""
    init_from: str = ""
    """Folder of a model whose weights to begin with, as `overnight import-hf` makes one or a
    checkpoint is; empty: random weights."""
    checkpoint_interval: Count = 250
    """Steps between checkpoints; the last step always writes one."""
    checkpoints_kept: Count = 2
    """Newest checkpoints that stay on disk, beside the one with the best validation loss."""
    checkpoint_keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of every so many steps stay on disk for good; 0: none does."""
    spike_sigma: Annotated[float, Field(ge=0.0)] = 6.0
    """Standard deviations above the mean of the last 128 losses from which a loss is a spike that
    sends the run back to the last checkpoint and over that batch; 0: none is."""
    recovery_attempts: Annotated[int, Field(ge=0)] = 3
    """Returns to a checkpoint after numbers went wrong in the same place before training stops."""
    log_interval: Count = 10
    """Steps between lines in the terminal; every step goes to MLflow."""


class EvaluationSection(Section):
    interval: Count = 250
    """Steps between validation losses during training; also taken before step 1 and at the end."""
    tokens: Count = 1_048_576
    """Length of the fixed validation slice, tokens; the same for every config on the data."""
    interval_tokens: Count = 131_072
    """How much of the slice's beginning is evaluated during training; all of it at the end."""
    batch_size: Count = 8
    """Sequences at once when evaluating; independent of training."""
    prompts: tuple[str, ...] = ("The", "In the beginning", "Once upon a time")
    """Prompts of the samples in the report."""
    sample_tokens: Annotated[int, Field(ge=0)] = 64
    """Tokens generated for each prompt."""
    hellaswag: str = ""
    """HellaSwag's Parquet, a file or an address, to score the trained model on; empty: left out."""
    lambada: str = ""
    """LAMBADA's Parquet (OpenAI's variant), likewise."""
    benchmark_examples: Count | None = None
    """Score the first so many examples of each; left out: all."""


class TrackingSection(Section):
    experiment: Annotated[str, Field(min_length=1)] = "overnight"
    """MLflow experiment."""
    uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else SQLite under run.root."""
    registered_model: Annotated[str, Field(pattern=r"^[^/:@'\"]*$", max_length=256)] = "gpt"
    """Name in MLflow's model registry that trained models become versions of; empty: none does."""


class HardwareSection(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto takes the GPU where there is one."""
    devices: Annotated[int, Field(ge=1, le=1_024)] = 1
    """GPUs of each machine that train together (processes, on a CPU); grad_acc is shared out among
    them."""
    nodes: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Machines that train together; start the same command on each."""
    rendezvous: str = ""
    """host:port where the machines find one another, of one of them; empty with one machine."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each device holds the whole model. fsdp: each holds its share of weights, gradients and
    optimizer states. auto: ddp where it fits."""
    timeout_seconds: Annotated[int, Field(ge=1)] = 600
    """How long devices wait for one that does not answer before they start again from the last
    checkpoint."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """How often they do so before the run fails."""


class RunConfig(Section):
    """Everything that decides a run. Built by `load_config` or `build_config` only, which apply
    the rules between values as well."""

    run: RunSection
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
    hardware: HardwareSection = HardwareSection()

    @property
    def sequences_per_step(self) -> int:
        return self.training.batch_size * self.training.grad_acc

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.model.block_size

    def flatten(self) -> dict[str, Any]:
        """Every value by its dotted key, as it would stand in JSON."""
        return dict(_flatten(self.model_dump(mode="json")))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fingerprint(values: Mapping[str, Any]) -> str:
    """Hash of plain values, the same in every process: hexadecimal, 64 digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
