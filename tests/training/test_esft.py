"""ESFT: which experts it chooses, that no other weight changes or has a moment, and the patch over an untouched base."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.patch import load_adapter, vectors_and_routers
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.weight_files import ADAPTER
from locum.data.tokens import batches
from locum.errors import CheckpointError, OptionError
from locum.measure.use import Use, uses_of
from locum.models.families import find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from locum.stats.statistics_file import load_statistics
from locum.training.context import Context
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from locum.training.states import STATE_FILE
from locum.training.ways.esft import SCORES, relevant
from making.checkpoints import locum as command
from making.policies import logits
from making.tiny_models import tiny_model
from making.training import QUICK, Killed, compressed, light, tiny_tokens
from test_vectors import changed, state

TOKENS = tiny_tokens()


def recovered(model, plan=None, **options):
    kept = {name: options.pop(name) for name in ("workdir", "progress", "uses") if name in options}
    return recover_model(model, plan, TOKENS, None, make_recovery({**QUICK, "how": "esft", **options}), **kept)


def use(counts, gates, tokens=10, top_k=2):
    return Use(tokens, top_k, *(torch.tensor(x, dtype=torch.float64) for x in (counts, gates)))


# --- which experts --------------------------------------------------------------------------------------------------


def slow_choice(scores, threshold):
    """The paper's rule: add the best expert that is left while the sum is below p."""
    left, found, total = [e for e, score in enumerate(scores) if score > 0], [], 0.0
    while left and total < threshold:
        best = max(left, key=lambda e: (scores[e], -e))
        left.remove(best)
        found.append(best)
        total += scores[best]
    return tuple(sorted(found))


