"""Show reports: one in the terminal, several side by side, one as Markdown.

The rows of a report are made once, as (name, text), for the terminal and for Markdown.
"""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpt.errors import Problem
from gpt.hardware.interconnect import Link
from gpt.markdown import render_table
from gpt.preflight.checks import gb, gib
from gpt.preflight.figures import Figures
from gpt.preflight.report import Report
from gpt.preflight.scaling import BASIS, Scaling
from gpt.preflight.suggestions import Suggestion
from gpt.schedule import peak_learning_rates

Rows = Iterator[tuple[str, str]]
UNKNOWN = "n/a"
FITS = {True: "yes", False: "no", None: UNKNOWN}
SHARDINGS = {
    "ddp": "each device holds the whole model",
    "fsdp": "weights, optimizer states and reduced gradients are sharded",
}


def summarize_report(report: Report) -> str:
    """Return "good", "good, with N warnings" or "blocked: N problems"."""
    for start, noun, found in (
        ("blocked:", "problem", report.problems),
        ("good, with", "warning", report.warnings),
    ):
        if found:
            return f"{start} {len(found)} {noun}{'s' if len(found) > 1 else ''}"
    return "good"


def sections(report: Report) -> Iterator[tuple[str, Rows]]:
    """Yield title and rows of each section of figures; nothing for an invalid config."""
    figures = report.figures
    if figures is None:
        return
    world_size = figures.config.hardware.world_size
    yield "model", _model_rows(figures)
    title = "memory of the GPU" if world_size == 1 else f"memory of each of {world_size:,} GPUs"
    yield title, _memory_rows(figures)
    yield "compute", _compute_rows(figures)
    if world_size > 1:
        yield "several devices", _scaling_rows(figures)
    yield "data and disk", _data_rows(figures)


def _model_rows(figures: Figures) -> Rows:
    config, parameters = figures.config, figures.parameters
    model, optimizer = config.model, config.optimizer
    size = f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}"
    yield "network", f"{model.architecture}, {size}, context {model.block_size:,} tokens"
    yield "parameters", f"{parameters.total:,} ({'tied' if parameters.tied else 'untied'} head)"
    counts = [(_name(group), count / 1e6) for group, count in parameters.groups().items() if count]
    yield "", ", ".join(f"{group} {millions:.1f}M" for group, millions in counts)
    rate = f"learning rate {peak_learning_rates(config).matrices:.2g}"
    default = "" if optimizer.learning_rate else " (default)"
    steps = config.schedule.warmup_steps
    warmup = f" after {steps:,} warm-up steps" if steps else ""
    yield "optimizer", f"{optimizer.name}, {rate}{default}, {config.schedule.name}{warmup}"


def _memory_rows(figures: Figures) -> Rows:
    memory, gpu = figures.memory, figures.gpu
    yield from ((_name(part), gib(size)) for part, size in memory.parts.items() if size)
    yield "attention", f"{memory.attention} kernels"
    yield "peak, uncompiled", f"{gib(memory.peak_bytes)}, at: {_name(memory.moment)}"
    saved = memory.peak_bytes - memory.compiled_bytes
    if saved > 0:
        yield "saved by compiling", gib(saved)
    overheads = memory.overheads.items()
    yield from ((f"{_name(part)}, assumed", gib(size)) for part, size in overheads if size)
    yield "evaluation", gib(memory.evaluation_bytes)
    available = f" of {gib(gpu.memory_bytes)} on {gpu.name}" if gpu.memory_bytes else ""
    fits = {True: ": fits", False: ": does not fit", None: ""}[figures.fits]
    yield "needed", f"{gib(memory.needed_bytes)}{available}{fits}"


def _compute_rows(figures: Figures) -> Rows:
    config, rate = figures.config, figures.throughput.tokens_per_second
    training, tokens, flops = config.training, config.total_tokens, config.flops_per_token
    sequences = f"{training.batch_size} x {training.grad_acc} sequences"
    yield "step", f"{sequences} = {config.tokens_per_step:,} tokens"
    yield "run", f"{training.max_steps:,} steps = {tokens:,} tokens"
    yield "FLOPs", f"{flops / 1e6:,.0f} million per token, {flops * tokens / 1e18:,.3g} x 10^18"
    one_device = config.hardware.world_size == 1
    name = "throughput" if one_device else "throughput, one GPU"
    yield name, UNKNOWN if rate is None else f"{rate:,.0f} tokens/s"
    if one_device:
        yield "time", f"{format_hours(figures.hours_range)} on {figures.gpu.name}"
    yield "basis", figures.throughput.basis


