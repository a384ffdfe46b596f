"""What a documentation page shows: code blocks, inline code, links, headings and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_PROGRAMS = ("overnight ", "make ", "prefect ", "mlflow ", "python ", "pytest ")
_ENDS_OF_COMMAND = {">", "|", "&&", ";"}


@dataclass(frozen=True)
class Page:
    path: Path
    text: str

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and content of each fenced code block."""
        return [(match[1], match[2]) for match in _FENCE.finditer(self.text)]

    @property
    def prose(self) -> str:
        return _FENCE.sub("", self.text)

    @property
    def inline_code(self) -> list[str]:
        return [" ".join(match[1].split()) for match in _INLINE.finditer(self.prose)]

    @property
    def links(self) -> list[str]:
        """Targets of links to other files, without their anchors."""
        found = [match[1] for match in _LINK.finditer(self.prose)]
        return [target for target in found if "://" not in target]

    @property
    def headings(self) -> list[str]:
        return [match[1] for match in _HEADING.finditer(self.prose)]

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each command: of shell blocks, of transcripts after `$ `, and of inline
        code that starts with a program of this project."""
        for language, content in self.blocks:
            lines = content.replace("\\\n", " ").splitlines()
            if language not in ("sh", "bash"):
                lines = [line[2:] for line in lines if line.startswith("$ ")]
            for line in lines:
                yield from _split(line)
        for code in self.inline_code:
            if code.startswith(_PROGRAMS):
                yield from _split(code)


def _split(line: str) -> Iterator[list[str]]:
    """The commands of a line, without what follows a redirection."""
    command: list[str] = []
    redirected = False
    for word in shlex.split(line, comments=True):
        if word in _ENDS_OF_COMMAND:
            redirected = word == ">"
            if command and not redirected:
                yield command
                command = []
        elif not redirected:
            command.append(word)
    if command:
        yield command


def read_page(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))
