"""gigatoken: many times faster than tiktoken, and verified on every chunk.

What is verified, exactly:

- the ids spell the text, byte for byte, by tiktoken's own ranks; so only the division of a word
  into tokens could still differ;
- the ids are tiktoken's in a sample, in all of each text that contains something like a special
  token, and in every span with a long run of one kind of character or with non-ASCII bytes. A span
  lies between two safe places to split (`gpt.data.tokenize.safe_split`), so tiktoken encodes it
  alone. English text has few such spans.

Any difference raises `EncoderMismatchError`, and the caller falls back to tiktoken for the whole
dataset. gigatoken's cache of words has no limit, so the encoder is rebuilt when it has grown.
"""

import os
import re
import tempfile
import zlib
from binascii import b2a_base64
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
from numpy.typing import NDArray

from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.tokenizer import EncoderMismatchError, TokenIds, concatenate_ids

SAMPLE_BYTES = 8_192
"""Compared in every chunk (1 MB), at a position derived from its text."""
LONG_RUN_BYTES = 128
"""A long run: this much text without a place to split, as long as GPT-2's longest token."""
SPECIAL = re.compile(rb"<\|")
"""The beginning of every special token. A pattern, because bytes.find takes three times as long."""
REBUILD_TEXT_BYTES = 512_000_000
REBUILD_GROWTH_BYTES = 48_000_000
"""The encoder is rebuilt (0.2 s) after this much text or this much growth of the process."""

_WORD_BYTES = 8
_SPACE, _NEWLINE, _NON_ASCII = 0x20, 0x0A, 0x80

Spans = NDArray[np.int64]
"""Rows (start, end), in order and without overlap."""


