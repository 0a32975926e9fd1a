"""Registries: names once, unknown names with close ones, sorted listing, and what other packages offer."""

from __future__ import annotations

import importlib.metadata
import types

import pytest

from locum.errors import OptionError, did_you_mean
from locum.registry import Registry, import_modules


def test_what_is_added_is_found_and_listed_by_name() -> None:
    things: Registry[int] = Registry("thing")
    assert things.add("b", 2) == 2 and things.add("a", 1) == 1
    assert things["a"] == 1 and "b" in things and "c" not in things
    assert list(things) == ["a", "b"] and things.items() == [("a", 1), ("b", 2)]


def test_the_same_name_twice_is_refused() -> None:
    things: Registry[int] = Registry("thing")
    things.add("a", 1)
    with pytest.raises(OptionError, match="thing 'a' is registered twice"):
        things.add("a", 2)
    assert things["a"] == 1


def test_unknown_name_lists_close_ones_then_all() -> None:
    things: Registry[int] = Registry("thing")
    things.add("gate", 1)
    things.add("reap", 2)
    with pytest.raises(OptionError, match=r"unknown thing 'gaet': did you mean 'gate'\? allowed: gate, reap"):
        things["gaet"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("--scheme", ""), ("--remov", "did you mean '--remove'? "), ("remov", "did you mean 'remove'? ")],
)
def test_dashes_make_no_names_alike(name: str, meant: str) -> None:
    dashes = "--" if name.startswith("--") else ""
    allowed = ["help", "force", "json", "out", "to", *(["remove"] if meant else [])]
    assert did_you_mean(name, [dashes + each for each in allowed]) == meant


class Point:
    def __init__(self, load) -> None:
        self.load = load


def test_other_packages_are_imported_once_and_only_when_needed(monkeypatch) -> None:
    things: Registry[int] = Registry("thing", "locum.things")
    asked, loaded = [], []

    def points(group: str) -> list[Point]:
        asked.append(group)
        return [Point(lambda: loaded.append(things.add("foreign", 7)))]

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    things.add("own", 1)
    assert things["own"] == 1 and asked == []
    assert things["foreign"] == 7 and asked == ["locum.things"]
    assert list(things) == ["foreign", "own"] and "nothing" not in things and loaded == [7] and len(asked) == 1


def test_listing_imports_other_packages_too(monkeypatch) -> None:
    things: Registry[int] = Registry("thing", "locum.things")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point(lambda: things.add("foreign", 7))])
    assert things.items() == [("foreign", 7)]


def test_an_import_error_of_another_package_is_not_hidden(monkeypatch) -> None:
    def fail() -> None:
        raise ImportError("broken package")

    things: Registry[int] = Registry("thing", "locum.things")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point(fail)])
    with pytest.raises(ImportError, match="broken package"):
        list(things)


def test_a_registry_without_entry_points_looks_nowhere(monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: pytest.fail("looked"))
    assert "a" not in Registry("thing")


def test_import_modules_imports_every_module_and_hides_no_error(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "locum_test_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("loaded = True")
    monkeypatch.syspath_prepend(tmp_path)
    import locum_test_package as package

    import_modules(package)
    assert isinstance(package.one, types.ModuleType) and package.one.loaded
    (folder / "two.py").write_text("raise ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        import_modules(package)
