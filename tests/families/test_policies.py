"""Every family with the policies that run fewer experts or others: the thresholds of calibration, saved, loaded and generating.

Group-local routing is refused by name on routers that go by more than their logits; everywhere else a token keeps to its groups.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from families.case import Case, copied, near, tokens_of
from families.tiny_families import all_families
from locum.checkpoints.load import load_model
from locum.errors import LocumError, PlanError, UnsupportedModel
from locum.experts.policies.group_local import GroupLocal
from locum.measure.calibration import calibrate
from locum.methods import METHODS
from locum.models.families import family_of, find_layers
from locum.plans.plan import KEPT, LayerPlan, Plan, make_plan
from making.tiny_models import CONFIGS

NEEDED = ("count", "gate_ratio", "gate_share", "prefix_share")
FEWER = (("top-p", {}), ("skip", {}), ("skip", {"beside": "selected"}))
SAMPLE = ("olmoe", "gpt_oss", "deepseek_v3")
assert set(SAMPLE) <= set(CONFIGS)


def marked(family: str) -> object:
    return family if family in SAMPLE else pytest.param(family, marks=pytest.mark.families)


FAMILIES = [marked(family) for family in all_families() if not family_of(family).refuse]


def saved_again(case: Case, plan: Plan, generates: bool) -> PreTrainedModel:
    """The model of a plan, which is what its saved self is: the same logits, and the same text with a cache and without one."""
    model = case.applied(plan)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "out")
        again = copied(load_model(Path(folder) / "out"))
    assert torch.equal(case.logits_of(again), case.logits_of(model))
    if generates and again.can_generate():
        prompt = case.ids_BS[:2, :7]
        again.generation_config.eos_token_id = None
        how = {"do_sample": False, "max_new_tokens": 3, "attention_mask": torch.ones_like(prompt)}
        written, slow = (again.generate(prompt, use_cache=use_cache, **how) for use_cache in (True, False))
        assert torch.equal(written, slow)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts(family):
    logging.disable_progress_bar()
    case = Case(family)
    try:
        observed = calibrate(case.model(), tokens_of(case.ids_BS), batch_size=2, needs=NEEDED)
    except LocumError as error:
        pytest.skip(str(error))
    for name, options in FEWER:
        method = METHODS[name](**options)
        plan = make_plan(case.shape, method.plan(method.score_experts(observed, case.shape), case.shape, 1.0))
        model, found = saved_again(case, plan, generates=name == "top-p"), []
        for layer in find_layers(model):

            def see(module, given, found=found):
                found.append((module.routed(*given).index_TM >= 0).sum(dim=1))

            layer.experts.register_forward_pre_hook(see)
        case.logits_of(model)
        first, policy = found[0].float(), plan.layers[0].routing
        assert float(first.mean()) == pytest.approx(policy.mean, abs=0.06) and int(first.min()) >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_groups(family):
    """One group is the model itself; of two, a token's experts lie in one."""
    logging.disable_progress_bar()
    case = Case(family)

    def plan_of(groups: tuple[int, ...]) -> Plan:
        layers = [
            LayerPlan(x.name, (KEPT,) * x.num_experts, routing=GroupLocal(groups, 1, x.router_kind, x.renormalised))
            for x in case.shape.layers
        ]
        return make_plan(case.shape, layers)

    try:
        whole = saved_again(case, plan_of((0,) * case.shape.layers[0].num_experts), generates=True)
    except (PlanError, UnsupportedModel) as error:
        words = ("for every expert, by which", "groups of experts already", "a way of its own", "unknown scores")
        assert any(word in str(error) for word in words), str(error)
        return
    near(case.logits_of(whole), case.logits)
    groups = torch.arange(case.shape.layers[0].num_experts) % 2
    halves, seen = saved_again(case, plan_of((*groups.tolist(),)), generates=False), []
    for layer in find_layers(halves):
        layer.experts.register_forward_pre_hook(lambda _m, given: seen.append(groups[given[1]]))
    case.logits_of(halves)
    assert seen and all(bool((group_TK == group_TK[:, :1]).all()) for group_TK in seen)
