"""A search on a model of which one decoder layer is there at a time gives what it gives on the whole model, to the bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import locum
from families.case import tokens_of
from locum.checkpoints.load import load_model
from locum.checkpoints.streamed import stream_model
from locum.errors import OptionError
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.shared_base import SharedBase
from locum.measure.removals import ModelExplorer
from locum.models.layer_major import NOTE, held_bytes
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint
from making.tiny_models import tiny_ids

ONE = torch.eye(8, dtype=torch.bool)
TWO = torch.tensor([[e in pair for e in range(8)] for pair in ((1, 6), (0, 5))])  # an expert of each of two groups


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def two(request, tmp_path_factory):
    """An explorer of a whole model and one of the same, streamed."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "m", request.param, num_hidden_layers=3)
    tokens = tokens_of(tiny_ids(4, 16))
    opened = (load_model(folder), stream_model(folder))
    for model in opened:
        model.set_experts_implementation("eager")
    return tuple(ModelExplorer(model, tokens, sample=64, batch_size=2) for model in opened)


def there(explorer) -> list[int]:
    """The decoder layers that have weights."""
    modules = getattr(explorer.model, NOTE).modules
    return [i for i, m in enumerate(modules) if any(p.device.type != "meta" for p in m.parameters())]


def test_stand_ins_and_noise_are_those_of_the_whole_model(two):
    """As many at a time as have room, and where only some do."""
    whole, streamed = two
    first, middle, last = (layer.name for layer in whole.shape.layers)
    parts = Slot((LowRank(4, "svd"),)), Slot((SharedBase(0),)), NOTHING, KEPT
    base = Base((6,), (1.0,))
    plans = {x: LayerPlan(x, parts * 2, (base,)) for x in (first, middle, last)}
    more = [plans[middle], LayerPlan(middle, (NOTHING,) * 8), LayerPlan(middle, (KEPT,) * 8)]
    dropping = LayerPlan(last, (DROPPED, *parts, KEPT, KEPT, DROPPED), (base,))
    variants = [{first: plans[first], last: dropping}, {}, plans, {middle: plans[middle]}]
    for held in (2**30, 3 * held_bytes(streamed.model, 32)):
        with mock.patch("locum.models.layer_major.HELD", held), mock.patch("locum.measure.stand_ins.HELD", held):
            assert streamed.together == max(1, held // held_bytes(streamed.model, 32) // 2)
            assert whole.together > len(more)
            for with_losses in (True, False):
                asked = [explorer.stand_ins(more, with_losses) for explorer in two]
                assert all(map(torch.equal, *asked))
            assert torch.equal(*(explorer.divergences(variants) for explorer in two))
            assert torch.equal(*(explorer.noise_price(0.1) for explorer in two))
    losses = whole.stand_ins(more, True)[1]
    assert losses[0] == whole.divergences(variants)[3] > 0 and losses[1] > 0
    assert there(streamed) in ([], [1])


def test_answers_are_those_of_the_whole_model_before_and_after_pruning(two):
    whole, streamed = two
    names = [layer.name for layer in whole.shape.layers]
    for name in (names[1], names[0], names[1]):
        assert torch.equal(whole.output_error(name, TWO), streamed.output_error(name, TWO))
        assert there(streamed) == [names.index(name)]
    candidates = [{names[1]: TWO[a], names[2]: TWO[b]} for a in (0, 1) for b in (0, 1)]
    assert torch.equal(whole.block_error(candidates), streamed.block_error(candidates))
    assert there(streamed) == [1, 2]
    assert_same_losses(two, TWO)
    assert there(streamed) == []
    for explorer in two:
        explorer.prune({names[0]: TWO[0], names[2]: TWO[1]})
    assert there(streamed) == []
    assert_same_losses(two, TWO[[0]])
    for name in reversed(names):
        gone = {names[0]: TWO[0], names[2]: TWO[1]}.get(name, torch.zeros(8, dtype=torch.bool))
        more = TWO[[1 if name == names[0] else 0]] & ~gone
        assert torch.equal(whole.output_error(name, more), streamed.output_error(name, more))
    for explorer in two:
        explorer.prune({names[1]: TWO[0]})
    assert torch.equal(*(explorer.block_error([{names[0]: TWO[1], names[1]: TWO[1]}]) for explorer in two))


def assert_same_losses(two, masks_CE):
    """Of one layer, and of all together, as many candidates at a time as have room."""
    name, last = (two[0].shape.layers[index].name for index in (1, 2))
    asked = [{name: one_E} for one_E in masks_CE] + [{name: masks_CE[0], last: TWO[1]}, {}]
    expected = two[0].loss_without(asked)
    assert torch.equal(two[0].loss_increase(name, masks_CE), expected[: len(masks_CE)])
    assert torch.equal(two[1].loss_increase(name, masks_CE), expected[: len(masks_CE)])
    for held in (2**30, 3 * held_bytes(two[1].model, 32)):
        with mock.patch("locum.models.layer_major.HELD", held):
            assert torch.equal(two[1].loss_without(asked), expected)
    assert expected[-1] == 0 and bool((expected[:-1] != 0).all())


def test_an_unknown_layer_is_refused(two):
    with pytest.raises(OptionError, match="unknown layer"):
        two[1].output_error("model.layers.9.mlp.experts", ONE[:1])


def assert_same(one, two):
    for name, named in one.layers.items():
        assert all(torch.equal(tensor, two.layers[name][key]) for key, tensor in named.items())


def test_a_search_finds_the_same(checkpoint, words, tmp_path):
    few = {"sample": 128, "generations": 2, "population": 4, "tokens": 512, "length": 64}
    made = [
        locum.search(checkpoint, data=[str(words)], out=tmp_path / f"{stream}", stream=stream, **few)
        for stream in (False, True)
    ]
    assert_same(*made)
    said = command(
        "search",
        checkpoint,
        "--data",
        words,
        "--stream",
        "--tokens",
        512,
        "--length",
        64,
        "--dry-run",
        "--out",
        tmp_path / "x",
    )
    assert said.exit_code == 0 and "try removals" in said.stdout
