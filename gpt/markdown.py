"""Markdown tables and quotations for pages and artifacts."""

from collections.abc import Iterable, Sequence

from gpt.artifacts import Sample


def render_table(rows: Iterable[Sequence[object]], heads: Sequence[str] = ("", "")) -> str:
    """Render a table with one line per row; whitespace in cells is collapsed."""

    def line(cells: Sequence[object]) -> str:
        escaped = (" ".join(str(cell).replace("|", "\\|").split()) for cell in cells)
        return f"| {' | '.join(escaped)} |"

    return "\n".join([line(heads), f"|{'---|' * len(heads)}", *map(line, rows)])


def quote_samples(samples: Iterable[Sample]) -> str:
    """Render each sample as a quotation, its prompt in bold."""
    texts = (f"**{sample.prompt}**{sample.text}" for sample in samples)
    return "\n\n".join("\n".join(f"> {line}" for line in text.splitlines()) for text in texts)
