"""A run ends with its best validated state: never with a model that is worse, on the validation text, than the one it got."""

from __future__ import annotations

import json

import pytest
import torch

from locum.models.next_token_loss import loss_sum
from locum.training import loop as loop_module
from locum.training.loop import Loop
from locum.training.ways import WAYS
from making.policies import TOP_4
from making.tiny_models import tiny_model
from making.training import Killed, compressed, light, run, tiny_tokens
from test_vectors import routed

TOKENS = tiny_tokens(3, seed=5)


def made():
    original = tiny_model("olmoe", **TOP_4)
    plan = routed(light(original))
    return original, plan, compressed(original, plan)


def loss_of(model) -> float:
    """Slowly: the mean over every position with loss."""
    summed, positions = loss_sum(model, TOKENS, torch.device("cpu"))
    return float(summed.detach()) / positions


def scripted(monkeypatch, losses):
    """Validations that say these losses, one after another; and the trained parameters as they were at each of them."""
    states, answers = [], iter(losses)

    def validate(model, tokens, options, accelerator):
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return next(answers)

    monkeypatch.setattr(loop_module, "validation_loss", validate)
    return states


@pytest.mark.parametrize("how", WAYS)
def test_training_that_makes_it_worse_gives_the_model_back(how, tmp_path, monkeypatch):
    real = loop_module.validation_loss
    worse = lambda model, tokens, options, accelerator: real(model, tokens, options, accelerator) + 100 * bool(steps)  # noqa: E731
    steps = []
    monkeypatch.setattr(loop_module, "validation_loss", worse)
    original, plan, model = made()
    before, weights = loss_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    log = tmp_path / "log"
    result, summary = run(model, plan, original, TOKENS, how=how, log=log, progress=lambda *now: steps.append(now))
    assert summary["kept_step"] == 0
    assert summary["validation_loss"] == summary["validation_loss_before"] == pytest.approx(before, rel=1e-5)
    for name, tensor in result.state_dict().items():
        assert torch.allclose(tensor, weights[name], atol=1e-6), name
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1] == {"event": "kept", "kept_step": 0, "kept_loss": summary["validation_loss"]}
    assert [line["event"] for line in lines].count("validation") == 2 and len(steps) == 6


@pytest.mark.parametrize("how", WAYS)
def test_the_state_with_the_lowest_loss_is_kept(how, monkeypatch):
    """Of the validations at steps 0, 2, 4 and 6 the third is the lowest, and the last is lower than the first."""
    original, plan, model = made()
    seen = {}
    states = scripted(
        monkeypatch, [5.0, 4.0, 3.0, 4.0][how == "annealed" :]
    )  # the first one is of the model as it came
    monkeypatch.setattr("locum.training.recovery.validation_loss", lambda *_: 5.0)
    take = Loop.take_best

    def watch(loop):
        take(loop)
        seen.update({name: p.detach().clone() for name, p in loop.trained.items()})

    monkeypatch.setattr(Loop, "take_best", watch)
    _, summary = run(model, plan, original, TOKENS, how=how, validate_every=2, learning_rate=1e-2)
    assert (summary["kept_step"], summary["validation_loss"], summary["validation_loss_before"]) == (4, 3.0, 5.0)
    third = states[2 - (how == "annealed")]
    assert seen.keys() == third.keys() and all(torch.equal(seen[name], third[name]) for name in seen)


def test_a_model_that_old_weights_still_carry_is_no_result(monkeypatch):
    """Until step 4 of 6 the old weights are there: those validations are logged, and never kept."""
    original, plan, model = made()
    scripted(monkeypatch, [1.0, 5.0, 4.5])
    monkeypatch.setattr("locum.training.recovery.validation_loss", lambda *_: 6.0)
    _, summary = run(model, plan, original, TOKENS, how="annealed", end_fraction=0.6, validate_every=2)
    assert (summary["kept_step"], summary["validation_loss"]) == (6, 4.5)


def test_a_run_that_was_killed_after_its_best_state_still_ends_with_it(tmp_path, monkeypatch):
    given = {"how": "lora", "steps": 8, "validate_every": 2, "checkpoint_every": 4, "learning_rate": 1e-2}

    def go(losses, **more):
        original, plan, model = made()
        scripted(monkeypatch, losses)
        return run(model, plan, original, TOKENS, **given, **more)

    whole, summary = go([5.0, 3.0, 4.0, 4.0, 4.0])
    assert summary["kept_step"] == 2

    def kill(step, steps, loss):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        go([5.0, 3.0, 4.0, 4.0], workdir=tmp_path, progress=kill)
    resumed, again = go([4.0, 4.0], workdir=tmp_path)
    assert again["kept_step"] == 2 and again["validation_loss"] == 3.0
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_without_validation_text_it_ends_with_the_last_step():
    original, plan, model = made()
    _, summary = run(model, plan, original, how="lora")
    assert summary["kept_step"] == 6 and summary["validation_loss"] is None
