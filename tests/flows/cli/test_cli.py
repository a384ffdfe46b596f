"""The command line as a person meets it: a process, what it prints, how it exits."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from overnight_command import ROOT, overnight

GOOD = ROOT / "configs" / "gpt-576.toml"


"""The environment without the settings of these tests."""


def test_a_good_config_is_summed_up() -> None:
    done = overnight("validate", GOOD)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 layers, 12 heads, width 576" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_configs_are_good(path: Path) -> None:
    assert overnight("validate", path).returncode == 0


def test_heads_that_do_not_divide_the_width() -> None:
    done = overnight("validate", GOOD, "--set", "model.n_embd=512")
    assert (done.returncode, done.stdout) == (2, "")
    for part in ("512", "12", "42.67", "480/12", "576/12", "512/8", "512/16"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_three_wrong_values_are_reported_together() -> None:
    wrong = ("model.n_embd=512", "training.batch_size=0", "optimizer.learning_rate=-1.0")
    done = overnight("validate", GOOD, *(word for value in wrong for word in ("--set", value)))
    assert done.returncode == 2
    assert "3 problems" in done.stderr
    for value in wrong:
        assert value.split("=")[0] in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("validate", "no-such.toml"), "no such file"),
        (("validate", GOOD, "--set", "n_embd"), "section.key=value"),
        (("validate", GOOD, "--set", "model.n_embed=576"), "did you mean n_embd?"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(
    arguments: tuple[str | Path, ...], message: str
) -> None:
    done = overnight(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_one_bad_config_among_good_ones_fails_and_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(GOOD.read_text().replace("n_embd = 576", "n_embd = 577"))
    done = overnight("validate", GOOD, bad)
    assert done.returncode == 2
    assert str(GOOD) in done.stdout
    assert f"{bad}\n  model.n_embd = 577" in done.stdout


def test_version() -> None:
    assert overnight("--version").stdout.startswith("overnight ")


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for the module: making its database takes most of a short run's time."""
    return tmp_path_factory.mktemp("prefect")


def flow_run_states(prefect_home: Path, name: str) -> list[str]:
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        rows = database.execute("SELECT state_type FROM flow_run WHERE name = ?", (name,))
        return [state for (state,) in rows]


def test_a_bad_run_says_so_once_and_is_recorded_as_failed(
    tmp_path: Path, prefect_home: Path
) -> None:
    wrong = ("--set", "model.n_embd=512")
    done = overnight("run", GOOD, *wrong, cwd=tmp_path, PREFECT_HOME=str(prefect_home))
    assert done.returncode == 2
    assert done.stderr.count("42.67") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert flow_run_states(prefect_home, "gpt-576") == ["FAILED"]
    assert not list(tmp_path.glob("runs/*"))
