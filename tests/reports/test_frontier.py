"""What every size is predicted to cost: from one search, the same as its plans say, and drawn where reports are."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

import locum
from locum.errors import OptionError, StatisticsError
from locum.measure.rows import Row, write_rows
from locum.methods.auto import Auto
from locum.plans.plan import Plan, with_provenance
from locum.plans.plan_file import save_plan
from locum.reports import frontier
from locum.reports.report import make_report
from locum.stats.origin import SearchedBy
from locum.stats.statistics_file import save_statistics
from locum.stats.sums import Statistics
from making.checkpoints import locum as command
from making.handmade import make_statistics, restrict, toy_shape

SHAPE = toy_shape(layers=2, experts=8)


@pytest.fixture(scope="module")
def searched() -> Statistics:
    return dataclasses.replace(make_statistics(SHAPE), searched=SearchedBy("auto", dataclasses.asdict(Auto())))


def measured(plan: Plan) -> Row:
    return Row("small", plan.id, "kl", "all", 0.25, 0.2, 0.3, 100, 0, 1.0, 1, {"plan_file": "plan.json"})


def test_points_are_what_plans_of_their_sizes_say(searched: Statistics) -> None:
    points = locum.frontier(searched, points=7)["points"]
    sizes, losses = [p["bytes"] for p in points], [p["predicted_kl"] for p in points]
    assert sizes == sorted(set(sizes)) and losses == sorted(losses, reverse=True) and len(points) > 4
    assert (sizes[-1], losses[-1]) == (SHAPE.bytes, 0.0)
    for point in points[:-1]:
        plan = locum.plan([searched], method="auto", fit=str(point["bytes"]))
        assert plan.provenance["auto"]["predicted_kl"] <= point["predicted_kl"] * (1 + 1e-9)
        of_experts = point["bytes"] - SHAPE.bytes + SHAPE.bytes_of_experts
        assert point["bits_per_weight"] == pytest.approx(8 * of_experts / SHAPE.expert_parameters)
        assert sum(point["became"].values()) == 16
    least = locum.plan([searched], method="auto", fit=str(sizes[0]))
    assert least.id == points[0]["plan"] and points[0]["became"] == dict(
        sorted(points[0]["became"].items(), key=lambda item: -item[1])
    )


def test_options_of_the_method_count(searched: Statistics) -> None:
    bits = locum.frontier(searched, points=3, only="keep,bits")["points"]
    assert all(words.startswith("kept") for words in bits[0]["became"])
    assert bits[0]["bytes"] > locum.frontier(searched, points=3)["points"][0]["bytes"]


def test_what_it_refuses(searched: Statistics) -> None:
    with pytest.raises(OptionError, match="method mone does not say what its plans cost"):
        locum.frontier(searched, method="mone")
    with pytest.raises(StatisticsError, match=r"has no statistic 'error_price'.*locum search"):
        locum.frontier(restrict(searched, [name for name in Auto().needs() if name != "error_price"]))


def test_the_command_prints_a_table_and_writes_what_it_says(searched: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "found.safetensors"
    save_statistics(searched, file)
    out, picture = tmp_path / "frontier.json", tmp_path / "frontier.html"
    said = command("frontier", file, "--points", 5, "--out", out, "--picture", picture)
    assert said.exit_code == 0, said.output
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept["points"] == json.loads(command("frontier", file, "--points", 5, "--json").output)["points"]
    assert "bits per weight" in said.output and str(kept["points"][2]["bytes"]) in said.output
    page = picture.read_text(encoding="utf-8")
    assert page.count("<circle") == len(kept["points"]) and kept["points"][0]["plan"] in page
    assert str(tmp_path) not in page


@pytest.mark.parametrize("options", [[], ["--only", "keep,bits"], ["--no-protect", "--preset", "paper"]])
def test_what_it_advises_makes_a_plan_of_one_of_its_rows(searched: Statistics, options: list, tmp_path: Path) -> None:
    """As it is printed: with the folder, whatever its name, the options that were given, and a size."""
    file = tmp_path / "a folder" / "found.safetensors"
    file.parent.mkdir()
    save_statistics(searched, file)
    points = json.loads(command("frontier", file, *options, "--json").output)["points"]
    said = command("frontier", file, *options, "--points", 24, "--out", tmp_path / "f.json").output
    words = shlex.split(said.splitlines()[-1].partition("locum ")[2])
    made = command(*words, "--json")
    assert made.exit_code == 0, made.output
    fits = next(p for p in points if str(p["bytes"]) == words[-1])
    assert json.loads(made.output)["bytes"][1] == fits["bytes"]


def test_rows_can_be_told_apart(searched: Statistics) -> None:
    found = locum.frontier(searched, points=24)
    sizes = [row[0] for row in (frontier.cells(point, found["bytes"]) for point in found["points"])]
    assert len(set(sizes)) == len(sizes) > 4


def test_a_report_draws_it_and_says_of_each_expert_what_it_was_not(searched: Statistics, tmp_path: Path) -> None:
    file, results, page = tmp_path / "found.safetensors", tmp_path / "results.jsonl", tmp_path / "report.html"
    save_statistics(searched, file)
    plan = locum.plan([searched], method="auto", remove=0.8)
    save_plan(plan, tmp_path / "plan.json")
    write_rows(results, [measured(plan)])
    locum.report([results, file], out=page)
    text = page.read_text(encoding="utf-8")
    assert "What every size is predicted to cost" in text
    line = plan.provenance["auto"]["experts"][plan.layers[0].layer][0]
    assert all(part in text for part in line.split("; "))
    predicted = f"predicted {plan.provenance['auto']['predicted_kl']:#.4g}"
    assert f"{predicted}, measured 0.2500" in text
    said = {**plan.provenance["auto"], "measured_kl": 0.125}
    save_plan(with_provenance(plan, auto=said), tmp_path / "plan.json")
    locum.report([results, file], out=page, force=True)
    assert f"{predicted}, 0.1250 where it was checked, measured 0.2500" in page.read_text(encoding="utf-8")


def test_statistics_are_known_by_what_they_hold(searched: Statistics, tmp_path: Path) -> None:
    for name in ("found", "found.st", "found.safetensors"):
        save_statistics(searched, tmp_path / name)
        page = locum.report(tmp_path / name, out=tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert "What every size is predicted to cost" in page


@pytest.mark.parametrize("said", [None, 3, {"experts": []}, {"experts": {"x": 1}}, {"predicted_kl": "much"}])
def test_what_anybody_wrote_into_a_plan_does_not_matter(searched: Statistics, said: object, tmp_path: Path) -> None:
    plan = locum.plan([searched], method="auto", remove=0.8)
    odd = dataclasses.replace(plan, provenance={"auto": said})
    save_plan(odd, tmp_path / "plan.json")
    write_rows(tmp_path / "results.jsonl", [measured(plan)])
    assert "What became of every expert" in make_report([tmp_path / "results.jsonl"])
