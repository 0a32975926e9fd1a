"""The output head of every family, called by itself on what the body gave."""

from __future__ import annotations

import pytest
import torch

from families.case import Case, near, tokens_of
from families.tiny_families import all_families
from locum.data.tokens import batches
from locum.errors import UnsupportedModel
from locum.models import next_token_loss
from locum.models.families import family_of
from locum.models.next_token_loss import loss_sum
from locum.models.output_head import check_predicts

SOME = ("gemma4", "granitemoe")  # whose heads do more than a product


@pytest.mark.parametrize(
    "family",
    [
        family if family in SOME else pytest.param(family, marks=pytest.mark.families)
        for family in all_families()
        if not family_of(family).refuse
    ],
)
def test_losses_in_pieces_are_those_at_once(family, monkeypatch):
    try:
        case = Case(family)
        model = case.model()
        check_predicts(model, "it has no loss")
    except UnsupportedModel as error:
        pytest.skip(str(error))
    batch, made = next(batches(tokens_of(case.ids_BS), 3)), []
    for few in (2**30, 4 * 128 * 5):
        monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", few)
        loss, count = loss_sum(model, batch, torch.device("cpu"))
        model.zero_grad()
        loss.backward()
        made.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        assert count == batch.loss_mask_BS[:, 1:].sum()
    near(made[1][0], made[0][0])
    near(made[1][1], made[0][1], 1e-4)
