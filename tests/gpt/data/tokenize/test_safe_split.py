"""Safe splits: the ids of the parts are the ids of the ids text."""

import numpy as np
import pytest
from corpus_data import AWKWARD_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data.tokenize.safe_split import SAFE_SPLIT, split_safely
from gpt.data.tokenize.tokenizer import encode


def view(text):
    return memoryview(text.encode())


@given(AWKWARD_TEXTS)
@settings(max_examples=400, deadline=None)
def test_ids_do_not_change_at_safe_places(text):
    ids = encode(text).tolist()
    for match in SAFE_SPLIT.finditer(text):
        left, right = text[: match.end()], text[match.end() :]
        assert encode(left).tolist() + encode(right).tolist() == ids, (left, right)


@given(AWKWARD_TEXTS, st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_parts_have_the_text_and_the_ids_of_the_whole(text, most):
    parts = [str(part, "utf-8") for part in split_safely(view(text), most)]
    assert "".join(parts) == text
    joined = [i for part in parts for i in encode(part).tolist()]
    assert joined == encode(text).tolist()


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ("It's 1 o'clock. " * 20_000, 5_000),
        ("東京都は日本の首都です。" * 9_000, 5_000),
        ("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0" * 9_000, 5_000),
        ("приветмир " * 9_000, 5_000),
        ("a" * 60_000 + " " + "b" * 60_000, 60_001),
        ("=" * 100_000, 100_000),
        ("x" + "\n" * 100_000 + "y", 100_001),
        ("é" * 50_000, 100_000),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_parts_are_short_where_the_text_has_safe_places(text, longest):
    parts = list(split_safely(view(text), 5_000))
    assert b"".join(parts) == text.encode()
    assert max(map(len, parts)) <= longest
    ids = [encode(str(part, "utf-8")) for part in parts]
    assert np.array_equal(np.concatenate(ids), encode(text))
