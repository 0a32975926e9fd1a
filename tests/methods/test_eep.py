"""EEP: the search finds what is best for all layers together, grows one expert at a time, and plans drop what it found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from locum.methods.eep import EEP
from locum.methods.naee import NAEE
from locum.plans.plan import DROPPED, KEPT, make_plan
from locum.shapes import ModelShape
from locum.stages.searching import with_found
from making.handmade import layers_of, make_statistics, toy_shape
from making.slots import base_of

SHAPE = toy_shape(layers=2, experts=5, top_k=2, d=16, f=8)


class Coupled:
    """A model whose loss is a quadratic form of all that goes from all layers: what is best for one depends on the other."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.tried = shape, []
        size = sum(layer.num_experts for layer in shape.layers)
        self.form = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def loss_without(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        gone_CE = [torch.cat([c[layer.name] for layer in self.shape.layers]).double() for c in candidates]
        self.tried += [tuple(gone_E.nonzero().flatten().tolist()) for gone_E in gone_CE]
        return torch.stack([gone_E @ self.form @ gone_E for gone_E in gone_CE])

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        """What a layer alone would say."""
        first = [x.name for x in self.shape.layers].index(layer) * 5
        form = self.form[first : first + 5, first : first + 5]
        return ((removed_CE.double() @ form) * removed_CE).sum(dim=1)


def sets_of(found: dict[str, dict[str, Tensor]], count: int) -> list[tuple[int, ...]]:
    return [tuple(named["best_sets"][count - 1].nonzero().flatten().tolist()) for named in found.values()]


def explored(model: Coupled, **options: object) -> dict[str, dict[str, Tensor]]:
    return EEP(**options).explore(model, lambda *_: None)


def test_it_finds_the_best_of_all_and_not_what_is_best_for_each_layer() -> None:
    apart = 0
    for seed in range(6):
        model = Coupled(SHAPE, seed)
        found = explored(model, most=0.6, population=40, generations=12)
        for count in (1, 2, 3):
            every = itertools.product(itertools.combinations(range(5), count), repeat=2)

            def loss(pair: tuple, model: Coupled = model) -> float:
                gone = [*pair[0], *(5 + e for e in pair[1])]
                return float(model.form[gone][:, gone].sum())

            best = min(every, key=loss)
            assert loss(tuple(sets_of(found, count))) == pytest.approx(loss(best))
            apart += sets_of(found, count) != sets_of(NAEE(most=0.6).explore(model, lambda *_: None), count)
    assert apart > 6


def test_the_budget_is_kept_nothing_is_tried_twice_and_a_seed_says_all() -> None:
    model, again, other = (Coupled(SHAPE, 0) for _ in range(3))
    found = explored(model, most=0.6, population=6, generations=2)
    assert len(model.tried) <= 3 * (6 + 2 * 4) and len(set(model.tried)) == len(model.tried)
    same, differs = explored(again, most=0.6, population=6, generations=2), explored(other, population=6, seed=1)
    assert again.tried == model.tried and other.tried != model.tried and set(differs) == set(found)
    assert all(torch.equal(found[name]["best_sets"], same[name]["best_sets"]) for name in found)


def test_groups_give_equally_many_and_a_tight_layer_gives_none() -> None:
    shape = toy_shape(layers=1, experts=8, top_k=2, d=16, f=8, num_groups=2, min_per_group=1)
    (named,) = explored(Coupled(shape, 2)).values()
    sets = [row_E.nonzero().flatten().tolist() for row_E in named["best_sets"]]
    assert [len(members) for members in sets] == [0, 2, 2, 4, 4, 4, 4, 4]
    assert all(sum(e < 4 for e in members) * 2 == len(members) for members in sets)
    tight = toy_shape(layers=1, experts=4, top_k=4, d=16, f=8)
    (named,) = explored(Coupled(tight, 0)).values()
    assert named["best_sets"].sum() == 0


class Mixing(Coupled):
    """Its loss is lowest where expert 0 of every layer is half itself and half expert 1; what is dropped counts a little."""

    def loss_merged(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        self.mixtures = [*getattr(self, "mixtures", ()), *candidates]
        return torch.tensor([sum(self.of_layer(weight_EE) for weight_EE in c.values()) for c in candidates])

    def loss_without(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.tensor([sum(self.of_layer((~mask).double().diag()) for mask in c.values()) for c in candidates])

    def of_layer(self, weight_EE: Tensor) -> float:
        gone_E = ~weight_EE.any(dim=1)
        best_E = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
        return float(2 * gone_E[0] + 0.1 * (gone_E * torch.arange(5)).sum() + (weight_EE[0] - best_E).norm())


def test_mixtures_lower_the_loss_from_the_best_that_was_pruned_and_stay_mixtures() -> None:
    model = Mixing(SHAPE, 0)
    found = explored(model, most=0.4, population=6, generations=6, mergings=25)
    for count in (1, 2):
        sets = sets_of(found, count)
        assert sets == [(1, 2)[:count]] * 2
        for named, gone in zip(found.values(), sets, strict=True):
            weight_EE = named["merge_weights"][count - 1]
            stay = [e for e in range(5) if e not in gone]
            assert not weight_EE[list(gone)].any() and bool((weight_EE >= 0).all())
            torch.testing.assert_close(weight_EE[stay].sum(dim=1), torch.ones(len(stay), dtype=torch.float64))
            pruned_EE = torch.eye(5, dtype=torch.float64)
            pruned_EE[list(gone)] = 0
            assert model.of_layer(weight_EE) < 0.8 * model.of_layer(pruned_EE)
    again = explored(Mixing(SHAPE, 0), most=0.4, population=6, generations=6, mergings=25)
    assert all(torch.equal(found[name]["merge_weights"], again[name]["merge_weights"]) for name in found)
    assert len(model.mixtures) == 2 * (1 + 25 * 4)


def test_plans_put_mixtures_where_something_stays() -> None:
    method = EEP(most=0.4, population=6, generations=6, mergings=4)
    found = method.explore(Mixing(SHAPE, 0), lambda *_: None)
    statistics = with_found(make_statistics(SHAPE), found)
    assert all(plan.is_identity for plan in layers_of(method, statistics, SHAPE, 0.0))
    for amount, count in ((0.5, 1), (1.0, 2)):
        for plan, named in zip(layers_of(method, statistics, SHAPE, amount), found.values(), strict=True):
            for e, slot in enumerate(plan.slots):
                row_E = named["merge_weights"][count - 1, e]
                base = plan.bases[base_of(slot)] if base_of(slot) is not None else None
                assert (slot == DROPPED) == (not bool(row_E.any())) and (slot == KEPT) == (float(row_E[e]) == 1)
                if base is not None:
                    assert base.experts == tuple(row_E.nonzero().flatten().tolist())
                    assert base.weights == pytest.approx(row_E[list(base.experts)].tolist())
        assert make_plan(SHAPE, layers_of(method, statistics, SHAPE, amount)).removed(SHAPE) == pytest.approx(count / 5)


def test_plans_drop_what_was_found() -> None:
    found = explored(Coupled(SHAPE, 3), most=0.6)
    statistics = with_found(make_statistics(SHAPE), found)
    for amount, count in ((0.34, 1), (0.7, 2), (1.0, 3)):
        plan = layers_of(EEP(), statistics, SHAPE, amount)
        assert [tuple(e for e, x in enumerate(p.slots) if x == DROPPED) for p in plan] == sets_of(found, count)
