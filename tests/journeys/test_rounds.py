"""`compress --rounds`: estimated anew in every round, one plan over the original, sizes kept, interrupted and gone on with."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.load import load_model
from locum.errors import OptionError, PlanError
from locum.models.families import find_layers, read_expert, write_expert
from locum.plans.plan import DROPPED
from making.checkpoints import tree, write_tokenizer
from making.tiny_models import tiny_model

SHORT = {"tokens": 512, "length": 32}
SMALL = "model.safetensors"
TRAINED = {"recover": "lora", "recover_steps": 1, "recover_batch_size": 1, "recover_length": 32, "recover_rank": 2}


def gone(plan):
    return [{e for e, slot in enumerate(layer.slots) if slot == DROPPED} for layer in plan.layers]


def test_a_round_counts_on_what_the_rounds_before_left_and_the_plan_is_over_the_original(checkpoint, words, tmp_path):
    asked = {"method": "prune", "score": "reap"}
    small = locum.compress(checkpoint, data=str(words), remove=0.5, rounds=2, out=tmp_path / "small", **asked, **SHORT)
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    one = locum.compress(checkpoint, data=str(words), remove=0.25, out=tmp_path / "one", **asked, **SHORT)
    two = locum.compress(one, data=str(words), remove=1 / 3, out=tmp_path / "two", **asked, **SHORT)
    first, second, whole = (locum.load_plan(place / "plan.json") for place in (one, two, small))
    expected = []
    for before, now in zip(gone(first), gone(second), strict=True):
        left = [e for e in range(8) if e not in before]
        expected.append(before | {left[e] for e in now})
    assert gone(whole) == expected and whole.provenance["rounds"] == [0.25, 0.5]
    assert whole.provenance["target"] == {"remove": 0.5, "fit": None}
    again = locum.apply(checkpoint, plan=small / "plan.json", out=tmp_path / "again")
    assert (small / SMALL).read_bytes() == (again / SMALL).read_bytes() == (two / SMALL).read_bytes()
    assert locum.inspect(small)["bytes"] == whole.size(locum.read_shape(checkpoint)).bytes


def with_halves(folder, top_k=1):
    """Experts 0 and 1 of every layer share the tokens of what would be one expert: their router rows are r + d and r - d."""
    model = tiny_model("olmoe", num_experts_per_tok=top_k, vocab_size=320, max_position_embeddings=512)
    for layer in find_layers(model):
        with torch.no_grad():
            row = 0.8 * layer.router.weight[0]
            apart = 0.03 * torch.randn(row.shape, generator=torch.Generator().manual_seed(2))
            layer.router.weight[0], layer.router.weight[1] = row + apart, row - apart
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.journeys
def test_of_two_that_share_their_tokens_rounds_keep_one_where_one_round_loses_both(words, tmp_path):
    model = with_halves(tmp_path / "model")
    asked = {"data": str(words), "method": "prune", "score": "frequency", "protect": False, "remove": 0.5, **SHORT}
    out = locum.compress(model, statistics=tmp_path / "stats", out=tmp_path / "once", **asked)
    stats = locum.load_statistics(tmp_path / "stats")
    seen_E = stats.layer(stats.shape.layers[0].name)["count"]
    fourth, fifth = seen_E.sort().values[3:5].tolist()
    assert max(seen_E[:2]) <= fourth and sum(seen_E[:2]) > fifth  # each is rare, and both together are not
    often = locum.compress(model, rounds=4, statistics=tmp_path / "stats", out=tmp_path / "often", **asked)
    once, often = (gone(locum.load_plan(place / "plan.json"))[0] for place in (out, often))
    assert {0, 1} <= once and len({0, 1} & often) == 1 and len(once) == len(often) == 4


@pytest.mark.journeys
@pytest.mark.parametrize("top_k", [1, 3])
def test_task_specific_pruning_ends_in_a_dense_model(top_k, words, tmp_path):
    """TSEP: one expert of each layer is left, after rounds with training between them, in which routers come to select fewer. It is
    stock, and a layer computes what its one expert computes."""
    model = with_halves(tmp_path / "model", top_k)
    asked = {
        "method": "prune",
        "score": "proficiency",
        "budget": "global",
        "protect": False,
        "remove": 7 / 8,
        "rounds": 3,
        "lower_top_k": top_k > 1,
    }
    trained = TRAINED | {"recover": "full", "recover_steps": 4}
    del trained["recover_rank"]
    out = locum.compress(model, data=str(words), out=tmp_path / "dense", **asked, **trained, **SHORT)
    plan = locum.load_plan(out / "plan.json")
    assert [len(layer.survivors) for layer in plan.layers] == [1] * len(plan.layers)
    assert plan.provenance["rounds"] == pytest.approx([7 / 24, 14 / 24, 7 / 8], abs=1 / 16)
    dense = AutoModelForCausalLM.from_pretrained(out)
    assert dense.config.num_experts == dense.config.num_experts_per_tok == 1
    assert "quantization_config" not in dense.config.to_dict()
    layer = find_layers(dense)[0]
    x_BSD = torch.randn(2, 3, layer.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    expert = read_expert(layer.experts, 0)
    with torch.no_grad():
        found = layer.block(x_BSD)
        hidden = torch.nn.functional.silu(x_BSD @ expert.gate_FD.T) * (x_BSD @ expert.up_FD.T)
        torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, hidden @ expert.down_DF.T)


@pytest.mark.journeys
@pytest.mark.parametrize("score", ["frequency", "reap", "evtc", "ews", "eas", "egn", "removal_loss"])
def test_criteria_of_every_kind_are_estimated_anew_on_what_a_training_left(score, words, tmp_path):
    """MC-Suite's loop, without and with a training between the drops: the second round's plan is that of the model that it finds."""
    model = with_halves(tmp_path / "model", top_k=2)
    searched = score == "removal_loss"
    how = (
        {"method": "leave-one-out", "curve": False, "budget": "uniform"}
        if searched
        else {"method": "prune", "score": score}
    )
    asked = {"data": str(words), "protect": False, **how, "tokens": 128, "length": 32}
    trained = TRAINED | {"recover": "full"}
    del trained["recover_rank"]
    for more in ({}, trained):
        out = tmp_path / f"rounds {len(more)}"
        twice = locum.compress(model, remove=0.25, rounds=2, out=out, **asked, **more)
        once = locum.compress(model, remove=0.125, out=tmp_path / f"one {len(more)}", **asked, **more)
        again = locum.compress(once, remove=1 / 7, out=tmp_path / f"two {len(more)}", **asked, **more)
        assert tree(twice)[SMALL] == tree(again)[SMALL]
        assert locum.load_plan(twice / "plan.json").provenance["rounds"] == [0.125, 0.25]


def test_weights_alone_are_estimated_anew_without_any_text(tmp_path):
    """Experts 0 to 2 of each layer are equal, 3 and 4 a little alike. At once the three go; of them one is like no other once two
    are gone, and it stays."""
    model = tiny_model("olmoe", vocab_size=320, max_position_embeddings=512)
    for layer in find_layers(model):
        for e in (1, 2):
            write_expert(layer.experts, e, read_expert(layer.experts, 0))
        other = read_expert(layer.experts, 4)
        write_expert(layer.experts, 4, read_expert(layer.experts, 3).map(lambda n, t, b=other: t + getattr(b, n)))
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    asked = {"method": "prune", "score": "ews_max", "protect": False, "remove": 3 / 8}
    once, often = (
        gone(
            locum.load_plan(locum.compress(tmp_path / "model", rounds=n, out=tmp_path / f"{n}", **asked) / "plan.json")
        )
        for n in (1, 3)
    )
    assert once == [{0, 1, 2}] * 2
    assert all(len(some & {0, 1, 2}) == 2 and len(some & {3, 4}) == 1 for some in often)


@pytest.mark.journeys
def test_a_size_is_met_by_the_last_round(checkpoint, words, tmp_path):
    limit = int(0.8 * locum.read_shape(checkpoint).bytes)
    small = locum.compress(
        checkpoint, data=str(words), method="prune", fit=str(limit), rounds=3, out=tmp_path / "s", **SHORT
    )
    shape = locum.read_shape(checkpoint)
    one = shape.layers[0].parameters() * shape.expert_itemsize
    assert limit - 2 * (one + 1000) < locum.inspect(small)["bytes"] <= limit


@pytest.mark.parametrize(
    ("changed", "error", "words_of_it"),
    [
        ({"rounds": 0}, OptionError, "--rounds is 0; allowed: whole numbers from 1 to 16"),
        ({"rounds": 17}, OptionError, "--rounds is 17; allowed: whole numbers from 1 to 16"),
        ({"bits": "4"}, OptionError, "--rounds drop whole experts; leave --bits out"),
        ({"method": "mone"}, PlanError, "method mone does something else with them"),
        ({"method": "compressed-experts", "remove": None}, OptionError, "saves active parameters"),
        ({"method": "mobe"}, OptionError, "method mobe estimates nothing; leave --rounds out"),
    ],
    ids=str,
)
def test_what_rounds_cannot_do_is_refused_before_anything_is_measured(
    changed, error, words_of_it, checkpoint, words, tmp_path, monkeypatch
):
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", None)
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "rounds": 2, **SHORT} | changed
    with pytest.raises(error, match=words_of_it):
        locum.compress(checkpoint, out=tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.journeys
def test_an_interrupted_run_goes_on_after_the_last_round(checkpoint, words, tmp_path, monkeypatch, caplog):
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "rounds": 3, **SHORT}
    whole = locum.compress(checkpoint, out=tmp_path / "whole", **asked)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("locum.stages.compression.apply", _press)  # after all rounds
        locum.compress(checkpoint, out=tmp_path / "out", **asked)
    left = tmp_path / ".out.rounds"
    assert {path.name for path in left.iterdir()} == {"question.json", "2", "2.statistics", "3.statistics"}
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", None)  # nothing is measured again
    monkeypatch.setattr("locum.stages.rounds.Rounds._joined", _once(locum.stages.rounds.Rounds._joined))
    out = locum.compress(checkpoint, out=tmp_path / "out", **asked)
    assert tree(out)[SMALL] == tree(whole)[SMALL] and "aside" not in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def _press(*given, **named):
    raise KeyboardInterrupt


def _once(function):
    """It may be called once: for the last round alone."""
    calls = []

    def counted(*given):
        calls.append(given)
        assert len(calls) == 1
        return function(*given)

    return counted


@pytest.mark.journeys
def test_rounds_of_another_question_are_set_aside(checkpoint, words, tmp_path, monkeypatch, caplog):
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "rounds": 2, **SHORT}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("locum.stages.compression.apply", _press)
        locum.compress(checkpoint, out=tmp_path / "out", **asked)
    locum.compress(checkpoint, out=tmp_path / "out", **asked | {"remove": 0.25})
    assert "remove was 0.5 and is 0.25; it was set aside" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.rounds.aside"}


@pytest.mark.journeys
def test_training_goes_on_from_round_to_round_and_the_result_is_of_the_original(checkpoint, words, tmp_path):
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "seed": 0, **SHORT, **TRAINED}
    out = locum.compress(checkpoint, rounds=2, out=tmp_path / "out", **asked)
    one = locum.compress(checkpoint, out=tmp_path / "one", **asked | {"remove": 0.25})
    two = locum.compress(one, out=tmp_path / "two", **asked | {"remove": 1 / 3})
    assert tree(out)[SMALL] == tree(two)[SMALL]
    plan, shape = locum.load_plan(out / "plan.json"), locum.read_shape(checkpoint)
    assert plan.removed(shape) == 0.5 and len(plan.layers[0].slots) == 8 and plan.validate(shape) == plan
    notes = locum.checkpoints.notes.read_notes(out)
    assert notes["original"] == checkpoint.name and notes["plan"] == plan.id
    assert notes["original_fingerprint"] == locum.checkpoints.read.fingerprint_checkpoint(checkpoint)
    pruned = locum.apply(checkpoint, plan=out / "plan.json", out=tmp_path / "pruned")
    assert tree(pruned)[SMALL] != tree(out)[SMALL] and load_model(out) is not None
    assert {row.model for row in locum.evaluate(out, data=str(words), split="all", tokens=256, length=32)} >= {
        "original"
    }


@pytest.mark.journeys
def test_what_rounds_would_take_is_said_and_nothing_is_written(checkpoint, words, tmp_path):
    asked = {"data": str(words), "method": "prune", "remove": 0.5, "dry_run": True, "out": tmp_path / "out", **SHORT}
    once, often = (locum.compress(checkpoint, rounds=n, **asked) for n in (1, 3))
    assert [part.stage for part in often.parts] == 3 * [part.stage for part in once.parts]
    assert often.seconds > once.seconds and not list(tmp_path.iterdir())
