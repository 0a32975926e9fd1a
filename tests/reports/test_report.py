"""The report: its numbers, its sections, its safety, and a look at it through a real browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import locum
from locum.errors import DataError, LocumError, PlanError
from locum.measure.rows import Row
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Plan, stand_in
from locum.reports import expert_maps
from locum.reports.card_results import eval_results
from locum.reports.charts import VIEW_WIDTH, Bar, Point, Scale, bars, scatter, shorten
from locum.reports.report import make_report, smoothed
from locum.shapes import LayerShape, ModelShape
from locum.stats.origin import Origin
from locum.stats.statistics_file import save_statistics
from locum.stats.sums import Statistics
from making.slots import base_of
from making.training_logs import make_log

DOMAINS = ("code", "fiction", "maths", "news")
LAYERS = tuple(f"model.layers.{n}.mlp.experts" for n in range(6))
EXPERTS = 64
EVIL = "<script>alert('x')</script> & \"co\""
VOID = {"meta", "link", "br"}


# --- inputs ---------------------------------------------------------------------------------------------------------


def row(model: str, metric: str, domain: str, value: float, spread: float = 0.0, **more) -> dict:
    return {
        "model": model,
        "plan": None,
        "metric": metric,
        "domain": domain,
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "n": 40960,
        "seed": 0,
        "seconds": 12.5,
        "peak_bytes": 3 * 2**30,
        "provenance": {},
    } | more


def rows_of(model: str, size: float, quality: float, spread: float = 0.008, **more) -> list[dict]:
    """All metrics of one model on all domains, as `locum eval` writes them."""
    about = {"bytes": int(size * 2**30), "parameters": int(size * 5e8), "expert_parameters": int(size * 4.5e8)}
    more = {
        "provenance": {"versions": {"torch": "2.11"}, "command": "locum eval", **about, **more.pop("provenance", {})}
    } | more
    rows = []
    for i, domain in enumerate((*DOMAINS, "all")):
        shift = 0.0 if domain == "all" else (0.12 * i - 0.2) + (quality - 0.8) * (0.4 - 0.2 * i)
        rows.append(row(model, "bits_per_byte", domain, quality + shift, spread, **more))
        rows.append(row(model, "loss", domain, 2.9 * (quality + shift), 3 * spread, **more))
        if model != "original":
            rows.append(row(model, "loss_delta", domain, 2.9 * (quality - 0.8) * (1.4 - 0.2 * i), spread, **more))
            rows.append(row(model, "top1_agreement", domain, 1 - 1.5 * (quality - 0.78), 0.004, **more))
    return rows


def write_results(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def make_statistics(path: Path, domains=DOMAINS, layers=LAYERS, experts=EXPERTS) -> Path:
    draw = torch.Generator().manual_seed(0)
    sums = {}
    for layer in layers:
        common = torch.randn(experts, generator=draw) * 0.9
        count = torch.softmax(common + torch.randn(len(domains), experts, generator=draw) * 0.8, 1) * 8000
        count[:, -3:] = 0
        sums[layer] = {"count": count.round().double(), "gate_sum": (count * 0.2).double()}
    shapes = tuple(LayerShape(layer, experts, 8, 64, 32, layer + ".gate", "softmax", False) for layer in layers)
    origin = Origin(ModelShape("olmoe", shapes, 1, 2, 2), "m", "t", ("d",))
    about = {"versions": {"torch": "2.11"}, "command": "c", "seed": 0}
    save_statistics(Statistics(tuple(domains), sums, origin, 32000, about), path)
    return path


def make_a_plan(path: Path | None = None, layers=LAYERS, experts=EXPERTS, method="lightmoe") -> Plan:
    chance = random.Random(1)
    made = []
    for n, layer in enumerate(layers):
        slots = []
        for e in range(experts):
            fate = e % 8 if chance.random() < 0.75 else 0
            based = stand_in(base=e % 5, rank=4) if fate in (1, 2, 3, 4) else None
            slots.append(based or {5: stand_in(constant=True), 6: DROPPED, 7: NOTHING}.get(fate, KEPT))
        for b in range(5):
            slots[b] = stand_in(base=b, rank=4 + n)
        slots[5] = stand_in(rank=2)
        members = [tuple(e for e, s in enumerate(slots) if base_of(s) == b) for b in range(5)]
        made.append(LayerPlan(layer, tuple(slots), tuple(Base(m, (1 / len(m),) * len(m)) for m in members)))
    plan = Plan(
        "olmoe", "f", tuple(made), method, {"remove": 0.5}, {"command": "locum plan s.safetensors --remove 0.5"}
    )
    if path is not None:
        locum.save_plan(plan, path)
    return plan


@pytest.fixture
def everything(tmp_path) -> Path:
    return write_everything(tmp_path)


def write_everything(folder: Path) -> Path:
    """Results of seven models, some with several seeds, that name a plan, statistics and a log beside them."""
    plan = make_a_plan(folder / "lightmoe.plan.json")
    make_statistics(folder / "statistics.safetensors")
    make_log(folder / "recovered" / "recovery.jsonl")
    files = {"plan_file": "lightmoe.plan.json", "statistics_file": "statistics.safetensors"}
    rows = rows_of("original", 12.9, 0.800, provenance={"stage": "original"})
    compressed = {"stage": "compressed", "method": "lightmoe", **files}
    rows += rows_of("lightmoe 50%", 7.1, 0.905, plan=plan.id, provenance=compressed)
    recovered = {"stage": "recovered", "method": "lightmoe", "recovery_log": "recovered/recovery.jsonl", **files}
    for seed, shift in enumerate((-0.012, 0.0, 0.013)):
        rows += rows_of("lightmoe 50% + annealed", 7.1, 0.832 + shift, seed=seed, plan=plan.id, provenance=recovered)
    rows += rows_of("reap 50%", 6.9, 0.913)
    rows += rows_of("reap 50% + LoRA", 6.95, 0.846)
    rows += rows_of("replace by constants 50%", 6.91, 0.886)
    rows += rows_of("reap 25%", 9.9, 0.835, provenance={"plan_file": "gone/plan.json"})
    return write_results(folder / "results.jsonl", rows)


# --- the page -------------------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order; gathers what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.svgs = self.titles = 0
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.svgs += tag == "svg"
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("src", "href", "xlink:href", "action") if key in given]
        assert not any(key.startswith("on") for key in given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_full_page(everything):
    page = make_report([everything])
    parsed = Balanced(page)
    assert parsed.ids == ["headline", "size", "domains", "use", "plan", "recovery", "results", "origins"]
    assert parsed.svgs == 1 + 2 + len(LAYERS) + 1 + 1  # scatter, bars of two metrics, layers, plan, recovery
    assert parsed.links == ["data:,"]
    assert "http://" not in page and "https://" not in page and "url(" not in page
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert page.count("\n") > 100 and "nan" not in re.findall(r'[xy12cdr]+="(nan|inf)', page)


def test_the_headline_says_what_the_rows_say(everything):
    text = Balanced(make_report([everything])).text
    assert "12.90 \N{RIGHTWARDS ARROW} 7.10 GiB" in text
    assert "size of the checkpoint, 55.0% of the original" in text
    assert "+0.032 bits per byte, 0.8000 \N{RIGHTWARDS ARROW} 0.8323" in text  # mean of three seeds
    assert "lightmoe 50% + annealed is the best of 6 compressed models here." in text
    assert "Text costs 4.0% more bits per byte than with the original" in text
    assert "92.2% same most likely token" in text
    assert "7 models, 4 domains, 40,960 predicted tokens" in text


def test_a_model_that_saves_active_parameters_says_so(tmp_path):
    """Its checkpoint is larger than the original's; what a token uses is less."""
    before = {"stage": "original", "expert_parameters": 6.4e9, "active_parameters": 1.28e9}
    after = {"stage": "compressed", "expert_parameters": 6.45e9, "active_parameters": 0.88e9}
    rows = rows_of("original", 12.9, 0.800, provenance=before) + rows_of("half", 12.91, 0.85, provenance=after)
    parsed = Balanced(make_report([write_results(tmp_path / "r.jsonl", rows)]))
    assert "\N{MINUS SIGN}31.2% of the parameters that a token uses: 1.28 billion" in parsed.text
    assert "A token uses 68.8% of the parameters." in parsed.text
    assert "model size active bits per byte" in parsed.text and "880 million parameters" in parsed.text
    plain = Balanced(make_report([write_results(tmp_path / "s.jsonl", rows_of("a", 1, 0.8) + rows_of("b", 1, 0.9))]))
    assert "model size bits per byte" in plain.text


