"""Methods that change which experts run: thresholds that keep to the mean that is wanted, groups, and the way through files."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.errors import OptionError, PlanError, StatisticsError, UnsupportedModel
from locum.experts.policies.group_local import GroupLocal
from locum.experts.policies.in_turn import InTurn
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.experts.policies.skip import Skip
from locum.experts.policies.top_p import TopP
from locum.measure.calibration import calibrate
from locum.methods import METHODS
from locum.methods.groups import touched
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Plan, make_plan
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint
from making.handmade import layers_of, tokens_of, toy_shape, with_sums
from making.policies import TOP_4, logits, near, policy_plan
from making.tiny_models import tiny_ids, tiny_model

IDS = tiny_ids(4, 64, vocab=120)
FEWER = {
    "top-p": {},
    "top-p of all": {"of": "all"},
    "skip": {},
    "skip by gate": {"beside": "selected"},
}
READ = ("count", "gate_ratio", "gate_share", "prefix_share", "prefix_gate", "co_count", "gate_sample")


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe", **TOP_4)


@pytest.fixture(scope="module")
def observed(model):
    return calibrate(model, tokens_of(IDS), needs=READ)


def made_by(name, options, statistics, shape):
    method = METHODS[name.split(" ")[0]](**options)
    return make_plan(shape, layers_of(method, statistics, shape, 1.0))


def experts_run(model, ids):
    """The mean number of experts that run for a token, in every layer."""
    found, hooks = [], []
    for layer in find_layers(model):

        def see(module, given):
            found.append(float((module.routed(*given).index_TM >= 0).sum(dim=1).float().mean()))

        hooks.append(layer.experts.register_forward_pre_hook(see))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("wanted", [1.4, 2.5, 3.3])
@pytest.mark.parametrize("name", FEWER)
def test_as_many_experts_run_as_are_wanted(model, observed, name, wanted):
    """In the first layer, which has the router inputs of calibration, to a bin; in others as many as hidden states differ."""
    plan = made_by(name, FEWER[name] | {"mean_experts": wanted}, observed, shape_of(model))
    policies = [layer.routing for layer in plan.layers]
    found = experts_run(apply_plan(copy.deepcopy(model), plan), IDS)
    assert found[0] == pytest.approx(policies[0].mean, abs=0.02)
    assert sum(found) / len(found) == pytest.approx(wanted, abs=0.3)
    means = [policy.mean for policy in policies]
    assert sum(means) / len(means) == pytest.approx(wanted, abs=0.05)
    if name.startswith("skip"):  # each layer for itself
        assert means == pytest.approx([wanted] * len(means), abs=0.05)
    else:
        assert len({policy.p for policy in policies}) == 1


def test_the_default_of_skipping_is_the_median(model, observed):
    """NAEE's threshold, and for K experts the median over all of them but the heaviest."""
    method = METHODS["skip"]()
    for layer, (threshold, mean) in zip(
        shape_of(model).layers, method.score_experts(observed, shape_of(model)), strict=True
    ):
        below = observed.layer(layer.name)["gate_ratio"][: round(threshold * 1024)].sum()
        assert float(below / observed.layer(layer.name)["gate_ratio"].sum()) == pytest.approx(0.5, abs=0.02)
        assert mean == pytest.approx(2.5, abs=0.05)


def test_thresholds_by_hand():
    """Two tokens of 8 (top-2 of 4): ratios 0.25 and 0.75; prefixes 0.8 and 0.5714."""
    shape = toy_shape(layers=1, experts=4)
    histogram = torch.zeros(1024)
    histogram[[255, 767]] = 4
    statistics = with_sums(shape, count=[[4.0] * 4], gate_ratio=[histogram], prefix_share=[histogram])
    (skip,) = layers_of(METHODS["skip"](), statistics, shape, 1.0)
    assert skip.routing == Skip(0.25, "heaviest", False, 1.5)  # from bin 256 on, half of the second experts run
    (top_p,) = layers_of(METHODS["top-p"](renormalise="yes"), statistics, shape, 1.0)
    assert top_p.routing == TopP(0.25, "selected", True, 1.5)
    (all_,) = layers_of(METHODS["top-p"](mean_experts=2.0), statistics, shape, 1.0)
    assert all_.routing == TopP(0.75, "selected", False, 2.0)


def test_what_is_renormalised_follows_the_router():
    for family, sums_to_one in (("olmoe", False), ("mixtral", True)):
        shape = shape_of(tiny_model(family, **TOP_4))
        assert {x.routing.renormalise for x in layers_of(METHODS["skip"](threshold=0.2), None, shape, 1.0)} == {
            sums_to_one
        }
    with pytest.raises(PlanError, match="there are no probabilities of all"):
        made_by("top-p", {"p": 0.4, "of": "all"}, None, shape)