class GigatokenEncoder:
    """An `Encoder` that raises `EncoderMismatchError` where gigatoken's ids are not tiktoken's."""

    def __init__(self) -> None:
        ranks = tokenizer.load_ranks()
        self._token_bytes = _TokenBytes(ranks)
        self._rank_file = b"".join(
            b"%b %d\n" % (b2a_base64(token, newline=False), rank) for token, rank in ranks.items()
        )
        self._rebuild()

    def _rebuild(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            path.write_bytes(self._rank_file)
            # No special tokens: a literal <|endoftext|> is ordinary text here.
            load = gigatoken.gigatoken_rs.BPETokenizer.from_tiktoken
            self._encoder = load(str(path), "gpt2", {})
        self._text_bytes, self._initial_bytes = 0, resident_bytes()

    def encode(self, texts: list[bytes]) -> TokenIds:
        growth_bytes = resident_bytes() - self._initial_bytes
        if self._text_bytes > REBUILD_TEXT_BYTES or growth_bytes > REBUILD_GROWTH_BYTES:
            self._rebuild()
        self._text_bytes += sum(map(len, texts))
        ids, counts = concatenate_ids([self._encoder.encode(text) for text in texts])
        self._verify(texts, ids, counts)
        return ids, counts

    def _verify(
        self, texts: list[bytes], ids: NDArray[np.uint32], counts: NDArray[np.int64]
    ) -> None:
        text = b"".join(texts)
        starts = self._token_bytes.find_starts(ids, text)
        if starts is None:
            raise EncoderMismatchError("its ids do not spell the text")
        edges = np.cumsum([0, *map(len, texts)])
        if not np.array_equal(starts[np.cumsum(counts)], edges[1:]):
            raise EncoderMismatchError("its ids do not end where a text does")
        spans = spans_to_verify(text, edges)
        tokens = np.searchsorted(starts, spans)
        if not np.array_equal(starts[tokens[:, 0]], spans[:, 0]):
            raise EncoderMismatchError("a token crosses a place where GPT-2's pattern splits")
        self._compare(text, spans, ids, tokens)

    def _compare(self, text: bytes, spans: Spans, ids: NDArray[np.uint32], tokens: Spans) -> None:
        """Compare the ids of each span with tiktoken's. `tokens` are the spans in `ids`."""
        data = np.frombuffer(text, dtype=np.uint8)
        span_text, span_ids = data[_indices(spans)].tobytes(), ids[_indices(tokens)]
        lasts = _last_spans_of_groups(data, spans)
        ends = np.cumsum(np.diff(spans), dtype=np.int64), np.cumsum(np.diff(tokens), dtype=np.int64)
        bounds = np.stack([each[lasts] for each in ends], axis=1).tolist()
        for (start, first), (end, last) in pairwise([[0, 0], *bounds]):
            expected = tokenizer.encode(span_text[start:end].decode())
            if not np.array_equal(span_ids[first:last], expected):
                place = span_text[start:end][:80]
                raise EncoderMismatchError(f"its ids differ from tiktoken's near {place!r}")


class _TokenBytes:
    """The bytes of every token by tiktoken's ranks, the first 16 as two words of eight."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        size = 2 * _WORD_BYTES
        tokens = sorted(ranks, key=ranks.__getitem__)
        self._lengths = np.array([len(token) for token in tokens], dtype=np.uint8)
        self._long = {i: token for i, token in enumerate(tokens) if len(token) > size}
        padded = b"".join(token[:size].ljust(size, b"\0") for token in tokens)
        self._words = np.frombuffer(padded, "<u8").reshape(-1, 2).T.copy()

    def find_starts(self, ids: NDArray[Any], text: bytes) -> NDArray[np.int64] | None:
        """Where each token begins in `text`, and the end of the text; None if the ids do not spell
        it."""
        if ids.size and int(ids.max()) >= self._lengths.size:
            return None
        tokens = ids.astype(np.intp)  # once, not in every look-up below
        lengths = self._lengths.take(tokens)
        starts = np.zeros(ids.size + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=starts[1:])
        if starts[-1] != len(text):
            return None
        # The words are written over a copy of the text, the second words first. Where one is longer
        # than the rest of its token, the first words of the next tokens overwrite what is too much:
        # numpy assigns in order, and the last value stays.
        spelled = bytearray(text) + bytes(_WORD_BYTES)
        words: NDArray[np.uint64] = np.ndarray(len(text), "<u8", spelled, strides=(1,))
        longer = np.flatnonzero(lengths > _WORD_BYTES)
        words[starts[longer] + _WORD_BYTES] = self._words[1].take(tokens[longer])
        words[starts[:-1]] = self._words[0].take(tokens)
        longest = np.flatnonzero(lengths > 2 * _WORD_BYTES)
        places = zip(tokens[longest].tolist(), starts[longest].tolist(), strict=True)
        is_spelled = spelled.startswith(text) and all(
            text.startswith(self._long[token], place) for token, place in places
        )
        return starts if is_spelled else None


def spans_to_verify(text: bytes, edges: NDArray[Any]) -> Spans:
    """Choose the parts of a chunk to compare. `edges` are the bounds of its texts, from 0 to its
    end.

    A span lies between neighboring bounds: an edge, or where a space or a newline follows visible
    ASCII, which is a safe place to split. A run of one kind of character contains no such place, so
    a long run shows as a long span.
    """
    data = np.frombuffer(text, dtype=np.uint8)
    before = data[:-1]
    is_safe = (data[1:] == _SPACE) | (data[1:] == _NEWLINE)
    is_safe &= (before > _SPACE) & (before < _NON_ASCII)
    places = np.flatnonzero(is_safe) + 1
    bounds = np.insert(places, np.searchsorted(places, edges), edges)
    lengths = np.diff(bounds)
    chosen = lengths >= LONG_RUN_BYTES
    non_ascii = np.flatnonzero(data >= _NON_ASCII)
    chosen[np.searchsorted(bounds, non_ascii, side="right") - 1] = True
    sample = zlib.crc32(text[-SAMPLE_BYTES:]) % max(1, len(text) - SAMPLE_BYTES)
    special = [each for each in pairwise(edges.tolist()) if SPECIAL.search(text, *each)]
    for start, end in [(sample, min(sample + SAMPLE_BYTES, len(text))), *special]:
        first = np.searchsorted(bounds, start, side="right") - 1
        chosen[first : np.searchsorted(bounds, end)] = True
    chosen &= lengths > 0
    return np.stack([bounds[:-1][chosen], bounds[1:][chosen]], axis=1)


def _last_spans_of_groups(data: NDArray[np.uint8], spans: Spans) -> NDArray[np.int64]:
    """Join spans to groups, as large as possible, that tiktoken encodes at once: the index of the
    last span of each group.

    Where a span begins with a space or a newline and the previous one ends with visible ASCII, the
    place between them is safe in the joined text as well.
    """
    first, last = data[spans[:, 0]], data[spans[:, 1] - 1]
    opens = (first == _SPACE) | (first == _NEWLINE)
    joins = opens[1:] & (last[:-1] > _SPACE) & (last[:-1] < _NON_ASCII)
    return np.flatnonzero(np.append(~joins, True)[: len(spans)])


def _indices(spans: Spans) -> NDArray[np.int64]:
    """Every index in the spans, in order."""
    lengths = spans[:, 1] - spans[:, 0]
    return np.arange(lengths.sum()) + np.repeat(spans[:, 1] - np.cumsum(lengths), lengths)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
