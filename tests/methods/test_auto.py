"""Auto: planted truth on a real model, the bytes that were asked for, what it says of its choice, and what it refuses.

Letters: E experts, C candidates.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

import locum
from locum.budgets.candidates import KINDS, candidates
from locum.budgets.target import Target
from locum.checkpoints.application import apply_plan
from locum.errors import OptionError, PlanError
from locum.experts.factors import svd_factors
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_weights import OwnWeights
from locum.experts.parts.shared_base import SharedBase
from locum.measure.calibration import calibrate
from locum.measure.removals import ModelExplorer
from locum.methods.auto import Auto
from locum.models.families import find_layers, write_expert
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, Plan
from locum.stages.candidates import candidates_of
from locum.stages.planning import decide
from locum.stages.searching import to_collect, with_found
from locum.stats.stand_ins import CANDIDATES
from locum.stats.sums import Statistics
from making.handmade import make_statistics, tokens_of, toy_shape
from making.planted import copy_of
from making.tiny_models import tiny_ids, tiny_model

SHAPE = toy_shape(layers=2, experts=8)
KINDS_OF = [
    candidate.kind for candidate in candidates(SHAPE.layers[0], make_statistics(SHAPE).layer(SHAPE.layers[0].name))
]
IDS = tiny_ids(6, 32)


# --- planted truth ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """One layer: 0 is of rank 8, 1 to 4 are nearly one expert and most used, 5 is never selected, 6 and 7 are of their own."""
    model = tiny_model("olmoe", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    (layer,) = find_layers(model)
    drawn = torch.Generator().manual_seed(3)
    copies = copy_of(layer, 1)
    with torch.no_grad():
        for e in (2, 3, 4):
            write_expert(layer.experts, e, copies.map(lambda _, t: t + 1e-3 * torch.randn(t.shape, generator=drawn)))

        def of_rank(_name, matrix):
            a, b = svd_factors(matrix, 8)
            return b @ a

        write_expert(layer.experts, 0, copy_of(layer, 0).map(of_rank))
        for e in (0, 6, 7):
            write_expert(layer.experts, e, copy_of(layer, e).map(lambda name, t: 3 * t if name == "down_DF" else t))
        layer.router.weight[1:5] *= 2
        layer.router.weight[[0, 6, 7]] *= 0.6
        layer.router.weight[5] = layer.router.weight[[0, 1, 2, 3, 4, 6, 7]].mean(0)  # never among the first two
    method = Auto(only="keep,bits,low-rank,base,nothing,drop", protect=False)
    tokens = tokens_of(IDS)
    statistics = calibrate(model, tokens, needs=to_collect(method))
    explorer = ModelExplorer(model, tokens, sample=192, statistics=statistics)
    statistics = with_found(statistics, method.explore(explorer, lambda *_: None))
    return model, method, statistics


def kinds_of(plan: Plan) -> list[set[str]]:
    return [{part.name for part in slot.parts} for slot in plan.layers[0].slots]


def test_what_is_planted_is_found(planted):
    model, method, statistics = planted
    shape = shape_of(model)
    assert float(statistics.layer(shape.layers[0].name)["count"][5]) <= 2
    plan = decide(method, statistics, shape, Target(remove=0.94))
    slots, kinds = plan.layers[0].slots, kinds_of(plan)
    assert kinds[0] == {"low_rank"} and slots[0].parts[0].rank == 8
    assert all("shared_base" in kinds[e] for e in (1, 2, 3, 4)) and len(plan.layers[0].bases) == 1
    assert not slots[5].parts
    assert all(kinds[e] == {"own_weights"} for e in (6, 7))


def test_costs_that_belong_to_others_cost_more(planted):
    """By the true costs, a plan from shuffled or random ones is worse at the same bytes."""
    model, method, statistics = planted
    shape = shape_of(model)
    scored = method.score_experts(statistics, shape)

    def true_cost(**options: object) -> float:
        plan = decide(dataclasses.replace(method, **options), statistics, shape, Target(remove=0.93))
        assert plan.size(shape).bytes <= shape.bytes - 0.93 * shape.bytes_of_experts
        return method.explain(scored, plan.layers)["predicted_kl"]

    best = true_cost()
    assert all(true_cost(costs=costs, draw=draw) > 2 * best for costs in ("shuffled", "random") for draw in (0, 1))


GROUP_E = (0, 1, 1, 0, 2, 0, 2, 1)


@pytest.fixture(scope="module")
def in_groups():
    """One layer of three groups of near-copies: a difference of rank 4, with a third of the weights' size, and a little noise."""
    model = tiny_model("olmoe", hidden_size=128, intermediate_size=64, num_hidden_layers=1)
    (layer,) = find_layers(model)
    drawn = torch.Generator().manual_seed(3)
    firsts = [copy_of(layer, GROUP_E.index(g)) for g in range(3)]

    def changed(_name, t):
        low = torch.randn(len(t), 4, generator=drawn) @ torch.randn(4, t.shape[1], generator=drawn)
        noise = 0.003 * t.std() * torch.randn(t.shape, generator=drawn)
        return t + low * (0.3 * t.norm() / low.norm()) + noise

    with torch.no_grad():
        for e, g in enumerate(GROUP_E):
            if e != GROUP_E.index(g):
                write_expert(layer.experts, e, firsts[g].map(changed))
    method = Auto(only="keep,bits,low-rank,base,nothing,drop", price="output", protect=False)
    tokens = tokens_of(tiny_ids(8, 64))
    statistics = calibrate(model, tokens, needs=to_collect(method))
    explorer = ModelExplorer(model, tokens, sample=256, statistics=statistics)
    return model, method, with_found(statistics, method.explore(explorer, lambda *_: None))


