"""MergeMoE: groups by weights, down weights fitted to outputs, in files as in memory, and what it needs it names."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import locum
from locum.checkpoints.application import apply_plan
from locum.errors import PlanError
from locum.measure.calibration import calibrate
from locum.methods.merge_moe import MergeMoE
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import Plan, make_plan
from making.groups import assert_weights, groups_of
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, compressed, copy_of, edit, logits, with_twins

SHAPE = toy_shape()


@pytest.mark.parametrize("amount", [0.1, 0.5, 1.0])
def test_groups_equal_a_slow_loop(amount: float) -> None:
    statistics = make_statistics(SHAPE, 1)
    for fit in (True, False):
        for layer in layers_of(MergeMoE(fit=fit), statistics, SHAPE, amount):
            named = statistics.layer(layer.layer)
            usage, product = named["count"].tolist(), named["weight_product"].tolist()
            order = sorted(range(16), key=lambda e: (-usage[e], -float(named["softmax_sum"][e])))
            centres = order[: 16 - int(amount * 15 + 1e-9)]
            groups = {c: [c] for c in centres}
            for e in order[len(centres) :]:
                far = [product[e][e] + product[c][c] - 2 * product[e][c] for c in centres]
                groups[centres[far.index(min(far))]].append(e)
            assert groups_of(layer) == sorted(tuple(sorted(group)) for group in groups.values())
            assert_weights(layer, usage)
            assert {base.merge for base in layer.bases} <= {"least-squares" if fit else "mean"}


def scaled_twins():
    """Copies of two experts whose hidden units are louder in up and quieter in down, each by a factor of its own."""
    model = with_twins(permuted=False)
    for number, layer in enumerate(find_layers(model)):
        for e in (2, 6, 3, 5):
            weights = copy_of(layer, e)
            generator = torch.Generator().manual_seed(10 * number + e)
            factor_F = torch.empty(weights.up_FD.shape[0]).uniform_(0.5, 2, generator=generator)
            up_FD, down_DF = weights.up_FD * factor_F[:, None], weights.down_DF / factor_F
            edit(layer, {e: dataclasses.replace(weights, up_FD=up_FD, down_DF=down_DF)})
    return model


def test_experts_that_differ_in_scale_alone_are_merged_without_loss_where_down_is_fitted() -> None:
    before, off = logits(scaled_twins()), {}
    for fit in (True, False):
        model = scaled_twins()
        shape, method = shape_of(model), MergeMoE(score="gate", fit=fit)
        statistics = calibrate(model, tokens_of(IDS), needs=method.needs())
        layers = layers_of(method, statistics, shape, 4 / 7)
        even = [
            dataclasses.replace(
                layer, bases=tuple(dataclasses.replace(base, weights=(0.4, 0.3, 0.3)) for base in layer.bases)
            )
            for layer in layers
        ]
        assert all({base.experts for base in layer.bases} == {(0, 2, 6), (1, 3, 5)} for layer in even)
        after = compressed(model, even, statistics if fit else None)
        off[fit] = float((after - before).abs().max() / before.abs().max())
    assert off[True] < 1e-3 and off[False] > 1e-2


def test_files_and_memory_agree_and_the_plan_says_what_it_reads(checkpoint, words, tmp_path) -> None:
    seen = locum.calibrate(
        checkpoint, data=[str(words)], out=tmp_path / "s", gram=False, tokens=1024, length=64, also=MergeMoE().needs()
    )
    plan = locum.plan(tmp_path / "s", method="merge-moe", remove=0.4, out=tmp_path / "plan.json")
    assert Plan.loads((tmp_path / "plan.json").read_text()).layers == plan.layers and plan.needs == ("input_sample",)
    assert '"merge": "least-squares"' in (tmp_path / "plan.json").read_text()
    locum.apply(checkpoint, plan=plan, statistics=seen, out=tmp_path / "small")
    from_files = locum.load_model(tmp_path / "small").state_dict()
    model = locum.load_model(checkpoint)
    in_memory = apply_plan(model, plan, seen).state_dict()
    assert from_files.keys() == in_memory.keys()
    assert all(torch.equal(from_files[name], tensor) for name, tensor in in_memory.items())
    with pytest.raises(PlanError, match="bases by least-squares"):
        apply_plan(locum.load_model(checkpoint), plan)


def test_an_unknown_merge_is_refused() -> None:
    statistics = make_statistics(SHAPE)
    (first, *rest) = layers_of(MergeMoE(), statistics, SHAPE, 0.5)
    bad = dataclasses.replace(first, bases=(dataclasses.replace(first.bases[0], merge="median"), *first.bases[1:]))
    with pytest.raises(PlanError, match="base 0: unknown merge 'median'"):
        make_plan(SHAPE, [bad, *rest])
