"""A report as people read it: in the terminal, as Markdown, and several side by side.

The rows are made once, as (name, text), and shown in each form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpt.errors import Problem
from gpt.hardware.flops import flops_per_token
from gpt.preflight.checks import gb, gib
from gpt.preflight.report import Figures, Report
from gpt.preflight.scaling_render import scaling_rows
from gpt.preflight.suggestions import Suggestion
from gpt.preflight.time import total_tokens
from gpt.schedule import peak_learning_rates

Rows = list[tuple[str, str]]
NONE = "n/a"


def summarize_report(report: Report) -> str:
    """One word and its reason."""
    if report.problems:
        count = len(report.problems)
        return f"blocked: {count} problem{'s' if count > 1 else ''}"
    if report.warnings:
        count = len(report.warnings)
        return f"good, with {count} warning{'s' if count > 1 else ''}"
    return "good"


# --- the rows ------------------------------------------------------------------------------------


def sections(report: Report) -> Iterator[tuple[str, Rows]]:
    """The figures, section by section; none for a config that is wrong."""
    figures = report.figures
    if figures is None:
        return
    yield "model", _model_rows(figures)
    each = "" if figures.layout.devices == 1 else f", each of {figures.layout.devices:,}"
    yield f"memory on the card{each}", _memory_rows(figures, report)
    yield "work", _work_rows(figures, report)
    if figures.layout.devices > 1:
        yield "many devices", scaling_rows(figures, report.target.name)
    yield "data and disk", _data_rows(figures)


def _model_rows(figures: Figures) -> Rows:
    config, parameters = figures.config, figures.parameters
    model, optimizer = config.model, config.optimizer
    rate = peak_learning_rates(config).matrices
    by_rule = "" if optimizer.learning_rate else " by rule"
    warmup = config.schedule.warmup_steps
    groups = ", ".join(f"{_name(n)} {c / 1e6:.1f}M" for n, c in parameters.groups().items() if c)
    return [
        (
            "network",
            f"{model.architecture}, {model.n_layer} layers, {model.n_head} heads, "
            f"width {model.n_embd}, context {model.block_size:,} tokens",
        ),
        ("parameters", f"{parameters.total:,} ({'tied' if parameters.tied else 'untied'} head)"),
        ("", groups),
        (
            "optimizer",
            f"{optimizer.name}, learning rate {rate:.2g}{by_rule}, {config.schedule.name}"
            f"{f' after {warmup:,} steps of warm-up' if warmup else ''}",
        ),
    ]


def _memory_rows(figures: Figures, report: Report) -> Rows:
    memory, target = figures.memory, report.target
    rows = [(_name(part), gib(size)) for part, size in memory.parts.items() if size]
    rows.append(("peak, not compiled", f"{gib(memory.peak_bytes)}, at the {memory.moment}"))
    saved = memory.peak_bytes - memory.compiled_bytes
    if saved > 0:
        rows.append(("compiling saves", gib(saved)))
    rows += [(f"{_name(part)}, assumed", gib(s)) for part, s in memory.overheads.items() if s]
    rows.append(("evaluation", gib(memory.evaluation_bytes)))
    of = f" of {gib(target.memory_bytes)} of {target.name}" if target.memory_bytes else ""
    fits = {True: ": fits", False: ": does not fit", None: ""}[figures.fits]
    rows.append(("needed", f"{gib(memory.needed_bytes)}{of}{fits}"))
    return rows


def _work_rows(figures: Figures, report: Report) -> Rows:
    config, pace = figures.config, figures.pace
    training, tokens = config.training, total_tokens(config)
    per_token = flops_per_token(config)
    many = figures.layout.devices > 1
    timed = [] if many else [("time", f"{_hours(figures.hours)} on {report.target.name}")]
    return [
        (
            "step",
            f"{training.batch_size} x {training.grad_acc} sequences = "
            f"{config.tokens_per_step:,} tokens",
        ),
        ("run", f"{training.max_steps:,} steps = {tokens:,} tokens"),
        (
            "operations",
            f"{per_token / 1e6:,.0f} million a token, {per_token * tokens / 1e18:,.3g} x 10^18 in "
            "all",
        ),
        ("pace of one device" if many else "pace", _pace(pace.tokens_per_second)),
        *timed,
        ("basis", pace.basis),
    ]


def _data_rows(figures: Figures) -> Rows:
    data, disk = figures.data, figures.disk
    train = NONE if data.train_tokens is None else f"{data.train_tokens:,} tokens"
    epochs = NONE if figures.epochs is None else f"{figures.epochs:,.2f} times each"
    parts = ", ".join(f"{_name(part)} {gb(size)}" for part, size in disk.items() if size)
    free = NONE if figures.free_disk_bytes is None else gb(figures.free_disk_bytes)
    return [
        ("data", ", ".join(figures.config.data.source)),
        ("to train on", f"{train}; the run asks for {epochs}" if data.train_tokens else train),
        ("basis", data.basis),
        ("disk", f"{gb(sum(disk.values()))} of {free} free: {parts}"),
    ]


def _name(key: str) -> str:
    return key.replace("_", " ")


def _pace(tokens_per_second: float | None) -> str:
    return NONE if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"


def _hours(count: float | None) -> str:
    if count is None:
        return NONE
    return f"{count:,.1f} hours" if count >= 1 else f"{count * 60:,.1f} minutes"


def _fits(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: NONE}[fits]


_SUGGESTION_HEADS = ("for", "set", "head size", "parameters", "fits")


def _suggestion_row(suggestion: Suggestion) -> tuple[str, ...]:
    parameters = NONE if suggestion.parameters is None else f"{suggestion.parameters / 1e6:.1f}M"
    return (
        suggestion.key,
        suggestion.as_overrides(),
        str(suggestion.head_size),
        parameters,
        _fits(suggestion.fits),
    )


# --- in the terminal -----------------------------------------------------------------------------


def print_report(report: Report, console: Console) -> None:
    console.print(_terminal_page(report))


def _terminal_page(report: Report) -> RenderableType:
    style = "bold red" if report.blocked else "bold yellow" if report.warnings else "bold green"
    parts: list[RenderableType] = [
        Text.assemble((f"{report.path}: ", "bold"), (summarize_report(report), style))
    ]
    for name, rows in sections(report):
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=22)
        table.add_column(overflow="fold")
        for label, text in rows:
            table.add_row(Text(label, "dim"), Text(text))
        parts += [Text(f"\n{name}", "bold"), Padding(table, (0, 0, 0, 2), expand=False)]
    parts += _noted("problem", report.problems, "red") + _noted(
        "warning", report.warnings, "yellow"
    )
    if report.suggestions:
        parts.append(Text("\nsuggestions, to lay over with --set", "bold"))
        parts.append(Padding(_suggestions(report.suggestions), (0, 0, 0, 2), expand=False))
    return Group(*parts)


def _noted(kind: str, problems: Sequence[Problem], style: str) -> list[RenderableType]:
    notes: list[RenderableType] = []
    for problem in problems:
        value = f" = {problem.value}" if problem.value else ""
        notes.append(Text.assemble("\n", (f"{kind}  ", style), (f"{problem.key}{value}", "bold")))
        said = Text(f"{problem.rule}\n-> {problem.remedy}")
        notes.append(Padding(said, (0, 0, 0, 4), expand=False))
    return notes


def _suggestions(suggestions: Sequence[Suggestion]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in _SUGGESTION_HEADS:
        right = head in ("head size", "parameters")
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for suggestion in suggestions:
        table.add_row(*map(Text, _suggestion_row(suggestion)))
    return table


# --- side by side --------------------------------------------------------------------------------

COMPARISON = (
    "config",
    "network",
    "parameters",
    "needed",
    "fits",
    "tokens a step",
    "tokens",
    "tokens/s",
    "time",
    "verdict",
)


def comparison_row(report: Report) -> tuple[str, ...]:
    """One config in the comparison of several, by the heads of `COMPARISON`."""
    figures = report.figures
    if figures is None:
        return (report.path, *[NONE] * (len(COMPARISON) - 2), summarize_report(report))
    config, pace = figures.config, figures.tokens_per_second
    model = config.model
    return (
        report.path,
        f"{model.architecture} {model.n_layer}/{model.n_head}/{model.n_embd}",
        f"{figures.parameters.total / 1e6:.1f}M",
        gib(figures.memory.needed_bytes),
        _fits(figures.fits),
        f"{config.tokens_per_step:,}",
        f"{total_tokens(config) / 1e9:.2f}B",
        NONE if pace is None else f"{pace:,.0f}",
        _hours(figures.hours),
        summarize_report(report),
    )


def print_reports(reports: Sequence[Report], console: Console) -> None:
    """The table, then what is to be said of each config."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in COMPARISON:
        left = head in ("config", "network", "fits", "verdict")
        table.add_column(head, justify="left" if left else "right", no_wrap=head == "parameters")
    for report in reports:
        table.add_row(*map(Text, comparison_row(report)))
    console.print(table)
    console.print(Text(f"on {reports[0].target.name}", "dim"))
    for basis in dict.fromkeys(r.figures.pace.basis for r in reports if r.figures):
        console.print(Text(f"pace: {basis}", "dim"))
    for problem, paths in _gathered(reports).items():
        console.print(Text.assemble("\n", (", ".join(paths), "bold"), f"\n  {problem}"))


