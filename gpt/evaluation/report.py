"""The report on one checkpoint: held-out loss and what the model writes."""

from __future__ import annotations

import torch
from safetensors.torch import load_model

from gpt.artifacts import CheckpointRef, DatasetManifest, EvaluationReport, Sample
from gpt.config import RunConfig
from gpt.evaluation.heldout import heldout_loss
from gpt.model.device import pick_device
from gpt.model.generation import Sampling, generate
from gpt.model.transformer import build_model


def evaluate(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointRef
) -> EvaluationReport:
    """Evaluate a checkpoint's weights on the validation slice and let it write samples."""
    device = pick_device(config.hardware.device)
    with torch.device(device):
        model = build_model(config.model)
    load_model(model, checkpoint.folder / "model.safetensors", device=str(device))
    model.eval()
    heldout = heldout_loss(model, config, dataset)
    sampling = Sampling(config.evaluation.sample_tokens, seed=config.training.seed)
    samples = tuple(
        Sample(prompt=prompt, text=generate(model, prompt, sampling))
        for prompt in config.evaluation.prompts
    )
    return EvaluationReport(step=checkpoint.step, samples=samples, **vars(heldout))