@pytest.mark.parametrize("score", SCORES)
def test_experts_are_added_until_their_scores_reach_p(score):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        counts_E = torch.randint(0, 9, (16,), generator=generator).double()
        gates_E = counts_E * torch.rand(16, generator=generator, dtype=torch.float64)
        tokens = max(int(counts_E.sum()) // 2, 1)
        scores_E = SCORES[score](Use(tokens, 2, counts_E, gates_E))
        for threshold in (0.05, 0.2, 0.5, 0.9):
            assert relevant(scores_E, threshold) == slow_choice(scores_E.tolist(), threshold)
        assert relevant(scores_E, 1.0) == tuple(counts_E.nonzero().flatten().tolist())


def test_no_more_experts_are_chosen_than_disk_and_memory_are_counted_for():
    generator = torch.Generator().manual_seed(1)
    for threshold in (0.1, 0.2, 0.55, 1.0):
        way = make_recovery({"how": "esft", "threshold": threshold}).way
        for _ in range(20):
            counts_E = torch.randint(0, 5, (12,), generator=generator).double() + 1
            chosen = relevant(SCORES["token"](Use(int(counts_E.sum()), 1, counts_E, counts_E)), threshold)
            assert len(chosen) <= len(way.choose(None, {"a": 12})["a"])


def test_scores_by_hand():
    layer = use([8, 0, 6, 6], [4.0, 0.0, 1.0, 1.0])
    assert SCORES["token"](layer).tolist() == [0.4, 0, 0.3, 0.3]
    assert SCORES["gate"](layer).tolist() == pytest.approx([0.4, 0, 0.1, 0.1])
    assert SCORES["gate"](use([8, 0, 6, 6], [40.0, 0.0, 10.0, 10.0])).sum() == pytest.approx(1)  # scaled gates
    assert relevant(SCORES["token"](layer), 0.4) == (0,) and relevant(SCORES["token"](layer), 0.41) == (0, 2)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_use_is_what_a_loop_over_tokens_counts(family):
    model, seen = tiny_model(family), {}
    for layer in find_layers(model):
        see = lambda _m, given, name=layer.shape.name: seen.setdefault(name, []).append(given[1:])  # noqa: E731
        layer.experts.register_forward_pre_hook(see)
    batch = next(batches(TOKENS, 3))
    batch.attention_BS[1, 9:] = 0
    found = uses_of(model, [(batch.ids_BS, batch.attention_BS)] * 2)
    keep = batch.attention_BS.flatten().tolist()
    for name, passes in seen.items():
        counts, gates = [0] * 8, [0.0] * 8
        for index_TK, gate_TK in passes:
            for keeps, experts, weights in zip(keep, index_TK.tolist(), gate_TK.tolist(), strict=True):
                for e, weight in zip(experts, weights, strict=True):
                    counts[e] += keeps
                    gates[e] += keeps * weight
        assert found[name].tokens == 2 * sum(keep) and found[name].count_E.tolist() == counts
        assert found[name].gate_E.tolist() == pytest.approx(gates) and 0 < found[name].router_entropy < 1
        assert found[name].dead == counts.count(0)


def test_spread_is_the_share_of_experts_that_do_the_work():
    assert use([5, 5, 5, 5], [0.0] * 4).spread == pytest.approx(1)
    assert use([20, 0, 0, 0], [0.0] * 4).spread == pytest.approx(0.25)
    assert use([10, 0, 10, 0], [0.0] * 4).spread == pytest.approx(0.5)
    assert use([0, 0, 0, 0], [0.0] * 4).spread == 0


# --- what is trained ------------------------------------------------------------------------------------------------


def expert_rows(model):
    """Every expert's weights, by layer and expert."""
    return {
        (layer.shape.name, e): torch.cat(
            [x.flatten() for x in vars(read_expert(layer.experts, e)).values() if x is not None]
        )
        for layer in find_layers(model)
        for e in range(layer.shape.num_experts)
    }


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_chosen_experts_change_and_nothing_else_does(family, threshold):
    """With weight decay too, which would move whatever the optimizer has."""
    model = tiny_model(family)
    before, rows = state(model), expert_rows(model)
    uses = uses_of(copy.deepcopy(model), [(TOKENS.ids_BS, TOKENS.attention_BS)])
    model, summary = recovered(model, threshold=threshold, weight_decay=0.5, uses=uses)
    after = expert_rows(model)
    moved = {key for key in rows if not torch.equal(rows[key], after[key])}
    chosen = {(name, e) for name, experts in summary["trained_experts"].items() for e in experts}
    assert moved == chosen and chosen
    assert all(".experts." in name for name in changed(before, model))
    for name, layer_use in uses.items():
        used = set(layer_use.count_E.nonzero().flatten().tolist())
        assert {e for layer, e in chosen if layer == name} <= used
        assert (threshold < 1) or {e for layer, e in chosen if layer == name} == used
    assert summary["trainable_parameters"] == sum(len(rows[key]) for key in chosen)


def test_gradients_are_those_of_the_whole_model_and_of_the_others_there_is_none():
    whole, model = tiny_model("olmoe"), tiny_model("olmoe")
    names = [layer.shape.name for layer in find_layers(model)]
    uses = {name: use([0, 9, 0, 0, 1, 0, 9, 0], [0.0] * 8, top_k=1, tokens=19) for name in names}
    way = make_recovery({"how": "esft", "threshold": 0.9}).way
    context = Context(model, None, 1, 0, uses=uses)
    way.prepare(context, 0)
    batch = next(batches(TOKENS, 2))
    way.loss(context, batch)[0].backward()
    make_recovery({"how": "full"}).way.loss(Context(whole, None, 1, 0), batch)[0].backward()
    for opened, layer in zip(context.layers, find_layers(whole), strict=True):
        assert opened.container.apart == {"dense": (1, 6)}
        apart = opened.container.stack_apart("dense")
        gradient_EDF = layer.experts.down_proj.grad
        assert torch.allclose(apart.down_NDF.grad, gradient_EDF[[1, 6]], atol=1e-6) and bool(apart.down_NDF.grad.any())
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{name}.apart_dense.{leaf}" for name in names for leaf in ("gate_up_NGD", "down_NDF")}


def test_states_hold_moments_of_the_chosen_alone(tmp_path):
    def kill(step, steps, loss):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        recovered(tiny_model("olmoe"), threshold=0.3, workdir=tmp_path, progress=kill, checkpoint_every=2)
    tensors = load_file(tmp_path / STATE_FILE)
    assert {name.split(".")[-2] for name in tensors} == {"apart_dense"}
    rows = {name: len(t) for name, t in tensors.items() if name.startswith("exp_avg|")}
    assert rows and all(0 < count < 8 for count in rows.values())


def test_stand_ins_train_what_they_have_for_themselves():
    """Experts 4 and 5 share a base, 6 and 7 another: with 4, 6 and 7 chosen, the second base is trained and the first is not."""
    original = tiny_model("olmoe")
    plan = light(original, constant=True)
    model = compressed(original, plan)
    before = state(model)
    uses = {x.shape.name: use([5, 0, 0, 0, 5, 0, 5, 5], [0.0] * 8) for x in find_layers(model)}
    expected = logits(model, TOKENS.ids_BS)
    context = Context(copy.deepcopy(model), plan, 1, 0, uses=uses)
    way = make_recovery({"how": "esft", "threshold": 1.0}).way
    way.prepare(context, 0)
    assert context.layers[0].container.apart == {"dense": (0, 5), "adapters.0": (0, 2, 3), "": (0, 2, 3)}
    assert float((logits(context.model, TOKENS.ids_BS) - expected).abs().max()) < 1e-5
    way.finish(context)
    assert changed(before, context.model) == set()
    model, _ = recovered(model, plan, threshold=1.0, uses=uses)
    for layer in find_layers(model):
        for leaf, rows in (("dense.down_NDF", [0, 5]), ("adapters.0.down_B_DR", [0, 2, 3]), ("constant_ND", [0, 2, 3])):
            now, then = model.get_parameter(f"{layer.shape.name}.{leaf}"), before[f"{layer.shape.name}.{leaf}"]
            assert [row for row in range(len(now)) if not torch.equal(now[row], then[row])] == rows, leaf


def test_text_that_selects_no_expert_is_refused(olmoe):
    uses = {x.shape.name: use([0] * 8, [0.0] * 8) for x in find_layers(olmoe)}
    with pytest.raises(OptionError, match="it selected none; give more text"):
        recovered(olmoe, uses=uses)


# --- the patch ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patched(checkpoint, words, tmp_path_factory):
    """One training twice: a whole checkpoint, and a patch over the base."""
    root = tmp_path_factory.mktemp("patched")
    options = {"how": "esft", "data": [str(words)], "steps": 2, "length": 32, "batch_size": 2, "threshold": 0.3}
    root.joinpath("summary").write_text(json.dumps(locum.recover(checkpoint, out=root / "whole", **options)))
    locum.recover(checkpoint, out=root / "patch", adapter_only=True, **options)
    return root


def test_a_patch_over_its_base_is_the_whole_checkpoint_to_the_bit(checkpoint, patched):
    whole = state(load_model(patched / "whole"))
    assert changed(whole, load_model(patched / "patch")) == set()
    assert changed(whole, load_adapter(load_model(checkpoint), patched / "patch")) == set()
    assert len(changed(whole, load_model(checkpoint))) == 4
    assert read_shape(patched / "patch") == read_shape(patched / "whole")
    said = command("inspect", patched / "patch", "--json")
    assert json.loads(said.stdout)["parameters"] == read_shape(checkpoint).parameters


def test_it_holds_routers_and_the_rows_of_chosen_experts(checkpoint, patched):
    chosen = json.loads((patched / "summary").read_text())["trained_experts"]
    tensors = load_file(patched / "patch" / ADAPTER)
    rows = {
        f"{n}.dense.{leaf}.{e}"
        for n, experts in chosen.items()
        for e in experts
        for leaf in ("gate_up_NGD", "down_NDF")
    }
    assert tensors.keys() == rows | set(vectors_and_routers(load_model(checkpoint)))
    notes = json.loads((patched / "patch" / "locum.json").read_text())
    assert notes["adapter"]["experts"] == chosen and notes["adapter"]["base"] == "original"
    assert notes["recovery"]["trained_experts"] == {name: len(experts) for name, experts in chosen.items()}
    card = (patched / "patch" / "README.md").read_text()
    assert f"It holds {sum(map(len, chosen.values()))} experts, routers and the vectors" in card


@pytest.mark.parametrize("change", ["another base", "a row less", "an expert that is not there"])
def test_what_does_not_fit_is_refused_before_anything_is_changed(change, checkpoint, patched, tmp_path):
    folder = tmp_path / "patch"
    folder.mkdir()
    for file in (patched / "patch").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = load_model(checkpoint)
    words = "does not hold what its config.json describes"
    if change == "another base":
        words = "other weights"
        find_layers(model)[1].experts.down_proj.data[:] += 1
    elif change == "a row less":
        tensors = load_file(folder / ADAPTER)
        save_file(
            {n: t for n, t in tensors.items() if n != max(n for n in tensors if ".dense." in n)}, folder / ADAPTER
        )
    else:
        notes = json.loads((folder / "locum.json").read_text())
        layer = next(iter(notes["adapter"]["experts"]))
        notes["adapter"]["experts"][layer] = [99]
        (folder / "locum.json").write_text(json.dumps(notes))
        words = "the model has no experts"
    before = state(model)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(model, folder)
    assert changed(before, model) == set()


def test_a_patch_that_is_trained_on_keeps_what_it_had(checkpoint, patched, words, tmp_path):
    options = {"data": [str(words)], "steps": 1, "length": 32, "batch_size": 2, "adapter_only": True}
    locum.recover(patched / "patch", how="router", out=tmp_path / "again", **options)
    again, first = load_model(tmp_path / "again"), load_model(patched / "patch")
    assert changed(state(first), again) == set(vectors_and_routers(again))


def test_routers_of_a_pruned_checkpoint_are_a_patch_too(checkpoint, words, tmp_path):
    shape = read_shape(checkpoint)
    plan = make_plan(shape, [LayerPlan(x.name, (KEPT,) * 6 + (DROPPED,) * 2) for x in shape.layers])
    locum.apply(checkpoint, plan=plan, out=tmp_path / "pruned")
    options = {"how": "router", "data": [str(words)], "steps": 1, "length": 32, "batch_size": 2}
    locum.recover(tmp_path / "pruned", out=tmp_path / "whole", **options)
    locum.recover(tmp_path / "pruned", out=tmp_path / "patch", adapter_only=True, **options)
    assert changed(state(load_model(tmp_path / "whole")), load_model(tmp_path / "patch")) == set()


def test_statistics_choose_as_the_text_that_they_are_of(checkpoint, statistics_file, words, tmp_path):
    options = {"data": [str(words)], "steps": 1, "length": 32, "batch_size": 2}
    found = locum.recover(checkpoint, how="esft", statistics=statistics_file, out=tmp_path / "out", **options)
    loaded = load_statistics(statistics_file)
    for name, experts in found["trained_experts"].items():
        counts = loaded.layer(name)["count"]
        assert tuple(experts) == slow_choice((counts / counts.sum()).tolist(), 0.2)
    with pytest.raises(OptionError, match="--how full does not choose; use --how esft"):
        locum.recover(checkpoint, how="full", statistics=statistics_file, out=tmp_path / "no", **options)


def test_a_plan_of_kept_experts_and_shape_stay(olmoe):
    plan = make_plan(shape_of(olmoe), [LayerPlan(x.name, (KEPT,) * 8) for x in shape_of(olmoe).layers])
    model = apply_plan(olmoe, plan)
    assert recovered(model, plan, threshold=0.5)[1]["trainable_parameters"] > 0
