"""Evaluation against slow, obvious loops, known answers, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from families.tiny_families import tiny
from locum.data.tokens import Tokens
from locum.errors import DataError, LocumError, OptionError, UnsupportedModel
from locum.measure.loss import evaluate, resample
from locum.measure.rows import Row, read_rows, write_rows
from making.tiny_models import tiny_model

module = importlib.import_module("locum.measure.loss")  # locum.evaluate itself is the function

VOCABULARY = 96


def make_model(seed, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1}
    config = OlmoeConfig(**sizes, num_experts=8, num_experts_per_tok=2, initializer_range=0.3)
    return OlmoeForCausalLM(config)


def make_tokens(blocks=6, length=12, seed=0, domains=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, length)
    attention = torch.ones(shape, dtype=torch.int64)
    attention[-1, length // 2 :] = 0
    loss = (torch.rand(shape, generator=generator) < 0.7) & attention.bool()
    loss[:, 0] = False
    loss[:, 1] = True
    return Tokens(
        ids_BS=torch.randint(VOCABULARY, shape, generator=generator),
        loss_mask_BS=loss,
        attention_BS=attention,
        bytes_BS=torch.randint(0, 5, shape, generator=generator),
        domain_B=torch.arange(blocks) * len(domains) // blocks,
        domains=domains,
        weights=(1.0,) * len(domains),
        fingerprint="f" * 16,
        sources=(),
        split="test",
        length=length,
    )


@pytest.fixture(scope="module")
def models():
    return make_model(0), make_model(1)


def values(rows, name="model"):
    return {(row.domain, row.metric): row.value for row in rows if row.model == name}


def naive(model, original, tokens, chosen):
    """One token at a time, in float64, from the plain forward of one block."""
    nats = original_nats = kl = agreed = count = bytes_ = 0.0
    for b in chosen:
        real = int(tokens.attention_BS[b].sum())
        ids = tokens.ids_BS[b : b + 1, :real]
        with torch.no_grad():
            p_SV, o_SV = (m.eval()(input_ids=ids).logits[0].double().log_softmax(-1) for m in (model, original))
        for s in range(1, real):
            if tokens.loss_mask_BS[b, s]:
                p, o, target = p_SV[s - 1], o_SV[s - 1], ids[0, s]
                nats -= p[target].item()
                original_nats -= o[target].item()
                kl += sum(math.exp(o[v]) * (o[v] - p[v]).item() for v in range(VOCABULARY))
                agreed += float(p.argmax() == o.argmax())
                count += 1
                bytes_ += tokens.bytes_BS[b, s].item()
    return {
        "loss": nats / count,
        "perplexity": math.exp(nats / count),
        "bits_per_byte": nats / math.log(2) / bytes_,
        "kl": kl / count,
        "top1_agreement": agreed / count,
        "loss_delta": (nats - original_nats) / count,
    }


@pytest.mark.parametrize("logit_bytes", [1, 4 * 4 * VOCABULARY * 5, 2**30])
def test_every_metric_equals_a_loop_over_tokens(models, monkeypatch, logit_bytes):
    monkeypatch.setattr(module, "LOGIT_BYTES", logit_bytes)  # stretches of one, five and all positions
    tokens = make_tokens()
    found = values(evaluate(*models[:1], tokens, against=models[1], batch_size=4, resamples=10))
    for domain, chosen in (("a", range(3)), ("b", range(3, 6)), ("all", range(6))):
        for metric, expected in naive(*models, tokens, chosen).items():
            assert found[domain, metric] == pytest.approx(expected, rel=1e-4), (domain, metric)


def test_the_original_is_measured_in_the_same_run(models):
    tokens = make_tokens()
    both = evaluate(models[0], tokens, against=models[1], against_name="it", plan="p", resamples=10)
    alone = evaluate(models[1], tokens, resamples=10)
    assert values(both, "it") == pytest.approx(values(alone))
    assert {row.plan for row in both if row.model == "it"} == {None}
    assert {row.plan for row in both if row.model == "model"} == {"p"}
    assert {row.metric for row in alone} == {"loss", "perplexity", "bits_per_byte"}
    assert {row.n for row in alone if row.domain == "all"} == {int(tokens.loss_mask_BS.sum())}


@pytest.mark.parametrize("room", [0, 2**30])
def test_the_original_runs_once_for_many_models_where_its_outputs_may_stay(models, monkeypatch, room):
    monkeypatch.setattr(module, "KEPT_BYTES", room)
    calls, kept, tokens = [], [], make_tokens()
    hook = models[1].model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        for model in (models[0], make_model(2)):
            alone = module.block_sums(model, tokens, against=models[1], batch_size=4)
            calls.clear()
            shared = module.block_sums(model, tokens, against=models[1], batch_size=4, of_original=kept)
            np.testing.assert_array_equal(shared, alone)
            assert len(calls) == (2 if model is models[0] or not room else 0)
    finally:
        hook.remove()
    assert len(kept) == (2 if room else 0)


def test_a_model_equals_itself(models):
    for row in evaluate(models[0], make_tokens(), against=models[0], resamples=50):
        if row.metric in ("kl", "loss_delta", "top1_agreement"):
            exact = 1.0 if row.metric == "top1_agreement" else 0.0
            assert (row.value, row.low, row.high) == (exact, exact, exact)


def test_bits_per_byte_by_hand(models):
    """A model with equal logits spends log2(V) bits on every token."""
    model = make_model(2)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = make_tokens(blocks=2, domains=("a",))
    bytes_ = torch.zeros_like(tokens.bytes_BS)
    bytes_[:, :3] = torch.tensor([100, 3, 2])  # the first column is never predicted
    loss = torch.zeros_like(tokens.loss_mask_BS)
    loss[:, 1:4] = True  # three tokens a block: 3, 2 and (a special token) 0 bytes
    found = values(evaluate(model, dataclasses.replace(tokens, bytes_BS=bytes_, loss_mask_BS=loss), resamples=10))
    assert found["a", "bits_per_byte"] == pytest.approx(3 * math.log2(VOCABULARY) / 5)
    assert found["a", "perplexity"] == pytest.approx(VOCABULARY)


def test_padding_and_masked_tokens_do_not_count(models):
    tokens = make_tokens()
    other = tokens.ids_BS.clone()
    other[tokens.attention_BS == 0] = 7
    changed = dataclasses.replace(tokens, ids_BS=other, bytes_BS=tokens.bytes_BS + 9 * ~tokens.loss_mask_BS)
    plain, padded = (values(evaluate(models[0], t, against=models[1], resamples=10)) for t in (tokens, changed))
    assert plain == pytest.approx(padded, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3_moe", {}), ("deepseek_v3", {}), ("granitemoe", {"logits_scaling": 5.0}), ("gpt_oss", {})],
)
def test_families_with_heads_of_their_own(family, changes):
    """granitemoe scales its logits: the head must run through the model's own forward."""
    model, tokens = tiny_model(family, **changes), make_tokens(blocks=2, domains=("a",))
    with torch.no_grad():
        logits = model(input_ids=tokens.ids_BS, attention_mask=tokens.attention_BS).logits
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens.ids_BS[:, 1:].flatten(), reduction="none"
    )
    expected = nats[tokens.loss_mask_BS[:, 1:].flatten()].mean().item()
    assert values(evaluate(model, tokens, resamples=10))["all", "loss"] == pytest.approx(expected, rel=1e-5)


