"""The output head some tokens at a time: the loss and the gradients of all at once, in the logits of a few."""

from __future__ import annotations

import copy

import pytest
import torch

from locum.data.tokens import batches
from locum.models import next_token_loss
from locum.models.next_token_loss import loss_sum
from locum.training.context import Context, Original
from locum.training.options import make_recovery
from making.tiny_models import tiny_model
from making.training import QUICK, compressed, light, tiny_tokens
from test_ways import Case

FEW = 4 * 128 * 5  # bytes of the logits of five tokens, of a vocabulary of 128


def graded(how, model, original, batch, **options):
    """Loss, number of tokens and gradients of one batch."""
    chosen = make_recovery({"how": how, **QUICK, **options})
    context = Context(copy.deepcopy(model), light(original), 1, 0, Original.of(original))
    chosen.way.prepare(context, 0)
    loss, count = chosen.way.loss(context, batch)
    loss.backward()
    return float(loss.detach()), count, {n: p.grad for n, p in context.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("how", "family"), [("lora", "olmoe"), ("full", "gpt_oss"), ("kd", "deepseek_v3")])
def test_pieces_are_the_whole(how, family, monkeypatch):
    original = tiny_model(family)
    model, batch = compressed(original, light(original)), next(batches(tiny_tokens(), 3))
    whole, count, gradients = graded(how, model, original, batch)
    for few in (1, FEW):
        monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", few)
        loss, same, found = graded(how, model, original, batch)
        assert (loss, same) == (pytest.approx(whole, rel=1e-6), count)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert all(parameter.grad is None for parameter in original.parameters())


@pytest.mark.parametrize("gradients", [False, True])
def test_no_more_logits_are_made_than_were_allowed(olmoe, monkeypatch, gradients):
    seen, bodies = [], []
    olmoe.lm_head.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape)))
    olmoe.model.register_forward_hook(lambda module, given, output: bodies.append(output.last_hidden_state.shape))
    batch = next(batches(tiny_tokens(), 3))
    monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", FEW)
    with torch.set_grad_enabled(gradients):
        loss, count = loss_sum(olmoe, batch, torch.device("cpu"))
    pieces = -(-count // 5)
    assert len(seen) == pieces and {shape[:2] for shape in seen[:-1]} == {(1, 5)} and sum(s[1] for s in seen) == count
    if gradients:
        loss.backward()
        assert len(seen) == 2 * pieces  # each again, for its gradient
    assert [shape for shape in bodies if shape[0] == 3] == [(3, 16, 32)]  # and the body once
    assert "forward" not in olmoe.model.__dict__


def test_what_fits_is_done_at_once_as_ever(olmoe, monkeypatch):
    batch = next(batches(tiny_tokens(), 3))
    monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", 4 * 128 * batch.ids_BS.numel())
    monkeypatch.setattr(next_token_loss, "run_head", None)
    logits_BSV = olmoe(batch.ids_BS, attention_mask=batch.attention_BS).logits[:, :-1]
    mask_BS = batch.loss_mask_BS[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits_BSV[mask_BS], batch.ids_BS[:, 1:][mask_BS], reduction="sum")
    assert torch.equal(loss_sum(olmoe, batch, torch.device("cpu"))[0], expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_goes_the_same_way(precision, monkeypatch):
    case = Case(torch.bfloat16 if precision == "bf16" else torch.float32)
    made = []
    for few in (next_token_loss.LOGIT_BYTES, FEW):
        monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", few)
        made.append(case.recover(how="lora", precision=precision, tokens=tiny_tokens(), balance=0.01)[1]["loss"])
    assert made[0] == pytest.approx(made[1], rel=1e-2 if precision == "bf16" else 1e-4)