def _gathered(reports: Sequence[Report]) -> dict[Problem, list[str]]:
    """Each problem and warning once, with the configs that have it."""
    found: dict[Problem, list[str]] = {}
    for report in reports:
        for problem in (*report.problems, *report.warnings):
            found.setdefault(problem, []).append(report.path)
    return found


# --- as Markdown ---------------------------------------------------------------------------------


def render_markdown(report: Report) -> str:
    """The same report, for the page of a Prefect run."""
    lines = [f"# {report.path}: {summarize_report(report)}"]
    for kind, problems in (("Problems", report.problems), ("Warnings", report.warnings)):
        if problems:
            lines += ["", f"## {kind}", ""]
            lines += [f"- **`{_key(p)}`** {p.rule}\n  → {p.remedy}" for p in problems]
    if report.suggestions:
        rows = [_suggestion_row(suggestion) for suggestion in report.suggestions]
        lines += ["", "## Suggestions", "", *markdown_table(_SUGGESTION_HEADS, rows)]
    for title, section in sections(report):
        lines += ["", f"## {title.capitalize()}", "", *markdown_table(("", ""), section)]
    return "\n".join(lines) + "\n"


def _key(problem: Problem) -> str:
    return f"{problem.key} = {problem.value}" if problem.value else problem.key


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        return f"| {' | '.join(escaped)} |"

    return [line(heads), f"|{'---|' * len(heads)}", *map(line, rows)]