def test_seeds_and_batch_sizes(models):
    tokens = make_tokens(blocks=10)
    runs = [
        [(row.metric, row.value, row.low, row.high) for row in evaluate(models[0], tokens, **options)]
        for options in ({"seed": 1}, {"seed": 1}, {"seed": 2})
    ]
    assert runs[0] == runs[1]
    assert [run[1] for run in runs[0]] == [run[1] for run in runs[2]]
    assert runs[0] != runs[2]
    one, many = (values(evaluate(models[0], tokens, batch_size=size, resamples=10)) for size in (1, 10))
    assert one == pytest.approx(many, rel=1e-5)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Synthetic blocks of unequal length with a known loss: some 95 of 100 intervals hold it."""
    covered = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        counts = generator.integers(20, 60, size=60).astype(float)
        block_loss = 2.0 + generator.normal(0, 0.3, size=60)
        sums = np.zeros((60, len(module.SUMS)))
        sums[:, 0], sums[:, 1] = counts * block_loss, counts
        drawn = resample(sums, f"{trial}:a", 400)
        low, high = np.percentile(drawn[:, 0] / drawn[:, 1], module.INTERVAL)
        covered += low <= 2.0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_paired_intervals_are_narrower(models):
    """The difference of two models on the same blocks varies less than either of them where they are alike."""
    near = make_model(0)
    with torch.no_grad():
        near.lm_head.weight.add_(0.01 * torch.randn_like(near.lm_head.weight))
    rows = evaluate(near, make_tokens(blocks=20), against=models[0])
    width = {row.metric: row.high - row.low for row in rows if row.model == "model" and row.domain == "all"}
    assert 0 < width["loss_delta"] < width["loss"] / 5


def test_one_block_has_no_interval(models):
    rows = evaluate(models[0], make_tokens(blocks=1, domains=("a",)), resamples=10)
    assert {(row.low, row.high) for row in rows} == {(None, None)}


def test_modes_and_forward_are_restored(models):
    model = make_model(3).train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    evaluate(model, make_tokens(), against=models[0], resamples=10)
    assert [part.training for part in model.modules()] == before
    assert "forward" not in model.model.__dict__
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_does_not_fit_is_refused(models):
    with pytest.raises(DataError, match=r"token id .* embeds ids 0 to 7; tokenise it with the model's own tokenizer"):
        evaluate(make_model(0, 8), make_tokens())
    with pytest.raises(OptionError, match="96 and the original one of 128"):
        evaluate(models[0], make_tokens(), against=make_model(0, 128))
    with pytest.raises(OptionError, match="batch_size is 0"):
        evaluate(models[0], make_tokens(), batch_size=0)
    broken = make_model(0)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(LocumError, match="bad gives nats that are not finite in 6 of 6 blocks"):
        evaluate(broken, make_tokens(), model_name="bad")


def test_rows_on_disk(tmp_path, models):
    path = tmp_path / "new" / "results.jsonl"
    rows = evaluate(models[0], make_tokens(), resamples=10, provenance={"who": "me"})
    write_rows(path, rows[:2])
    write_rows(path, rows[2:])
    assert read_rows(path) == rows
    assert rows[0].provenance["who"] == "me"
    assert rows[0].provenance["evaluation"]["data"]["fingerprint"] == "f" * 16
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]
    assert rows[0].peak_bytes > 1e7 and rows[0].seconds > 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "not JSON"]),
        ("[]", ["line 2", "list"]),
        ('{"model": "m"}', ["line 2", "found model", "provenance"]),
        ({"value": "high"}, ["line 2", "'value'", "'high'", "float"]),
        ({"n": True}, ["line 2", "'n'"]),
    ],
)
def test_bad_rows(tmp_path, line, words):
    row = dataclasses.asdict(Row("m", None, "loss", "all", 1.0, None, None, 5, 0, 1.0, 1, {}))
    line = line if isinstance(line, str) else json.dumps(row | line)
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row) + "\n" + line + "\n")
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(DataError, match="cannot read results"):
        read_rows(tmp_path / "none.jsonl")


def test_a_model_that_predicts_no_tokens_is_refused():
    """The logits of a token classifier are of labels: cross entropy would take them for tokens."""
    with pytest.raises(UnsupportedModel, match="does not predict tokens"):
        evaluate(tiny("openai_privacy_filter"), make_tokens())