def test_the_original_measured_again_is_one_measurement(tmp_path):
    rows = rows_of("original", 4, 0.8) * 3 + rows_of("small", 2, 0.9)
    page = make_report([write_results(tmp_path / "r.jsonl", rows)])
    assert "several seeds" not in page


def test_sections_without_input_are_left_out(tmp_path):
    rows = [row("mine", "loss", "all", 2.5), row("mine", "arc_easy", "all", 0.61)]
    parsed = Balanced(make_report([write_results(tmp_path / "r.jsonl", rows)]))
    assert parsed.ids == ["headline", "results", "origins"]
    assert parsed.svgs == 0
    assert "no row is of the original" in parsed.text and "arc_easy" in parsed.text


def test_files_are_found_where_the_results_were_moved(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    write_everything(old)
    words = (old / "results.jsonl").read_text().replace('"lightmoe.plan.json"', '"/somewhere/run/lightmoe.plan.json"')
    old.rename(tmp_path / "new")
    (tmp_path / "new" / "results.jsonl").write_text(words)
    assert "plan" in Balanced(make_report([tmp_path / "new" / "results.jsonl"])).ids


def test_named_files_that_are_gone_are_listed(everything):
    text = Balanced(make_report([everything])).text
    assert "plan, not found beside the results gone/plan.json" in text
    assert f"results, used {everything.name}" in text
    assert "recovery log, used" in text


def test_a_plan_other_than_the_named_one_is_not_shown(tmp_path):
    make_a_plan(tmp_path / "plan.json")
    rows = rows_of("small", 2, 0.9, plan="0123456789ab", provenance={"plan_file": "plan.json"})
    parsed = Balanced(make_report([write_results(tmp_path / "r.jsonl", rows)]))
    assert "plan" not in parsed.ids and "and not 0123456789ab" in parsed.text


def test_damaged_discovered_files_are_listed_and_given_ones_raise(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    rows = rows_of("small", 2, 0.9, provenance={"plan_file": "plan.json"})
    results = write_results(tmp_path / "r.jsonl", rows)
    assert "cannot be used" in Balanced(make_report([results])).text
    with pytest.raises(PlanError):
        make_report([results], plans=[tmp_path / "plan.json"])


def test_rows_do_not_make_it_read_what_is_elsewhere(tmp_path):
    """Rows may be anybody's, and could name any file of the machine."""
    plan = make_a_plan(tmp_path / "plan.json")
    make_log(tmp_path / "far" / "recovery.jsonl")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "linked.json").symlink_to(tmp_path / "plan.json")
    for name in (str(tmp_path / "plan.json"), "../plan.json", "linked.json"):
        named = {"plan_file": name, "recovery_log": str(tmp_path / "far" / "recovery.jsonl")}
        results = write_results(folder / "r.jsonl", rows_of("small", 2, 0.9, plan=plan.id, provenance=named))
        parsed = Balanced(make_report([results]))
        assert "plan" not in parsed.ids and "recovery" not in parsed.ids, name
        assert parsed.text.count("outside the folder of the results") == 2, name
        assert "plan" in Balanced(make_report([results], plans=[tmp_path / "plan.json"])).ids


@pytest.mark.parametrize("key", ["plan_file", "recovery_log", "statistics_file"])
def test_rows_do_not_make_it_read_files_without_end(key, tmp_path):
    with (tmp_path / "run").with_suffix(".big").open("wb") as file:
        file.truncate(2**40)
    rows = rows_of("small", 2, 0.9, provenance={key: "run.big"})
    text = Balanced(make_report([write_results(tmp_path / "r.jsonl", rows)])).text
    assert "has 1,099,511,627,776 bytes, too many" in text


@pytest.mark.parametrize("line", ['{"a": ' + "9" * 6_000 + "}", "[" * 100_000], ids=["digits", "deep"])
def test_lines_that_are_no_json_in_any_way_are_named(line, tmp_path):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl, line 1: not JSON"):
        make_report([tmp_path / "r.jsonl"])
    (tmp_path / "log.jsonl").write_text(line + "\n{}\n")
    results = write_results(tmp_path / "r.jsonl", rows_of("small", 2, 0.9))
    with pytest.raises(DataError, match=r"log\.jsonl, line 1: not JSON"):
        make_report([results], logs=[tmp_path / "log.jsonl"])


def test_a_recovery_says_how_it_was_done(tmp_path):
    results = write_results(tmp_path / "r.jsonl", rows_of("small", 2, 0.9))
    log = make_log(tmp_path / "small" / "recovery.jsonl")
    start = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    facts = Balanced(make_report([results], logs=[log])).text.partition("Recovery of small ")[2]
    assert facts.startswith(f"trainable parameters {start['trainable_parameters']} how annealed steps 40")
    assert f"plan {start['provenance']['identity']['plan']}" in facts and "versions torch" in facts


def test_rows_made_here_are_as_eval_writes_them(pruned, checkpoint, words, tmp_path):
    options = {"data": [f"code={words}"], "tokens": 256, "length": 64, "resamples": 5, "against": checkpoint}
    locum.evaluate(pruned, json=tmp_path / "real.jsonl", **options)
    real = [json.loads(line) for line in (tmp_path / "real.jsonl").read_text().splitlines()]
    write_everything(tmp_path)
    invented = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {frozenset(one) for one in invented} == {frozenset(one) for one in real}
    for what in ("original", "pruned"):
        mine = [one for one in invented if (one["model"] == "original") == (what == "original")]
        theirs = [one for one in real if one["model"] == what]
        assert {one["metric"] for one in mine} <= {one["metric"] for one in theirs}
        told = {key for one in mine for key in one["provenance"]} - {"recovery_log"}  # of a recovered model alone
        assert told <= {key for one in theirs for key in one["provenance"]}, what
        assert {type(one["value"]) for one in mine} == {type(one["value"]) for one in theirs} == {float}


def test_given_files_make_their_sections(tmp_path):
    results = write_results(tmp_path / "r.jsonl", rows_of("small", 2, 0.9))
    make_a_plan(tmp_path / "p.json")
    given = {"plans": [tmp_path / "p.json"], "statistics": [make_statistics(tmp_path / "s.safetensors")]}
    parsed = Balanced(make_report([results], logs=[make_log(tmp_path / "log.jsonl")], **given))
    assert {"plan", "use", "recovery"} <= set(parsed.ids)


def test_statistics_alone_show_who_uses_which_experts(tmp_path):
    out = locum.report([make_statistics(tmp_path / "s.safetensors")], out=tmp_path / "use.html")
    parsed = Balanced(out.read_text(encoding="utf-8"))
    assert parsed.ids == ["headline", "use", "origins"]
    assert all(domain in parsed.text for domain in DOMAINS)


def test_names_from_users_are_escaped(tmp_path):
    layers = (f"layers.{EVIL}", "other")
    plan = make_a_plan(tmp_path / "p.json", layers, method=EVIL)
    domains = (EVIL, "b")
    stats = make_statistics(tmp_path / "s.safetensors", domains, layers)
    rows = [
        row(EVIL, "bits_per_byte", d, 0.9, plan=plan.id, provenance={"bytes": 5, EVIL: EVIL}) for d in (EVIL, "all")
    ]
    rows += [row("original", "bits_per_byte", d, 0.8, provenance={"bytes": 9}) for d in (EVIL, "all")]
    rows.append(row(EVIL, EVIL, EVIL, 1.0))
    log = make_log(tmp_path / f"{EVIL.replace('/', '')}.jsonl")
    results = write_results(tmp_path / "r.jsonl", rows)
    page = make_report([results], plans=[tmp_path / "p.json"], statistics=[stats], logs=[log], title=EVIL)
    parsed = Balanced(page)
    assert page.count("<script") == 1 and "alert('x')" not in page
    assert EVIL in parsed.text
    assert {"size", "domains", "plan", "use"} <= set(parsed.ids)


def test_values_that_are_no_numbers_stay_out_of_the_charts(tmp_path):
    rows = rows_of("original", 4, 0.8) + rows_of("small", 2, 0.9)
    rows.append(row("broken", "bits_per_byte", "all", math.nan, low=None, high=None, provenance={"bytes": 5}))
    page = make_report([write_results(tmp_path / "r.jsonl", rows)])
    Balanced(page)
    assert not re.search(r'="-?(nan|inf)', page) and "broken" in page


def test_one_row_makes_a_page(tmp_path):
    Balanced(make_report([write_results(tmp_path / "r.jsonl", rows_of("small", 2, 0.9)[-1:])]))
    Balanced(make_report([write_results(tmp_path / "r.jsonl", rows_of("original", 2, 0.9))]))


def test_different_texts_are_warned_of(tmp_path):
    rows = rows_of("a", 2, 0.9, provenance={"data_fingerprint": "x"}) + rows_of(
        "b", 2, 0.9, provenance={"data_fingerprint": "y"}
    )
    assert "2 different texts" in make_report([write_results(tmp_path / "r.jsonl", rows)])


@pytest.mark.parametrize("odd", [[], [1], {}, {"a": []}, 0.5, None, True, "", "x", [[["x"]]]], ids=repr)
def test_provenance_may_say_anything(odd, tmp_path):
    """Rows are anybody's. What Locum reads of their provenance it takes where it is of its kind."""
    keys = (
        "data_fingerprint",
        "evaluation",
        "split",
        "checkpoint",
        "plan_file",
        "statistics_file",
        "recovery_log",
        "bytes",
        "plan",
    )
    odd_rows = rows_of("a", 2, 0.9, provenance=dict.fromkeys(keys, odd))
    Balanced(make_report([write_results(tmp_path / "r.jsonl", odd_rows + rows_of("b", 2, 0.9))]))
    assert len(eval_results("a", [Row(**row) for row in odd_rows])) > 3


def test_no_rows_and_bad_lines_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"no results rows in .*empty.jsonl.*locum eval"):
        make_report([write_results(tmp_path / "empty.jsonl", [])])
    with pytest.raises(LocumError, match="no results rows"):
        make_report([])
    bad = write_results(tmp_path / "bad.jsonl", rows_of("a", 1, 1)[:1])
    bad.write_text(bad.read_text() + "{not json\n")
    with pytest.raises(DataError, match=r"bad.jsonl, line 2"):
        make_report([bad])
    with pytest.raises(LocumError, match=r"missing.jsonl"):
        make_report([tmp_path / "missing.jsonl"])


