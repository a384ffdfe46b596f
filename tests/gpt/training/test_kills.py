"""A tracked run killed at random moments ends with the weights and metrics of one that is not.

OVERNIGHT_KILLS=50 kills it more often than the test suite has time for.
"""

import os
import random
import shutil

import faults
import pytest
import torch
from mlflow.tracking import MlflowClient
from training_data import make_token_dataset, small_config, weights
from waiting import scaled

from gpt.data.shards import read_manifest
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import open_run_dir
from tasks.tracking.runs import create_sqlite_store, open_run, track_run_status
from tasks.train import train

KILLS = int(os.environ.get("OVERNIGHT_KILLS", "4"))
STEPS = 30 * KILLS
PROCESSES = faults.forkserver_context("tasks.train", "tasks.tracking.runs", "test_kills")


def config_of(root):
    return small_config(
        root,
        training__max_steps=STEPS,
        training__checkpoint_interval=7,
        training__log_interval=50,
        evaluation__interval=25,
    )


def tracked_run(root, dataset_folder):
    """Run the part of the flow between tokenizing and evaluating."""
    torch.set_num_threads(1)
    config, dataset = config_of(root), read_manifest(dataset_folder)
    run = open_run(config, dataset, open_run_dir(config, dataset))
    with track_run_status(run):
        train.fn(config, dataset, run)


def start(root, dataset):
    process = PROCESSES.Process(target=tracked_run, args=(root, dataset.folder))
    process.start()
    return process


def curve(root):
    """Return every metric point in MLflow: (key, step) -> values."""
    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'overnight'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    points = {}
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            points.setdefault((key, metric.step), []).append(metric.value)
    return points


@pytest.mark.slow
@pytest.mark.timeout(scaled(30) * KILLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kills_at_random_moments_change_nothing(tmp_path, mlflow_database):
    dataset = make_token_dataset(tmp_path / "tokens")
    for name in ("whole", "killed"):
        # With an existing store, the kills hit training; creating one has its own test below.
        (tmp_path / name / "mlflow").mkdir(parents=True)
        shutil.copy(mlflow_database, tmp_path / name / "mlflow")
    process = start(tmp_path / "whole", dataset)
    process.join()
    assert process.exitcode == 0
    chance, hit = random.Random(6), 0
    for _ in range(KILLS):
        process = start(tmp_path / "killed", dataset)
        process.join(chance.uniform(0.0, 2.5))
        process.kill()
        process.join()
        hit += process.exitcode == -9
    process = start(tmp_path / "killed", dataset)
    process.join()
    assert process.exitcode == 0
    assert hit > KILLS // 2, "too many kills came after the end"
    (folder,) = (tmp_path / "killed" / "train").iterdir()
    (whole,) = (tmp_path / "whole" / "train").iterdir()
    assert latest_checkpoint(folder).finished
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(folder)[name], tensor), name
    ours, theirs = curve(tmp_path / "killed"), curve(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert {key for key, values in ours.items() if len(values) > 1} == set()
    for key in ("train/loss", "val/loss", "lr", "grad_norm"):
        points = {point: values for point, values in theirs.items() if point[0] == key}
        assert {point: ours[point] for point in points} == points
    assert {step for key, step in ours if key == "train/loss"} == set(range(1, STEPS + 1))


def test_kill_while_mlflow_store_is_created_is_repaired_by_the_next_start(tmp_path):
    database = tmp_path / "mlflow.db"
    process = PROCESSES.Process(target=create_sqlite_store, args=(database,))
    process.start()
    partial = tmp_path / ".mlflow.db.partial"
    while not (partial.exists() and partial.stat().st_size > 100_000):  # some of its tables
        assert process.is_alive()
    process.kill()
    process.join()
    assert not database.exists()
    create_sqlite_store(database)
    client = MlflowClient(f"sqlite:///{database}")
    run = client.create_run(client.create_experiment("after"))
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