def test_groups_of_near_copies_are_found_and_beat_all_else(in_groups):
    """Measured on other tokens: at the same bytes every other candidate, and one base for all, lose ten times as much."""
    model, method, statistics = in_groups
    shape, ids = shape_of(model), tiny_ids(4, 64, seed=9)
    target = Target(fit=int(shape.bytes - shape.bytes_of_experts + 2.25 / 8 * shape.expert_parameters))

    def lost(plan: Plan) -> float:
        assert plan.size(shape).bytes <= target.fit
        with torch.no_grad():
            small = apply_plan(copy.deepcopy(model), plan, statistics)
            whole_MV, small_MV = (x(ids).logits.flatten(0, 1).log_softmax(-1) for x in (model, small))
        return float((whole_MV.exp() * (whole_MV - small_MV)).sum(-1).mean())

    plan = decide(method, statistics, shape, target)
    (layer,) = plan.layers
    assert [layer.bases[slot.base].experts for slot in layer.slots] == [(GROUP_E.index(g),) for g in GROUP_E]
    assert all(slot.parts[0].format == "int4-g32" for slot in layer.slots)
    best = lost(plan)
    for only in ("keep,bits,low-rank,nothing,drop", "bits,drop", "low-rank", "nothing,keep,bits"):
        assert lost(decide(dataclasses.replace(method, only=only), statistics, shape, target)) > 10 * best
    found = {name: x.clone() for name, x in statistics.layers[layer.layer].items()}
    found["candidate_error"][:, :, [c for c, kind in enumerate(KINDS_OF) if kind == "base"][6:]] = torch.inf
    single = dataclasses.replace(statistics, layers={layer.layer: found})
    assert lost(decide(method, single, shape, target)) > 10 * best


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.85, 0.95])
def test_a_plan_has_the_bytes_that_were_asked_for(share: float) -> None:
    statistics, limit = make_statistics(SHAPE), SHAPE.bytes - share * SHAPE.bytes_of_experts
    plan = locum.plan([statistics], method="auto", remove=share)
    size = plan.size(SHAPE).bytes
    assert limit - SHAPE.bytes_of_expert(SHAPE.layers[0]) < size <= limit
    assert plan.layers == locum.plan([statistics], method="auto", fit=str(int(limit))).layers
    bytes_of = sum(layer.bytes(SHAPE.layer(layer.layer), SHAPE) for layer in plan.layers)
    chosen = Auto().plan_for(Auto().score_experts(statistics, SHAPE), SHAPE, Target(remove=share))
    assert bytes_of == sum(layer.bytes(SHAPE.layer(layer.layer), SHAPE) for layer in chosen)


def test_a_plan_says_of_every_expert_what_it_became_and_what_was_next_to_it() -> None:
    plan = locum.plan([make_statistics(SHAPE)], method="auto", remove=0.7)
    said = json.loads(plan.dumps())["provenance"]["auto"]
    for layer in plan.layers:
        for slot, line in zip(layer.slots, said["experts"][layer.layer], strict=True):
            assert line.startswith(f"{slot}: ") and line.count(" nats, ") == line.count(" bytes") >= 2
    assert said["predicted_kl"] > 0


