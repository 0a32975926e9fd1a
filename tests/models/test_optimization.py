"""`locum.optimize`: a model computes what it computed, `generate` and saving work as before, and training is left to torch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import locum
from locum.checkpoints.application import apply_plan
from locum.containers.container import StandInExperts
from locum.kernels import few_rows
from locum.models import optimization
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, make_plan, stand_in
from making.containers import relative_error
from making.tiny_models import CONFIGS, tiny_ids, tiny_model

needs_library = pytest.mark.skipif(not few_rows.library(), reason="no C++ compiler or no avx512_bf16")
FAMILIES = ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "mixtral", "granitemoe", "gpt_oss")


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "forward" in vars(module)}


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def stand_ins(model: PreTrainedModel) -> PreTrainedModel:
    """LightMoE's plan: two own experts, the rest adapters over one base."""
    shape = shape_of(model)
    slots = (KEPT, KEPT, *(stand_in(0, 4) for _ in range(6)))
    plans = [LayerPlan(x.name, slots, (Base(tuple(range(2, 8)), (1 / 6,) * 6),)) for x in shape.layers]
    return apply_plan(model, make_plan(shape, plans, method="lightmoe"), None)


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    shape = shape_of(model)
    plans = [LayerPlan(x.name, (KEPT,) * 5 + (DROPPED,) * 3) for x in shape.layers]
    return apply_plan(model, make_plan(shape, plans, method="prune"), None)


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_results_are_the_original_s(family):
    model, ids = tiny_model(family), tiny_ids(2, 12)
    expected = logits(model, ids)
    assert locum.optimize(model) is model
    assert relative_error(logits(model, ids), expected.double()) < 1e-5
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert {*linear} <= replaced(model).keys() and "lm_head" in linear


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_from_float64_than_torch(family):
    """Every expert runs for every token: an expert taken for another by rounding would be all of the error."""
    all_run = {"num_experts_per_tok": 8} | ({"n_group": 1} if family == "deepseek_v3" else {})
    errors = {"torch": 0.0, "ours": 0.0}
    for seed in range(4):
        ids, exact = tiny_ids(2, 16, seed=seed), tiny_model(family, seed, **all_run).double()
        exact.set_experts_implementation("eager")  # torch's grouped product has no float64
        expected, model = logits(exact, ids), tiny_model(family, seed, **all_run).bfloat16()
        errors["torch"] += relative_error(logits(model, ids), expected)
        errors["ours"] += relative_error(logits(locum.optimize(model), ids), expected)
    assert errors["ours"] <= 1.05 * errors["torch"]


@needs_library
@pytest.mark.parametrize("make", [stand_ins, pruned])
def test_compressed_models_compute_what_they_computed(make):
    model, ids = make(tiny_model("olmoe")), tiny_ids(2, 12)
    expected = logits(model, ids)
    assert relative_error(logits(locum.optimize(model), ids), expected.double()) < 1e-5


@needs_library
def test_what_is_known_by_its_numbers_is_replaced_and_nothing_else():
    kinds = {"olmoe": (True, True), "qwen3_moe": (True, True), "mixtral": (True, True), "gpt_oss": (True, False)}
    for family, (router, experts) in kinds.items():
        model = locum.optimize(tiny_model(family))
        for layer in find_layers(model):
            assert ("forward" in vars(layer.router), "forward" in vars(layer.experts)) == (router, experts), family
    names = replaced(locum.optimize(tiny_model("olmoe")))
    assert "model.norm" in names and "model.layers.0.self_attn.q_norm" in names
    odd = locum.optimize(tiny_model("deepseek_v3"))  # its router takes sigmoids, groups and a bias
    assert not any("forward" in vars(layer.router) for layer in find_layers(odd))
    assert "forward" not in vars(find_layers(locum.optimize(tiny_model("olmoe", hidden_act="gelu")))[0].experts)


