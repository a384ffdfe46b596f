"""`overnight watch`: one event per complete new file, across restarts and outages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import polars
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.service import watch
from flows.service.watch import Watcher, state_path
from gpt.data.new_files import NewFileScanner
from gpt.errors import WatchError


def parquet(path: Path, text: str = "text") -> Path:
    polars.DataFrame({"text": [text]}).write_parquet(path)
    return path


def test_file_is_new_once_it_is_complete_and_unchanged(tmp_path):
    parquet(tmp_path / "there.parquet")
    arrivals = NewFileScanner(tmp_path)
    assert arrivals.mark_existing_as_seen() == 1
    assert arrivals.scan() == ([], {})

    whole = parquet(tmp_path / "whole", "a text that is longer " * 50).read_bytes()
    (tmp_path / "sub").mkdir()
    growing = tmp_path / "sub" / "growing.parquet"
    for length in (10, 50, len(whole)):
        growing.write_bytes(whole[:length])
        assert arrivals.scan() == ([], {}), "it is still growing"
    assert arrivals.scan() == ([growing], {})
    assert arrivals.scan() == ([], {}), "reported once"

    stuck = tmp_path / "stuck.parquet"
    stuck.write_bytes(whole[:50])
    (tmp_path / ".stuck.parquet.part").write_bytes(whole)
    arrivals.scan()
    found, broken = arrivals.scan()
    assert (found, list(broken)) == ([], [stuck])
    assert arrivals.scan() == ([], {}), "reported once"
    stuck.write_bytes(whole)
    arrivals.scan()
    assert arrivals.scan() == ([stuck], {}), "the copy was completed"

    parquet(tmp_path / "there.parquet", "other text")
    arrivals.scan()
    assert arrivals.scan() == ([tmp_path / "there.parquet"], {}), "rewritten"


class Server:
    """Takes events, unless it is down."""

    def __init__(self) -> None:
        self.down = False
        self.asked: list[tuple[str, object]] = []

    def send(self, path, event_id):
        self.asked.append((path.name, event_id))
        if self.down:
            raise httpx.ConnectError("refused")


def test_event_is_sent_once_across_outage_and_kill(tmp_path, monkeypatch, capsys):
    server = Server()
    monkeypatch.setattr(watch, "send_file_event", server.send)
    folder, state = tmp_path / "in", state_path(tmp_path / "in", "*.parquet", tmp_path)
    folder.mkdir()
    state.parent.mkdir()
    parquet(folder / "before.parquet")

    def watcher() -> Watcher:
        return Watcher(folder, "*.parquet", state, existing=False)

    first = watcher()
    parquet(folder / "a.parquet")
    server.down = True
    for _ in range(4):
        first.step()
    assert {name for name, _ in server.asked} == {"a.parquet"}
    assert capsys.readouterr().out.count("cannot be sent") == 1
    # The watcher is killed; another file arrives while none is running.
    parquet(folder / "b.parquet")
    second = watcher()
    server.down = False
    for _ in range(3):
        second.step()
    sent = [name for name, _ in server.asked[3:]]
    assert sent == ["a.parquet", "b.parquet"]
    assert len({event for name, event in server.asked if name == "a.parquet"}) == 1, "one event"
    third = watcher()
    shutil.move(folder, tmp_path / "away")
    third.step()
    assert "waiting for it" in capsys.readouterr().out
    shutil.move(tmp_path / "away", folder)
    for _ in range(3):
        third.step()
    assert len(server.asked) == 5, "nothing is sent twice"


def test_existing_files_are_sent_on_request(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setattr(watch, "send_file_event", server.send)
    parquet(tmp_path / "before.parquet")
    watcher = Watcher(tmp_path, "*.parquet", tmp_path / "state.json", existing=True)
    for _ in range(3):
        watcher.step()
    assert [name for name, _ in server.asked] == ["before.parquet"]


def test_unsent_events_of_an_earlier_version_are_sent(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setattr(watch, "send_file_event", server.send)
    sent, unsent = parquet(tmp_path / "a.parquet"), parquet(tmp_path / "b.parquet")
    known = {str(p): f"{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in (sent, unsent)}
    events = [{"id": "12345678123456781234567812345678", "path": str(unsent)}]
    (tmp_path / "state.json").write_text(json.dumps({"known": known, "unsent": events}))
    watcher = Watcher(tmp_path, "*.parquet", tmp_path / "state.json", existing=False)
    for _ in range(3):
        watcher.step()
    assert [name for name, _ in server.asked] == ["b.parquet"]


def test_watch_refuses_missing_folder_and_missing_server(tmp_path):
    def watching(folder: Path) -> None:
        watch.watch(folder, "*.parquet", 0.1, False, tmp_path / "runs")

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with pytest.raises(WatchError, match="overnight up"):
            watching(tmp_path)
        with pytest.raises(WatchError, match="no such directory"):
            watching(tmp_path / "none")
