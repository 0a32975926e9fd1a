"""Losses on what routers say: balance, widths, alignment and entropy, by hand, on models and in training."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from locum.checkpoints.application import apply_plan
from locum.errors import OptionError
from locum.experts.columns import COLUMNS
from locum.experts.parts.narrowed import Narrowed
from locum.experts.policies.group_local import GroupLocal
from locum.experts.policies.in_turn import InTurn
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.experts.policies.soft_lora import SoftLora
from locum.experts.policies.top_p import TopP
from locum.measure.use import in_short, uses_of
from locum.models.families import find_layers
from locum.models.routing import Routed, watched
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, Slot, make_plan
from locum.training.alignment import alignment
from locum.training.balance import load_balance, p_penalty, running_balance
from locum.training.context import Context
from locum.training.entropy import router_entropy
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from locum.training.router_losses import RouterLosses
from locum.training.ways.seer import running_at
from making.handmade import with_sums
from making.policies import TOP_4, logits, near, policy_plan
from making.tiny_models import tiny_ids, tiny_model
from making.training import QUICK, tiny_tokens


def balance_of(logits_TE, index_TK, mask_T, sigmoid=False):
    return load_balance(Routed(logits_TE, index_TK, torch.ones(index_TK.shape), sigmoid), mask_T)


def losses_of(model, tokens_BS, mask_BS, name):
    """The mean over layers of one loss of a model's routers."""
    with watched(model) as routing:
        model(input_ids=tokens_BS, attention_mask=mask_BS)
        return RouterLosses({name: 1.0}, routing).of(mask_BS)[name]


@pytest.mark.parametrize("padded", [False, True])
def test_one_layer_has_the_loss_that_transformers_gives_it(padded):
    logits_TE = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0 if padded else 1
    index = logits_TE.topk(3).indices
    ours = balance_of(logits_TE, index, mask.flatten())
    theirs = load_balancing_loss_func((logits_TE,), 8, 3, mask if padded else None)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_even_use_gives_k_and_collapse_gives_more():
    even = torch.arange(8).roll(0).repeat(2)[:, None].add(torch.arange(2)).remainder(8)
    assert float(balance_of(torch.zeros(16, 8), even, torch.ones(16))) == pytest.approx(2)
    collapsed = torch.zeros(16, 8)
    collapsed[:, :2] = 20
    index = torch.tensor([[0, 1]] * 16)
    assert float(balance_of(collapsed, index, torch.ones(16))) == pytest.approx(8)
    assert float(balance_of(collapsed, index, torch.ones(16), sigmoid=True)) == pytest.approx(16 / 5, rel=1e-3)


