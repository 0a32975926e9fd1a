"""Layer Drop: which layers lose their experts, and models without them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.measure.calibration import calibrate
from locum.methods.layer_drop import LayerDrop
from locum.models.families import find_layers, read_expert, write_expert
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, NOTHING, make_plan
from making.checkpoints import locum as command
from making.containers import assert_near
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape, with_sums
from making.tiny_models import tiny_ids, tiny_model


def dropped(layers) -> list[bool]:
    assert all(set(layer.slots) in ({KEPT}, {NOTHING}) for layer in layers)
    return [layer.slots[0] == NOTHING for layer in layers]


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_the_layers_that_turn_tokens_least_go(amount: float, keep: int) -> None:
    shape = toy_shape(layers=5, experts=4, d=8, f=4)
    statistics = make_statistics(shape)
    turns = [float(statistics.layer(x.name)["turn_sum"] / statistics.layer(x.name)["tokens"]) for x in shape.layers]
    left, expected = int(amount * 4 * (5 - keep) + 1e-9), [[KEPT] * 4 for _ in range(5)]
    for i in sorted(range(5), key=lambda i: turns[i]):
        counts = statistics.layer(shape.layers[i].name)["gate_sum"].tolist()
        for e in sorted(range(4), key=lambda e: counts[e])[:left]:
            expected[i][e] = NOTHING
        left = max(0, left - 4)
    assert [list(x.slots) for x in layers_of(LayerDrop(keep), statistics, shape, amount)] == expected


def test_equal_layers_go_from_the_first() -> None:
    shape = toy_shape(layers=4, experts=4, d=8, f=4)
    even = with_sums(shape, turn_sum=[2.0, 2.0, 1.0, 2.0], tokens=[4.0] * 4, gate_sum=[torch.ones(4)] * 4)
    assert dropped(layers_of(LayerDrop(0), even, shape, 0.5)) == [True, False, True, False]


def test_a_layer_that_says_next_to_nothing_is_found() -> None:
    """Experts of the first layer have outputs of a thousandth: all of them go, and the model hardly changes."""
    model, ids = tiny_model("olmoe"), tiny_ids(6, 32)
    for layer in find_layers(model)[:1]:
        for e in range(8):
            weights = read_expert(layer.experts, e)
            write_expert(layer.experts, e, weights.map(lambda n, t: t * 1e-3 if n == "down_DF" else t))
    shape = shape_of(model)
    layers = layers_of(LayerDrop(), calibrate(model, tokens_of(ids), needs=LayerDrop().needs()), shape, 1.0)
    assert dropped(layers) == [True, False]
    plan = make_plan(shape, layers)
    assert plan.removed(shape) == 0.5
    with torch.no_grad():
        before = model(ids).logits
        assert_near(apply_plan(model, plan)(ids).logits, before, 1e-2)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_what_is_left_computes_what_experts_of_zeros_would(family: str) -> None:
    """Shared experts go on."""
    model, ids = tiny_model(family), tiny_ids()
    shape, zeros = shape_of(model), copy.deepcopy(model)
    for e in range(8):
        experts = find_layers(zeros)[1].experts
        write_expert(experts, e, read_expert(experts, e).map(lambda _, t: torch.zeros_like(t)))
    seen = with_sums(shape, turn_sum=[1.0, 0.5], tokens=[4.0, 4.0], gate_sum=[torch.ones(8)] * 2)
    with torch.no_grad():
        small = apply_plan(model, make_plan(shape, layers_of(LayerDrop(), seen, shape, 1.0)))
        assert_near(small(ids).logits, zeros(ids).logits, 1e-5)


def test_from_the_command_to_the_reloaded_model(checkpoint, words, tmp_path) -> None:
    line = ("--data", words, "--tokens", 256, "--length", 32, "--method", "layer-drop", "--remove", "0.5")
    made = command("compress", checkpoint, *line, "--out", tmp_path / "small")
    assert made.exit_code == 0, made.output + made.stderr
    plan, shape = locum.load_plan(tmp_path / "small" / "plan.json"), locum.read_shape(checkpoint)
    assert sorted(dropped(plan.layers)) == [False, True]
    assert locum.inspect(tmp_path / "small")["bytes"] == plan.size(shape).bytes
    locum.export(tmp_path / "small", to="stock", out=tmp_path / "stock")
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("small", "stock")]
    with torch.no_grad():
        live = apply_plan(locum.load_model(checkpoint), plan)(tiny_ids()).logits
        small, stock = (model(tiny_ids()).logits for model in loaded)
    assert torch.equal(small, live)
    assert_near(stock, small, 1e-5)