def test_groups_are_those_that_are_used_together(model, observed):
    shape = shape_of(model)
    plan = made_by("groups", {"groups": 2}, observed, shape)
    for layer in plan.layers:
        groups, together = layer.routing.groups, observed.layer(layer.layer)["co_count"].clone().fill_diagonal_(0)
        same = torch.tensor(groups)[:, None] == torch.tensor(groups)
        assert sorted(groups) == [0] * 4 + [1] * 4
        swapped = [list(groups)] * 16
        swaps = [(i, j) for i in range(8) for j in range(8) if groups[i] < groups[j]]
        for row, (i, j) in zip(map(list, swapped), swaps, strict=True):
            row[i], row[j] = row[j], row[i]
            other = torch.tensor(row)[:, None] == torch.tensor(row)
            assert float(together[other].sum()) <= float(together[same].sum())
        sample = observed.layer(layer.layer)["gate_sample"]
        counts = [len({groups[e] for e in range(8) if row[e]}) for row in sample.tolist() if any(row)]
        assert layer.routing.before == pytest.approx(sum(counts) / len(counts)) and 1 < layer.routing.before < 2
    assert touched(torch.zeros(3, 4), (0, 0, 1, 1)) == 0


def test_with_groups_a_token_stays_in_few_of_them(model, observed):
    plan = made_by("groups", {"groups": 4, "open": 2}, observed, shape_of(model))
    changed = apply_plan(copy.deepcopy(model), plan)
    seen = []
    for layer, policy in zip(find_layers(changed), (x.routing for x in plan.layers), strict=True):
        groups = torch.tensor(policy.groups)
        layer.experts.register_forward_pre_hook(lambda _m, given, groups=groups: seen.append(groups[given[1]]))
    assert not torch.equal(logits(changed), logits(model))
    assert len(seen) == 2 and all(len(set(row)) <= 2 for group_TK in seen for row in group_TK.tolist())
    one = apply_plan(copy.deepcopy(model), policy_plan(model, lambda _: GroupLocal((0,) * 8)))
    near(logits(one), logits(model))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("top-p", {"mean_experts": 5.0}, "--mean-experts is 5; allowed: 1 to 4"),
        ("skip", {"mean_experts": 0.5}, "--mean-experts is 0.5"),
        ("groups", {"groups": 9}, "make 1 to 8 groups"),
        ("groups", {"groups": 4}, "the 1 smallest groups hold 2 experts"),
    ],
)
def test_what_a_layer_cannot_have_is_refused(model, observed, name, options, words):
    with pytest.raises(PlanError, match=words):
        made_by(name, options, observed, shape_of(model))


def test_a_router_with_a_selection_bias_chooses_for_itself():
    biased = tiny_model("deepseek_v3", n_group=1, topk_group=1)
    with pytest.raises(UnsupportedModel, match=r"has e_score_correction_bias for every expert"):
        apply_plan(biased, policy_plan(biased, lambda x: GroupLocal((0,) * x.num_experts, 1, "sigmoid", True)))


# --- through files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def top_4(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("top-4") / "original", **TOP_4)


@pytest.fixture(scope="module")
def statistics(top_4, words, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    locum.calibrate(top_4, data=[str(words)], tokens=2048, length=64, gram=False, also=READ, out=out)
    return out


POLICIES = {
    "top-p": (["--method", "top-p", "--mean-experts", "2"], TopP),
    "skip": (["--method", "skip"], Skip),
    "groups": (["--method", "groups"], GroupLocal),
}


@pytest.mark.journeys
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_saved_and_generates_as_before(top_4, statistics, tmp_path, name):
    """By the command line: plan, apply, inspect; then logits of the live model to the bit, and greedy text with its cache, for
    prompts of unequal length together as alone."""
    options, kind = POLICIES[name]
    said = command("plan", statistics, *options, "--out", tmp_path / "plan.json", "--json")
    assert said.exit_code == 0, said.stderr
    summary, plan = json.loads(said.stdout), Plan.loads((tmp_path / "plan.json").read_text())
    assert {type(layer.routing) for layer in plan.layers} == {kind} and len(summary["routing"]) == 2
    locum.apply(top_4, plan=tmp_path / "plan.json", out=tmp_path / "out")
    seen = json.loads(command("inspect", tmp_path / "out", "--json").stdout)
    before, after = seen["experts_per_token"]
    assert (before, after) == tuple(summary["experts_per_token"]) == (4, after)
    assert [layer["routing"] for layer in seen["layers"]] == [str(layer.routing) for layer in plan.layers]
    assert seen["active_parameters"] == summary["active_parameters"][1]
    assert (after < 3, seen["active_parameters"] < summary["active_parameters"][0]) == (name != "groups",) * 2
    loaded, live = load_model(tmp_path / "out"), apply_plan(load_model(top_4), plan)
    assert torch.equal(logits(loaded), logits(live)) and not torch.equal(logits(loaded), logits(load_model(top_4)))
    prompts = tiny_ids(2, 9)
    prompts[0, :4] = loaded.config.pad_token_id or 0
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    how = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    written = loaded.generate(prompts, attention_mask=mask, **how)
    slow = loaded.generate(prompts, attention_mask=mask, use_cache=False, **how)
    alone = loaded.generate(prompts[:1, 4:], attention_mask=mask[:1, 4:], **how)
    assert torch.equal(written, slow) and torch.equal(written[0, 4:], alone[0])
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(live))


