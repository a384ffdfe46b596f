"""What a model folder holds: `model.safetensors` and `config.json`, whose `model` section describes
the network. A checkpoint is such a folder with more files beside them. Does not import torch.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.schema import ModelSection
from gpt.errors import CheckpointError, Problem

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
MODEL_FOLDER_REMEDY = f"give a checkpoint, or another folder with {MODEL_FILE} and {CONFIG_FILE}"


def load_model_section(folder: Path) -> ModelSection:
    """Read the `[model]` section of a model folder.

    Raises `CheckpointError` if the file is missing or not a model config.
    """
    path = folder / CONFIG_FILE
    try:
        raw: Any = json.loads(path.read_bytes())
        return ModelSection.model_validate_json(json.dumps(raw["model"]))
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
    except ValidationError as error:
        rule = f"is not a valid model config: {error.error_count()} invalid values in [model]"
    except (ValueError, KeyError, TypeError):
        rule = "is not a valid model config: it has no section model"
    raise CheckpointError(Problem(str(path), "", rule, MODEL_FOLDER_REMEDY))
