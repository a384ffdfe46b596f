"""Score your own text files with a trained model: loss and bits per byte of each.

    python examples/score_text.py runs/train/example/checkpoints/step-00000100 README.md LICENSE

A model is the folder of a checkpoint, or one that `overnight import-hf` wrote. The lower the bits
per byte, the better the model predicts the text; the figure compares models with any tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gpt.evaluation.heldout import score_texts
from gpt.hardware.device import pick_device
from gpt.model.io import load_model


def main(model_folder: Path, paths: Sequence[Path]) -> dict[Path, float]:
    """Print a line per file; return the bits per byte of each."""
    model = load_model(model_folder, pick_device("auto"))
    scores = {}
    for path in paths:
        result = score_texts(model, [path.read_text(encoding="utf-8")])
        scores[path] = result.bits_per_byte
        print(
            f"{path}: {result.tokens:,} tokens, loss {result.loss:.4f}, "
            f"{result.bits_per_byte:.4f} bits per byte"
        )
    return scores


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
