"""The sections and values of a config. Rules between values are in `gpt.config.rules`.

Values are frozen and strict: "512" is refused for 512, and so are unknown keys. The docstring of a
field appears in error messages, in configs/README.md and in configs/schema.json. Nothing here
imports torch, so checking a config takes milliseconds.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]
DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$"


def _as_tuple(value: Any) -> Any:
    """Accept one path for a list of paths; strict pydantic wants a tuple."""
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
    """Name of the run folder and of the MLflow run."""
    root: Path = Path("runs")
    """Folder for all output: datasets, checkpoints, MLflow, Prefect."""
    notify: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+/[^/]+$")], ...] = ()
    """Prefect notification blocks to notify when a run ends, e.g. slack-webhook/me."""


class ModelSection(Section):
    architecture: Literal["gpt2", "nanochat"] = "gpt2"
    """gpt2: learned positions, LayerNorm, GELU, tied head. nanochat: rotary positions, RMSNorm,
    QK-norm, ReLU squared, untied head, capped logits."""
    n_layer: Annotated[int, Field(ge=1, le=1_000)]
    """Number of transformer blocks."""
    n_head: Annotated[int, Field(ge=1, le=65_536)]
    """Attention heads per block; must divide n_embd."""
    n_embd: Annotated[int, Field(ge=1, le=65_536)]
    """Width of the residual stream."""
    block_size: Annotated[int, Field(ge=1, le=1_048_576)]
    """Context length in tokens."""
    vocab_size: Annotated[int, Field(ge=50_257, le=65_536)] = 50_304
    """Rows of the embedding; default: GPT-2's 50,257 tokens padded to a multiple of 64."""
    dropout: Fraction = 0.0
    """Dropout probability; use 0 for pretraining that sees each token once."""
    bias: bool = False
    """Biases in linear layers and LayerNorms, as in the original GPT-2; gpt2 only."""


class DataSection(Section):
    source: Annotated[
        tuple[Text, ...],
        BeforeValidator(
            _as_tuple, json_schema_input_type=Text | Annotated[list[Text], Field(min_length=1)]
        ),
        Field(min_length=1),
    ]
    """Parquet to train on: a file, a glob, a directory (including hive partitions), an address such
    as hf://datasets/... or s3://..., or a list of these."""
    text_column: Text = "text"
    """Column that holds the documents."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Fraction of documents in the validation split, selected by a hash of their text."""
    tokens_per_shard: Annotated[int, Field(ge=1_000)] = 100_000_000
    """Maximum number of tokens per shard file (2 bytes each)."""
    where: str = ""
    """Keep only rows that satisfy this polars SQL condition, e.g. language_score > 0.9; empty: all
    rows."""
    min_length: Annotated[int, Field(ge=0)] = 0
    """Skip documents with fewer characters."""
    max_length: Count | None = None
    """Skip documents with more characters; default: no limit."""
    drop_duplicates: bool = False
    """Keep only the first of several documents with identical text."""
    max_tokens: Count | None = None
    """Maximum number of tokens of both splits together: the document that would exceed it and all
    later ones are skipped; default: no limit."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """fail: stop at an unusable file. skip: skip it, count it and log a warning."""
    engine: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """Tokenizer: tiktoken, or gigatoken verified against it; auto: gigatoken if it is installed.
    The tokens are the same."""
    workers: Annotated[int, Field(ge=1, le=1_024)] | None = None
    """Number of tokenizing processes; default: one per CPU. The tokens are the same."""
    runner: Literal["local", "dask", "ray"] = "local"
    """Where files are tokenized: in processes on this machine, or on a Dask or Ray cluster that
    reads and writes the same paths. The tokens are the same."""
    cluster: str = ""
    """Address of the Dask scheduler or Ray cluster, e.g. tcp://host:8786 or ray://host:10001;
    empty: start a temporary one on this machine."""
    store: str = ""
    """Folder or address, e.g. s3://bucket/data, that shares finished datasets between machines: a
    dataset found there is downloaded, a new one is uploaded; empty: do not share."""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all parameters. muon: Muon for the matrices of the blocks, AdamW for the
    rest."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate (with muon: of Muon's matrices); default: derived from width and tokens
    per step (gpt/schedule.py)."""
    embedding_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the embedding, with muon; default: derived likewise."""
    head_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of an untied head and of vectors, with muon; default: derived likewise."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight decay of matrices (with muon: of Muon's); vectors have none."""
    beta1: Fraction = 0.9
    """AdamW's first-moment decay rate."""
    beta2: Fraction = 0.95
    """AdamW's second-moment decay rate."""
    momentum: Fraction = 0.95
    """Muon's momentum."""
    momentum_warmup_steps: Annotated[int, Field(ge=0)] = 300
    """Steps over which Muon's momentum rises from 0.85; at most a tenth of the run."""
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Clip gradients to this global norm; 0: no clipping."""


class ScheduleSection(Section):
    name: Literal["cosine", "linear"] = "cosine"
    """cosine: cosine decay until the last step. linear: constant, then linear decay over the last
    cooldown_fraction of the steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    cooldown_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Fraction of the steps in which a linear schedule decays."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Learning rate at the last step, as a fraction of the peak."""