def _scaling_rows(figures: Figures) -> Rows:
    config, scaling = figures.config, figures.scaling
    hardware, training = config.hardware, config.training
    machines = f"{hardware.nodes:,} machines x " if hardware.nodes > 1 else ""
    each = f"{training.grad_acc // hardware.world_size:,} of {training.grad_acc:,} micro-batches"
    devices = f"{machines}{hardware.devices:,} {figures.gpu.name} = {hardware.world_size:,}"
    yield "devices", f"{devices}, each {each} per step"
    yield "sharding", f"{figures.sharding}: {SHARDINGS[figures.sharding]}"
    if scaling is None:
        yield "communication and time", "n/a: throughput or interconnect of this GPU is unknown"
        return
    sent = f"gradients {gb(scaling.gradient_bytes)}"
    if scaling.gathered_bytes:
        sent += f", weights {gb(scaling.micro_batches * scaling.gathered_bytes)}"
    yield "sent per device and step", f"{gb(scaling.sent_bytes)}: {sent}, in float32"
    yield "within a machine", _link(scaling.intra_node)
    if scaling.nodes > 1:
        yield "between machines", _link(scaling.network)
    compute = f"{_seconds(scaling.compute_seconds)} of computation"
    communication = f"{_seconds(scaling.communication_seconds)} of communication"
    full, none = map(_seconds, scaling.step_seconds)
    yield "step", f"{compute}, {communication}: {full} with full overlap, {none} with none"
    full, none = (f"{share:.0%}" for share in scaling.efficiency)
    yield "efficiency", f"{full} with full overlap, {none} with none"
    full, none = map(_hours, scaling.hours(training.max_steps))
    yield "time", f"{full} with full overlap, {none} with none"
    yield "network-bound", _network_bound(scaling)
    batch_size = max(1, math.ceil(training.batch_size * scaling.needed_factor))
    needed = scaling.link.bytes_per_second * scaling.needed_factor
    link = f"a link of {gb(needed)}/s ({needed * 8 / 1e9:,.0f} Gbit/s)"
    yield "", f"full overlap from training.batch_size = {batch_size:,}, or with {link}"
    yield "basis", BASIS


def _link(link: Link) -> str:
    return f"{link.name}: {gb(link.bytes_per_second)}/s each way; {link.source}"


def _network_bound(scaling: Scaling) -> str:
    name = scaling.link.name
    here = f"no: the {name} is fast enough for full overlap"
    if scaling.is_network_bound:
        here = f"yes: a device waits {_seconds(scaling.wait_seconds)} per step for the {name}"
    if (bound_from := scaling.network_bound_from) is None:
        return f"{here}; nor with more machines"
    devices, nodes = bound_from
    place = f"{nodes:,} machines of {devices:,}" if nodes > 1 else f"{devices:,} devices"
    return f"{here}; with this micro-batch, from {place}"


def _data_rows(figures: Figures) -> Rows:
    data, disk = figures.data, figures.disk
    yield "data", ", ".join(figures.config.data.source)
    epochs = "" if figures.epochs is None else f"; the run makes {figures.epochs:,.2f} epochs"
    train = UNKNOWN if data.train_tokens is None else f"{data.train_tokens:,} tokens"
    yield "training split", f"{train}{epochs}"
    yield "basis", data.basis
    parts = ", ".join(f"{_name(part)} {gb(size)}" for part, size in disk.items() if size)
    free = UNKNOWN if figures.free_disk_bytes is None else gb(figures.free_disk_bytes)
    yield "disk", f"{gb(sum(disk.values()))} of {free} free: {parts}"


def _name(key: str) -> str:
    return key.replace("_", " ").replace("cuda", "CUDA")


def _hours(count: float | None) -> str:
    if count is None:
        return UNKNOWN
    return f"{count:,.1f} hours" if count >= 1 else f"{count * 60:,.1f} minutes"


def format_hours(bounds: tuple[float, float] | None) -> str:
    """Format a range of hours to two digits, e.g. "8 to 10 hours"; "n/a" for None."""
    if bounds is None:
        return UNKNOWN
    factor, unit = (1, "hours") if bounds[1] >= 1 else (60, "minutes")
    low, high = (f"{float(f'{count * factor:.2g}'):,g}" for count in bounds)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _seconds(count: float) -> str:
    return f"{count:,.2f} s" if count >= 1 else f"{count * 1000:,.1f} ms"


