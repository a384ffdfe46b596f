"""gigatoken, many times faster than tiktoken, and trusted only as far as it is checked.

Of every chunk it is checked, exactly:

- that the ids spell the text, byte for byte, by tiktoken's own ranks (so what could still differ
  is how a word is cut into tokens);
- that the ids are tiktoken's in a sample, in the whole of each text that holds something like a
  special token, and in every stretch with a long run of one kind of character or with anything
  beyond ASCII. A stretch lies between two places where a cut is safe
  (`gpt.data.tokenize.safe_split`), so
  tiktoken encodes it alone, and that much of a text written in ASCII is little.

Any difference raises `EncoderMismatchError`; whoever called falls back to tiktoken for the whole
data set. gigatoken's cache of words has no bound, so the encoder is made anew when it has grown.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import zlib
from binascii import b2a_base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
from numpy.typing import NDArray

from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.encoders import EncoderMismatchError, TokenIds, concatenate_ids

SAMPLE_BYTES = 8_192
"""Compared of every chunk (1 MB), at a place drawn from its own bytes."""
LONG_RUN = 128
"""Bytes without a place to cut that are called a long run: as many as GPT-2's longest token has."""
SPECIAL = re.compile(rb"<\|")
"""How every special token begins. A pattern, because bytes.find takes three times as long."""
RECYCLE_TEXT_BYTES = 512_000_000
RECYCLE_GROWTH_BYTES = 48_000_000
"""The encoder is made anew (0.2 s) after so much text, or when the process has grown so much."""

WORD, WORDS = 8, 2
_SPACE, _NEWLINE, _BEYOND = 0x20, 0x0A, 0x80


Stretches = NDArray[np.int64]
"""Rows (start, end) in bytes, in order, none touching another."""