@pytest.mark.parametrize("prior", [0.0, 0.1, 1.0])
def test_a_candidate_costs_what_a_layer_that_is_all_of_it_costs_the_model(prior: float) -> None:
    """By a loop: the errors of a kind add up to its loss, what was not measured has the price of noise, none costs next to nothing; a
    share of what each expert loses and gives is that of the mean expert."""
    statistics, layer = make_statistics(SHAPE), SHAPE.layers[0]
    found = statistics.layers[layer.name]
    error_EC, noise = found["candidate_error"].sum(0), float(found["error_price"].sum(0))
    loss_C = torch.full((CANDIDATES,), torch.inf, dtype=torch.float64)
    bits, low, nothing = (KINDS_OF.index(kind) for kind in ("bits", "low-rank", "nothing"))
    loss_C[bits], loss_C[low], loss_C[nothing] = (
        0.0,
        *(noise * x * float(error_EC[:, c].sum()) for x, c in ((2, low), (7, nothing))),
    )
    found["candidate_loss"] = torch.stack([loss_C, torch.zeros_like(loss_C)])
    given_E = found["gated_norm_product"].sum(0).diagonal()
    whole = float(error_EC[:, nothing].sum())
    cost_EC = Auto(protect=False, prior=prior).score_experts(statistics, SHAPE)[0].choices.cost_EC

    def mixed(of_E: torch.Tensor, e: int) -> float:
        return (1 - prior) * float(of_E[e]) + prior * float(of_E.sum()) / 8

    prices = {
        bits: 0.5 * noise,
        low: 2 * noise,
        nothing: 7 * noise,
        KINDS_OF.index("drop"): 7 * noise,
        KINDS_OF.index("constant"): noise,
    }
    for c, price in prices.items():
        for e in range(8):
            share = mixed(error_EC[:, c], e) / mixed(error_EC[:, nothing], e)
            expected = share * whole * mixed(given_E, e) / float(given_E.sum()) * price
            assert cost_EC[e, c] == pytest.approx(expected, rel=1e-9)


def test_out_of_reach_is_said() -> None:
    with pytest.raises(PlanError, match="out of reach"):
        locum.plan([make_statistics(SHAPE)], method="auto", fit="100")


def of_groups(experts: int) -> dict[str, torch.Tensor]:
    """Statistics of a layer whose experts are near-copies in two groups, the even and the odd ones."""
    part_E = torch.arange(experts) % 2
    inner_EE = (part_E[:, None] == part_E).double() + 1e-3 * torch.eye(experts, dtype=torch.float64)
    return {"count": torch.arange(experts), "weight_product": inner_EE}


# --- rules --------------------------------------------------------------------------------------------------------


def test_candidates_are_as_many_for_every_layer_and_fit_it() -> None:
    for layer in (SHAPE.layers[0], toy_shape(d=32, f=16).layers[0], toy_shape(num_groups=4).layers[0]):
        found = candidates(layer, of_groups(layer.num_experts))
        assert len(found) == len(KINDS_OF) <= CANDIDATES
        assert {c.kind for c in found} == set(KINDS)
        assert all(c.plan is None or len(c.plan.slots) == layer.num_experts for c in found)
        plans = [c.plan for c in found if c.plan is not None]
        assert len(plans) == len(set(plans))
    assert next(c for c in found if c.kind == "drop").plan is None  # of a group-limited router
    quantised = dataclasses.replace(SHAPE.layers[0], expert_bytes=1000)
    left = [c.kind for c in candidates(quantised, of_groups(8)) if c.plan is not None]
    assert left == ["keep", "constant", "nothing", "drop"]


def test_super_experts_keep_their_weights_and_no_more_go_than_may() -> None:
    statistics = make_statistics(SHAPE)
    peak = statistics.layers[SHAPE.layers[0].name]["output_peak"].clone()
    peak[:, 3] = 1e6
    statistics.layers[SHAPE.layers[0].name]["output_peak"] = peak
    first, second = (
        locum.plan([statistics], method="auto", remove=0.97, protect=protect).layers[0].slots[3]
        for protect in (True, False)
    )
    assert first.is_kept and first.parts[0].format in ("", "int8-g32", "int4-g32") and second != first
    dropping = locum.plan([statistics], method="auto", remove=0.7, only="keep,drop", protect=False)
    assert all(len(layer.survivors) >= 2 for layer in dropping.layers)
    assert {str(slot) for layer in dropping.layers for slot in layer.slots} == {"kept", "dropped"}


