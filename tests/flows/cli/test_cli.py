"""The command line as a user sees it: what it prints, and its exit codes."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest
from overnight_command import ROOT, overnight

from flows.cli import main

GOOD = ROOT / "configs" / "gpt-576.toml"


def test_validate_summarizes_valid_config() -> None:
    done = overnight("validate", GOOD)
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 layers, 12 heads, width 576" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert overnight("validate", path).returncode == 0


def test_validate_refuses_indivisible_heads() -> None:
    done = overnight("validate", GOOD, "--set", "model.n_embd=512")
    assert (done.returncode, done.stdout) == (2, "")
    for part in ("512", "12", "42.67", "480/12", "576/12", "512/8", "512/16"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_reports_all_problems_at_once() -> None:
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
def test_user_error_prints_message_without_traceback(
    arguments: tuple[str | Path, ...], message: str
) -> None:
    done = overnight(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_names_the_invalid_config_among_several(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(GOOD.read_text().replace("n_embd = 576", "n_embd = 577"))
    done = overnight("validate", GOOD, bad)
    assert done.returncode == 2
    assert str(GOOD) in done.stdout
    assert f"{bad}\n  model.n_embd = 577" in done.stdout


def test_version() -> None:
    assert overnight("--version").stdout.startswith("overnight ")


def test_help_shows_every_summary_uncut_and_ends_with_three_commands() -> None:
    lines = overnight("--help", COLUMNS="80").stdout.splitlines()
    assert "  --version  Show the version and exit." in lines
    commands = lines[lines.index("Commands:") + 1 : lines.index("", lines.index("Commands:"))]
    assert len(commands) == 17
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)
    assert [line.split()[0] for line in lines[-3:]] == ["overnight"] * 3


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the module: creating the database takes most of a short run."""
    return tmp_path_factory.mktemp("prefect")


def flow_run_states(prefect_home: Path, name: str) -> list[str]:
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        rows = database.execute("SELECT state_type FROM flow_run WHERE name = ?", (name,))
        return [state for (state,) in rows]


def test_invalid_run_is_reported_once_and_recorded_as_failed(
    tmp_path: Path, prefect_home: Path
) -> None:
    wrong = ("--set", "model.n_embd=512")
    done = overnight("run", GOOD, *wrong, cwd=tmp_path, PREFECT_HOME=str(prefect_home))
    assert done.returncode == 2
    assert done.stderr.count("42.67") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert flow_run_states(prefect_home, "gpt-576") == ["FAILED"]
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    "command", [("calibrate", "--device", "cpu"), ("sync", "run"), ("doctor",)]
)
def test_root_below_a_file_is_one_message(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    done = overnight(*command, "--root", tmp_path / "file" / "runs")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stdout + done.stderr
    assert "file" in done.stdout + done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_that_cannot_be_written_is_one_message(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "runs/file")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert capsys.readouterr().err.splitlines() == [
        "a file or folder cannot be used: 1 problem",
        "  runs/file",
        f"    {os.strerror(number)}",
        "    -> free space there, or use a folder that you can write, e.g. by run.root or --root",
    ]


def test_other_error_of_the_system_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EBADF, "a mistake of the program")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(OSError, match="mistake"):
        main.main()
