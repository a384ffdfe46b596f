"""nanoGPT config files are converted without being executed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gpt.config.loading import build_config
from gpt.errors import ConfigError
from gpt.exchange.nanogpt import SETTINGS, convert_nanogpt

ROOT = Path(__file__).resolve().parents[3]

OURS = """
# a user's own file
out_dir = 'out-fineweb'
wandb_log = True
wandb_project = 'fineweb'
wandb_run_name = 'gpt2 124M!'
dataset = 'fineweb'
n_layer=12; n_head=12
n_embd=512
batch_size = 16
gradient_accumulation_steps = 4 * 8
block_size = 1024
dropout = 0
max_iters = lr_decay_iters = 5_000
warmup_iters = 100
eval_iters = 10
min_lr = 3e-5
weight_decay = 1e-1
"""


def read(tmp_path: Path, text: str) -> tuple[dict, dict[str, str]]:
    path = tmp_path / "train_user.py"
    path.write_text(text)
    imported = convert_nanogpt(path, "data/fineweb.parquet")
    values = tomllib.loads(imported.to_toml())
    assert values == imported.values
    return values, dict(imported.unsupported)


def test_every_key_is_converted_or_reported(tmp_path: Path) -> None:
    values, unsupported = read(tmp_path, OURS)
    assert values["run"] == {"name": "gpt2-124M", "root": "out-fineweb"}
    model = {"n_layer": 12, "n_head": 12, "n_embd": 512, "block_size": 1024, "dropout": 0.0}
    assert values["model"] == model | {"bias": False, "architecture": "gpt2"}
    assert values["training"]["grad_acc"] == 32
    assert values["training"]["max_steps"] == 5000
    assert values["schedule"] == {
        "warmup_steps": 100,
        "name": "cosine",
        "min_learning_rate_ratio": 0.05,
    }
    assert values["evaluation"]["tokens"] == 10 * 16 * 1024
    assert values["tracking"]["experiment"] == "fineweb"
    assert unsupported.keys() == {"wandb_log", "dataset"}


def test_the_result_is_checked_by_the_config_rules(tmp_path: Path) -> None:
    values, _ = read(tmp_path, OURS)
    with pytest.raises(ConfigError, match=r"42\.67"):
        build_config(values)
    build_config(read(tmp_path, OURS.replace("512", "576"))[0])


def test_missing_settings_get_the_defaults_of_nanogpt(tmp_path: Path) -> None:
    config = build_config(read(tmp_path, "")[0])
    assert config.tokens_per_step == 12 * 40 * 1024
    assert config.training.max_steps == 600_000
    assert config.schedule.min_learning_rate_ratio == 0.1


def test_nothing_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    values, unsupported = read(
        tmp_path,
        f"import time\nopen({str(trap)!r}, 'w')\nn_layer = int('6')\nn_head = 6\n"
        "wandb_run_name = 'ft-' + str(time.time())\nif True:\n    n_embd = 6\nn_head += 1\n",
    )
    assert not trap.exists()
    assert values["model"]["n_layer"] == SETTINGS["n_layer"][1]
    assert values["model"]["n_head"] == 6
    assert unsupported.keys() == {
        *("line 1", "line 2", "line 6", "line 8"),
        *("n_layer", "wandb_run_name"),
    }


def test_no_decay_gives_a_constant_rate(tmp_path: Path) -> None:
    assert read(tmp_path, "decay_lr = False")[0]["schedule"]["min_learning_rate_ratio"] == 1.0
    assert "lr_decay_iters" in read(tmp_path, "max_iters = 100\nlr_decay_iters = 90")[1]


def test_a_minimum_rate_above_the_maximum_is_refused(tmp_path: Path) -> None:
    values, _ = read(tmp_path, "learning_rate = 1e-5\nmin_lr = 1e-4")
    with pytest.raises(ConfigError, match="min_learning_rate_ratio"):
        build_config(values)


@pytest.mark.parametrize(
    "text",
    [
        "n_layer = 'many'",
        "eval_iters = [1, 2]",
        "learning_rate = 1 / 0",
        "learning_rate = 0\nmin_lr = 'x'",
        "n_embd = {(1, 2): 3}",
        "wandb_project = '\\ud800 \\x7f \\U0001F600'",
        "out_dir = '\\x7f \\U0001F600'",
        "max_iters = 10 ** 10",
        "device = 'mps'",
        "dtype = None",
        "batch_size = -1 - 1",
        f"x = {'(' * 80}1{')' * 80}",
    ],
)
def test_unusual_values_give_a_config_or_a_config_error(tmp_path: Path, text: str) -> None:
    values, _ = read(tmp_path, text)
    with contextlib.suppress(ConfigError):
        build_config(values)


@pytest.mark.parametrize("text", ["n_layer = ", "\0", "def", "x = (" * 500, "n = " + "9" * 5000])
def test_files_that_are_not_python_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not Python"):
        convert_nanogpt(path, "x")
    with pytest.raises(ConfigError, match="no such file"):
        convert_nanogpt(tmp_path / "none.py", "x")


def test_the_command_prints_toml_and_validates_it(tmp_path: Path) -> None:
    path = tmp_path / "train_user.py"
    path.write_text(OURS)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "import-nanogpt", str(path), "--gpu", "rtx-4070"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert tomllib.loads(done.stdout)["model"]["n_embd"] == 512
    assert "# not converted: dataset" in done.stdout
    for part in ("42.67", "n_embd=512 model.n_head=8", "yes"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