def slow_balance(scores_TE, index_TK, keep_T):
    """Switch Eq. 5 and 6 with counting."""
    rows = [t for t in range(len(scores_TE)) if keep_T[t]]
    experts, total = scores_TE.shape[1], 0.0
    for e in range(experts):
        f = sum(e in index_TK[t].tolist() for t in rows) / len(rows)
        p = sum(float(scores_TE[t, e] / scores_TE[t].sum()) for t in rows) / len(rows)
        total += experts * f * p
    return total


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_on_a_model_it_is_that_of_what_its_own_routers_select(family):
    """Sigmoid routers: their scores, normalised; and whatever biases and groups had a say in the selection."""
    original = tiny_model(family)
    model = apply_plan(original, policy_plan(original))
    layers, seen = find_layers(model), {}
    for layer in layers:
        router = lambda _m, _i, out, name=layer.shape.name: seen.update({f"{name} logits": out[0]})  # noqa: E731
        experts = lambda _m, given, name=layer.shape.name: seen.update({name: given[1]})  # noqa: E731
        layer.router.register_forward_hook(router)
        layer.experts.register_forward_pre_hook(experts)
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, 20:] = 0
    loss = losses_of(model, tiny_ids(), mask, "balance")
    expected = []
    for layer in layers:
        raw = seen[f"{layer.shape.name} logits"].reshape(-1, 8).detach()
        scores = raw.sigmoid() if family == "deepseek_v3" else raw.softmax(-1)
        expected.append(slow_balance(scores, seen[layer.shape.name], mask.flatten()))
    assert float(loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    loss.backward()
    assert all(bool(layer.router.weight.grad.any()) for layer in layers)


def test_training_with_it_evens_the_routing_out(tmp_path):
    original = tiny_model("olmoe", **TOP_4)
    plan = policy_plan(original)
    tokens, found = tiny_tokens(), {}
    for balance in (0.0, 1.0):
        model = apply_plan(copy.deepcopy(original), plan)
        options = make_recovery({**QUICK, "how": "vectors", "balance": balance, "steps": 25, "learning_rate": 0.01})
        log = tmp_path / f"{balance}.jsonl"
        model, _ = recover_model(model, plan, tokens, None, options, log=log)
        with torch.no_grad():
            found[balance] = float(losses_of(model, tokens.ids_BS, tokens.attention_BS, "balance"))
        steps = [json.loads(line) for line in log.read_text().splitlines()[1:]]
        assert all(("balance_loss" in step) == (balance > 0) for step in steps)
    assert 4 <= found[1.0] < found[0.0] - 0.02


def test_experts_that_run_fall_one_at_a_time():
    assert [running_at(step, 12, 0.5, 8, 4) for step in (0, 1, 2, 3, 4, 5, 6, 11)] == [8, 8, 7, 6, 6, 5, 4, 4]
    assert running_at(0, 10, 0.0, 8, 4) == 4 and running_at(9, 10, 1.0, 2, 1) == 2


def test_fewer_and_fewer_experts_run_until_the_policy_is_kept(tmp_path):
    """Before the first step the model is the original; of a token 4, 3 and then 2 experts run; the result has its policy."""
    original = tiny_model("olmoe", **TOP_4)
    policy = MainWithVectors(2, "projections")
    plan = policy_plan(original, lambda _: policy)
    context = Context(apply_plan(copy.deepcopy(original), plan), plan, 6, 0)
    way = make_recovery({"how": "seer", "steps": 6}).way
    way.prepare(context, 0)
    before = logits(apply_plan(copy.deepcopy(original), plan))
    for step, running in enumerate((4, 4, 3, 2, 2, 2, 2)):
        assert way.at_step(context, step) == {"experts": running} and way.is_result(context, step) == (running == 2)
        fewer = policy if running == 2 else MainWithVectors(running, "none")
        expected = apply_plan(copy.deepcopy(original), policy_plan(original, lambda _, fewer=fewer: fewer))
        near(logits(context.model), logits(original) if running == 4 else logits(expected))
    way.finish(context)
    near(logits(context.model), before)
    assert {x.experts.layout.routing for x in find_layers(context.model)} == {policy}


def test_sets_of_small_experts_stay_while_fewer_and_fewer_of_the_others_run():
    original, sets = tiny_model("olmoe", **TOP_4), SoftLora(3, 2, "math")

    def with_sets(policy):
        model = apply_plan(copy.deepcopy(original), policy_plan(original, lambda _: policy))
        with torch.no_grad():
            for layer in find_layers(model):
                for leaf in sets.leaves:
                    layer.experts.get_parameter(leaf).normal_(generator=torch.Generator().manual_seed(len(leaf)))
        return model

    policy = InTurn((MainWithVectors(2, "none"), sets))
    context = Context(with_sets(policy), policy_plan(original, lambda _: policy), 6, 0)
    way = make_recovery({"how": "seer", "steps": 6}).way
    way.prepare(context, 0)
    for step, expected in ((0, sets), (2, InTurn((MainWithVectors(3, "none"), sets))), (3, policy)):
        way.at_step(context, step)
        near(logits(context.model), logits(with_sets(expected)))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_entropy_of_routers_is_that_of_their_probabilities(family):
    model = tiny_model(family)
    mask, seen = torch.ones(3, 24, dtype=torch.int64), {}
    mask[0, 20:] = 0
    for layer in find_layers(model):
        see = lambda _m, _i, out, name=layer.shape.name: seen.update({name: out[0].reshape(-1, 8).detach()})  # noqa: E731
        layer.router.register_forward_hook(see)
    loss = losses_of(model, tiny_ids(), mask, "entropy")
    expected = 0.0
    for raw_TE in seen.values():
        scores_TE = raw_TE.sigmoid() if family == "deepseek_v3" else raw_TE.exp()
        for scores_E, keep in zip(scores_TE.tolist(), mask.flatten().tolist(), strict=True):
            shares = [score / sum(scores_E) for score in scores_E]
            expected -= keep * sum(p * math.log(p) for p in shares) / int(mask.sum()) / len(seen)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5) and 0 < expected < math.log(8)
    sure = Routed(torch.tensor([[1e4, 0.0], [0.0, 0.0]], requires_grad=True), None, None, False)
    one_of_two = router_entropy(sure, torch.tensor([1, 0]))
    one_of_two.backward()
    assert float(one_of_two.detach()) == 0 and bool(sure.logits_TE.grad.isfinite().all())
    assert float(router_entropy(sure, torch.tensor([0, 1])).detach()) == pytest.approx(math.log(2))


