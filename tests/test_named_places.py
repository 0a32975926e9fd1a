"""What artefacts name without folders, and how it is found again: beside them, or where it was last seen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from locum.cache import own_folder
from locum.errors import CheckpointError
from locum.places import MOST_PLACES, bare, bare_word, find, name_of, named_from, remember, without_folders

MARK, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "locum" / "places"


def mark_of(place: Path) -> str:
    """The mark of a file is what is in it."""
    if place.is_dir():
        raise CheckpointError("a folder has none")
    return place.read_text()


def made(path: Path, mark: str = MARK) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(mark)
    return path


def test_what_lies_beside_is_found_before_what_was_seen_elsewhere(tmp_path):
    far = made(tmp_path / "far" / "original")
    remember(MARK, far)
    beside = tmp_path / "here"
    assert find("original", MARK, beside, mark_of).place == far
    near = made(beside / "original")
    assert find("original", MARK, beside, mark_of).place == near
    near.write_text(OTHER)
    assert find("original", MARK, beside, mark_of).place == far
    far.write_text(OTHER)
    found = find("original", MARK, beside, mark_of)
    assert found.place is None and found.other == near
    far.unlink()
    near.unlink()
    assert find("original", MARK, beside, mark_of).other is None


def test_a_name_leads_nowhere_but_beside(tmp_path):
    made(tmp_path / "out" / "original")
    made(tmp_path / "original")
    for named in ("..", ".", "", "/", "../../original/..", str(tmp_path / "gone" / "..")):
        assert find(named, MARK, tmp_path / "out", mark_of).place is None, named
    assert find("../original", MARK, tmp_path / "out", mark_of).place == tmp_path / "out" / "original"


def test_whole_paths_of_earlier_artefacts_still_lead_there(tmp_path):
    old = made(tmp_path / "old" / "original")
    assert find(str(old), MARK, tmp_path, mark_of).place == old
    assert find(str(old), None, tmp_path, mark_of).place == old
    old.write_text(OTHER)
    assert find(str(old), MARK, tmp_path, mark_of).other == old
    moved = made(tmp_path / "new" / "original")
    assert find(str(old), MARK, tmp_path / "new", mark_of).place == moved


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", "null", '{"path": 7}', '{"path": "relative"}', '{"other": 1}', "[" * 9000, " " * 20_000],
)
def test_a_damaged_note_is_none(content, cache, tmp_path):
    place = made(tmp_path / "far" / "original")
    remember(MARK, place)
    (cache / MARK).write_text(content)
    assert find("original", MARK, tmp_path, mark_of).place is None
    remember(MARK, place)
    assert find("original", MARK, tmp_path, mark_of).place == place


def test_notes_of_others_are_none(cache, tmp_path, monkeypatch):
    place = made(tmp_path / "far" / "original")
    remember(MARK, place)
    assert not (cache.stat().st_mode | (cache / MARK).stat().st_mode) & 0o022

    def is_found() -> bool:
        return find("original", MARK, tmp_path, mark_of).place is not None

    assert is_found()
    (cache / MARK).chmod(0o666)
    assert not is_found()
    (cache / MARK).rename(tmp_path / "note")
    (cache / MARK).symlink_to(tmp_path / "note")
    assert not is_found()
    (cache / MARK).unlink()
    remember(MARK, place)
    cache.chmod(0o777)
    assert not is_found()
    remember(OTHER, place)
    assert not (cache / OTHER).exists()
    cache.chmod(0o700)
    assert is_found()
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert not is_found()


@pytest.mark.parametrize("mark", ["../../x", "a/b", "", ".", "0" * 200, "XYZ"])
def test_a_mark_from_anywhere_names_no_file(mark, tmp_path):
    made(tmp_path / "x", json.dumps({"path": str(tmp_path / "x")}))
    assert find("original", mark, tmp_path, mark_of).place is None


def test_without_a_cache_nothing_is_noted_and_nothing_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember(MARK, tmp_path)
    assert find("original", MARK, tmp_path, mark_of).place is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    remember(MARK, tmp_path)
    assert find("original", MARK, tmp_path, mark_of).place is None
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        own_folder("places")


def test_notes_are_few(cache, tmp_path):
    remember(MARK, tmp_path)
    for i in range(MOST_PLACES):
        (cache / f"{i:016x}").write_text("{}")
        os.utime(cache / f"{i:016x}", (i, i))
    remember(OTHER, tmp_path)
    left = {file.name for file in cache.iterdir()}
    assert len(left) <= MOST_PLACES and {MARK, OTHER, f"{MOST_PLACES - 1:016x}"} <= left
    assert f"{0:016x}" not in left


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("/home/me/model/", "model"),
        ("../me/model", "model"),
        ("code=/home/me/a.txt@2", "code=a.txt@2"),
        ("--out=/home/me/x", "--out=x"),
        ("/home/me/a=b/c", "c"),
        ("--remove", "--remove"),
        ("a.txt", "a.txt"),
        ("method=prune", "method=prune"),
    ],
)
def test_words_of_a_command_have_no_folders(word, said):
    assert bare_word(word) == said


def test_nothing_absolute_is_in_what_is_written():
    given = {
        "a": "/home/me/my models/one",
        "b": ["locum eval /home/me/x --data code=/home/me/a.txt", 7, None],
        "c": {"d": "('/home/me/y', '~/z')", "e": "https://arxiv.org/abs/1", "f": "2 / 3, a/b, model.layers.0"},
    }
    assert bare(given) == {
        "a": "one",
        "b": ["locum eval x --data code=a.txt", 7, None],
        "c": {"d": "('y', 'z')", "e": "https://arxiv.org/abs/1", "f": "2 / 3, a/b, model.layers.0"},
    }
    assert without_folders("found /tmp/x/plan.json, which is another") == "found plan.json, which is another"


def test_files_are_named_from_the_folder_of_what_names_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    model = tmp_path / "runs" / "out" / "small"
    assert named_from(model, tmp_path / "runs") == "out/small"
    assert named_from(model, tmp_path / "elsewhere") == named_from(model, None) == "small"
    assert named_from(tmp_path / "home" / "me" / "small", tmp_path / "home") == "small"  # else it would name the user
    monkeypatch.chdir(tmp_path)
    assert name_of(".") == tmp_path.name and name_of("a/") == "a"
