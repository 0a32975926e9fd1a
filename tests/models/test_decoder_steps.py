"""Decoder layers in few calls: which are known, that steps are what they were, and that a layer whose parts somebody else needs runs as before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import locum
from locum.kernels import few_rows
from locum.models import decoder_steps, optimization
from making.containers import relative_error
from making.tiny_models import tiny_ids, tiny_model

pytestmark = pytest.mark.skipif(not few_rows.library(), reason="no C++ compiler or no avx512_bf16")
KNOWN = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "granitemoe")
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
SAID = {"output_logits": True, "return_dict_in_generate": True}


def steps_of(model: nn.Module) -> list[str]:
    """The layers that have a forward of steps."""
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return [name for name, forward in forwards.items() if getattr(forward, "func", None) is decoder_steps.step]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry for each layer that ran in few calls; trials run none."""
    found, serves = [], decoder_steps.FirstHalf.serves

    def served(half, *given):
        found.extend([1] * (known := serves(half, *given)))
        return known

    monkeypatch.setattr(decoder_steps.FirstHalf, "serves", served)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
def test_steps_are_what_they_were_to_the_bit(family, dtype, calls, monkeypatch):
    """Beside the same products one by one, rounded where torch rounds."""
    ids = tiny_ids(3, 7)
    one_by_one, fast = tiny_model(family).to(dtype), tiny_model(family).to(dtype)
    with monkeypatch.context() as patched:
        patched.setattr(optimization, "first_half", lambda *_: None)
        locum.optimize(one_by_one)
    locum.optimize(fast)
    assert steps_of(one_by_one) == [] and len(steps_of(fast)) == fast.config.num_hidden_layers
    expected, made = (model.generate(ids, **GREEDY, **SAID) for model in (one_by_one, fast))
    assert torch.equal(torch.stack(made.logits), torch.stack(expected.logits))
    assert len(calls) == 5 * fast.config.num_hidden_layers
    caches = (made.past_key_values, expected.past_key_values)
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
        ("olmoe", {"clip_qkv": 2.0}),
        ("granitemoe", {"residual_multiplier": 0.5}),
    ],
)
def test_layers_that_compute_something_else_stay(family, changes):
    model, ids = tiny_model(family, **changes), tiny_ids(2, 7)
    expected = torch.stack(model.generate(ids, **GREEDY, **SAID).logits)
    assert steps_of(locum.optimize(model)) == []
    assert relative_error(torch.stack(model.generate(ids, **GREEDY, **SAID).logits), expected.double()) < 1e-5


def test_what_is_alike_is_tried_once(monkeypatch):
    tried, made = [], decoder_steps._computes_that
    monkeypatch.setattr(decoder_steps, "_computes_that", lambda *given: tried.append(1) or made(*given))
    model = locum.optimize(tiny_model("olmoe"))
    assert len(steps_of(model)) > len(tried) == 1


def prompt_and_step(model, **more):
    """The logits of one token after a prompt."""
    ids = tiny_ids(2, 8)
    with torch.no_grad():
        before = model(ids[:, :7], use_cache=True)
        return model(ids[:, 7:], past_key_values=before.past_key_values, use_cache=True, **more)


def test_hooks_on_its_parts_are_called(calls):
    model, seen = locum.optimize(tiny_model("olmoe")), []
    expected = prompt_and_step(model).logits
    assert len(calls) == model.config.num_hidden_layers
    calls.clear()
    layer = model.model.layers[0]
    hooks = [
        module.register_forward_hook(lambda *_: seen.append(1)) for module in (layer.self_attn.k_proj, layer.self_attn)
    ]
    assert torch.equal(prompt_and_step(model).logits, expected)
    assert len(seen) == 4 and len(calls) == model.config.num_hidden_layers - 1
    for hook in hooks:
        hook.remove()
    prompt_and_step(model)
    assert len(calls) == 2 * model.config.num_hidden_layers - 1


def test_adapters_gradients_training_masks_and_other_attention_run_as_before(calls):
    model = locum.optimize(tiny_model("olmoe"))
    ids, layers = tiny_ids(2, 1), model.config.num_hidden_layers
    model(ids).logits.sum().backward()
    model.train()
    prompt_and_step(model)
    model.eval()
    prompt_and_step(model, attention_mask=torch.tensor([[0, *[1] * 7], [1] * 8]))
    assert prompt_and_step(model, output_hidden_states=True).hidden_states[0].shape[1] == 1
    model.set_attn_implementation("eager")
    assert len(prompt_and_step(model, output_attentions=True).attentions) == layers
    assert calls == []
    model.set_attn_implementation(optimization.ATTENTION)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with_adapters = prompt_and_step(adapted).logits
    assert calls == []
    with adapted.disable_adapter():
        assert not torch.equal(prompt_and_step(adapted).logits, with_adapters)


def test_copies_and_pickles_compute_with_their_own_weights(calls):
    model = locum.optimize(tiny_model("olmoe"))
    expected = prompt_and_step(model).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(2)
        assert steps_of(twin) == steps_of(model)
        assert torch.equal(prompt_and_step(twin).logits, expected)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.div_(2)
    optimization.restore(model)
    assert steps_of(model) == []


def test_positions_of_fewer_numbers_than_a_head_are_left_to_its_class():
    """Known by a trial that turns all of a head; where the model turns a part of it, the layer is not asked."""
    model = locum.optimize(tiny_model("olmoe"))
    layer = model.model.layers[0]
    knows = layer.forward.keywords["half"].serves
    x, head = torch.randn(1, 1, model.config.hidden_size), layer.self_attn.head_dim
    for width, served in ((head, True), (head // 2, False)):
        angles = tuple(torch.randn(1, 1, width) for _ in range(2))
        with torch.no_grad():
            assert knows(x, (), {"position_embeddings": angles}, optimization.ATTENTION) is served
            assert knows(x, (), {"position_embeddings": angles, "other": 1}, optimization.ATTENTION) is False
