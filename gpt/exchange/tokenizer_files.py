"""GPT-2's tokenizer as the files that stock transformers reads, so that it gives tiktoken's ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiktoken_ext.openai_public import ENDOFTEXT  # type: ignore[import-untyped]

from gpt.data.tokenize.tokenizer import END_OF_TEXT, ranks_folder, read_verified_files

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def write_tokenizer(folder: Path, block_size: int) -> None:
    """`vocab.json` and `merges.txt` are OpenAI's own files, byte for byte; `tokenizer.json` holds
    both in the format of the tokenizers library. Raises `TokenizerError`.

    A literal `<|endoftext|>` in a text is one token there and seven plain ones in training here.
    """
    files = read_verified_files(ranks_folder())
    (folder / "vocab.json").write_bytes(files["encoder.json"])
    (folder / "merges.txt").write_bytes(files["vocab.bpe"])
    whole = _tokenizer(vocabulary(), files["vocab.bpe"].decode("utf-8"))
    text = json.dumps(whole, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": ENDOFTEXT,
        "eos_token": ENDOFTEXT,
        "unk_token": ENDOFTEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def vocabulary() -> dict[str, int]:
    """Ids by token, bytes written as GPT-2's printable characters."""
    ids: dict[str, int] = json.loads(read_verified_files(ranks_folder())["encoder.json"])
    return ids


def _tokenizer(ids: dict[str, int], merges: str) -> dict[str, Any]:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    lines = merges.splitlines()[1:]  # the first names the version
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_TEXT, "content": ENDOFTEXT, **special, "special": True}],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL | {"use_regex": True},
        "post_processor": BYTE_LEVEL | {"use_regex": True, "trim_offsets": False},
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [line.split(" ") for line in lines],
        },
    }