NUMBERS = {"head size", "parameters", "needed", "tokens/step", "tokens", "tokens/s", "time"}
"""Right-aligned columns."""
SUGGESTION_HEADS = ("for", "set", "head size", "parameters", "fits")


def _suggestion_row(suggestion: Suggestion) -> tuple[str, ...]:
    count = suggestion.parameters
    return (
        suggestion.key,
        suggestion.as_overrides(),
        str(suggestion.head_size),
        UNKNOWN if count is None else f"{count / 1e6:.1f}M",
        FITS[suggestion.fits],
    )


def print_report(report: Report, console: Console) -> None:
    """Print one report in full."""
    style = "bold red" if report.blocked else "bold yellow" if report.warnings else "bold green"
    summary = (summarize_report(report), style)
    parts: list[RenderableType] = [Text.assemble((f"{report.path}: ", "bold"), summary)]
    for title, rows in sections(report):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=22)
        grid.add_column(overflow="fold")
        for name, text in rows:
            grid.add_row(Text(name, "dim"), Text(text))
        parts += [Text(f"\n{title}", "bold"), Padding.indent(grid, 2)]
    for kind, problems, style in (
        ("problem", report.problems, "red"),
        ("warning", report.warnings, "yellow"),
    ):
        for problem in problems:
            parts.append(Text.assemble("\n", (f"{kind}  ", style), (problem.subject, "bold")))
            parts.append(Padding.indent(Text(f"{problem.rule}\n-> {problem.remedy}"), 4))
    if report.suggestions:
        choices = [_suggestion_row(suggestion) for suggestion in report.suggestions]
        table = _table(SUGGESTION_HEADS, choices, "dim")
        parts += [Text("\nsuggestions for --set", "bold"), Padding.indent(table, 2)]
    console.print(Group(*parts))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=style)
    for head in heads:
        table.add_column(
            head,
            justify="right" if head in NUMBERS else "left",
            overflow="fold",
            no_wrap=head == "parameters",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


COMPARISON_HEADS = (
    *("config", "network", "parameters", "needed", "fits"),
    *("tokens/step", "tokens", "tokens/s", "time", "verdict"),
)


def print_reports(reports: Sequence[Report], console: Console) -> None:
    """Print several reports as one table, then each problem and warning once."""
    rows = [_comparison_row(report) for report in reports]
    console.print(_table(COMPARISON_HEADS, rows, "bold"))
    console.print(Text(f"on {reports[0].gpu.name}", "dim"))
    for basis in dict.fromkeys(r.figures.throughput.basis for r in reports if r.figures):
        console.print(Text(f"throughput: {basis}", "dim"))
    paths: dict[Problem, list[str]] = {}
    for report in reports:
        for problem in (*report.problems, *report.warnings):
            paths.setdefault(problem, []).append(report.path)
    for problem, having in paths.items():
        console.print(Text.assemble("\n", (", ".join(having), "bold"), f"\n  {problem}"))


def _comparison_row(report: Report) -> tuple[str, ...]:
    figures = report.figures
    if figures is None:
        unknown = [UNKNOWN] * (len(COMPARISON_HEADS) - 2)
        return (report.path, *unknown, summarize_report(report))
    config, rate = figures.config, figures.tokens_per_second
    model = config.model
    return (
        report.path,
        f"{model.architecture} {model.n_layer}/{model.n_head}/{model.n_embd}",
        f"{figures.parameters.total / 1e6:.1f}M",
        gib(figures.memory.needed_bytes),
        FITS[figures.fits],
        f"{config.tokens_per_step:,}",
        f"{config.total_tokens / 1e9:.2f}B",
        UNKNOWN if rate is None else f"{rate:,.0f}",
        format_hours(figures.hours_range),
        summarize_report(report),
    )


def render_markdown(report: Report) -> str:
    """Return the report as Markdown, for an artifact of a Prefect run."""
    lines = [f"# {report.path}: {summarize_report(report)}"]
    for title, problems in (("Problems", report.problems), ("Warnings", report.warnings)):
        if problems:
            lines += ["", f"## {title}", ""]
            lines += [f"- **`{p.subject}`** {p.rule}\n  → {p.remedy}" for p in problems]
    if report.suggestions:
        rows = [_suggestion_row(suggestion) for suggestion in report.suggestions]
        lines += ["", "## Suggestions", "", render_table(rows, SUGGESTION_HEADS)]
    for title, section in sections(report):
        lines += ["", f"## {title.capitalize()}", "", render_table(section)]
    return "\n".join(lines) + "\n"
