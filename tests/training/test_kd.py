"""Distillation from the original: what it must reach, what it must leave alone, and its loss by hand."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load

import locum
from locum.checkpoints.load import load_model
from locum.data.tokens import batches
from locum.errors import OptionError
from locum.measure.loss import evaluate
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, make_plan
from locum.stages import recovery as stage
from locum.training.context import Context, Original
from locum.training.kept_logits import KeptLogits, keep_logits, largest
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from making.tiny_models import tiny_model
from making.training import compressed, light, tiny_tokens

QUICK = {"how": "kd", "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0, "validate_every": 0}


@pytest.fixture(scope="module")
def original():
    return tiny_model("olmoe")


def recovered(model, plan, original, **options):
    chosen = make_recovery({**QUICK, "checkpoint_every": 0, **options})
    return recover_model(copy.deepcopy(model), plan, tiny_tokens(), None, chosen, Original.of(original))[0]


def divergence(model, original) -> float:
    rows = evaluate(model, tiny_tokens(), against=original, resamples=1)
    return next(row.value for row in rows if (row.metric, row.domain) == ("kl", "all"))


def test_a_compressed_model_comes_nearer_to_its_original(original):
    plan = light(original)
    small = compressed(original, plan)
    assert divergence(recovered(small, plan, original, steps=30), original) < 0.5 * divergence(small, original)


def test_a_model_that_is_its_original_has_nothing_to_learn(original):
    plan = make_plan(shape_of(original), [LayerPlan(x.name, (KEPT,) * 8) for x in shape_of(original).layers])
    context = Context(copy.deepcopy(original), plan, 1, 0, Original.of(original))
    chosen = make_recovery(QUICK).way
    chosen.prepare(context, 0)
    loss, _ = chosen.loss(context, next(batches(tiny_tokens(), 2)))
    loss.backward()
    gradients = [p.grad for p in context.model.parameters() if p.grad is not None]
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4) and gradients
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients)


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 4.0)])
def test_the_loss_mixes_both(share, temperature, original):
    plan = light(original)
    context = Context(compressed(original, plan), plan, 1, 0, Original.of(original))
    chosen = make_recovery({**QUICK, "share": share, "temperature": temperature}).way
    chosen.prepare(context, 0)
    batch, expected = next(batches(tiny_tokens(), 2)), 0.0
    found, _ = chosen.loss(context, batch)
    with torch.no_grad():
        ours, theirs = (model(batch.ids_BS).logits.double() for model in (context.model, original))
    for b, s in batch.loss_mask_BS[:, 1:].nonzero().tolist():
        p, q = (z[b, s].div(temperature).softmax(-1).tolist() for z in (theirs, ours))
        nats = sum(x * float(torch.tensor(x / y).log()) for x, y in zip(p, q, strict=True))
        label = float(ours[b, s].softmax(-1)[batch.ids_BS[b, s + 1]].log())
        expected += share * temperature**2 * nats - (1 - share) * label
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": float("nan")}, {"temperature": 0.0}])
def test_senseless_options_are_refused(wrong, original):
    plan = light(original)
    with pytest.raises(OptionError, match=f"--{next(iter(wrong))} is"):
        recovered(compressed(original, plan), plan, original, steps=1, **wrong)


def test_an_original_of_another_vocabulary_is_refused(original):
    plan, other = light(original), tiny_model("olmoe", vocab_size=200)
    with pytest.raises(OptionError, match="a vocabulary of"):
        recovered(compressed(original, plan), plan, other, steps=1)


# --- the original's logits, kept on the disk


def kept(folder, original, top, *, temperature=1.0, load=None, mark="it") -> KeptLogits:
    return keep_logits(
        folder, batches(tiny_tokens(), 2), top, temperature, mark, 128, (lambda: original) if load is None else load
    )


def losses(original, plan, logits, temperature, share=1.0):
    """The loss and the gradients of a batch, in the original's presence and from what was kept of it."""
    batch, found = next(batches(tiny_tokens(), 2)), []
    for known in (Original.of(original), Original({}, logits=logits)):
        context = Context(compressed(original, plan), plan, 1, 0, known)
        chosen = make_recovery({**QUICK, "share": share, "temperature": temperature}).way
        chosen.prepare(context, 0)
        loss, _ = chosen.loss(context, batch)
        trained = [p for p in context.model.parameters() if p.requires_grad]
        found.append((loss, torch.autograd.grad(loss, trained, allow_unused=True)))
    return found


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_the_whole_vocabulary_kept_is_the_whole_original(share, temperature, original, tmp_path):
    plan, size = light(original), original.config.vocab_size
    logits = kept(tmp_path, original, size, temperature=temperature)
    (whole, theirs), (again, ours) = losses(original, plan, logits, temperature, share)
    torch.testing.assert_close(again, whole)
    for one, two in zip(ours, theirs, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("top", [1, 5, 127])
def test_all_but_the_kept_are_one_class(top, original, tmp_path):
    plan = light(original)
    logits, expected = kept(tmp_path, original, top, temperature=2.0), 0.0
    (whole, _), (found, _) = losses(original, plan, logits, 2.0)
    batch = next(batches(tiny_tokens(), 2))
    with torch.no_grad():
        ours, theirs = (model(batch.ids_BS).logits.double() for model in (compressed(original, plan), original))
    for b, s in batch.loss_mask_BS[:, 1:].nonzero().tolist():
        p, q = (z[b, s].div(2).softmax(-1) for z in (theirs, ours))
        best = p.argsort(descending=True)[:top].tolist()
        classes = [(float(p[i]), float(q[i])) for i in best] + [(1 - float(p[best].sum()), 1 - float(q[best].sum()))]
        expected += 4 * sum(x * float(torch.tensor(x / y).log()) for x, y in classes)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-3)
    assert float(found.detach()) <= float(whole.detach()) * (1 + 1e-5)