def test_a_bad_log_names_its_line_but_an_unfinished_end_passes(tmp_path):
    results = write_results(tmp_path / "r.jsonl", rows_of("a", 1, 1))
    log = make_log(tmp_path / "log.jsonl", steps=20)
    log.write_text(log.read_text() + '{"step": 20, "lo')
    assert 'id="recovery"' in make_report([results], logs=[log])
    log.write_text('{"event": "start"}\nnonsense\n{"step": 1, "loss": 2}\n')
    with pytest.raises(DataError, match=r"log.jsonl, line 2"):
        make_report([results], logs=[log])


def test_the_page_is_written_whole(everything, tmp_path):
    page = make_report([everything], tmp_path / "report.html", title="Mine")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert "<title>Mine</title>" in page
    assert make_report([everything], title="Mine") == page  # the same inputs, the same bytes


# --- the drawings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0, 1), (0.79, 0.83), (-3, 4), (1e-6, 3e-6), (120, 98000), (5, 5.001)])
def test_ticks_are_round_and_different(low, high):
    ticks = Scale(low, high, 0, 100).ticks
    assert 3 <= len(ticks) <= 11
    assert len({words for _, words in ticks}) == len(ticks)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks)


def test_labels_of_close_points_do_not_overlap():
    points = [Point(f"some method {n}%", 7 + 0.02 * n, 0.8 + 0.005 * n, 0.79, 0.85, f"c{n}") for n in range(8)]
    pattern = r'<text x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")? class="name c\d">([^<]+)<'
    shift = {"": 0.0, "middle": 0.5, "end": 1.0}
    boxes = []
    for x, y, anchor, words in re.findall(pattern, scatter(points, "x", "y")):
        wide = 7 * len(words)
        left = float(x) - shift[anchor] * wide
        boxes.append((left, float(y) - 10, left + wide, float(y) + 2))
    assert len(boxes) == 8
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= VIEW_WIDTH
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_negative_bars_reach_to_the_left_of_zero():
    drawn = bars([("code", [Bar("a", -0.5, -0.6, -0.4, "c0"), Bar("b", 0.5, 0.4, 0.6, "c1")])], "loss")
    (a, aw), (b, bw) = ((float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" [^>]*width="([\d.]+)"', drawn))
    assert a + aw == pytest.approx(b, abs=0.2) and aw == pytest.approx(bw, abs=0.2)
    assert "\N{MINUS SIGN}0.500" in drawn


def test_every_fate_has_a_colour_and_a_mark():
    plan = make_a_plan()
    page = expert_maps.fate_grid(plan)
    slots = [slot for layer in plan.layers for slot in layer.slots]
    assert page.count('class="cell"') == len(slots)
    kinds = {(expert_maps.mark_of(s), expert_maps.colour_of(s)) for s in slots}
    assert len({mark for mark, _ in kinds}) == len({colour for _, colour in kinds}) == len(kinds)
    legend = expert_maps.fate_legend(plan)
    assert f"kept: {sum(s == KEPT for s in slots)}" in legend
    assert f"dropped: {sum(s == DROPPED for s in slots)}" in legend


def test_use_is_a_share_of_the_domains_own_selections():
    drawn = expert_maps.use_block("layer 0", ["a", "b"], [[1, 3, 0], [300, 0, 100]], None)
    assert "expert 1\na: 75.0% of selections\nb: 0.0% of selections" in drawn
    assert [expert_maps.use_level(s, 4) for s in (0, 0.01, 0.24, 0.26, 1.0)] == [0, 1, 4, 5, 7]


def test_of_many_models_the_best_are_drawn_by_domain(tmp_path):
    rows = rows_of("original", 4, 0.8)
    for number in range(30):
        rows += rows_of(f"model {number:02}", 2, 0.82 + 0.01 * ((number * 7) % 30))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_report([tmp_path / "results.jsonl"], tmp_path / "page.html")
    drawn = (tmp_path / "page.html").read_text().split("Quality by domain")[-1].split("<h2")[0]
    best = sorted(range(30), key=lambda number: (number * 7) % 30)[:15]
    assert all((f"model {number:02}" in drawn) == (number in best) for number in range(30)) and "original" in drawn
    assert "The best 16 of 31 models" in drawn


def test_layers_have_short_names_only_if_these_differ():
    assert expert_maps.short_layers(["model.layers.3.mlp.experts", "x"]) == {
        "model.layers.3.mlp.experts": "layer 3",
        "x": "x",
    }
    both = ["a.layers.1.experts", "b.layers.1.experts"]
    assert expert_maps.short_layers(both) == {name: name for name in both}


def test_smoothing_keeps_a_constant_and_long_names_keep_both_ends():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert shorten("a very long model name v2", 12).endswith("v2") and len(shorten("x" * 99, 12)) == 12


# --- a real browser -------------------------------------------------------------------------------------------------

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]


def look(page: Path, shot: Path, width: int, height: int, *more: str) -> str:
    """A screenshot; returns what the browser said. No name resolves, so a request would be an error in its log."""
    profile = shot.with_suffix(".profile")
    own = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={shot}"]
    command = [CHROMIUM, *FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND", *own, *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shot.is_file(), done.stderr
    return done.stderr


def colours(png: Path) -> int:
    """The number of different rows of pixels, still filtered: 1 or 2 for a blank picture."""
    data, at, packed = png.read_bytes(), 8, b""
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    (width,) = struct.unpack(">I", data[16:20])
    raw = zlib.decompress(packed)
    stride = 1 + width * {2: 3, 6: 4}[data[25]]
    return len({raw[start : start + stride] for start in range(0, len(raw), stride)})


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")
@pytest.mark.parametrize("width, height", [(1280, 3000), (390, 4000)])
def test_a_browser_shows_it_without_complaint(everything, tmp_path, width, height):
    page = make_report([everything])
    (tmp_path / "report.html").write_text(
        page.replace("</body>", f"<script>{READER}</script></body>"), encoding="utf-8"
    )
    said = look(tmp_path / "report.html", tmp_path / "shot.png", width, height)
    assert "CONSOLE" not in said and "ERR_NAME_NOT_RESOLVED" not in said
    assert colours(tmp_path / "shot.png") > 200


# sorts a table, reorders a plan, and complains if that does nothing or if the page is wider than its window
READER = """
if (document.documentElement.scrollWidth > innerWidth) console.error('wider than the window');
const head = [...document.querySelectorAll('#results th')].find(th => th.textContent === 'value');
head.querySelector('button').click();
const values = [...document.querySelectorAll('#results tbody tr')].map(row => parseFloat(row.cells[3].textContent));
if (values.length < 2 || values.some((v, i) => i && v < values[i - 1])) console.error('not sorted: ' + values);
const press = document.querySelector('.press');
const at = () => [...document.querySelectorAll('.cell')].map(cell => cell.getAttribute('transform')).join();
const before = at();
press.click();
if (press.hidden || at() === before) console.error('the cells stayed');
press.click();
if (at() !== before) console.error('the cells did not return');
"""
