"""The folder of a model: `model.safetensors`, and `config.json`, whose section `model` says what it
is. A checkpoint is such a folder, with more beside them. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.schema import ModelSection
from gpt.errors import CheckpointError, Problem

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
REMEDY = "give a checkpoint's folder, or another with model.safetensors and config.json of ours"


def load_model_section(folder: Path) -> ModelSection:
    """Raises `CheckpointError` where the file is missing or no config of ours."""
    path = folder / CONFIG_FILE
    try:
        raw: Any = json.loads(path.read_bytes())
        return ModelSection.model_validate_json(json.dumps(raw["model"]))
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
    except ValidationError as error:
        rule = f"is no config of ours: {error.error_count()} values of [model] are wrong"
    except (ValueError, KeyError, TypeError):
        rule = "is no config of ours: it has no section model"
    raise CheckpointError(Problem(str(path), "", rule, REMEDY))
