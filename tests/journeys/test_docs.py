"""What the documents say is there, is there; and what is there, they say."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import locum
from locum.cli import cli, methods_page
from locum.containers.layout import Layout
from locum.criteria.criterion import CRITERIA
from locum.experts.parts.part import PARTS
from locum.experts.parts.shared_base import SharedBase
from locum.exports.target import TARGETS
from locum.methods import METHODS
from locum.plans.plan import KEPT, NOTHING, Base, LayerPlan, Plan, Slot, make_plan
from locum.stats.sums import STATISTICS
from locum.training.ways import WAYS
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_rows, write_text
from making.containers import filled, swiglu
from making.handmade import make_statistics, toy_shape

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


def test_the_page_of_methods_is_what_docstrings_say():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == methods_page.page(), "docs/methods.md is not current; run: make methods"
    named = {name for row in methods_page.MC_SUITE for name in row[2:] if name}
    assert named <= set(CRITERIA) and len(methods_page.MC_SUITE) == 16


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


@pytest.mark.journeys
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


ADDING = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
ADDED = {
    "gate_per_use": (CRITERIA, "gate_per_use"),
    "clusters": (METHODS, "cluster_means"),
    "shift": (PARTS, "shift"),
    "distilled": (WAYS, "distilled"),
    "listing": (TARGETS, "listing"),
}


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of docs/adding.md, imported; what they register is there in this test alone."""
    files = dict(re.findall(r"```python\n# file: (\w+)\.py\n(.*?)```", ADDING, re.DOTALL))
    assert set(files) == set(ADDED) and len(files) == ADDING.count("```python")
    monkeypatch.syspath_prepend(tmp_path)
    for registry, _ in ADDED.values():
        monkeypatch.setattr(registry, "_items", dict(registry.items()))
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        assert ADDED[name][1] not in ADDED[name][0]
    yield {name: importlib.import_module(name) for name in files}
    for name in files:
        sys.modules.pop(name, None)


def test_what_the_page_adds_is_registered(added):
    points = tomllib.loads(re.search(r"```toml\n(.*?)```", ADDING, re.DOTALL)[1])["project"]["entry-points"]
    for name, (registry, item) in ADDED.items():
        assert item in registry and locum.show(item)[0]["summary"]
        assert points.pop(registry.entry_points) == {name: name}
    assert not points


def test_the_criterion_of_the_page_is_its_formula(added):
    statistics = make_statistics(toy_shape())
    for layer in statistics.shape.layers:
        values = statistics.layer(layer.name)
        sums, counts = values["gate_sum"].tolist(), values["count"].tolist()
        expected = [s / n if n else 0.0 for s, n in zip(sums, counts, strict=True)]
        assert CRITERIA["gate_per_use"](values).tolist() == pytest.approx(expected)


def test_the_part_of_the_page_is_its_formula(added):
    """Through a plan's file and a container; one token and one expert at a time, as the page says."""
    shape = toy_shape(layers=1)
    layer, shift = shape.layers[0], added["shift"].Shift()
    slots = (Slot((SharedBase(0), shift)), Slot((shift,)), *(KEPT,) * (layer.num_experts - 3), NOTHING)
    plan = make_plan(shape, [LayerPlan(layer.name, slots, (Base((0,), (1.0,)),))])
    plan = Plan.loads(plan.dumps())
    assert plan.layers[0].slots == slots
    container = filled(Layout.of(plan.layers[0], layer), swiglu)
    tensors = dict(container.named_parameters())
    assert {*tensors} == {"dense.gate_up_NGD", "dense.down_NDF", "shift.shift_NG"}
    x_TD = torch.randn(3, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    index_TK = torch.tensor([[0, 1], [2, 0], [layer.num_experts - 1, 0]])
    weight_TK = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
    expected_TD = torch.zeros_like(x_TD)
    rows = container.layout.dense_of
    for t in range(3):
        for e, weight in zip(index_TK[t].tolist(), weight_TK[t].tolist(), strict=True):
            if rows[e] >= 0:  # expert 1 has no down projection, so that its output is zero
                pre_G = tensors["dense.gate_up_NGD"][rows[e]] @ x_TD[t]
                pre_G = pre_G + (tensors["shift.shift_NG"][0] if e == 0 else 0)
                expected_TD[t] += weight * (tensors["dense.down_NDF"][rows[e]] @ swiglu(pre_G))
    torch.testing.assert_close(container(x_TD, index_TK, weight_TK), expected_TD, rtol=1e-4, atol=1e-3)
