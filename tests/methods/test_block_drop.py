"""Block Drop: which decoder layers go, models without them, and what works on those."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.streamed import stream_model
from locum.errors import OptionError, UnsupportedModel
from locum.measure.calibration import calibrate
from locum.methods.block_drop import BlockDrop
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import LayerPlan, make_plan
from locum.verification.folder import Folder, check_files
from making.checkpoints import locum as command
from making.checkpoints import write_tokenizer
from making.containers import assert_near
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape, with_sums
from making.tiny_models import tiny_ids, tiny_model

NEEDS = BlockDrop().needs()


def gone(layers) -> list[int]:
    return [i for i, layer in enumerate(layers) if layer.dropped]


@pytest.fixture
def deep(tmp_path):
    """A checkpoint of five layers, whose second and fourth hardly say anything."""
    model = tiny_model("olmoe", num_hidden_layers=5, vocab_size=320, max_position_embeddings=512)
    for i in (1, 3):
        layer = model.model.layers[i]
        with torch.no_grad():
            layer.self_attn.o_proj.weight *= 1e-3
            layer.mlp.experts.down_proj *= 1e-3
    model.save_pretrained(tmp_path / "deep")
    write_tokenizer(tmp_path / "deep")
    return tmp_path / "deep"


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("keep", [1, 3])
def test_the_decoder_layers_that_turn_tokens_least_go(amount: float, keep: int) -> None:
    shape = toy_shape(layers=5, experts=4, d=8, f=4)
    statistics = make_statistics(shape)
    turns = [float(statistics.layer(x.name)["decoder_turn_sum"]) for x in shape.layers]
    assert len(set(turns)) == 5
    expected = sorted(sorted(range(5), key=lambda i: turns[i])[: round(amount * (5 - keep))])
    layers = layers_of(BlockDrop(keep), statistics, shape, amount)
    assert gone(layers) == expected and make_plan(shape, layers).is_stock(shape)


def test_equal_layers_go_from_the_first() -> None:
    shape = toy_shape(layers=4, experts=4, d=8, f=4)
    even = with_sums(shape, decoder_turn_sum=[2.0, 2.0, 1.0, 2.0], tokens=[4.0] * 4)
    assert gone(layers_of(BlockDrop(), even, shape, 2 / 3)) == [0, 2]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_how_far_a_decoder_layer_turns_equals_a_plain_pass(family: str) -> None:
    """One token at a time, padding left out; afterwards no hook is there."""
    model, ids_BS = tiny_model(family), tiny_ids(3, 6)
    attention_BS = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    tokens = dataclasses.replace(tokens_of(ids_BS), attention_BS=attention_BS)
    made = calibrate(model, tokens, needs=NEEDS, batch_size=2)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    before, after = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _m, given: before.append(given[0].clone()))
        layer.register_forward_hook(
            lambda _m, _given, out: after.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    with torch.no_grad():
        model(ids_BS, attention_mask=attention_BS)
    for layer, one_BSD, two_BSD in zip(find_layers(model), before, after, strict=True):
        turns = [
            max(0.0, 1 - float(functional.cosine_similarity(one_BSD[b, s].double(), two_BSD[b, s].double(), dim=0)))
            for b, s in attention_BS.nonzero().tolist()
        ]
        named = made.layer(layer.shape.name)
        assert float(named["decoder_turn_sum"]) == pytest.approx(sum(turns), rel=1e-3)
        assert float(named["tokens"]) == len(turns) == 16 and sum(turns) > 0


def test_streamed_it_is_the_same_to_the_bit(deep) -> None:
    tokens = tokens_of(tiny_ids(4, 12))
    whole, streamed = (
        calibrate(model, tokens, needs=NEEDS, batch_size=2) for model in (locum.load_model(deep), stream_model(deep))
    )
    for name, named in whole.layers.items():
        assert torch.equal(named["decoder_turn_sum"], streamed.layers[name]["decoder_turn_sum"])


def test_layers_that_say_next_to_nothing_are_found(deep, words, tmp_path) -> None:
    """From the command to the reloaded model: it is nearly the model that it was, in three fifths of its layers."""
    line = ("--data", words, "--tokens", 256, "--length", 32, "--method", "block-drop", "--remove", "0.4")
    made = command("compress", deep, *line, "--out", tmp_path / "small")
    assert made.exit_code == 0, made.output + made.stderr
    plan, shape = locum.load_plan(tmp_path / "small" / "plan.json"), locum.read_shape(deep)
    assert gone(plan.layers) == [1, 3] and plan.removed(shape) == pytest.approx(0.4)
    assert locum.inspect(tmp_path / "small")["bytes"] == plan.size(shape).bytes
    assert "2 whole decoder layers dropped" in (tmp_path / "small" / "README.md").read_text()
    small, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("small", "deep"))
    assert small.config.num_hidden_layers == len(small.model.layers) == 3
    with torch.no_grad():
        assert_near(small(tiny_ids()).logits, whole(tiny_ids()).logits, 1e-2)
    checks = check_files(Folder(tmp_path / "small", deep, "cpu"))
    assert not [check for check in checks if check.result == "failed"]


def test_rounds_measure_what_is_left_and_one_plan_says_all(deep, words, tmp_path) -> None:
    asked = {"data": str(words), "tokens": 256, "length": 32, "method": "block-drop"}
    small = locum.compress(deep, remove=0.6, rounds=3, out=tmp_path / "small", **asked)
    plan = locum.load_plan(small / "plan.json")
    assert plan.provenance["rounds"] == [0.2, 0.4, 0.6] and set(gone(plan.layers)) > {1, 3}
    again = locum.apply(deep, plan=small / "plan.json", out=tmp_path / "again")
    assert (small / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (small / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_it_is_trained_and_pruned_further(deep, words, tmp_path) -> None:
    asked = {"data": str(words), "tokens": 256, "length": 32}
    training = {"recover_steps": 2, "recover_batch_size": 1, "recover_length": 32}
    out = tmp_path / "trained"
    locum.compress(deep, method="block-drop", remove=0.4, recover="kd", out=out, **asked, **training)
    assert gone(locum.load_plan(out / "plan.json").layers) == [1, 3]
    checks = check_files(Folder(out, deep, "cpu"))
    assert not [check for check in checks if check.result == "failed"]
    pruned = locum.compress(out, method="prune", remove=0.25, out=tmp_path / "pruned", **asked)
    assert locum.load_model(pruned).config.num_hidden_layers == 3
    with pytest.raises(OptionError, match="goes by the original's layers, and the plan drops some of them"):
        locum.compress(deep, method="block-drop", remove=0.4, recover="layerwise", out=tmp_path / "no", **asked)


def test_what_a_config_says_by_a_rule_is_refused_before_anything_is_written(tmp_path) -> None:
    """Experts in every other layer: without the first of them, the layers after it would be others."""
    model = tiny_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    shape = shape_of(model)
    assert [layer.name for layer in shape.layers] == [f"model.layers.{i}.mlp.experts" for i in (1, 3)]
    plan = make_plan(shape, [LayerPlan.without(shape.layers[0])])
    locum.save_plan(plan, tmp_path / "plan.json")
    with pytest.raises(UnsupportedModel, match=r"layer 2 has .*, and .* in a model without them; drop their experts"):
        locum.apply(tmp_path / "model", plan=tmp_path / "plan.json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    last = make_plan(shape, [LayerPlan.without(shape.layers[1])])
    assert apply_plan(model, last).config.num_hidden_layers == 3


def test_layers_that_are_numbered_are_numbered_anew(tmp_path) -> None:
    """Dense layers 0 and 3 of five, sliding windows in some: without layer 1 they are 0 and 2."""
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": types}
    model = tiny_model("qwen2_moe", num_hidden_layers=5, mlp_only_layers=[0, 3], **windows)
    shape = shape_of(model)
    small = apply_plan(model, make_plan(shape, [LayerPlan.without(shape.layers[0])]))
    assert (small.config.mlp_only_layers, small.config.num_hidden_layers) == ([0, 2], 4)
    assert small.config.layer_types == [types[i] for i in (0, 2, 3, 4)]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2, 3]
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tiny_ids()).logits, small(tiny_ids()).logits)