class TrainingSection(Section):
    batch_size: Count
    """Sequences per micro-batch: what the device processes at once."""
    grad_acc: Count
    """Micro-batches per step; tokens per step = batch_size * grad_acc * block_size."""
    max_steps: Count
    """Optimizer steps of the whole run."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Autocast dtype on CUDA (float16 if the GPU lacks bfloat16); a CPU always computes in
    float32."""
    compile: bool = True
    """Compile the network and the loss with torch.compile; without a compiler, log a line and run
    uncompiled."""
    loss_chunk_rows: Count | None = None
    """Tokens whose logits are computed at once; default: 2,048 on CUDA, 512 on a CPU (128
    uncompiled)."""
    activation_checkpointing: bool = False
    """Store only the input of each block and recompute the rest in the backward pass: less memory,
    about a third more FLOPs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of the initial weights, the data order and dropout."""
    init_from: str = ""
    """Folder of a model whose weights to start from: a checkpoint, or one made by `overnight
    import-hf`; empty: random weights."""
    checkpoint_interval: Count = 250
    """Steps between checkpoints; the last step always writes one."""
    checkpoints_kept: Count = 2
    """Number of latest checkpoints to keep, besides the one with the best validation loss."""
    checkpoint_keep_every: Annotated[int, Field(ge=0)] = 0
    """Keep the checkpoints of multiples of this many steps forever; 0: keep none."""
    spike_sigma: Annotated[float, Field(ge=0.0)] = 6.0
    """A loss this many standard deviations above the mean of the last 128 is a spike: the run rolls
    back to the last checkpoint and skips that batch; 0: never."""
    recovery_attempts: Annotated[int, Field(ge=0)] = 3
    """Rollbacks at the same place, after a spike or a non-finite loss, before training stops."""
    log_interval: Count = 10
    """Steps between lines in the terminal; MLflow gets every step."""


class EvaluationSection(Section):
    interval: Count = 250
    """Steps between validation losses during training, besides those before step 1 and at the
    end."""
    tokens: Count = 1_048_576
    """Tokens of the fixed validation slice; the same for every config on the same data."""
    interval_tokens: Count = 131_072
    """Tokens, from the beginning of the slice, to evaluate during training; at the end all of it
    is."""
    batch_size: Count = 8
    """Sequences per batch in evaluation; independent of training."""
    prompts: tuple[str, ...] = ("The", "In the beginning", "Once upon a time")
    """Prompts of the samples in the report."""
    sample_tokens: Annotated[int, Field(ge=0)] = 64
    """Tokens to generate per prompt."""
    hellaswag: str = ""
    """HellaSwag as Parquet, a file or an address, to score the trained model on; empty: skip."""
    lambada: str = ""
    """LAMBADA (OpenAI's variant) as Parquet, likewise."""
    benchmark_examples: Count | None = None
    """Score only this many examples of each benchmark; default: all."""


class TrackingSection(Section):
    experiment: Text = "overnight"
    """MLflow experiment."""
    uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, otherwise SQLite under run.root."""
    registered_model: Annotated[str, Field(pattern=r"^[^/:@'\"]*$", max_length=256)] = "gpt"
    """Name in MLflow's model registry under which to register trained models; empty: do not
    register."""


class HardwareSection(Section):
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] = "auto"
    """auto, cpu, cuda or cuda:INDEX; auto: the GPU if there is one."""
    devices: Annotated[int, Field(ge=1, le=1_024)] = 1
    """GPUs per machine that train together (on a CPU: processes); they share a step's
    micro-batches."""
    nodes: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Machines that train together; start the same command on each."""
    rendezvous: str = ""
    """host:port of one of the machines, where they connect; empty with one machine."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each device holds the whole model. fsdp: each holds a share of weights, gradients and
    optimizer states. auto: ddp if it fits."""
    timeout_seconds: Annotated[int, Field(ge=1)] = 600
    """How long devices wait for one that does not respond before they restart from the last
    checkpoint."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """Number of such restarts before the run fails."""

    @property
    def world_size(self) -> int:
        """Devices of all machines together."""
        return self.devices * self.nodes


class RunConfig(Section):
    """The complete config of a run. Build it with `load_config` or `build_config`, which also apply
    the rules between values."""

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

    @property
    def total_tokens(self) -> int:
        """Tokens that the run trains on, repetitions included."""
        return self.training.max_steps * self.tokens_per_step

    @property
    def flops_per_token(self) -> int:
        """FLOPs of training per token: 6 N + 12 n_layer n_embd block_size.

        This is the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) and of
        nanoGPT's `estimate_mfu`, so that utilizations compare. N counts the weights that take part
        in matrix products: those of the blocks and of the head, which is the embedding if they are
        tied. An untied embedding and learned positions are looked up and do not count; nor do
        vectors. The factor 6 is a multiplication and an addition, once forward and twice backward.
        The second term is attention's scores and sums over the whole block, forward and backward,
        as if it were not causal. Recomputation by activation checkpointing does not count.
        """
        model = self.model
        multiplied = 12 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd
        return 6 * multiplied + 12 * model.n_layer * model.n_embd * model.block_size

    def flatten(self) -> dict[str, Any]:
        """Return every value by its dotted key, as in JSON."""
        sections = self.model_dump(mode="json").items()
        return {f"{name}.{key}": value for name, keys in sections for key, value in keys.items()}


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values in hexadecimal, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
