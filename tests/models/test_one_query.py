"""Attention of `locum.optimize`: one query over the cache in one call, and torch's wherever anything else is asked for."""

from __future__ import annotations

import contextlib
import copy
import inspect

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import locum
from locum.kernels import few_rows
from locum.models import decoder_steps, optimization
from making.containers import relative_error
from making.tiny_models import tiny_ids, tiny_model

pytestmark = pytest.mark.skipif(not few_rows.library(), reason="no C++ compiler or no avx512_bf16")
FAMILIES = ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "mixtral", "granitemoe", "gpt_oss")
GREEDY = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture
def calls(monkeypatch):
    """How many positions each compiled call read, of attention alone or of a decoder layer's first half."""
    found, alone, within = [], few_rows.attend, few_rows.attended
    monkeypatch.setattr(few_rows, "attend", lambda q, key, *more: found.append(key.shape[2]) or alone(q, key, *more))
    monkeypatch.setattr(
        few_rows, "attended", lambda x, q, key, *more: found.append(key.shape[2]) or within(x, q, key, *more)
    )
    without_trials(monkeypatch, found)
    return found


def without_trials(monkeypatch, found: list[int]) -> None:
    """Let what a trial of a decoder layer adds to a list be taken off again."""
    tried = decoder_steps._computes_that

    def computes_that(*given):
        before = len(found)
        known = tried(*given)
        del found[before:]
        return known

    monkeypatch.setattr(decoder_steps, "_computes_that", computes_that)


def logits(model, ids, **more):
    """Of every new token [T, B, V]."""
    return torch.stack(model.generate(ids, **GREEDY, **more).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_says_what_it_said(family, calls):
    model, ids = tiny_model(family), tiny_ids(2, 9)
    expected, layers = logits(model, ids), model.config.get_text_config().num_hidden_layers
    by_torch = model.config._attn_implementation == "sdpa"
    found = logits(locum.optimize(model), ids)
    assert relative_error(found, expected.double()) < 1e-5
    # the prompt is torch's; each new token is one call in each layer, over one position more
    assert calls == ([9 + step for step in range(1, 6) for _ in range(layers)] if by_torch else [])
    assert by_torch is (family != "gpt_oss")  # which has sinks


def test_prompts_of_unequal_length_are_masked(calls):
    model, ids = tiny_model("olmoe"), tiny_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = logits(model, ids, attention_mask=mask)
    assert relative_error(logits(locum.optimize(model), ids, attention_mask=mask), expected.double()) < 1e-5
    assert calls == []


def test_a_window_is_a_window(calls):
    """Shorter than the prompt: what has left it is in no cache."""
    model, ids = tiny_model("mixtral", sliding_window=5), tiny_ids(2, 9)
    expected = logits(model, ids)
    assert not torch.equal(expected, logits(tiny_model("mixtral", sliding_window=None), ids))
    assert relative_error(logits(locum.optimize(model), ids), expected.double()) < 1e-5
    assert max(calls, default=0) <= 5


def test_a_static_cache_is_masked(calls):
    model, ids = tiny_model("olmoe"), tiny_ids(2, 9)
    expected = logits(model, ids, cache_implementation="static")
    found = logits(locum.optimize(model), ids, cache_implementation="static")
    assert relative_error(found, expected.double()) < 1e-5
    assert calls == []


def test_without_a_cache_and_with_gradients_torch_attends(calls):
    model, ids = locum.optimize(tiny_model("olmoe")), tiny_ids(2, 1)
    model(ids).logits.sum().backward()
    assert calls == [] and all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())
    with torch.no_grad():
        model(ids)
    assert calls == [1] * model.config.num_hidden_layers  # one token, nothing before it


def asked(**more):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, s, 16, generator=generator) for n, s in ((4, 1), (2, 7), (2, 7)))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    given = {"attention_mask": None, "scaling": 0.3} | more
    return [
        ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, **given)[0]
        for name in (optimization.ATTENTION, "sdpa")
    ]


@torch.no_grad()
def test_options_that_are_known_are_the_same_and_others_are_left_to_torch(calls):
    for more in ({}, {"scaling": None}, {"is_causal": False}, {"sliding_window": 3}, {"dropout": 0.0}):
        ours, theirs = asked(**more)
        torch.testing.assert_close(ours, theirs)
    assert calls == [7] * 5
    mask = torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    for more in ({"attention_mask": mask}, {"attention_mask": torch.where(mask, 0.0, -9.0)}):
        ours, theirs = asked(**more)
        assert torch.equal(ours, theirs)
    with contextlib.suppress(ValueError):  # newer versions of transformers refuse it, older ones leave it out
        asked(softcap=20.0)
    assert calls == [7] * 5


def test_it_is_taken_back_and_chosen_attention_is_left():
    model = tiny_model("olmoe")
    before = copy.deepcopy(model.config.to_dict())
    locum.optimize(model)
    assert model.config._attn_implementation == optimization.ATTENTION
    assert model.config.to_dict() == before  # nothing is saved
    optimization.restore(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert locum.optimize(model).config._attn_implementation == "eager"


def test_a_model_whose_code_asks_for_the_name_keeps_it(calls, monkeypatch):
    """Some add their own mask where attention is "sdpa", and none where it has another name."""
    model, ids = tiny_model("olmoe"), tiny_ids(2, 9)
    expected = logits(model, ids)
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + 'if attention == "sdpa": ...')
    assert locum.optimize(model).config._attn_implementation == "sdpa"
    assert relative_error(logits(model, ids), expected.double()) < 1e-5 and calls == []
    monkeypatch.setattr(inspect, "getsource", lambda module: next(iter({}[module])))
    assert locum.optimize(model).config._attn_implementation == "sdpa"
