"""Reports and locks lie beside a folder of tables, inside it where they must, and never in two places."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from curator_embed.errors import UsageError
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock, OutputLocked


def book(folder: Path, state: Path | None = None) -> Bookkeeping:
    return Bookkeeping.of(Location.of(str(folder)), None if state is None else str(state))


def test_it_lies_beside_the_folder_and_is_made_only_for_what_is_written(tmp_path: Path) -> None:
    found = book(tmp_path / "out")
    assert found.place.path == str(tmp_path / "out.curator_embed")
    assert not list(tmp_path.iterdir())
    found.write("report-1.json", {"read": 1})
    assert found.read("report-1.json") == {"read": 1} and found.names("report-") == ["report-1.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.curator_embed"]


def test_a_place_somebody_chose(tmp_path: Path) -> None:
    book(tmp_path / "out", tmp_path / "state").write("report-1.json", {})
    assert (tmp_path / "state" / "report-1.json").exists()


def test_inside_where_nothing_can_be_written_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and real(path, mode))
    found = book(tmp_path / "out")  # as an ordinary user sees it; root may write anywhere
    assert found.place.path == str(tmp_path / "out" / ".curator_embed")
    found.write("a.json", 1)
    monkeypatch.undo()
    assert book(tmp_path / "out").read("a.json") == 1, "the one that is there is used by everybody"


def test_a_buckets_root_has_nothing_beside_it() -> None:
    assert Bookkeeping.of(Location.of("memory://")).place.path.endswith("/.curator_embed")
    assert Bookkeeping.of(Location.of("memory://bookbucket/out")).place.path == "/bookbucket/out.curator_embed"


def test_two_places_are_an_error_whose_remedy_works(tmp_path: Path) -> None:
    (tmp_path / "out" / ".curator_embed").mkdir(parents=True)
    (tmp_path / "out.curator_embed").mkdir()
    with pytest.raises(UsageError, match=r"both hold reports.*Remove .*out/\.curator_embed"):
        book(tmp_path / "out")
    (tmp_path / "out" / ".curator_embed").rmdir()
    assert book(tmp_path / "out").place.path == str(tmp_path / "out.curator_embed")


def test_what_version_0_1_0_left_is_read_and_moved(tmp_path: Path) -> None:
    former = tmp_path / "out" / "_curator_embed"
    former.mkdir(parents=True)
    (former / "report-20260101-000000-aa.json").write_text('{"read": 3}')
    found = book(tmp_path / "out")
    assert found.names("report-") == ["report-20260101-000000-aa.json"]
    assert found.read("report-20260101-000000-aa.json") == {"read": 3}
    with OutputLock(found):
        assert not former.exists()
    assert book(tmp_path / "out").read("report-20260101-000000-aa.json") == {"read": 3}


def test_a_run_of_version_0_1_0_that_is_going_on_holds_the_folder(tmp_path: Path) -> None:
    former = tmp_path / "out" / "_curator_embed"
    former.mkdir(parents=True)
    (former / "lock.json").write_text(json.dumps({"token": "x", "host": "elsewhere", "expires": time.time() + 60}))
    with pytest.raises(OutputLocked, match="elsewhere"):
        OutputLock(book(tmp_path / "out")).__enter__()
    assert former.exists(), "nothing was moved under its feet"


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with OutputLock(book(tmp_path / "out")):
        pass
    assert not list(tmp_path.iterdir())


def test_text_that_is_no_utf8_is_kept_escaped(tmp_path: Path) -> None:
    book(tmp_path / "out").write("a.json", {"path": "caf\udce9.jpg"})
    assert book(tmp_path / "out").read("a.json") == {"path": "caf\udce9.jpg"}