@needs_library
@pytest.mark.parametrize("make", [lambda model: model, stand_ins])
def test_generate_writes_the_same_text(make):
    """Prompts of different lengths, with a cache, greedily; and the same from a static cache."""
    model, ids = make(tiny_model("olmoe")), tiny_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    locum.optimize(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), expected)


@needs_library
def test_few_rows_go_to_the_products_and_many_to_torch(monkeypatch):
    model, rows = locum.optimize(tiny_model("olmoe")), []
    monkeypatch.setattr(
        few_rows, "linear", lambda x, *w: rows.append(x.numel() // x.shape[-1]) or nn.functional.linear(x, *w)
    )
    logits(model, tiny_ids(1, optimization.ROWS))
    assert {*rows} == {optimization.ROWS}
    rows.clear()
    logits(model, tiny_ids(1, optimization.ROWS + 1))
    model(tiny_ids(1, 4))  # gradients may be asked for
    assert rows == []


@needs_library
def test_training_is_torch_s_to_the_bit():
    plain, model, ids = tiny_model("olmoe"), locum.optimize(tiny_model("olmoe")), tiny_ids(2, 8)
    for each in (plain, model):
        each.train()(ids, labels=ids).loss.backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@needs_library
def test_adapters_are_trained_over_it():
    model = get_peft_model(locum.optimize(tiny_model("olmoe")), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model(tiny_ids(1, 8), labels=tiny_ids(1, 8)).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
    expected = copy.deepcopy(model)
    optimization.restore(expected)
    assert relative_error(logits(model, tiny_ids()), logits(expected, tiny_ids()).double()) < 1e-5


@needs_library
@pytest.mark.parametrize("make", [lambda model: model, stand_ins])
def test_saving_writes_the_same_bytes_and_nothing_is_held_twice(make, tmp_path):
    model = make(tiny_model("olmoe").bfloat16())
    places = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    locum.optimize(model)
    logits(model, tiny_ids())
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == places
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name


@needs_library
def test_copies_and_pickles_read_their_own_weights():
    model, ids = locum.optimize(tiny_model("olmoe")), tiny_ids(1, 4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        expected = logits(twin, ids)
        assert torch.equal(expected, logits(model, ids)) and len(replaced(twin)) == len(replaced(model))
        twin.lm_head.weight.data.zero_()
        assert not logits(twin, ids).any() and torch.equal(logits(model, ids), expected)


@needs_library
def test_casting_and_compiling_work_afterwards():
    model, ids = locum.optimize(tiny_model("olmoe")), tiny_ids(1, 4)
    expected = logits(model, ids)
    assert torch.equal(logits(model.half().float(), ids), logits(model, ids))
    model = locum.optimize(tiny_model("olmoe"))
    torch.compiler.reset()
    assert relative_error(logits(torch.compile(model, backend="eager"), ids), expected.double()) < 1e-5


@needs_library
def test_a_forward_that_somebody_replaced_stays():
    model = tiny_model("olmoe")
    own = model.lm_head.forward = lambda x: torch.zeros(*x.shape[:-1], 128)
    assert locum.optimize(model).lm_head.forward is own
    optimization.restore(model)
    assert {*replaced(model)} == {"lm_head"}


def test_without_the_products_nothing_changes(monkeypatch):
    monkeypatch.setattr(few_rows, "library", dict)
    assert not replaced(locum.optimize(tiny_model("olmoe")))


def test_what_is_no_model_with_experts_is_refused():
    with pytest.raises(locum.OptionError, match="takes a transformers model, not Linear"):
        locum.optimize(nn.Linear(2, 2))
    dense = tiny_model("olmoe")
    dense.model.layers = nn.ModuleList()
    with pytest.raises(locum.UnsupportedModel):
        locum.optimize(dense)


def test_families_that_are_tried_are_known():
    assert {*FAMILIES} <= {*CONFIGS} and StandInExperts is locum.StandInExperts
