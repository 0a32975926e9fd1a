"""Training vectors and routers, alone or with the rest, and adapters over an untouched base."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import locum
from families.tiny_families import tiny
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.notes import plan_of
from locum.checkpoints.patch import load_adapter, vectors_and_routers
from locum.checkpoints.read import fingerprint_checkpoint
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.weight_files import ADAPTER
from locum.errors import CheckpointError, OptionError, UnsupportedModel
from locum.experts.policies.main_with_vectors import VECTORS, MainWithVectors
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from locum.training.options import make_recovery
from locum.training.recovery import count_trainable, recover_model
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint
from making.policies import TOP_4, drawn, logits, near, policy_plan
from making.tiny_models import tiny_ids, tiny_model
from making.training import QUICK, compressed, light, tiny_tokens
from test_recover import opened

MAIN_2 = MainWithVectors(2)


def recovered(model, plan, how, **options):
    return recover_model(model, plan, tiny_tokens(), None, make_recovery({"how": how, **QUICK, **options}))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, x in model.state_dict().items() if name not in before or not torch.equal(x, before[name])}


def routed(plan, policy=MAIN_2):
    return dataclasses.replace(plan, layers=tuple(dataclasses.replace(x, routing=policy) for x in plan.layers))


# --- recovery ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("vectors", VECTORS)
def test_vectors_and_routers_alone_leave_every_weight_as_it_was(family, vectors):
    original = tiny_model(family, **TOP_4)
    plan = policy_plan(original, lambda _: MainWithVectors(2, vectors))
    model = apply_plan(original, plan)
    before, layouts = state(model), [x.experts.layout for x in find_layers(model)]
    model, summary = recovered(model, plan, "vectors")
    expected = set(vectors_and_routers(model))
    assert changed(before, model) == expected
    assert sum(name.endswith("offsets_NV") for name in expected) == (0 if vectors == "none" else 2)
    assert summary["trainable_parameters"] == sum(p.numel() for p in vectors_and_routers(model).values())
    assert [x.experts.layout for x in find_layers(model)] == layouts


@pytest.mark.parametrize("how", ["lora", "full"])
def test_vectors_are_trained_with_the_rest(how):
    original = tiny_model("olmoe", **TOP_4)
    plan = policy_plan(original)
    model = apply_plan(original, plan)
    before, layouts = state(model), [x.experts.layout for x in find_layers(model)]
    model, _ = recovered(model, plan, how)
    assert {x.experts.layout for x in find_layers(model)} == set(layouts)
    names = {name.split(".")[-1] for name in changed(before, model)}
    assert {"offsets_NV", "gate_up_NGD", "down_NDF"} <= names
    assert ("embed_tokens.weight" in " ".join(changed(before, model))) == (how == "full")
    near(logits(copy.deepcopy(model)), logits(model), 0)


def test_more_is_learnt_with_vectors_than_with_routers_alone():
    """Teaching half of the experts to write what all of them wrote."""
    original = tiny_model("olmoe", **TOP_4)
    ids, losses = tiny_ids(6, 16), {}
    tokens = tiny_tokens()
    for vectors in ("none", "static", "projections"):
        plan = policy_plan(original, lambda _, vectors=vectors: MainWithVectors(1, vectors))
        model = apply_plan(copy.deepcopy(original), plan)
        options = make_recovery({**QUICK, "how": "vectors", "steps": 30, "batch_size": 6, "learning_rate": 0.02})
        _, summary = recover_model(model, plan, tokens, tokens, options)
        losses[vectors] = summary["validation_loss"]
        assert losses[vectors] < summary["validation_loss_before"]
    assert losses["projections"] < losses["none"] and ids.shape == (6, 16)


def test_annealing_begins_at_the_original_under_the_same_policy():
    original = tiny_model("olmoe", **TOP_4)
    plan = routed(light(original, start="svd"))
    model = compressed(original, plan)
    policy_only = apply_plan(copy.deepcopy(original), policy_plan(original, lambda _: MAIN_2))
    assert float((logits(model) - logits(policy_only)).abs().max()) > 1e-2
    opened(model, plan, original)
    near(logits(model), logits(policy_only))
    model, _ = recovered(compressed(original, plan), plan, "annealed", end_fraction=0.0)
    assert {x.experts.layout.routing for x in find_layers(model)} == {MAIN_2}
    assert all(bool(x.experts.offsets_NV.any()) for x in find_layers(model))


def test_an_interrupted_run_ends_as_one_in_a_piece(tmp_path):
    original = tiny_model("olmoe", **TOP_4)
    plan = policy_plan(original)
    whole, _ = recovered(apply_plan(copy.deepcopy(original), plan), plan, "vectors", balance=0.1, checkpoint_every=2)
    model = apply_plan(copy.deepcopy(original), plan)
    options = make_recovery({**QUICK, "how": "vectors", "balance": 0.1, "checkpoint_every": 2})

    def stop(done, total, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_model(copy.deepcopy(model), plan, tiny_tokens(), None, options, workdir=tmp_path, progress=stop)
    model, _ = recover_model(model, plan, tiny_tokens(), None, options, workdir=tmp_path)
    assert changed(state(whole), model) == set()


def test_bfloat16_training_keeps_float32_vectors_until_the_end():
    original = tiny_model("olmoe", **TOP_4).bfloat16()
    plan = policy_plan(original)
    model, _ = recovered(apply_plan(original, plan), plan, "vectors", precision="bf16", learning_rate=1e-4)
    offsets = [x.experts.offsets_NV for x in find_layers(model)]
    assert {t.dtype for t in offsets} == {torch.bfloat16}
    assert all(
        0 < float(t.detach().abs().max()) < 2**-9 for t in offsets
    )  # as vectors in bfloat16, all of it would be gone


def test_vectors_need_a_policy(olmoe):
    with pytest.raises(OptionError, match="compressed-experts"):
        recovered(olmoe, make_plan(shape_of(olmoe), []), "vectors")


def test_what_would_be_trained_is_counted_without_weights():
    original = tiny_model("olmoe", **TOP_4)
    model = apply_plan(original, policy_plan(original))
    assert count_trainable(model, policy_plan(original), make_recovery({"how": "vectors"})) == 2 * (8 * 80 + 8 * 32)


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def top_4(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("top-4") / "original", **TOP_4)


@pytest.fixture(scope="module")
def both(top_4, words, tmp_path_factory):
    """One training twice: merged into a checkpoint, and as an adapter over the original."""
    root = tmp_path_factory.mktemp("vectors")
    small = locum.compress(top_4, method="compressed-experts", out=root / "small")
    options = {"how": "vectors", "data": [str(words)], "steps": 3, "length": 32, "learning_rate": 0.01}
    locum.recover(small, out=root / "merged", **options)
    locum.recover(small, out=root / "adapter", adapter_only=True, **options)
    return root


def realigned(model):
    return copy.deepcopy(model)


def test_an_adapter_over_its_base_is_the_merged_checkpoint_to_the_bit(top_4, both):
    expected = logits(realigned(load_model(both / "merged")))
    by_folder = load_model(both / "adapter")
    assert torch.equal(logits(realigned(by_folder)), expected)
    for base in (top_4, both / "small"):  # live, stock or with the policy in it already
        assert torch.equal(logits(realigned(load_adapter(load_model(base), both / "adapter"))), expected)
    merged = load_model(both / "merged")
    assert {k: v.tolist() for k, v in by_folder.state_dict().items()} == {
        k: v.tolist() for k, v in merged.state_dict().items()
    }
    assert read_shape(both / "adapter") == read_shape(both / "merged")
    assert not torch.equal(logits(realigned(load_model(both / "small"))), expected)


def test_an_adapter_file_holds_vectors_and_routers_and_nothing_else(both):
    tensors = load_file(both / "adapter" / ADAPTER)
    assert sorted(tensors) == sorted(vectors_and_routers(load_model(both / "merged")))
    assert sum(t.numel() for t in tensors.values()) == 2 * (8 * 80 + 8 * 32)
    assert list((both / "adapter").glob("*.safetensors")) == [both / "adapter" / ADAPTER]
    notes = json.loads((both / "adapter" / "locum.json").read_text())["adapter"]
    assert notes["base"] == "original"
    card = (both / "adapter" / "README.md").read_text()
    assert 'load_model("adapter")' in card and "routers and the vectors of experts alone" in card
    assert "import locum  #" in (both / "merged" / "README.md").read_text()


def test_every_stage_takes_an_adapter_for_the_checkpoint_it_makes(both, words, tmp_path):
    rows = {}
    for name in ("merged", "adapter"):
        rows[name] = locum.evaluate(both / name, data=[str(words)], length=64, tokens=512, name="m")
    same = [(row.metric, row.model, row.value) for row in rows["merged"]]
    assert same == [(row.metric, row.model, row.value) for row in rows["adapter"]]
    sizes = ("parameters", "bytes", "active_parameters")
    assert [[rows[n][0].provenance[key] for key in sizes] for n in ("merged",)] == [
        [rows["adapter"][0].provenance[key] for key in sizes]
    ]
    said = command("inspect", both / "adapter", "--json")
    assert json.loads(said.stdout)["parameters"] == read_shape(both / "merged").parameters
    options = {"data": [str(words)], "steps": 1, "length": 32}
    again = locum.recover(both / "adapter", how="vectors", adapter_only=True, out=tmp_path / "again", **options)
    notes = json.loads((tmp_path / "again" / "locum.json").read_text())["adapter"]
    assert notes["base"] == "original" and again["steps"] == 1
    locum.recover(both / "adapter", how="full", out=tmp_path / "whole", **options)
    assert "adapter" not in json.loads((tmp_path / "whole" / "locum.json").read_text())
    assert load_model(tmp_path / "whole") is not None and plan_of(tmp_path / "whole") == plan_of(both / "merged")


@pytest.mark.parametrize("change", ["longer", "gone", "more", "whole"])
def test_inspect_refuses_an_adapter_that_does_not_load(change, both, tmp_path):
    folder = Path(shutil.copytree(both / "adapter", tmp_path / "adapter"))
    tensors = load_file(folder / ADAPTER)
    name = min(tensors)
    changed = {"longer": tensors[name][None], "whole": tensors[name].view(torch.int32)}
    tensors |= {name: changed[change]} if change in changed else {"model.x": torch.ones(1)}
    if change == "gone":
        tensors = {n: t for n, t in tensors.items() if n not in (name, "model.x")}
    save_file(tensors, folder / ADAPTER, {"format": "pt"})
    said = command("inspect", folder)
    with pytest.raises(CheckpointError, match=r"does not hold what its config.json describes") as caught:
        load_model(folder)
    assert (said.exit_code, said.stderr) == (2, f"locum inspect: error: {caught.value}\n")


def test_an_adapter_over_an_adapter_is_refused(both, tmp_path):
    """Itself too: its fingerprint does not cover what its notes say of the base."""
    folder = Path(shutil.copytree(both / "adapter", tmp_path / "adapter"))
    notes = json.loads((folder / "locum.json").read_text())
    for base in (folder, both / "adapter"):
        notes["adapter"] |= {"base": str(base), "base_fingerprint": fingerprint_checkpoint(base)}
        (folder / "locum.json").write_text(json.dumps(notes))
        for call in (load_model, read_shape):
            with pytest.raises(CheckpointError, match=f"{re.escape(str(base))}, which is an adapter itself"):
                call(folder)


def test_over_weights_that_were_trained_the_base_is_the_trained_checkpoint(both, words, tmp_path):
    options = {"data": [str(words)], "steps": 1, "length": 32}
    locum.recover(both / "small", how="full", out=tmp_path / "full", **options)
    locum.recover(tmp_path / "full", how="vectors", adapter_only=True, out=tmp_path / "over", **options)
    assert json.loads((tmp_path / "over" / "locum.json").read_text())["adapter"]["base"] == "full"
    load_model(tmp_path / "over")
    with pytest.raises(CheckpointError, match="other weights"):
        load_adapter(load_model(both / "small"), tmp_path / "over")


def test_a_base_in_another_precision_is_still_the_base(top_4, both):
    model = load_adapter(load_model(top_4, dtype=torch.bfloat16), both / "adapter")
    assert {p.dtype for p in vectors_and_routers(model).values()} == {torch.bfloat16}


def test_another_base_is_refused_and_left_alone(both, checkpoint):
    for other, words in (
        (drawn(tiny_model("olmoe", seed=3, vocab_size=320, max_position_embeddings=512, **TOP_4)), "other weights"),
        (tiny_model("mixtral", **TOP_4), "another model"),
    ):
        before = state(other)
        with pytest.raises((CheckpointError, locum.LocumError), match=words):
            load_adapter(other, both / "adapter")
        assert changed(before, other) == set()


def copied(both, tmp_path):
    return shutil.copytree(both / "adapter", tmp_path / "adapter")


def test_a_base_that_is_gone_or_has_changed_is_named(both, top_4, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # or it is found where it was seen last
    folder = copied(both, tmp_path)
    notes = json.loads((folder / "locum.json").read_text())
    base = shutil.copytree(top_4, tmp_path / "base")
    notes["adapter"]["base"] = str(base)
    (folder / "locum.json").write_text(json.dumps(notes))
    load_model(folder)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has changed since"):
        load_model(folder)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"which is not there.*load_adapter"):
        load_model(folder)
    made = command("eval", folder, "--data", str(top_4))
    assert made.exit_code == 2


@pytest.mark.parametrize("change", ["missing", "reshaped", "more", "truncated", "no notes"])
def test_a_damaged_adapter_is_refused(both, top_4, tmp_path, change):
    folder = copied(both, tmp_path)
    tensors = load_file(folder / ADAPTER)
    name = min(tensors)
    if change == "truncated":
        (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-5])
    elif change == "no notes":
        (folder / "locum.json").unlink()
    else:
        other = {"missing": {}, "reshaped": {name: tensors[name][:-1].clone()}, "more": {"x": torch.ones(1)}}[change]
        kept = tensors if change == "more" else {k: v for k, v in tensors.items() if k != name}
        save_file(kept | other, folder / ADAPTER, {"format": "pt"})
    model = load_model(top_4)
    before = state(model)
    with pytest.raises(CheckpointError):
        load_adapter(model, folder)
    assert changed(before, model) == set()
    with pytest.raises(CheckpointError):
        load_model(folder)


def test_only_recipes_that_leave_the_weights_alone_make_adapters(both, words, tmp_path):
    with pytest.raises(OptionError, match="--how vectors"):
        locum.recover(both / "small", how="full", adapter_only=True, data=[str(words)], out=tmp_path / "x")


@pytest.mark.parametrize("even", [True, False])
def test_pruning_then_compressed_experts_then_an_adapter(top_4, words, tmp_path, even):
    """Pruned to unequal numbers, the base is saved in containers, which open for the policy."""
    shape = read_shape(top_4)
    gone = [(1, 6), (1, 6)] if even else [(1,), (1, 5, 6)]
    slots = [tuple(DROPPED if e in drop else KEPT for e in range(8)) for drop in gone]
    pruned = make_plan(shape, [LayerPlan(x.name, s) for x, s in zip(shape.layers, slots, strict=True)])
    locum.apply(top_4, plan=pruned, out=tmp_path / "pruned")
    small = locum.compress(tmp_path / "pruned", method="compressed-experts", out=tmp_path / "small")
    options = {"how": "vectors", "data": [str(words)], "steps": 2, "length": 32, "learning_rate": 0.01}
    locum.recover(small, out=tmp_path / "merged", **options)
    locum.recover(small, out=tmp_path / "adapter", adapter_only=True, **options)
    notes = json.loads((tmp_path / "adapter" / "locum.json").read_text())["adapter"]
    assert notes["base"] == "pruned"
    expected = logits(realigned(load_model(tmp_path / "merged")))
    assert torch.equal(logits(realigned(load_model(tmp_path / "adapter"))), expected)


def test_over_stand_ins_the_compressed_checkpoint_is_the_base(top_4, words, tmp_path):
    """Its plan changes more than routing, so the stock model cannot be its base."""
    plan = routed(light(load_model(top_4), start="svd"))
    locum.apply(top_4, plan=plan, out=tmp_path / "small")
    options = {"how": "vectors", "data": [str(words)], "steps": 1, "length": 32}
    locum.recover(tmp_path / "small", adapter_only=True, out=tmp_path / "adapter", **options)
    locum.recover(tmp_path / "small", out=tmp_path / "merged", **options)
    assert json.loads((tmp_path / "adapter" / "locum.json").read_text())["adapter"]["base"] == "small"
    expected = logits(realigned(load_model(tmp_path / "merged")))
    assert torch.equal(logits(realigned(load_model(tmp_path / "adapter"))), expected)
    with pytest.raises(CheckpointError, match="not what the adapter was made for"):
        load_adapter(load_model(top_4), tmp_path / "adapter")


def test_a_model_that_predicts_no_tokens_is_refused():
    """A token classifier is compressed like others, but next-token recovery has nothing to train it by."""
    with pytest.raises(UnsupportedModel, match="does not predict tokens"):
        recover_model(
            tiny("openai_privacy_filter"), None, tiny_tokens(), None, make_recovery({"how": "full", "steps": 1})
        )