@pytest.mark.journeys
def test_what_people_are_told(top_4, statistics, tmp_path):
    said = command("compress", top_4, "--method", "top-p", "--p", "0.5", "--out", tmp_path / "out")  # no text is needed
    assert said.exit_code == 0, said.stderr
    assert {x.routing for x in Plan.loads((tmp_path / "out" / "plan.json").read_text()).layers} == {TopP(0.5)}
    assert "top-p 0.5 of selected" in command("inspect", tmp_path / "out").stdout
    said = command("plan", statistics, "--method", "skip", "--mean-experts", "2").stdout
    assert "experts per token: 2.0" in said and "skips below" in said
    said = command("plan", statistics, "--method", "groups").stdout
    assert "experts of 1 of 2 groups, of 1." in said
    with pytest.raises(StatisticsError, match="--also prefix_share"):
        locum.plan(with_less(statistics), method="top-p")
    with pytest.raises(OptionError, match="saves devices that a token touches"):
        locum.plan(statistics, method="groups", remove=0.5)


def with_less(path):
    whole = locum.load_statistics(path)
    layers = {name: {"count": named["count"]} for name, named in whole.layers.items()}
    return type(whole)(whole.domains, layers, whole.origin, whole.tokens)


@pytest.mark.journeys
def test_policies_go_onto_plans_of_stand_ins_and_of_vectors(checkpoint, statistics_file, plan_file, tmp_path):
    skipping = locum.plan(statistics_file, method="skip", threshold=0.6, onto=plan_file, out=tmp_path / "one.json")
    base = Plan.loads(plan_file.read_text())
    for ours, theirs in zip(skipping.layers, base.layers, strict=True):
        assert ours.routing == Skip(0.6) and (ours.slots, ours.bases) == (theirs.slots, theirs.bases)
    both = locum.plan(
        statistics_file,
        method="compressed-experts",
        vectors="hidden",
        onto=tmp_path / "one.json",
        out=tmp_path / "p.json",
    )
    assert {x.routing for x in both.layers} == {InTurn((MainWithVectors(1, "hidden"), Skip(0.6)))}
    again = locum.plan(statistics_file, method="skip", threshold=0.9, onto=both)
    assert {x.routing for x in again.layers} == {InTurn((MainWithVectors(1, "hidden"), Skip(0.9)))}
    out = locum.apply(checkpoint, plan=tmp_path / "p.json", out=tmp_path / "both")
    model = load_model(out)
    live = apply_plan(load_model(checkpoint), both, locum.load_statistics(statistics_file))
    near(logits(model), logits(live))


def test_groups_among_the_experts_that_are_left(model):
    """Pruning and groups together: indices of the plan are the original's."""
    groups = GroupLocal((0, 0, 0, 0, 0, 1, 1, 1), renormalised=False, open=2)
    slots = (DROPPED, *(KEPT,) * 7)
    shape = shape_of(model)
    pruned = apply_plan(copy.deepcopy(model), make_plan(shape, [LayerPlan(x.name, slots) for x in shape.layers]))
    plan = make_plan(shape, [LayerPlan(x.name, slots, routing=groups) for x in shape.layers])
    near(logits(apply_plan(copy.deepcopy(model), plan)), logits(pruned))
    few = tuple(DROPPED if e < 3 else KEPT for e in range(8))
    with pytest.raises(PlanError, match="among the experts that are left: the 1 smallest groups hold 2 experts"):
        one = GroupLocal((0, 0, 0, 0, 0, 1, 1, 1, 1)[:8], open=1)
        make_plan(
            shape_of(tiny_model("olmoe", num_experts_per_tok=3)),
            [LayerPlan(x.name, few, routing=one) for x in shape.layers],
        )
