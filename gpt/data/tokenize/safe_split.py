"""Where a text may be cut so that its parts, encoded alone, give the ids of the whole.

GPT-2 splits text with `'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|
\\s+(?!\\S)|\\s`, from left to right and without looking back, and byte pairs merge inside a piece
only. So a cut is safe when a piece of the whole ends there, and no piece before it ends elsewhere
because the text does. Both hold between two characters x and y if

- x is no white space, so that neither `$` nor the look-ahead is asked at the new end;
- no piece holds x and then y: they are of different kinds (letter, number, other, white space),
  and only a contraction or a leading space joins kinds, so x is not the apostrophe that may begin
  a contraction. A run that ended before y ends there too when y is gone, and a contraction across
  the cut would have letters on both sides.

Kinds are asked only of characters whose kind no version of Unicode has changed: white space,
ASCII, and the plain ideographs, kana and Hangul with their own punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpt.data.tokenize.tokenizer import WHITESPACE

_NOT_LETTER = r"!-@\[-`{-~"
_EASTERN = "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_EASTERN_MARKS = "\u3001\u3002\u300c\u300d\uff01\uff0c\uff1a\uff1b\uff1f"
SAFE_SPLIT = re.compile(
    f"[^{WHITESPACE}](?=[{WHITESPACE}])"
    f"|[A-Za-z](?=[{_NOT_LETTER}])"
    r"|[0-9](?=[!-/:-~])"
    r"|[!-&(-/:-@\[-`{-~](?=[0-9A-Za-z])"
    f"|[{_EASTERN}](?=[{_NOT_LETTER}{_EASTERN_MARKS}])"
)
"""Matches a character after which a cut is safe."""
_FIRST_WINDOW = 256


def split_safely(text: memoryview, most_bytes: int) -> Iterator[memoryview]:
    """Cut UTF-8 into parts of at most `most_bytes` where it is safe; a longer part is one in which
    there is no such place."""
    while len(text) > most_bytes:
        cut = _last_cut(text, most_bytes) or _next_cut(text, most_bytes)
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


def _last_cut(text: memoryview, end: int) -> int:
    """The last safe place up to `end`, or 0; looks back in windows that grow."""
    size = _FIRST_WINDOW
    while True:
        start = max(0, end - size)
        decoded, start = _window(text, start, end)
        cuts = [match.end() for match in SAFE_SPLIT.finditer(decoded)]
        if cuts:
            return start + len(decoded[: cuts[-1]].encode())
        if size >= end:
            return 0
        size *= 16


def _next_cut(text: memoryview, start: int) -> int:
    """The first safe place after `start`, or the end."""
    size = _FIRST_WINDOW
    start = max(0, start - 4)  # the character before may be the one to cut after
    while True:
        end = min(len(text), start + size)
        decoded, first = _window(text, start, end)
        if match := SAFE_SPLIT.search(decoded):
            return first + len(decoded[: match.end()].encode())
        if end == len(text):
            return end
        size *= 16


def _window(text: memoryview, start: int, end: int) -> tuple[str, int]:
    """Whole characters between two places, decoded, and where they begin."""
    while start < end and text[start] & 0xC0 == 0x80:
        start += 1
    while start < end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return str(text[start:end], "utf-8"), start