def test_training_with_it_makes_routers_sure_while_fewer_experts_run(tmp_path):
    """SEER-MoE's second stage: half of the experts run, and the entropy goes down with the loss."""
    original = tiny_model("olmoe", **TOP_4)
    plan = policy_plan(original, lambda _: MainWithVectors(2, "none"))
    tokens, found = tiny_tokens(), {}
    for entropy in (0.0, 1.0):
        model = apply_plan(copy.deepcopy(original), plan)
        options = make_recovery({**QUICK, "how": "router", "entropy": entropy, "steps": 20, "learning_rate": 0.01})
        log = tmp_path / f"{entropy}.jsonl"
        model, summary = recover_model(model, plan, tokens, tokens, options, log=log)
        assert summary["validation_loss"] < summary["validation_loss_before"]
        with torch.no_grad():
            found[entropy] = float(losses_of(model, tokens.ids_BS, tokens.attention_BS, "entropy"))
        steps = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "step"]
        assert all(("entropy_loss" in step) == (entropy > 0) for step in steps)
    assert found[1.0] < found[0.0] - 0.1
    assert {x.experts.layout.routing for x in find_layers(model)} == {MainWithVectors(2, "none")}


# --- what runs: dynamic top-p, unequal widths, groups

WIDTHS = (4, 16, 16, 8, 16, 2, 16, 12)
GROUPS = (0, 1, 0, 1, 2, 3, 2, 3)


def of_widths(original):
    """A plan with experts of these widths in every layer, and a function that makes the model of it."""
    shape = shape_of(original)
    slots = tuple(KEPT if width == shape.layers[0].expert_width else Slot((Narrowed(width),)) for width in WIDTHS)
    plan = make_plan(shape, [LayerPlan(x.name, slots) for x in shape.layers])
    drawn = [torch.rand(8, x.expert_width, generator=torch.Generator().manual_seed(2)) for x in shape.layers]
    statistics = with_sums(shape, **dict.fromkeys(COLUMNS["camera"].needs, drawn))
    return plan, lambda: apply_plan(copy.deepcopy(original), plan, statistics)


def watched_layer(model):
    """What the router of the first layer said, on text with padding, and the mask."""
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, 20:] = 0
    with watched(model) as routing:
        model(input_ids=tiny_ids(), attention_mask=mask)
        return routing.of(routing.layers[0]), mask.flatten()


def slow_running(routed, mask_T, weight):
    """N sum_i M_i P_i, counted: M_i sums weight(i) over the tokens for which i runs, over their number."""
    rows = [t for t in range(len(mask_T)) if mask_T[t]]
    shares, runs, total = routed.share_TE.tolist(), routed.runs_TM.tolist(), 0.0
    for e in range(len(shares[0])):
        counted = sum(weight(e) for t in rows for other in runs[t] if other == e) / len(rows)
        total += len(shares[0]) * counted * sum(shares[t][e] for t in rows) / len(rows)
    return total


def test_the_balance_of_what_runs_counts_what_top_p_lets_run():
    original = tiny_model("olmoe", **TOP_4)
    routed, mask_T = watched_layer(apply_plan(copy.deepcopy(original), policy_plan(original, lambda _: TopP(0.5))))
    skipped = int((routed.runs_TM < 0).sum())
    assert 0 < skipped < routed.runs_TM.numel() and int((routed.index_TK < 0).sum()) == 0
    found = running_balance(routed, mask_T)
    assert float(found.detach()) == pytest.approx(slow_running(routed, mask_T, lambda e: 1), rel=1e-5)
    assert float(found.detach()) < float(load_balance(routed, mask_T).detach())
    for p, runs in ((0.0, 1), (1000.0, 4)):
        limit, _ = watched_layer(apply_plan(copy.deepcopy(original), policy_plan(original, lambda _, p=p: TopP(p))))
        assert ((limit.runs_TM >= 0).sum(dim=1) == runs).all()
    torch.testing.assert_close(running_balance(limit, mask_T), load_balance(limit, mask_T))


def test_equal_widths_make_the_p_penalty_the_balance_loss_times_the_width():
    model = tiny_model("olmoe")
    routed, mask_T = watched_layer(model)
    width = find_layers(model)[0].shape.expert_width
    torch.testing.assert_close(p_penalty(routed, mask_T), width * load_balance(routed, mask_T))


def test_the_p_penalty_counts_hidden_units_that_run():
    _, made = of_widths(tiny_model("olmoe"))
    routed, mask_T = watched_layer(made())
    assert routed.width_E == WIDTHS
    found = float(p_penalty(routed, mask_T).detach())
    assert found == pytest.approx(slow_running(routed, mask_T, lambda e: WIDTHS[e]), rel=1e-5)


