"""Whole chains of two methods on every family: statistics or a search, a plan, stand-ins, a step of recovery, a file.

search -> plan -> apply -> recover -> evaluate -> save -> load again, to the bit
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from families.case import Case, copied, stored, tokens_of
from families.test_matrix import marked
from families.tiny_families import all_families, main_type
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.errors import LocumError, UnsupportedModel
from locum.measure.calibration import calibrate
from locum.measure.loss import evaluate
from locum.measure.removals import ModelExplorer
from locum.methods import METHODS
from locum.models.families import family_of
from locum.plans.plan import make_plan
from locum.stages.searching import to_collect, with_found
from locum.training.options import make_recovery
from locum.training.recovery import recover_model

CHAINS = {
    "moe-i2": ({"population": 4, "generations": 1, "seed": 0, "start": "whitened"}, "lora"),
    "compressed-experts": ({}, "vectors"),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("family", [marked(family) for family in all_families()])
def test_chain(family, name, tmp_path):
    rule = family_of(main_type(family))
    try:
        chain(Case(family), name, tmp_path)
    except LocumError as error:
        stated = rule.refuse or (rule.refuse_dropping if name == "moe-i2" else "")
        assert (stated and stated in str(error)) or predicts_nothing(error), error


def predicts_nothing(error):
    """Token classifiers have no next token to be trained on."""
    return isinstance(error, UnsupportedModel) and "does not predict tokens" in str(error)


def chain(case, name, folder):
    options, how = CHAINS[name]
    method, tokens = METHODS[name](**options), tokens_of(case.ids_BS)
    statistics = None
    if method.needs():
        if refusal := family_of(main_type(case.family)).refuse_dropping:
            raise UnsupportedModel(refusal)
        explorer = ModelExplorer(case.model(), tokens, sample=tokens.ids_BS.numel())
        found = method.explore(explorer, lambda *_: None)
        statistics = with_found(calibrate(case.model(), tokens, needs=to_collect(method)), found)
    amount = 0.5 if statistics is not None else 1.0
    plan = make_plan(case.shape, method.plan(method.score_experts(statistics, case.shape), case.shape, amount))
    model = apply_plan(case.model(), plan, statistics if plan.needs else None)
    untrained = case.logits_of(model)
    training = make_recovery(
        {"how": how, "steps": 1, "batch_size": 1, "length": case.ids_BS.shape[1], "learning_rate": 1e-2}
    )
    model, _ = recover_model(model, plan, replace(tokens, split="train"), None, training)
    after = case.logits_of(model.eval())
    assert torch.isfinite(after).all() and not torch.equal(after, untrained)
    loss = next(row for row in evaluate(model, tokens, resamples=10) if row.metric == "loss")
    assert loss.n > 0 and torch.isfinite(torch.tensor(loss.value))
    model.save_pretrained(folder)
    size = plan.size(case.shape)
    assert stored(folder) == (size.parameters, size.bytes)
    assert torch.equal(case.logits_of(copied(load_model(folder))), case.logits_of(copied(model)))
