"""The page that goes with a published model, from what is known of it; nothing is made up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from gpt.artifacts import DatasetManifest, EvaluationReport
from gpt.config.schema import ModelSection, RunConfig
from gpt.model.io import tensor_shapes

SOURCES_SHOWN = 20


@dataclass(frozen=True)
class ModelCardData:
    """What is known of a model beside its weights; each may be missing."""

    name: str = "gpt"
    config: RunConfig | None = None
    dataset: DatasetManifest | None = None
    tokens_seen: int | None = None
    step: int | None = None
    report: EvaluationReport | None = None


def model_card(section: ModelSection, facts: ModelCardData) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads; the licence is left to the
    user, because only they know what the data allow."""
    parts = [
        _FRONT_MATTER,
        f"# {facts.name}",
        _model(section),
        _USE,
        _training(facts),
        _data(facts.dataset),
        render_evaluation(facts.report) if facts.report else "",
        _samples(facts.report),
        _LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
# Fill in an identifier as apache-2.0 or cc-by-4.0; see "Licence" below.
license:
---"""

_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
# In training an end-of-text stands before every document.
inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""

_LICENCE = """\
## Licence

To be filled in, here and as `license` at the top of this file: the terms under which the weights
may be used, which the licences of the data have a say in."""


def _model(section: ModelSection) -> str:
    network = {"gpt2": "GPT-2", "nanochat": "nanochat"}[section.architecture]
    parameters = sum(shape.numel() for shape in tensor_shapes(section).values())
    rows = {
        "network": f"{network} (`{_CLASSES[section.architecture]}`)",
        "parameters": f"{parameters:,}",
        "layers": section.n_layer,
        "heads": section.n_head,
        "width": section.n_embd,
        "context, tokens": f"{section.block_size:,}",
        "vocabulary": f"{section.vocab_size:,} rows; GPT-2's 50,257 tokens",
    }
    return f"A language model pretrained with overnight. It completes text.\n\n{_table(rows)}"


_CLASSES = {"gpt2": "GPT2LMHeadModel", "nanochat": "NanoChatForCausalLM"}


def _training(facts: ModelCardData) -> str:
    rows: dict[str, object] = {}
    if facts.tokens_seen is not None:
        rows["tokens seen"] = f"{facts.tokens_seen:,}"
    if facts.step is not None:
        rows["steps"] = f"{facts.step:,}"
    if facts.config:
        rows["tokens a step"] = f"{facts.config.tokens_per_step:,}"
        shown = ("optimizer.", "schedule.", "training.dtype", "training.seed", "model.dropout")
        for key, value in facts.config.flatten().items():
            if key.startswith(shown) and value is not None:
                rows[f"`{key}`"] = value
    return f"## Training\n\n{_table(rows)}" if rows else ""


def _data(dataset: DatasetManifest | None) -> str:
    if dataset is None:
        return ""
    training = dataset.train
    sources = dataset.sources[:SOURCES_SHOWN]
    lines = [
        f"- `{PurePath(source.path).name}`: {source.rows:,} rows, sha256 `{source.sha256}`"
        for source in sources
    ]
    if hidden := len(dataset.sources) - len(sources):
        lines.append(f"- and {hidden:,} files more")
    rows = {
        "training documents": f"{training.documents:,}",
        "training tokens": f"{training.tokens:,}",
        "training text, bytes": f"{training.text_bytes:,}",
        "held-out documents": f"{dataset.validation.documents:,}",
        "data set": f"`{dataset.fingerprint}`",
    }
    return f"## Data\n\n{_table(rows)}\n\nFrom these files:\n\n" + "\n".join(lines)


def render_evaluation(report: EvaluationReport) -> str:
    """Every number of a report, as Markdown."""
    rows: dict[str, object] = {
        "validation loss, nats a token": _with_error(report.loss, report.standard_error),
        "validation perplexity": f"{report.perplexity:.2f}",
        "bits a byte": f"{report.bits_per_byte:.4f}",
        "validation tokens": f"{report.tokens:,}",
    }
    if by_position := report.loss_by_position:
        part = "sixteenth of the context" if len(by_position) == 16 else "part of the context"
        rows[f"loss in the first and the last {part}"] = (
            f"{by_position[0]:.4f}, {by_position[-1]:.4f}"
        )
    if found := report.hellaswag:
        accuracy, error = found.normalized_accuracy, found.normalized_accuracy_error
        rows["HellaSwag, length-normalised accuracy"] = _with_error(accuracy, error)
        rows["HellaSwag, accuracy"] = _with_error(found.accuracy, found.accuracy_error)
        rows["HellaSwag, examples"] = f"{found.examples:,}"
    if last := report.lambada:
        rows["LAMBADA (OpenAI), accuracy"] = _with_error(last.accuracy, last.accuracy_error)
        rows["LAMBADA (OpenAI), perplexity"] = f"{last.perplexity:.2f}"
        rows["LAMBADA (OpenAI), examples"] = f"{last.examples:,}"
    return (
        f"## Evaluation\n\nAfter step {report.step:,}; ± is one standard error.\n\n{_table(rows)}"
    )


def _samples(report: EvaluationReport | None) -> str:
    if report is None or not report.samples:
        return ""
    samples = []
    for sample in report.samples:
        lines = f"**{sample.prompt}**{sample.text}".splitlines()
        samples.append("\n".join(f"> {line}" for line in lines))
    return "## What it writes\n\n" + "\n\n".join(samples)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _table(rows: Mapping[str, object]) -> str:
    lines: Iterable[str] = (f"| {key} | {value} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])
