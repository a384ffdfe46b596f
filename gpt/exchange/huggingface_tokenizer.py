"""GPT-2's tokenizer in the files that transformers loads; its ids equal tiktoken's."""

import json
from pathlib import Path
from typing import Any

from tiktoken_ext.openai_public import ENDOFTEXT  # type: ignore[import-untyped]

from gpt.data.tokenize.tokenizer import END_OF_TEXT, ranks_folder, read_verified_files
from gpt.errors import Problem

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def write_tokenizer(folder: Path, block_size: int) -> None:
    """Write `vocab.json`, `merges.txt`, `tokenizer.json` and `tokenizer_config.json`.

    The first two are OpenAI's files, byte for byte. A literal `<|endoftext|>` in a text is one
    token in transformers, and seven ordinary tokens in training here. Raises `TokenizerError`.
    """
    files = read_verified_files(ranks_folder())
    (folder / "vocab.json").write_bytes(files["encoder.json"])
    (folder / "merges.txt").write_bytes(files["vocab.bpe"])
    tokenizer = _build_tokenizer(files["encoder.json"], files["vocab.bpe"].decode("utf-8"))
    text = json.dumps(tokenizer, ensure_ascii=False)
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


def find_tokenizer_problem(directory: Path) -> Problem | None:
    """Compare `vocab.json`, if there is one, with GPT-2's vocabulary, the only one supported."""
    path = directory / "vocab.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if found == json.loads(read_verified_files(ranks_folder())["encoder.json"]):
        return None
    rule = "is not GPT-2's vocabulary, the only one supported"
    return Problem("vocab.json", "", rule, "choose a model with GPT-2's tokenizer")


def _build_tokenizer(vocabulary: bytes, merges: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": END_OF_TEXT, "content": ENDOFTEXT, **flags, "special": True}],
        "pre_tokenizer": BYTE_LEVEL | {"use_regex": True},
        "post_processor": BYTE_LEVEL | {"use_regex": True, "trim_offsets": False},
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": json.loads(vocabulary),
            "merges": [line.split(" ") for line in merges.splitlines()[1:]],  # after the version
        },
    }