def test_training_with_the_p_penalty_makes_narrow_experts_run(tmp_path):
    """Less is computed for a token, and the summary says how much: 3 D parameters for every hidden unit that runs."""
    tokens, active = tiny_tokens(), {}
    plan, made = of_widths(tiny_model("olmoe"))
    for weight in (0.0, 0.1):
        options = make_recovery({**QUICK, "how": "router", "p_penalty": weight, "steps": 20, "learning_rate": 0.01})
        model, summary = recover_model(made(), plan, tokens, tokens, options)
        active[weight] = summary["routing"]["active_expert_parameters"]
    assert active[0.1] < 0.9 * active[0.0]
    counted = 0
    with watched(model) as routing, torch.no_grad():
        model(input_ids=tokens.ids_BS, attention_mask=tokens.attention_BS)
        for layer in routing.layers:
            for t, experts in enumerate(routing.of(layer).index_TK.tolist()):
                if tokens.attention_BS.flatten()[t]:
                    counted += sum(3 * layer.shape.hidden_size * WIDTHS[e] for e in experts)
    said = in_short(uses_of(model, [(tokens.ids_BS, tokens.attention_BS)]))
    assert said["active_expert_parameters"] == round(counted / int(tokens.attention_BS.sum()))


def test_the_alignment_loss_is_what_closed_groups_have_above_the_least_chosen():
    original = tiny_model("olmoe", **TOP_4)
    policy = GroupLocal(GROUPS, open=2)
    routed, mask_T = watched_layer(apply_plan(copy.deepcopy(original), policy_plan(original, lambda _: policy)))
    scores_TE, expected = routed.share_TE.tolist(), 0.0
    for scores, chosen, keep in zip(scores_TE, routed.index_TK.tolist(), mask_T.tolist(), strict=True):
        sums = [sum(score for e, score in enumerate(scores) if GROUPS[e] == group) for group in range(4)]
        opened = sorted(range(4), key=lambda group: -sums[group])[:2]
        least = min(scores[e] for e in chosen)
        expected += keep * sum(max(0, x - least) for e, x in enumerate(scores) if GROUPS[e] not in opened)
    found = float(alignment(routed, mask_T).detach())
    assert found == pytest.approx(expected / int(mask_T.sum()), rel=1e-5) and found > 0
    whole = GroupLocal(GROUPS, open=4)
    routed, mask_T = watched_layer(apply_plan(copy.deepcopy(original), policy_plan(original, lambda _: whole)))
    assert float(alignment(routed, mask_T).detach()) == 0  # every group is open: the router's own choice


def test_behind_groups_the_balance_loss_is_sams():
    """Summed over the k choices: N sum_e mean(a_e) mean(choice k is e), as PKU-DAIR/Hetu's SAMGate has it."""
    original = tiny_model("olmoe", **TOP_4)
    policy = GroupLocal(GROUPS, open=2)
    routed, mask_T = watched_layer(apply_plan(copy.deepcopy(original), policy_plan(original, lambda _: policy)))
    keep, expected = mask_T.bool(), 0.0
    shares_TE, chosen_TK = routed.share_TE[keep].detach(), routed.index_TK[keep]
    for k in range(4):
        for e in range(8):
            expected += 8 * float(shares_TE[:, e].mean()) * float((chosen_TK[:, k] == e).float().mean())
    assert float(load_balance(routed, mask_T).detach()) == pytest.approx(expected, rel=1e-5)


def test_training_with_alignment_lowers_it():
    original, tokens, found = tiny_model("olmoe", **TOP_4), tiny_tokens(), {}
    plan = policy_plan(original, lambda _: GroupLocal(GROUPS, open=2))
    for weight in (0.0, 10.0):
        model = apply_plan(copy.deepcopy(original), plan)
        options = make_recovery({**QUICK, "how": "router", "alignment": weight, "steps": 20, "learning_rate": 0.01})
        model, _ = recover_model(model, plan, tokens, None, options)
        with torch.no_grad():
            found[weight] = float(losses_of(model, tokens.ids_BS, tokens.attention_BS, "alignment"))
    assert found[10.0] < 0.8 * found[0.0]


def test_alignment_without_groups_is_refused():
    original = tiny_model("olmoe")
    options = make_recovery({**QUICK, "how": "router", "alignment": 1.0})
    with pytest.raises(OptionError, match="no layer chooses in groups"):
        recover_model(original, None, tiny_tokens(), None, options)