def of_one_domain() -> tuple[Statistics, str]:
    """Statistics of two domains; the second, a twentieth of the text, is all that uses expert 5 of every layer."""
    statistics = make_statistics(SHAPE)
    for layer in statistics.layers.values():
        for name in ("count", "gated_norm_product"):
            layer[name] = layer[name].clone()
            layer[name][1] /= 20
        layer["gated_norm_product"][0, 5], layer["gated_norm_product"][0, :, 5] = 0, 0
        layer["gated_norm_product"][1] = 0
        layer["gated_norm_product"][1, 5, 5] = float(layer["gated_norm_product"][0].diagonal().min() + 1) / 20
    return statistics, statistics.domains[1]


def test_a_protected_domain_keeps_what_it_needs() -> None:
    statistics, rare = of_one_domain()
    plans = [
        locum.plan([statistics], method="auto", remove=0.9, protect_domains=names) for names in (None, rare, f"{rare},")
    ]
    free, kept, again = (plan.provenance["auto"]["predicted_kl_by_domain"] for plan in plans)
    assert kept == again and set(kept) == set(statistics.domains)
    assert kept[rare] < 0.5 * free[rare] and plans[1].size(SHAPE).bytes <= SHAPE.bytes - 0.9 * SHAPE.bytes_of_experts
    total = [plan.provenance["auto"]["predicted_kl"] for plan in plans]
    assert total[0] < total[1]


def test_domains_together_lose_what_all_text_loses() -> None:
    statistics = make_statistics(SHAPE)
    said = locum.plan([statistics], method="auto", remove=0.9).provenance["auto"]
    tokens_Z = statistics.layers[SHAPE.layers[0].name]["count"].sum(1)
    share_Z = (tokens_Z / tokens_Z.sum()).tolist()
    of_domains = said["predicted_kl_by_domain"].values()
    assert sum(s * kl for s, kl in zip(share_Z, of_domains, strict=True)) == pytest.approx(said["predicted_kl"])


def test_no_token_is_left_with_nothing() -> None:
    """Fewer than top-k experts of a layer become nothing, also where a constant is worse."""
    statistics = make_statistics(SHAPE)
    for layer in SHAPE.layers:
        error = statistics.layers[layer.name]["candidate_error"].clone()
        error[..., KINDS_OF.index("constant")] = 10 * error[..., KINDS_OF.index("nothing")]
        statistics.layers[layer.name]["candidate_error"] = error
    for protect, most in ((True, SHAPE.layers[0].top_k - 1), (False, 8)):
        plan = locum.plan([statistics], method="auto", remove=0.9, protect=protect, only="keep,bits,constant,nothing")
        counts = [sum(slot.survives and not slot.parts for slot in layer.slots) for layer in plan.layers]
        assert max(counts) <= most and (protect or max(counts) > 1)


@pytest.mark.parametrize(
    ("only", "parts"), [("keep,bits", {OwnWeights, LowRank}), ("low-rank,keep", {OwnWeights, LowRank})]
)
def test_only_what_is_named_is_chosen(only: str, parts: set[type]) -> None:
    plan = locum.plan([make_statistics(SHAPE)], method="auto", remove=0.7, only=only)
    assert {type(part) for layer in plan.layers for part in layer.parts} <= parts
    assert not any(isinstance(part, SharedBase) for layer in plan.layers for part in layer.parts)
    assert ("bits" in only) or {slot for slot in plan.layers[0].slots if slot.is_kept} <= {KEPT}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "bitz"}, "unknown kind for --only 'bitz': did you mean 'bits'"),
        (
            {"protect_domains": "domain0,domian1"},
            "unknown domain for --protect-domains 'domian1': did you mean 'domain1'",
        ),
        ({"only": "drop"}, "leaves an expert of .* nothing that it can become"),
        ({"bits": "4"}, "method auto chooses the bits of every expert itself; leave --bits out"),
    ],
)
def test_what_it_refuses(options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        locum.plan([make_statistics(SHAPE)], method="auto", remove=0.5, **options)


def test_comparisons_take_it_as_it_is() -> None:
    names = [c.name for c in candidates_of("auto,mone", "4", None)]
    assert "auto" in names and "mone:bits=4" in names and "auto:bits=4" not in names
    with pytest.raises(OptionError, match="chooses the bits"):
        candidates_of("auto:bits=4", None, None)
