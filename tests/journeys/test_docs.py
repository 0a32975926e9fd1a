"""What the documents say is there, is there; and what is there, they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

import locum
from locum.cli import cli
from locum.criteria.criterion import CRITERIA
from locum.methods import METHODS
from locum.stats.sums import STATISTICS
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_rows, write_text

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALL = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
SRC = ROOT / "src" / "locum"
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
ROOMS = sorted(path for path in SRC.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py")


@pytest.mark.parametrize("room", [room for room in ROOMS if room.name != "__init__.py"], ids=lambda path: path.name)
def test_the_map_has_every_room(room):
    """Folders and top-level modules; that each file begins with what it is for, test_layering.py says."""
    house = README.partition("## The house")[2].partition("\n## ")[0]
    assert house, "README has no map"
    name = f"`src/locum/{room.name}/`" if room.is_dir() else room.name
    assert re.search(rf"`(src/locum/)?{room.name}`", house) or name in house, f"{room.name} is not in README's map"


def test_the_file_map_has_nothing_else():
    for place in re.findall(r"`((?:src|docs|benchmarks|tests)/[\w/.]*)`", README):
        assert (ROOT / place).exists(), f"README names {place}, which is not there"


def test_the_evidence_of_the_results_is_there():
    """Every file and program that the page names; a table has a line that says what it was made from."""
    names = re.findall(r"`([\w/.-]+\.(?:jsonl?|py))`", RESULTS)
    for name in names:
        places = [ROOT / name, ROOT / "benchmarks" / name, ROOT / "benchmarks" / "results" / name]
        assert any(place.is_file() for place in places), f"docs/results.md names {name}, which is not there"
    sections = RESULTS.split("\n## ")[1:]
    assert len(sections) == len(re.findall(r"\bEvidence: ", RESULTS)) and "\n|" in sections[-1]
    assert "\n|" not in README.partition("## The house")[0], "README has a table of results; docs/results.md has those"


def test_pictures_are_drawings():
    for picture in (ROOT / "docs").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(picture).iter()}
        assert not tags & {"script", "style", "foreignObject", "image"}, f"{picture.name}: hubs do not show all of it"


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_is_documented(name):
    assert re.search(rf"locum {name}\b|make {name}\b", ALL), f"no page says what `locum {name}` does"


@pytest.mark.parametrize("name", [*METHODS, *CRITERIA])
def test_every_method_and_criterion_is_documented(name):
    assert re.search(rf"`{name}`|--(method|score) {name}\b|`{name}\.py`|method=\"{name}\"", ALL), (
        f"no page names `{name}`"
    )


def test_the_changelog_has_the_unreleased():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_list_names_everything():
    said = command("list").stdout
    catalogue = locum.catalogue()
    assert set(catalogue["methods"]) == set(METHODS)
    assert set(catalogue["criteria"]) == set(CRITERIA)
    assert set(catalogue["statistics"]) == set(STATISTICS)
    for name in (*METHODS, *CRITERIA, *STATISTICS):
        assert re.search(rf"\b{name}\b", said), name
    for about in catalogue["methods"].values():
        assert about["summary"].endswith(".")
        assert about["paper"]
        assert all(option["help"] for option in about["options"].values())


def test_the_examples_of_the_readme_work(tmp_path, monkeypatch):
    """Its command lines and its Python, as they stand but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("PATH"), hidden_size=128, intermediate_size=128, num_experts=16)
    write_text(Path("a.txt"))
    write_rows(Path("b.jsonl"))
    blocks = dict(re.findall(r"```(sh|python)\n(.*?locum.*?)```", README, re.DOTALL))
    shell = re.findall(r"^locum .*$", README, re.MULTILINE)
    assert len(shell) >= 7
    for line in shell:
        result = command(*shlex.split(line.replace("--steps 300", "--steps 2"), comments=True)[1:])
        assert result.exit_code == 0, f"{line}\n{result.stderr}"
    for name in ("stats.safetensors", "plan.json", "small", "recovered"):
        Path(name).rename(f"shell-{name}")
    names: dict = {}
    exec(compile(blocks["python"].replace("steps=300", "steps=2"), "README", "exec"), names)
    assert names["model"].config.model_type == "olmoe"
    assert {row.domain for row in names["rows"]} == {"code", "prose", "all"}
