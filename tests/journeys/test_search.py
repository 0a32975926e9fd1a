"""The stages around a search: what it writes, that it goes on, and the chain from search to a recovered checkpoint."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import locum
from families.tiny_families import tiny
from locum.checkpoints.load import load_model, open_model
from locum.data.tokens import load_tokens
from locum.measure.remembered import RememberedAnswers
from locum.measure.removals import ModelExplorer
from locum.models.families import find_layers, is_stock_experts
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint, write_tokenizer
from making.tiny_models import tiny_ids

REFERENCE = Path(locum.__file__).parent / "reference"
SHORT = {"tokens": 1024, "length": 64, "batch_size": 4}
QUICK = {"sample": 128, "population": 6, "generations": 2, "pruned": 0.3}
TRAINED = {"length": 64, "batch_size": 2, "steps": 1}


@pytest.fixture(scope="module")
def searched(checkpoint, words, tmp_path_factory):
    """A search of `checkpoint`. Tests only read it."""
    out = tmp_path_factory.mktemp("searched") / "stats"
    locum.search(checkpoint, data=str(words), out=out, seed=3, start="whitened", **SHORT, **QUICK)
    return out


def found_in(path):
    statistics = locum.load_statistics(path)
    return {x.name: dict(statistics.layer(x.name)) for x in statistics.shape.layers}


# --- the stage -------------------------------------------------------------------------------------------------------


def test_search_writes_what_calibration_and_the_method_find(checkpoint, words, searched, tmp_path):
    tokenizer = locum.checkpoints.read.load_tokenizer(checkpoint)
    blocks = load_tokens(str(words), tokenizer, split="train", length=64, tokens=1024, seed=3)
    method = locum.METHODS["moe-i2"](population=6, generations=2, pruned=0.3, seed=3, start="whitened")
    explorer = ModelExplorer(load_model(checkpoint), blocks, sample=128, batch_size=4, seed=3)
    expected = method.explore(explorer, lambda *_: None)
    grams = ["input_gram", "hidden_gram"]
    calibrated = locum.calibrate(checkpoint, data=str(words), out=tmp_path / "s", seed=3, also=grams, **SHORT)
    for name, values in found_in(searched).items():
        assert set(values) == {*calibrated.names, "dropped", "pruned_importance"}
        for key in calibrated.names:
            assert torch.equal(values[key], calibrated.layer(name)[key])
        for key in ("dropped", "pruned_importance"):
            assert torch.equal(values[key], expected[name][key])
        assert values["dropped"].sum() > 0
    about = locum.load_statistics(searched)
    assert (about.searched.name, about.searched.options["population"]) == ("moe-i2", 6)
    assert about.provenance["sample"] == 128
    assert {p.name for p in searched.parent.iterdir()} == {"stats"}


def test_a_search_tokenises_once_and_loads_the_model_once(checkpoint, words, monkeypatch, tmp_path):
    calls = Counter()
    for name in ("load_tokens", "open_model"):
        real = getattr(locum.stages.calibration, name)

        def count(*given, _real=real, _name=name, **more):
            calls[_name] += 1
            return _real(*given, **more)

        for module in ("calibration", "searching"):
            monkeypatch.setattr(f"locum.stages.{module}.{name}", count, raising=False)
    locum.search(checkpoint, data=str(words), out=tmp_path / "stats", **SHORT, **QUICK)
    assert calls == {"load_tokens": 1, "open_model": 1}


def test_a_plan_takes_the_options_of_its_search_and_refuses_others(searched, tmp_path):
    plan = locum.plan(searched, method="moe-i2", remove=0.5, exponent=0.3)
    assert plan.options["pruned"] == 0.3 and plan.options["population"] == 6 and plan.options["exponent"] == 0.3
    assert locum.plan(searched, method="moe-i2", remove=0.5, exponent=0.3, pruned=0.3).id == plan.id
    with pytest.raises(locum.StatisticsError, match=r"searched with --pruned 0\.3, the plan asks for 0\.5"):
        locum.plan(searched, method="moe-i2", remove=0.5, pruned=0.5)
    result = command(
        "plan", searched, "--method", "moe-i2", "--remove", 0.5, "--generations", 9, "--out", tmp_path / "p"
    )
    assert result.exit_code == 2 and "searched with --generations 2" in result.stderr
    assert all(layer.is_dense for layer in locum.plan(searched, method="moe-i2", remove=0.3, decompose=False).layers)
    locum.plan(searched, method="lightmoe", remove=0.4, rank=2)  # a statistics file like any other


def test_what_cannot_be_searched_is_refused_before_weights_are_read(checkpoint, words, searched, monkeypatch, tmp_path):
    monkeypatch.setattr("locum.checkpoints.load.load_model", None)
    asked = {"data": str(words), "out": tmp_path / "out", **SHORT}
    with pytest.raises(locum.OptionError, match="method prune does not search; use locum calibrate"):
        locum.search(checkpoint, method="prune", **asked)
    with pytest.raises(locum.OptionError, match="sample is 0"):
        locum.search(checkpoint, sample=0, **asked)
    with pytest.raises(locum.OutputError, match="exists already"):
        locum.search(checkpoint, **asked | {"out": searched})
    tiny("deepseek_v4").save_pretrained(tmp_path / "hashed")
    write_tokenizer(tmp_path / "hashed")
    with pytest.raises(locum.UnsupportedModel, match=r"removals cannot be tried.*hash-routed"):
        locum.search(tmp_path / "hashed", **asked)
    with pytest.raises(locum.StatisticsError, match="locum search"):
        locum.plan(without_search(searched), method="moe-i2", remove=0.5)
    assert command("search", checkpoint, "--data", words, "--pruned", 2, "--out", tmp_path / "no").exit_code == 2
    assert {p.name for p in tmp_path.iterdir()} == {"hashed"}


def without_search(path):
    statistics = locum.load_statistics(path)
    layers = {
        layer: {name: t for name, t in named.items() if name not in ("dropped", "pruned_importance")}
        for layer, named in statistics.layers.items()
    }
    return dataclasses.replace(statistics, layers=layers, searched=None)


def test_an_interrupted_search_goes_on_where_it_stopped(checkpoint, words, searched, monkeypatch, tmp_path):
    asked = {"data": str(words), "seed": 3, "start": "whitened", "out": tmp_path / "stats", **SHORT, **QUICK}
    real, calls = ModelExplorer.output_error, Counter()

    def count(self, layer, removed_CE):
        calls[run] += len(removed_CE)
        if run == "cut short" and calls[run] > 30:
            raise KeyboardInterrupt
        return real(self, layer, removed_CE)

    monkeypatch.setattr(ModelExplorer, "output_error", count)
    run = "cut short"
    with pytest.raises(KeyboardInterrupt):
        locum.search(checkpoint, **asked)
    assert not (tmp_path / "stats").exists()
    monkeypatch.setattr("locum.stages.searching.observe", None)  # done already
    run = "the rest"
    locum.search(checkpoint, **asked)
    run = "whole"
    monkeypatch.undo()
    monkeypatch.setattr(ModelExplorer, "output_error", count)
    locum.search(checkpoint, **asked | {"out": tmp_path / "again"})
    assert 0 < calls["the rest"] < calls["whole"]
    one, two = found_in(tmp_path / "stats"), found_in(searched)
    assert all(torch.equal(one[layer][name], two[layer][name]) for layer in one for name in one[layer])
    assert {p.name for p in tmp_path.iterdir()} == {"stats", "again"}


# --- answers ---------------------------------------------------------------------------------------------------------


class Counting:
    """An explorer whose answer is how many are removed, and that counts what it is asked."""

    shape = None

    def __init__(self):
        self.asked = []

    def output_error(self, layer, removed_CE):
        self.asked += removed_CE.tolist()
        return removed_CE.sum(dim=1).double()

    loss_increase = output_error

    def block_error(self, candidates):
        self.asked += candidates
        return torch.tensor([sum(mask.sum() for mask in c.values()) for c in candidates]).double()

    loss_without = block_error

    def prune(self, removed):
        self.asked.append("prune")


def test_every_question_is_put_once_and_answers_outlive_a_run(tmp_path):
    one, masks = Counting(), torch.tensor([[1, 0], [0, 0], [1, 0]]).bool()
    answers = RememberedAnswers(one, tmp_path / "a", {"model": 1})
    assert answers.output_error("x", masks).tolist() == [1, 0, 1] and len(one.asked) == 2
    assert answers.output_error("x", masks[:1]).tolist() == [1] and len(one.asked) == 2
    answers.output_error("y", masks[:1]), answers.loss_increase("x", masks[:1])
    assert len(one.asked) == 4
    for _ in range(2):
        assert answers.block_error([{"y": masks[0], "x": masks[1]}, {"x": masks[1], "y": masks[0]}]).tolist() == [1, 1]
    assert len(one.asked) == 5
    assert [answers.loss_without([{"x": masks[0]}]).tolist() for _ in range(2)] == [[1], [1]]
    assert len(one.asked) == 6
    answers.prune({"x": masks[0]})
    answers.output_error("x", masks)
    assert len(one.asked) == 9  # pruning, and two questions that are new ones now
    answers.save()
    two = Counting()
    again = RememberedAnswers(two, tmp_path / "a", {"model": 1})
    assert again.output_error("x", masks).tolist() == [1, 0, 1] and two.asked == []
    again.prune({"x": masks[0]})
    assert again.output_error("x", masks).tolist() == [1, 0, 1] and two.asked == ["prune"]
    for other in ({"model": 2}, {"model": 1}):
        three = Counting()
        RememberedAnswers(three, tmp_path / "a", other).output_error("x", masks)
        assert len(three.asked) == 2
        (tmp_path / "a").write_bytes(b"damaged")


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_a_pruned_checkpoint_opens_as_an_ordinary_model(model_type, words, tmp_path):
    """Unequal counts are saved in containers; opened, layers are stock, sizes agree, and all goes on from there."""
    model = write_checkpoint(tmp_path / "model", model_type)
    shape = locum.read_shape(model)
    uneven = [(1, 6), ()] if model_type == "deepseek_v3" else [(1, 6), (0, 3, 4)]
    plan = make_plan(
        shape,
        [
            LayerPlan(layer.name, tuple(DROPPED if e in gone else KEPT for e in range(8)))
            for layer, gone in zip(shape.layers, uneven, strict=True)
        ],
    )
    small = locum.apply(model, plan=plan, out=tmp_path / "small")
    assert locum.inspect(small)["compressed"]
    live, opened = load_model(small), open_model(small)
    assert all(is_stock_experts(layer.experts) for layer in find_layers(opened))
    assert (shape_of(opened).layers, shape_of(opened).bytes) == (
        locum.read_shape(small).layers,
        locum.read_shape(small).bytes,
    )
    with torch.no_grad():
        expected = live(tiny_ids(), use_cache=False).logits
        torch.testing.assert_close(opened(tiny_ids(), use_cache=False).logits, expected, atol=2e-5, rtol=2e-5)
    opened.set_experts_implementation("eager")
    assert {layer.experts.config._experts_implementation for layer in find_layers(opened)} == {"eager"}
    # A layer that the next plan keeps whole is still not what the config says, so it stays in a container.
    last = shape_of(opened).layers[1]
    slots = tuple(KEPT if e else locum.stand_in(rank=2, start="svd") for e in range(last.num_experts))
    first = LayerPlan(shape.layers[0].name, (KEPT,) * 6)
    next_plan = make_plan(shape_of(opened), [first, LayerPlan(last.name, slots)])
    again = locum.apply(small, plan=next_plan, out=tmp_path / "again")
    assert locum.inspect(again)["bytes"] == next_plan.size(locum.read_shape(small)).bytes
    assert locum.read_shape(again).layers[0].num_experts == 6
    load_model(again)(tiny_ids(), use_cache=False)
    with pytest.raises(locum.UnsupportedModel, match=r"compressed already.*stand-ins"):
        locum.calibrate(again, data=str(words), out=tmp_path / "no", **SHORT)


def test_a_plan_that_evens_a_pruned_model_out_is_saved_stock(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    shape = locum.read_shape(model)
    one, two = (layer.name for layer in shape.layers)

    def pruned(source, gone, out):
        shape = locum.read_shape(source)
        counts = {layer.name: layer.num_experts for layer in shape.layers}
        layers = [LayerPlan(n, tuple(DROPPED if e in gone[n] else KEPT for e in range(counts[n]))) for n in counts]
        return locum.apply(source, plan=make_plan(shape, layers), out=out)

    uneven = pruned(model, {one: (1, 6), two: (3,)}, tmp_path / "uneven")
    even = pruned(uneven, {one: (), two: (0,)}, tmp_path / "even")
    expected = pruned(model, {one: (1, 6), two: (0, 3)}, tmp_path / "expected")
    assert not locum.inspect(even)["compressed"]
    with torch.no_grad():
        logits = [load_model(path)(tiny_ids(), use_cache=False).logits for path in (even, expected)]
    assert torch.equal(*logits)


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [pytest.param("reference", marks=pytest.mark.journeys), "deepseek_v3"])
def test_the_chain_of_three_stages(which, words, tmp_path):
    """search, prune, recover, calibrate, decompose, recover, measure: through files alone, sizes as promised."""
    if which == "reference":
        model, data = REFERENCE / "model", str(REFERENCE / "text" / "docs.txt")
    else:
        model, data = write_checkpoint(tmp_path / "model", which), str(words)
    locum.search(model, data=data, out=tmp_path / "found", **SHORT, **QUICK)
    plan = locum.plan(tmp_path / "found", method="moe-i2", decompose=False, remove=0.3, out=tmp_path / "prune.json")
    assert all(layer.is_dense for layer in plan.layers) and plan.removed(locum.read_shape(model)) > 0.1
    locum.apply(model, plan=tmp_path / "prune.json", out=tmp_path / "pruned")
    locum.recover(tmp_path / "pruned", how="lora", data=data, out=tmp_path / "half", **TRAINED)
    locum.calibrate(tmp_path / "half", data=data, also=("input_gram", "hidden_gram"), out=tmp_path / "stats", **SHORT)
    asked = {"method": "decompose", "start": "whitened", "multiple": 2, "remove": 0.3}
    second = locum.plan(tmp_path / "stats", out=tmp_path / "low.json", **asked)
    locum.apply(tmp_path / "half", plan=tmp_path / "low.json", out=tmp_path / "low")
    assert locum.inspect(tmp_path / "low")["bytes"] == second.size(locum.read_shape(tmp_path / "half")).bytes
    locum.recover(tmp_path / "low", how="lora", data=data, out=tmp_path / "done", **TRAINED)
    rows = locum.evaluate(tmp_path / "done", against=model, data=data, length=64, tokens=256)
    assert {row.model for row in rows} == {"original", "done"}
    assert all(torch.isfinite(torch.tensor(row.value)) for row in rows)
    left = 1 - locum.inspect(tmp_path / "done")["expert_parameters"] / locum.inspect(model)["expert_parameters"]
    assert left == pytest.approx(1 - (1 - plan.removed(locum.read_shape(model))) * 0.7, abs=0.05)


def test_compress_searches_and_recovers_in_one(checkpoint, words, searched, tmp_path):
    asked = {"data": str(words), "method": "moe-i2", "seed": 3, "start": "whitened", "remove": 0.5, "multiple": 2}
    once = {"out": tmp_path / "one", "statistics": tmp_path / "stats", **asked, **SHORT, **QUICK}
    said = []
    locum.compress(checkpoint, recover="lora", recover_steps=2, progress=lambda *now: said.append(now), **once)
    assert {"calibrate", "importance", "search", "blocks", "importance anew", "apply"} <= {
        stage.split(":")[0] for stage, *_ in said
    }
    one, two = found_in(tmp_path / "stats"), found_in(searched)
    assert all(torch.equal(one[layer][name], two[layer][name]) for layer in one for name in two[layer])
    plan = locum.plan(searched, method="moe-i2", remove=0.5, multiple=2, start="whitened")
    assert locum.load_plan(tmp_path / "one" / "plan.json").id == plan.id
    by_hand = locum.apply(checkpoint, plan=plan, statistics=searched, seed=3, out=tmp_path / "two")
    again = tmp_path / "three"
    locum.recover(by_hand, how="lora", data=str(words), steps=2, seed=3, out=again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "three", "stats"}


def test_compress_collects_what_is_needed_on_demand(checkpoint, words, tmp_path):
    asked = {"data": str(words), "method": "decompose", "start": "whitened", "multiple": 2, "remove": 0.4, **SHORT}
    locum.compress(checkpoint, out=tmp_path / "one", statistics=tmp_path / "stats", **asked)
    assert {"input_gram", "hidden_gram", "count"} <= set(locum.load_statistics(tmp_path / "stats").names)


def test_nothing_appears_when_recovery_fails(checkpoint, words, monkeypatch, tmp_path):
    asked = {"data": str(words), "method": "prune", "remove": 0.25, "out": tmp_path / "out", **SHORT}
    before = tree(tmp_path)
    with pytest.raises(locum.OptionError, match="unknown way to recover 'magic'"):
        locum.compress(checkpoint, recover="magic", **asked)
    with pytest.raises(
        locum.OptionError,
        match=r"\(prune\) leaves none; use --recover esft or --recover experts or --recover full or --recover kd",
    ):
        locum.compress(checkpoint, recover="annealed", **asked)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("locum.stages.recovery.recover_model", fail)
    with pytest.raises(KeyboardInterrupt):
        locum.compress(checkpoint, recover="lora", **asked)
    left = {name for name in tree(tmp_path) if not name.startswith(".out.unrecovered")}  # which is gone on with
    assert left == {*before, ".out.statistics.safetensors"}


def test_damaged_partial_files_are_made_anew(checkpoint, words, searched, tmp_path, caplog):
    (tmp_path / ".stats.calibrated").write_bytes(b"no")
    save_file({"keys": torch.zeros(1)}, tmp_path / ".stats.answers", {"identity": "another"})
    left = {f"{name}.aside" for name in tree(tmp_path)}
    asked = {"data": str(words), "seed": 3, "start": "whitened", **SHORT, **QUICK}
    locum.search(checkpoint, out=tmp_path / "stats", **asked)
    one, two = found_in(tmp_path / "stats"), found_in(searched)
    assert all(torch.equal(one[layer][name], two[layer][name]) for layer in one for name in one[layer])
    assert {p.name for p in tmp_path.iterdir()} == {"stats", *left}
    assert all(name in caplog.text for name in left) and caplog.text.count("begins afresh") == 2
