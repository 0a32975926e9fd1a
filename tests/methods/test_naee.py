"""NAEE: the sets that it finds are the best of all, what is too much is refused first, and plans drop what was found."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from locum.checkpoints.application import apply_plan
from locum.errors import PlanError
from locum.measure.removals import ModelExplorer
from locum.methods.naee import NAEE
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, make_plan
from locum.shapes import ModelShape
from locum.stages.searching import with_found
from making.checkpoints import locum as command
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.tiny_models import tiny_ids, tiny_model

SHAPE = toy_shape(layers=2, experts=7, top_k=2, d=16, f=8)


class Paired:
    """A model in which what a set costs is a quadratic form of its members: the cheapest alone are not the cheapest together."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.form = {
            layer.name: torch.rand(layer.num_experts, layer.num_experts, generator=generator, dtype=torch.float64)
            for layer in shape.layers
        }
        self.asked: list[int] = []

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        self.asked.append(len(removed_CE))
        gone_CE = removed_CE.double()
        return ((gone_CE @ self.form[layer]) * gone_CE).sum(dim=1)


def found_sets(found: dict[str, dict[str, Tensor]], layer: str) -> list[tuple[int, ...]]:
    return [tuple(row_E.nonzero().flatten().tolist()) for row_E in found[layer]["best_sets"]]


def dropped(plan: list) -> list[tuple[int, ...]]:
    return [tuple(e for e, slot in enumerate(layer.slots) if slot == DROPPED) for layer in plan]


@pytest.mark.parametrize("seed", range(3))
def test_sets_are_the_best_of_all(seed: int) -> None:
    model = Paired(SHAPE, seed)
    found = NAEE(most=0.6).explore(model, lambda *_: None)
    greedy = 0
    for layer in SHAPE.layers:
        form = model.form[layer.name]
        sets = found_sets(found, layer.name)
        for count in range(1, 5):
            every = itertools.combinations(range(7), count)
            assert sets[count - 1] == min(every, key=lambda s: sum(float(form[i, j]) for i in s for j in s))
        assert sets[4:] == [sets[3]] * 3  # 0.6 of 7 experts are 4
        greedy += sets[1] != tuple(sorted(form.diagonal().argsort()[:2].tolist()))
    assert greedy > 0
    assert sum(model.asked) == 2 * (7 + 21 + 35 + 35)


def test_experts_that_no_token_selects_are_the_best_set_and_are_not_missed() -> None:
    model, dead = tiny_model("gpt_oss"), (2, 5, 7)
    for layer in find_layers(model):
        with torch.no_grad():
            layer.router.bias[list(dead)] = -100.0
    ids = tiny_ids(4, 16)
    with torch.no_grad():
        before = model(ids).logits
    explorer, shape = ModelExplorer(model, tokens_of(ids), sample=64), shape_of(model)
    found = NAEE().explore(explorer, lambda *_: None)
    for layer in shape.layers:
        sets = found_sets(found, layer.name)
        assert sets[2] == dead and all(set(smaller) < set(dead) for smaller in sets[:2]) and set(sets[3]) > set(dead)
    scored = tuple(found[layer.name]["best_sets"] for layer in shape.layers)
    plan = NAEE().plan(scored, shape, 3 / 4)
    assert dropped(plan) == [dead, dead]
    with torch.no_grad():
        after = apply_plan(model, make_plan(shape, plan))(ids).logits
    torch.testing.assert_close(after, before)


def test_plans_drop_the_found_sets_and_nothing_beyond_what_was_tried() -> None:
    model = Paired(SHAPE, 0)
    found = NAEE(most=0.45).explore(model, lambda *_: None)
    statistics = with_found(make_statistics(SHAPE), found)
    sets = [found_sets(found, layer.name) for layer in SHAPE.layers]
    for amount, count in ((0.0, 0), (0.3, 0), (0.34, 1), (0.7, 2), (1.0, 3)):
        wanted = [of[count - 1] if count else () for of in sets]
        assert dropped(layers_of(NAEE(), statistics, SHAPE, amount)) == wanted


def test_groups_give_equally_many_and_a_tight_layer_is_not_asked() -> None:
    grouped = toy_shape(layers=1, experts=6, top_k=2, d=16, f=8, num_groups=2, min_per_group=1)
    model = Paired(grouped, 1)
    sets = found_sets(NAEE(most=0.7).explore(model, lambda *_: None), grouped.layers[0].name)
    assert [len(s) for s in sets] == [0, 2, 2, 4, 4, 4] and model.asked == [9, 9]
    form = model.form[grouped.layers[0].name]
    pairs = itertools.product(range(3), range(3, 6))
    assert sets[1] == min(pairs, key=lambda s: sum(float(form[i, j]) for i in s for j in s))
    tight = toy_shape(layers=1, experts=6, top_k=6, d=16, f=8)
    model = Paired(tight, 0)
    found = NAEE().explore(model, lambda *_: None)
    assert model.asked == [] and found[tight.layers[0].name]["best_sets"].sum() == 0


def test_too_many_sets_are_refused_with_what_to_use_instead() -> None:
    wide = toy_shape(layers=1, experts=64, top_k=8, d=16, f=8)
    with pytest.raises(
        PlanError, match=r"6\.35e\+05 sets of 4 of its 64 .*--most 0\.0469 or less.*--method hope.*moe-i2"
    ):
        NAEE().check(wide)
    NAEE(most=0.0469).check(wide)
    NAEE(limit=10**6, most=0.07).check(wide)


def test_the_command_refuses_before_anything_is_loaded(checkpoint, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("locum.stages.searching.prepare", lambda *_, **__: pytest.fail("the model was loaded"))
    line = ("search", checkpoint, "--method", "naee", "--limit", 3, "--data", words, "--out", tmp_path / "found")
    result = command(*line)
    assert result.exit_code == 2 and "naee tries all of them, --limit 3 at most" in result.stderr
    assert list(tmp_path.iterdir()) == []
