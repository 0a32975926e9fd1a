"""A run ends with its best validated state: never with a model that is worse, on the validation text, than the one it got."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from locum.errors import OptionError
from locum.measure.use import in_short, uses_of
from locum.models.next_token_loss import loss_sum
from locum.training import loop as loop_module
from locum.training.loop import Loop
from locum.training.ways import WAYS
from making.policies import TOP_4
from making.tiny_models import tiny_model
from making.training import Killed, compressed, light, run, tiny_tokens
from test_vectors import routed
from test_ways import ALIKE

TOKENS = tiny_tokens(3, seed=5)
FALLING = ("annealed", "seer")  # whose first steps run another model than the result


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


@pytest.mark.parametrize("how", [pytest.param(x, marks=pytest.mark.journeys if x in ALIKE else ()) for x in WAYS])
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
    assert loss_of(result) == pytest.approx(before, rel=1e-5)  # whatever the way put beside what was there
    after = result.state_dict()
    for name, tensor in weights.items():
        assert torch.allclose(after[name], tensor, atol=1e-6), name
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1] == {"event": "kept", "kept_step": 0, "kept_loss": summary["validation_loss"]}
    assert [line["event"] for line in lines].count("validation") == 2 and len(steps) == 6


@pytest.mark.parametrize("how", [pytest.param(x, marks=pytest.mark.journeys if x in ALIKE else ()) for x in WAYS])
def test_the_state_with_the_lowest_loss_is_kept(how, monkeypatch):
    """Of the validations at steps 0, 2, 4 and 6 the third is the lowest, and the last is lower than the first."""
    original, plan, model = made()
    seen = {}
    states = scripted(monkeypatch, [5.0, 4.0, 3.0, 4.0][how in FALLING :])  # the first one is of the model as it came
    monkeypatch.setattr("locum.training.recovery.validation_loss", lambda *_: 5.0)
    take = Loop.take_best

    def watch(loop):
        take(loop)
        seen.update({name: p.detach().clone() for name, p in loop.trained.items()})

    monkeypatch.setattr(Loop, "take_best", watch)
    _, summary = run(model, plan, original, TOKENS, how=how, validate_every=2, learning_rate=1e-2)
    assert (summary["kept_step"], summary["validation_loss"], summary["validation_loss_before"]) == (4, 3.0, 5.0)
    third = states[2 - (how in FALLING)]
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


def test_a_run_ends_after_validations_that_were_no_better(tmp_path, monkeypatch):
    """Patience 2: of the validations at steps 0, 2, 4, 6 and 8 that at 2 is the lowest, so the run ends at 6; and it ends there
    too where it was killed before, without a step more where it had ended already."""
    given = {
        "how": "lora",
        "steps": 12,
        "validate_every": 2,
        "checkpoint_every": 4,
        "learning_rate": 1e-2,
        "patience": 2,
    }

    def go(losses, **more):
        original, plan, model = made()
        scripted(monkeypatch, losses)
        return run(model, plan, original, TOKENS, **given, **more)

    whole, summary = go([5.0, 3.0, 4.0, 3.0])  # a loss that is as low is no better
    assert (summary["steps"], summary["kept_step"], summary["validation_loss"]) == (6, 2, 3.0)

    def kill(step, steps, loss):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        go([5.0, 3.0, 4.0], workdir=tmp_path, progress=kill)
    for losses in ([3.0], []):
        resumed, again = go(losses, workdir=tmp_path)
        assert (again["steps"], again["kept_step"], again["loss"]) == (6, 2, summary["loss"])
        for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(one, two), name


def test_patience_counts_results_alone(monkeypatch):
    """Of an annealed model, validations while old weights are there are no results: those at 2 and 4 of 8 do not count."""
    original, plan, model = made()
    scripted(monkeypatch, [9.0, 9.0, 9.0, 5.0])
    monkeypatch.setattr("locum.training.recovery.validation_loss", lambda *_: 6.0)
    options = {"how": "annealed", "end_fraction": 0.6, "steps": 8, "validate_every": 2, "patience": 2}
    _, summary = run(model, plan, original, TOKENS, **options)
    assert (summary["steps"], summary["kept_step"]) == (8, 8)
    with pytest.raises(OptionError, match="--patience is 2 and --validate-every 0"):
        run(*made()[2:0:-1], **options | {"validate_every": 0})


def test_it_says_how_the_validation_text_uses_the_experts_before_and_after():
    original, plan, model = made()
    result, summary = run(copy.deepcopy(model), plan, original, TOKENS, how="full", learning_rate=1e-2)
    for said, of in (("routing_before", model), ("routing", result)):
        assert summary[said] == in_short(uses_of(of, [(TOKENS.ids_BS, TOKENS.attention_BS)]))
        assert summary[said]["experts"] == 16 and summary[said]["tokens"] == 48
    assert summary["routing"] != summary["routing_before"]


def test_without_validation_text_it_ends_with_the_last_step():
    original, plan, model = made()
    _, summary = run(model, plan, original, how="lora")
    assert summary["kept_step"] == 6 and summary["validation_loss"] is None