class GigatokenEncoder:
    """An `Encoder`: gigatoken's ids, or `EncoderMismatchError`."""

    def __init__(self) -> None:
        ranks = tokenizer.ranks()
        self._spelling = _Spelling(ranks)
        self._rank_file = b"".join(
            b"%b %d\n" % (b2a_base64(t, newline=False), i) for t, i in ranks.items()
        )
        self._fresh()

    def _fresh(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            path.write_bytes(self._rank_file)
            # No special tokens: a literal <|endoftext|> is ordinary text here.
            load = gigatoken.gigatoken_rs.BPETokenizer.from_tiktoken
            self._encoder = load(str(path), "gpt2", {})
        self._text_bytes, self._resident = 0, resident_bytes()

    def encode(self, texts: list[bytes]) -> TokenIds:
        if self._text_bytes > RECYCLE_TEXT_BYTES or (
            resident_bytes() - self._resident > RECYCLE_GROWTH_BYTES
        ):
            self._fresh()
        self._text_bytes += sum(map(len, texts))
        ids, counts = concatenate_ids([self._encoder.encode(text) for text in texts])
        self._check(texts, ids, counts)
        return ids, counts

    def _check(
        self, texts: list[bytes], ids: NDArray[np.uint32], counts: NDArray[np.int64]
    ) -> None:
        text = b"".join(texts)
        starts = self._spelling.starts(ids, text)
        if starts is None:
            raise EncoderMismatchError("its ids do not spell the text")
        edges = np.cumsum([0, *map(len, texts)])
        if not np.array_equal(starts[np.cumsum(counts)], edges[1:]):
            raise EncoderMismatchError("its ids do not end where a text does")
        stretches = spans_to_verify(text, edges)
        firsts = np.searchsorted(starts, stretches[:, 0])
        lasts = np.searchsorted(starts, stretches[:, 1])
        if not np.array_equal(starts[firsts], stretches[:, 0]):
            raise EncoderMismatchError("a token reaches over a place where GPT-2's pattern cuts")
        self._compare(text, stretches, ids, np.stack([firsts, lasts], axis=1))

    def _compare(
        self, text: bytes, stretches: Stretches, ids: NDArray[np.uint32], tokens: Stretches
    ) -> None:
        """Hold the ids of each stretch, those of the range in `tokens`, against tiktoken's."""
        data = np.frombuffer(text, dtype=np.uint8)
        theirs, ours = data[_inside(stretches)].tobytes(), ids[_inside(tokens)]
        groups = _groups(data, stretches)
        bounds = np.stack([_ends(stretches)[groups], _ends(tokens)[groups]], axis=1).tolist()
        for (a, first), (b, last) in itertools.pairwise([[0, 0], *bounds]):
            expected = tokenizer.encode(theirs[a:b].decode())
            if not np.array_equal(ours[first:last], expected):
                raise EncoderMismatchError(
                    f"its ids differ from tiktoken's near {theirs[a:b][:80]!r}"
                )


class _Spelling:
    """The bytes of every token, by tiktoken's ranks: the first ones as words of eight."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        tokens = sorted(ranks, key=ranks.__getitem__)
        self._lengths = np.array([len(token) for token in tokens], dtype=np.uint8)
        self._long = {i: token for i, token in enumerate(tokens) if len(token) > WORDS * WORD}
        padded = b"".join(token[: WORDS * WORD].ljust(WORDS * WORD, b"\0") for token in tokens)
        self._words = np.frombuffer(padded, "<u8").reshape(-1, WORDS).T.copy()
        self._masks = np.array([(1 << 8 * size) - 1 for size in range(WORD + 1)], dtype=np.uint64)

    def starts(self, ids: NDArray[Any], text: bytes) -> NDArray[np.int64] | None:
        """Where each token begins in `text`, and its end; None if the ids do not spell it."""
        if ids.size and int(ids.max()) >= self._lengths.size:
            return None
        tokens = ids.astype(np.intp)  # once, and not in every look-up below
        lengths = self._lengths.take(tokens)
        starts = np.zeros(ids.size + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=starts[1:])
        if starts[-1] != len(text):
            return None
        places = starts[:-1]
        if not self._begin_alike(tokens, places, text):
            return None
        # The eight bytes that begin at each byte of the text.
        words: NDArray[np.uint64] = np.ndarray(len(text), "<u8", text + bytes(WORD), strides=(1,))
        for row, expected in enumerate(self._words[1:], 1):
            longer = np.flatnonzero(lengths > row * WORD)
            tokens, lengths, places = tokens[longer], lengths[longer], places[longer]
            different = words[places + row * WORD] ^ expected.take(tokens)
            different &= self._masks.take(np.minimum(lengths - row * WORD, WORD))
            if different.any():
                return None
        longest = np.flatnonzero(lengths > WORDS * WORD)
        for token, place in zip(tokens[longest].tolist(), places[longest].tolist(), strict=True):
            if not text.startswith(self._long[token], place):
                return None
        return starts

    def _begin_alike(
        self, tokens: NDArray[np.intp], places: NDArray[np.int64], text: bytes
    ) -> bool:
        """Whether the first eight bytes of every token stand in the text, those of a shorter one
        all. They are written over a copy of it: what a word has beyond its token is overwritten by
        the tokens behind it, because numpy assigns in order, the last value last."""
        spelt = bytearray(text) + bytes(WORD)
        words: NDArray[np.uint64] = np.ndarray(len(text), "<u8", spelt, strides=(1,))
        words[places] = self._words[0].take(tokens)
        return spelt.startswith(text)


def spans_to_verify(text: bytes, edges: NDArray[Any]) -> Stretches:
    """What of a chunk is to be compared. `edges` are the bounds of its texts, from 0 to its end.

    A stretch begins and ends at an edge or where a space or a newline follows visible ASCII, which
    is a safe cut. A run of one kind of character holds no such place, so a long one shows as a long
    way between two of them.
    """
    data = np.frombuffer(text, dtype=np.uint8)
    before = data[:-1]
    spaces = (data[1:] == _SPACE) | (data[1:] == _NEWLINE)
    spaces &= (before > _SPACE) & (before < _BEYOND)
    cuts = np.flatnonzero(spaces) + 1
    bounds = np.insert(cuts, np.searchsorted(cuts, edges), edges)
    long = np.flatnonzero(np.diff(bounds) >= LONG_RUN)
    beyond = np.flatnonzero(data >= _BEYOND)
    sample = zlib.crc32(text[-SAMPLE_BYTES:]) % max(1, len(text) - SAMPLE_BYTES)
    wanted = [
        np.stack([bounds[long], bounds[long + 1]], axis=1),
        np.stack([beyond, beyond + 1], axis=1),
        np.array([[sample, min(sample + SAMPLE_BYTES, len(text))]]),
        _with_special(text, edges),
    ]
    return _cut_at(edges, _widened(np.concatenate(wanted), bounds))


def _with_special(text: bytes, edges: NDArray[Any]) -> Stretches:
    """The whole of each text that holds something like a special token."""
    found = []
    match = SPECIAL.search(text)
    while match:
        home = int(np.searchsorted(edges, match.start(), side="right"))
        found.append((edges[home - 1], edges[home]))
        match = SPECIAL.search(text, int(edges[home]))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _widened(wanted: Stretches, bounds: NDArray[Any]) -> Stretches:
    """Each stretch out to the nearest bounds, overlapping ones joined."""
    first = np.searchsorted(bounds, wanted[:, 0], side="right") - 1
    last = np.searchsorted(bounds, wanted[:, 1], side="left")
    order = np.argsort(first, kind="stable")
    starts, ends = bounds[first[order]], np.maximum.accumulate(bounds[last[order]])
    opens = np.concatenate([[True], starts[1:] > ends[:-1]])
    closes = np.concatenate([opens[1:], [True]])
    return np.stack([starts[opens], ends[closes]], axis=1)


def _cut_at(edges: NDArray[Any], stretches: Stretches) -> Stretches:
    """The stretches cut where one text ends and the next begins."""
    points = np.sort(np.concatenate([edges, stretches.ravel()]), kind="stable")
    points = points[np.diff(points, prepend=-1) > 0]
    homes = np.searchsorted(stretches[:, 0], points[:-1], side="right") - 1
    inside = (homes >= 0) & (points[:-1] < stretches[homes, 1])
    return np.stack([points[:-1][inside], points[1:][inside]], axis=1)


def _groups(data: NDArray[np.uint8], stretches: Stretches) -> NDArray[np.int64]:
    """The last stretch of each group that tiktoken encodes at once, as much as can be.

    Where one begins with a space or a newline and the one before ends with visible ASCII, the place
    between them is a safe cut in the joined text as well.
    """
    first, last = data[stretches[:, 0]], data[stretches[:, 1] - 1]
    opens = (first == _SPACE) | (first == _NEWLINE)
    joins = opens[1:] & (last[:-1] > _SPACE) & (last[:-1] < _BEYOND)
    return np.flatnonzero(np.append(~joins, True)[: len(stretches)])


def _inside(ranges: Stretches) -> NDArray[np.int64]:
    """Every index in the ranges, in order."""
    lengths = ranges[:, 1] - ranges[:, 0]
    return np.arange(lengths.sum()) + np.repeat(ranges[:, 1] - np.cumsum(lengths), lengths)


def _ends(ranges: Stretches) -> NDArray[np.int64]:
    """Where each range ends once they lie end to end."""
    return np.cumsum(ranges[:, 1] - ranges[:, 0])


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
