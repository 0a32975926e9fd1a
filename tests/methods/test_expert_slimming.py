"""Expert Slimming: masked experts in stock checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import open_model
from locum.errors import OptionError, PlanError
from locum.experts.masks import MASKS, Pattern, by_norms, sparsegpt
from locum.experts.parts.masked import Masked
from locum.experts.quantisers import seen_by
from locum.measure.calibration import calibrate
from locum.methods.expert_slimming import ExpertSlimming
from locum.models.families import find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.bits import FewBits
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Slot, make_plan, stand_in
from making.checkpoints import write_checkpoint
from making.containers import assert_near
from making.handmade import layers_of, tokens_of
from making.tiny_models import tiny_ids, tiny_model
from making.training import run

IDS = tiny_ids(6, 32)


def expected(weights, layer, e: int, mask: str, pattern: Pattern) -> dict[str, torch.Tensor]:
    """Gate, up and down of one expert, from the statistics themselves."""
    names = ("gate_FD", "up_FD", "down_DF")
    if mask == "sparsegpt":
        count = float(layer["count"].sum())
        means = (
            layer["input_gram"].sum(0) / count,
            float(layer["hidden_gram"].diagonal(dim1=1, dim2=2).mean(1).sum()) / count,
        )
        sums = {"up_FD": layer["input_gram"][e], "down_DF": layer["hidden_gram"][e]}
        grams = seen_by(sums, float(layer["count"][e]), *means)
        return {name: sparsegpt(getattr(weights, name), grams[name], pattern) for name in names}
    first, second = {"magnitude": (None, None), "wanda": ("input_gram", "hidden_gram")}.get(mask, (None, None))
    squares = dict.fromkeys(names, None if first is None else layer[first][e].diagonal())
    squares["down_DF"] = None if second is None else layer[second][e].diagonal()
    if mask == "moe-pruner":
        squares = dict.fromkeys(names, layer["gated_input_square"][e]) | {"down_DF": layer["gated_hidden_square"][e]}
    return {name: by_norms(getattr(weights, name), squares[name], pattern) for name in names}


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("unstructured", 0.25)])
@pytest.mark.parametrize("mask", MASKS)
def test_every_expert_gets_its_mask_from_its_own_inputs(mask: str, pattern: str, share: float) -> None:
    model, method = tiny_model("olmoe"), ExpertSlimming(mask, pattern, share)
    shape = shape_of(model)
    seen = calibrate(model, tokens_of(IDS), needs=(*method.needs(), "input_gram", "hidden_gram", "count"))
    plan = make_plan(shape, layers_of(method, seen, shape, 1.0))
    assert plan.is_stock(shape) and plan.removed(shape) == 0 and plan.size(shape).bytes == shape.bytes
    masked = apply_plan(copy.deepcopy(model), plan, seen)
    for before, after in zip(find_layers(model), find_layers(masked), strict=True):
        for e in range(8):
            found, old = read_expert(after.experts, e), read_expert(before.experts, e)
            now = Pattern.of("2:4" if pattern == "2:4" else "0.25")
            for name, tensor in expected(old, seen.layer(before.shape.name), e, mask, now).items():
                torch.testing.assert_close(getattr(found, name), tensor.detach())
                assert float((getattr(found, name) == 0).float().mean()) == share


def test_weights_on_inputs_that_are_never_there_go_first() -> None:
    """The norm in front of the experts silences half of their inputs: half of gate and up go, and nothing changes there."""
    model = tiny_model("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[torch.arange(0, 32, 2)] = 0
    seen = calibrate(model, tokens_of(IDS), needs=MASKS["wanda"].needs)
    masked = apply_plan(
        copy.deepcopy(model), make_plan(shape_of(model), layers_of(ExpertSlimming(), seen, shape_of(model), 1.0)), seen
    )
    for before, after in zip(find_layers(model), find_layers(masked), strict=True):
        for e in range(8):
            old, new = read_expert(before.experts, e), read_expert(after.experts, e)
            assert not new.up_FD[:, ::2].any() and torch.equal(new.up_FD[:, 1::2], old.up_FD[:, 1::2])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_files_are_stock_and_equal_the_live_model_to_the_bit(family: str, words, tmp_path) -> None:
    """Experts numbered in the files; and stacked, transposed, interleaved, with biases."""
    original = write_checkpoint(tmp_path / "original", family)
    seen = locum.calibrate(original, data=[str(words)], tokens=256, length=32, out=tmp_path / "stats")
    plan = locum.plan(seen, method="expert-slimming", mask="sparsegpt")
    small = locum.apply(original, plan=plan, statistics=tmp_path / "stats", out=tmp_path / "small")
    before, after = (load_file(folder / "model.safetensors") for folder in (original, small))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("experts" in name and "bias" not in name for name in changed)
    assert "quantization_config" not in json.loads((small / "config.json").read_text())
    live, again = apply_plan(locum.load_model(original), plan, seen), AutoModelForCausalLM.from_pretrained(small)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in live.state_dict().items())
    card = (small / "README.md").read_text()
    assert "nothing removed, weights of 16 experts set to zero" in card and "loads without Locum" in card


def same_logits(folder, live) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert_near(again.eval()(tiny_ids()).logits, live.eval()(tiny_ids()).logits, 1e-6)


MASK = Slot((Masked("2:4", "magnitude"),))


def test_a_masked_expert_of_a_container_lies_among_own_weights(checkpoint, tmp_path) -> None:
    shape = locum.read_shape(checkpoint)
    slots = (MASK, stand_in(rank=2, start="svd"), *[MASK] * 5, KEPT)
    plan = make_plan(shape, [LayerPlan(x.name, slots) for x in shape.layers])
    folder = locum.apply(checkpoint, plan=plan, out=tmp_path / "mixed")
    assert locum.inspect(folder)["bytes"] == plan.size(shape).bytes and not plan.is_stock(shape)
    live = apply_plan(locum.load_model(checkpoint), plan)
    same_logits(folder, live)
    down_DF = live.model.layers[0].mlp.experts.dense.down_NDF[0]
    assert torch.equal((down_DF == 0).sum(1), torch.full((32,), 8))


def test_a_checkpoint_that_lost_unequal_numbers_of_experts_is_masked(checkpoint, tmp_path) -> None:
    shape = locum.read_shape(checkpoint)
    layers = [LayerPlan(x.name, (*[DROPPED] * n, *[KEPT] * (8 - n))) for n, x in enumerate(shape.layers)]
    uneven = locum.apply(checkpoint, plan=make_plan(shape, layers), out=tmp_path / "uneven")
    left = locum.read_shape(uneven)
    plan = make_plan(left, [LayerPlan(x.name, (MASK,) * x.num_experts) for x in left.layers])
    folder = locum.apply(uneven, plan=plan, out=tmp_path / "masked")
    assert locum.inspect(folder)["bytes"] == left.bytes
    same_logits(folder, apply_plan(open_model(uneven), plan))
    for path, share in ((uneven, 0.0), (folder, 0.5)):
        down = [tensor for name, tensor in load_file(path / "model.safetensors").items() if "down" in name]
        assert down and all(float((tensor == 0).float().mean()) == share for tensor in down)


def test_what_cannot_be_is_refused() -> None:
    model = tiny_model("olmoe")
    shape = shape_of(model)

    def plan(*slots: Slot):
        return make_plan(shape, [LayerPlan(shape.layers[0].name, (*slots, *[KEPT] * (8 - len(slots))))])

    for part, words in (
        (Masked("3:2"), "expert 0: pattern '3:2' is not known"),
        (Masked("2:4", "wonda"), "unknown mask 'wonda': did you mean 'wanda'"),
        (Masked("2:4", format="int4-g32"), "masked and in int4-g32"),
    ):
        with pytest.raises(PlanError, match=words):
            plan(Slot((part,)))
    with pytest.raises(PlanError, match="is masked and has rank 2"):
        plan(stand_in(None, 2, "svd", False, Masked()))
    masked = make_plan(shape, [LayerPlan(shape.layers[0].name, (Slot((Masked(by="magnitude"),)),) * 8)])
    with pytest.raises(OptionError, match="lora trains no masked experts"):
        run(apply_plan(model, masked), masked, how="lora")
    with pytest.raises(PlanError, match="masked and in int8"):
        make_plan(shape, FewBits("int8-g32", "nearest").applied(masked.layers, shape))
    with pytest.raises(OptionError, match="saves products with zeros, not stored ones"):
        locum.plan([], method="expert-slimming", remove=0.5)
