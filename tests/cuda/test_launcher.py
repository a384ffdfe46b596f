"""Two cards of one machine: torch's launcher, DDP and FSDP2 over the stub of NCCL."""

import pytest
from training_data import make_token_dataset, tiny_config

from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.distributed.launch import launch_training

pytestmark = pytest.mark.cards("two_rtx4070")

NANOCHAT = {"model__architecture": "nanochat", "optimizer__name": "muon", "model__dropout": 0.0}


@pytest.mark.parametrize(
    ("sharding", "changes"),
    [
        ("ddp", {"training__activation_checkpointing": True}),
        ("fsdp", NANOCHAT),
    ],
)
def test_two_cards_train_one_model(tmp_path, sharding, changes):
    config = tiny_config(
        tmp_path,
        hardware__device="cuda",
        hardware__devices=2,
        hardware__sharding=sharding,
        hardware__restarts=0,
        training__max_steps=4,
        training__checkpoint_interval=2,
        evaluation__interval=2,
        **changes,
    )
    dataset = make_token_dataset(tmp_path / "tokens")
    records = list(launch_training(config, dataset, tmp_path / "run"))
    assert [record.step for record in records if record.validation is None] == [1, 2, 3, 4]
    assert [record.step for record in records if record.validation] == [0, 2, 4]
    assert latest_checkpoint(tmp_path / "run").finished
