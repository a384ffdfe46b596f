"""Where a text can be split so that its parts, encoded separately, give the ids of the whole.

GPT-2 divides text with `'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|
\\s+(?!\\S)|\\s`, from left to right and without looking back, and byte pairs merge only inside a
piece. So a split is safe where a piece of the whole text ends and no earlier piece changes because
the text ends there. Both hold between two characters x and y if

- x is not whitespace, so neither `$` nor the look-ahead applies at the new end;
- no piece contains x followed by y: they are of different kinds (letter, number, other,
  whitespace). Only a contraction or a leading space joins kinds, so x is not the apostrophe that
  may begin a contraction. A run that ended before y also ends there when y is gone, and a
  contraction across the split would have letters on both sides.

Only characters whose kind no version of Unicode has changed are considered: whitespace, ASCII, and
the plain ideographs, kana and Hangul with their own punctuation.
"""

import re
from collections.abc import Iterator

from gpt.data.tokenize.tokenizer import WHITESPACE

_NOT_LETTER = r"!-@\[-`{-~"
_EAST_ASIAN = "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_EAST_ASIAN_PUNCTUATION = "\u3001\u3002\u300c\u300d\uff01\uff0c\uff1a\uff1b\uff1f"
SAFE_SPLIT = re.compile(
    f"[^{WHITESPACE}](?=[{WHITESPACE}])"
    f"|[A-Za-z](?=[{_NOT_LETTER}])"
    r"|[0-9](?=[!-/:-~])"
    r"|[!-&(-/:-@\[-`{-~](?=[0-9A-Za-z])"
    f"|[{_EAST_ASIAN}](?=[{_NOT_LETTER}{_EAST_ASIAN_PUNCTUATION}])"
)
"""Matches a character after which a split is safe."""
_UP_TO_LAST = re.compile(f"(?s:.*)(?:{SAFE_SPLIT.pattern})")


def split_safely(text: memoryview, max_bytes: int) -> Iterator[memoryview]:
    """Split UTF-8 at safe places into parts of at most `max_bytes`. A part without a safe place
    inside it may be longer."""
    size = max_bytes
    while len(text) > size:
        decoded = str(text[:size], "utf-8", "ignore")  # without the beginning of a character
        find = _UP_TO_LAST.match if size == max_bytes else SAFE_SPLIT.search
        if found := find(decoded):
            place = len(decoded[: found.end()].encode())
            yield text[:place]
            text, size = text[place:], max_bytes
        else:
            size *= 2
    if text:
        yield text
