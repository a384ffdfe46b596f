"""Finished runs without training: checkpoints, a report and recorded metrics."""

from dataclasses import dataclass

import numpy as np
import torch
from training_data import make_token_dataset, small_config

from gpt.artifacts import EvaluationReport
from gpt.evaluation.report_store import REPORT_FILE, save_report
from gpt.model.architectures import build_model
from gpt.training.checkpoint.format import take_snapshot, write_checkpoint
from gpt.training.checkpoint.retention import TrainingProgress
from gpt.training.run_dir import open_run_dir
from tasks.evaluate import collect_models
from tasks.tracking.runs import attach_artifacts, open_recorder, open_run

STEPS = (10, 20)
SEQUENCE_LOSSES = np.random.default_rng(0).normal(5.0, 1.0, 100)
"""Mean loss of each sequence of the slice, of any model."""


def report(shift=0.0, text="a", noise=0.01, seed=1):
    """Report of a model that is `shift` nats worse than the mean, plus noise."""
    losses = SEQUENCE_LOSSES + shift + np.random.default_rng(seed).normal(0, noise, 100)
    return EvaluationReport(
        step=STEPS[-1],
        tokens=800,
        loss=float(losses.mean()),
        perplexity=100.0,
        bits_per_byte=1.5,
        samples=(),
        sequence_losses=tuple(losses),
        slice_fingerprint=text,
    )


@dataclass
class FinishedRun:
    """A run with its config and dataset."""

    run: object
    config: object
    dataset: object

    @property
    def folder(self):
        return self.run.folder


def finished_run(root, evaluation, seed=1337, uri=""):
    """Make a run that only has to be registered."""
    config = small_config(root, training__seed=seed)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    dataset = make_token_dataset(root / "datasets" / "0123")
    folder = open_run_dir(config, dataset, fresh=True)
    torch.manual_seed(seed)
    network = build_model(config.model)
    for step in STEPS:
        progress = TrainingProgress(
            step=step,
            position=step,
            tokens_seen=64 * step,
            finished=step == STEPS[-1],
            dataset_fingerprint=dataset.fingerprint,
        )
        write_checkpoint(folder, take_snapshot(config, network, [], progress))
    save_report(folder, config, evaluation)
    run = open_run(config, dataset, folder)
    with open_recorder(run) as recorder:
        recorder.log_metrics(
            STEPS[0], {"val/loss": 6.0, "val/bits_per_byte": 2.0, "train/loss": 6.1}
        )
        recorder.log_metrics(STEPS[1], {"val/loss": 5.0, "train/loss": 5.1})
        recorder.log_report(evaluation)
        attach_artifacts(
            run, {REPORT_FILE: folder / REPORT_FILE}, models=collect_models(folder, STEPS[-1])
        )
    return FinishedRun(run, config, dataset)