def test_logits_are_made_once_and_what_is_missing_is_made_anew(original, tmp_path, monkeypatch):
    monkeypatch.setattr("locum.training.kept_logits.TOGETHER", 2)

    def never():
        raise AssertionError("the original was asked for")

    first = kept(tmp_path, original, 4)
    files = sorted(tmp_path.glob("logits-*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 3 and kept(tmp_path, original, 4, load=never).places == first.places
    files[1].unlink()  # as after an interruption
    files[2].write_bytes(before[2][:-3] + b"xyz")  # damaged
    with pytest.raises(AssertionError, match="was asked for"):
        kept(tmp_path, original, 4, load=never)
    kept(tmp_path, original, 4)
    for now, then in ((load(file.read_bytes()), load(bytes_)) for file, bytes_ in zip(files, before, strict=True)):
        # as tensors, since notes lie in any order
        assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
    for other in ({"temperature": 2.0}, {"mark": "another"}, {"top": 5}):
        with pytest.raises(AssertionError, match="was asked for"):
            kept(tmp_path, original, **{"top": 4, **other}, load=never)


def test_what_is_kept_of_a_block_is_that_of_its_positions_with_loss(original, tmp_path):
    logits = kept(tmp_path, original, 6)
    for batch in batches(tiny_tokens(), 3, seed=4):
        with torch.no_grad():
            rows_MV = original(batch.ids_BS).logits[:, :-1][batch.loss_mask_BS[:, 1:]]
        index_MK, log_MK, rest_M = logits.of(batch)
        wanted = largest(rows_MV, 6, 1.0)
        assert torch.equal(index_MK, wanted[0])
        torch.testing.assert_close((log_MK, rest_M), wanted[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_MK.exp().sum(1) + rest_M.exp(), torch.ones(len(rest_M)))


@pytest.mark.parametrize("how", ["kd", "router-kd"])
def test_training_on_kept_logits_ends_where_the_original_would_lead(how, original):
    plan = light(original)
    small = compressed(original, plan)
    given = {"how": how, "steps": 6, "learning_rate": 1e-3}
    one = recovered(small, plan, original, **given)
    two = recovered(small, plan, original, top_logits=original.config.vocab_size, **given)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)
    assert divergence(one, original) != divergence(small, original)


def test_more_logits_than_there_are_tokens_are_refused(original):
    plan, size = light(original), original.config.vocab_size
    with pytest.raises(OptionError, match=f"--top-logits is {size + 1}; allowed: at most {size}"):
        recovered(compressed(original, plan), plan, original, steps=1, top_logits=size + 1)


@pytest.mark.journeys
def test_the_original_is_not_in_memory_while_another_trains(small, words, tmp_path, monkeypatch):
    """It goes before the model that learns is loaded; an interrupted run does not load it again, and nothing is left in the end."""
    asked = {"data": str(words), "length": 32, "validation_tokens": 256}
    loaded = []

    def load(path, **given):
        gc.collect()
        assert not any(live() is not None for live in loaded)
        live = load_model(path, **given)
        loaded.append(weakref.ref(live))
        return live

    monkeypatch.setattr(stage, "load_model", load)
    train, runs = stage.recover_model, {"top_logits": 16, "batch_size": 2, "steps": 3, "how": "kd"}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "recover_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locum.recover(small, out=tmp_path / "out", **asked, **runs)
    assert len(loaded) == 2 and any((tmp_path / ".out.logits").iterdir())
    monkeypatch.setattr(stage, "recover_model", train)
    said = locum.recover(small, out=tmp_path / "out", **asked, **runs)
    assert len(loaded) == 3 and said["steps"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
