"""The model card (README.md) of an exported model, from recorded values only."""

from dataclasses import dataclass
from pathlib import PurePath

from gpt.artifacts import DatasetManifest, EvaluationReport
from gpt.config.schema import ModelSection, RunConfig
from gpt.markdown import quote_samples, render_table
from gpt.model.io import tensor_shapes

SOURCES_SHOWN = 20


@dataclass(frozen=True)
class ModelCardData:
    """What is known about a model beside its weights; None if unknown."""

    name: str = "gpt"
    config: RunConfig | None = None
    dataset: DatasetManifest | None = None
    tokens_seen: int | None = None
    step: int | None = None
    report: EvaluationReport | None = None


def build_model_card(section: ModelSection, data: ModelCardData) -> str:
    """Return Markdown with the front matter of the Hugging Face Hub.

    The license is left empty, because it depends on the training data.
    """
    sections = [
        _render_training(data),
        _render_data(data.dataset),
        render_evaluation(data.report) if data.report else "",
    ]
    if data.report and data.report.samples:
        sections.append(f"## Samples\n\n{quote_samples(data.report.samples)}")
    return _CARD.format(
        name=data.name,
        model=_render_model(section),
        sections="".join(f"{text}\n\n" for text in sections if text),
    )


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
# Fill in an identifier, e.g. apache-2.0 or cc-by-4.0; see "License" below.
license:
---

# {name}

A language model pretrained with overnight. It completes text.

{model}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
# In training, every document starts with end-of-text.
inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{sections}## License

Fill in here, and as `license` at the top of this file, the terms under which the weights may be
used. The licenses of the training data may restrict them.
"""


def _render_model(section: ModelSection) -> str:
    parameters = sum(shape.numel() for shape in tensor_shapes(section).values())
    rows = {
        "network": _NETWORKS[section.architecture],
        "parameters": f"{parameters:,}",
        "layers": section.n_layer,
        "heads": section.n_head,
        "width": section.n_embd,
        "context, tokens": f"{section.block_size:,}",
        "vocabulary": f"{section.vocab_size:,} rows for GPT-2's 50,257 tokens",
    }
    return render_table(rows.items())


_NETWORKS = {"gpt2": "GPT-2 (`GPT2LMHeadModel`)", "nanochat": "nanochat (`NanoChatForCausalLM`)"}


def _render_training(data: ModelCardData) -> str:
    rows: dict[str, object] = {}
    if data.tokens_seen is not None:
        rows["tokens seen"] = f"{data.tokens_seen:,}"
    if data.step is not None:
        rows["steps"] = f"{data.step:,}"
    if data.config:
        rows["tokens per step"] = f"{data.config.tokens_per_step:,}"
        shown = ("optimizer.", "schedule.", "training.dtype", "training.seed", "model.dropout")
        for key, value in data.config.flatten().items():
            if key.startswith(shown) and value is not None:
                rows[f"`{key}`"] = value
    return f"## Training\n\n{render_table(rows.items())}" if rows else ""


def _render_data(dataset: DatasetManifest | None) -> str:
    if dataset is None:
        return ""
    training = dataset.train
    sources = dataset.sources[:SOURCES_SHOWN]
    lines = [
        f"- `{PurePath(source.path).name}`: {source.rows:,} rows, sha256 `{source.sha256}`"
        for source in sources
    ]
    if hidden := len(dataset.sources) - len(sources):
        lines.append(f"- and {hidden:,} more files")
    rows = {
        "training documents": f"{training.documents:,}",
        "training tokens": f"{training.tokens:,}",
        "training text, bytes": f"{training.text_bytes:,}",
        "held-out documents": f"{dataset.validation.documents:,}",
        "dataset": f"`{dataset.fingerprint}`",
    }
    return f"## Data\n\n{render_table(rows.items())}\n\nSource files:\n\n" + "\n".join(lines)


def render_evaluation(report: EvaluationReport) -> str:
    """Render every number of a report as Markdown."""
    rows: dict[str, object] = {
        "validation loss, nats per token": _with_error(report.loss, report.standard_error),
        "validation perplexity": f"{report.perplexity:.2f}",
        "bits per byte": f"{report.bits_per_byte:.4f}",
        "validation tokens": f"{report.tokens:,}",
    }
    if by_position := report.loss_by_position:
        part = "sixteenth of the context" if len(by_position) == 16 else "part of the context"
        rows[f"loss in the first and the last {part}"] = (
            f"{by_position[0]:.4f}, {by_position[-1]:.4f}"
        )
    if found := report.hellaswag:
        accuracy, error = found.normalized_accuracy, found.normalized_accuracy_error
        rows["HellaSwag, length-normalized accuracy"] = _with_error(accuracy, error)
        rows["HellaSwag, accuracy"] = _with_error(found.accuracy, found.accuracy_error)
        rows["HellaSwag, examples"] = f"{found.examples:,}"
    if last := report.lambada:
        rows["LAMBADA (OpenAI), accuracy"] = _with_error(last.accuracy, last.accuracy_error)
        rows["LAMBADA (OpenAI), perplexity"] = f"{last.perplexity:.2f}"
        rows["LAMBADA (OpenAI), examples"] = f"{last.examples:,}"
    note = f"After step {report.step:,}; ± is one standard error."
    return f"## Evaluation\n\n{note}\n\n{render_table(rows.items())}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
