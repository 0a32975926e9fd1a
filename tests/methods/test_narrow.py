"""Narrowed experts: which columns go, what is computed without them, and the checkpoints that hold them.

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.containers.build import build_layer
from locum.containers.container import StandInExperts
from locum.errors import OptionError, PlanError
from locum.experts.columns import COLUMNS
from locum.experts.parts.narrowed import Narrowed
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.experts.weights import ExpertWeights
from locum.exports.whole_experts import to_stock
from locum.measure.calibration import calibrate
from locum.methods.narrow import Narrow
from locum.models.families import find_layers, read_expert, write_expert
from locum.models.sizes import shape_of
from locum.plans.bits import FewBits
from locum.plans.plan import DROPPED, KEPT, NOTHING, LayerPlan, Slot, make_plan, stand_in
from locum.stats.sums import LayerStatistics, Statistics
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint
from making.containers import KINDS, D, E, F, assert_near, drawn_experts, layer_of, routing
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape, with_sums
from making.oracles import slow_experts
from making.tiny_models import tiny_ids, tiny_model
from making.training import run

WIDTHS = (3, 3, 7, None, 9, 0, 1, None)  # of each expert; None: whole, 0: nothing
SLOTS = tuple(KEPT if w is None else Slot((Narrowed(w),)) if w else NOTHING for w in WIDTHS)


def statistics(shape) -> LayerStatistics:
    generator = torch.Generator().manual_seed(2)
    return LayerStatistics(
        shape, {name: torch.rand(E, F, generator=generator, dtype=torch.float64) for name in COLUMNS["camera"].needs}
    )


def camera(layer, e: int) -> list[float]:
    """CAMERA's energies of an expert's columns, one number at a time."""
    named = [layer[name][e].tolist() for name in ("down_column_square", "gated_hidden_square", "gated_hidden_peak")]
    return [down * (0.1 * spread + 0.9 * peak**2) for down, spread, peak in zip(*named, strict=True)]


def heapr(layer, e: int) -> list[float]:
    n = max(float(layer["count"][e]), 1)
    pairs = zip(layer["hidden_square"][e].tolist(), layer["hidden_gradient_square"][e].tolist(), strict=True)
    return [hidden / n * gradient / n for hidden, gradient in pairs]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:count])


# --- what is computed ---------------------------------------------------------------------------------------------


def with_zeros(weights: ExpertWeights, kept: list[int]) -> dict[str, torch.Tensor]:
    """A whole expert whose other columns of down are zero."""
    mask_F = torch.zeros(F).index_fill(0, torch.tensor(kept, dtype=torch.int64), 1.0)
    parts = {"W1": weights.gate_up_GD, "W2": weights.down_DF * mask_F, "c": torch.zeros(len(weights.down_DF))}
    return parts | {
        "b1": torch.zeros(len(parts["W1"])) if weights.up_bias_F is None else weights.gate_up_bias_G,
        "b2": parts["c"] if weights.down_bias_D is None else weights.down_bias_D,
    }


def narrowed_layer(kind: str, policy=None, dtype=torch.float32) -> StandInExperts:
    shape = layer_of(kind)
    plan = LayerPlan("experts", SLOTS, routing=policy)
    layout, tensors = build_layer(plan, shape, drawn_experts(kind, dtype).__getitem__, statistics(shape))
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.parameters(shape)
    container = StandInExperts(layout, KINDS[kind][0], dtype, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    return container


@pytest.mark.parametrize("way", ["loop", "gathered", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_narrowed_experts_compute_what_whole_ones_do_with_their_other_columns_at_zero(kind: str, way: str) -> None:
    container, own = narrowed_layer(kind), drawn_experts(kind)
    container.way = None if way == "compiled" else way
    layer = statistics(layer_of(kind))
    kept = [best(camera(layer, e), F if width is None else width) for e, width in enumerate(WIDTHS)]
    nothing = {name: torch.zeros_like(x) for name, x in with_zeros(own[0], []).items()}
    parts = {e: with_zeros(own[e], kept[e]) if kept[e] else nothing for e in range(E)}
    x, index, weights = routing(E, 30, 3)
    with torch.set_grad_enabled(way == "loop"):
        assert_near(
            container(x, index, weights), slow_experts(parts.__getitem__, KINDS[kind][0], x, index, weights), 1e-5
        )


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_families_layouts_are_narrowed_alike(family: str) -> None:
    """Interleaved and biased; group-limited, with shared experts."""
    model = tiny_model(family)
    shape, whole, layers, seen = shape_of(model), copy.deepcopy(model), [], {}
    for layer, copied in zip(find_layers(model), find_layers(whole), strict=True):
        e, f = layer.shape.num_experts, layer.shape.expert_width
        seen[layer.shape.name] = torch.rand(e, f, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        layers.append(LayerPlan(layer.shape.name, tuple(Slot((Narrowed(1 + e % (f - 1)),)) for e in range(e))))
        for e, slot in enumerate(layers[-1].slots):
            dead = sorted(set(range(f)) - set(best(seen[layer.shape.name][e].tolist(), slot.parts[0].width)))
            weights = read_expert(copied.experts, e)
            write_expert(
                copied.experts,
                e,
                dataclasses.replace(weights, down_DF=weights.down_DF.clone().index_fill_(1, torch.tensor(dead), 0)),
            )
    ones = [torch.ones_like(x) for x in seen.values()]
    sums = with_sums(
        shape, down_column_square=ones, gated_hidden_square=list(seen.values()), gated_hidden_peak=[x * 0 for x in ones]
    )
    narrow, ids = apply_plan(model, make_plan(shape, layers), sums), tiny_ids()
    with torch.no_grad():
        assert_near(narrow(ids).logits, whole(ids).logits, 1e-4)


def test_a_policys_vectors_are_used_as_far_as_an_expert_is_wide() -> None:
    container = narrowed_layer("swiglu", MainWithVectors(1, "static"))
    with torch.no_grad():
        for name in container.policy_tensors:
            container.get_parameter(name).normal_(generator=torch.Generator().manual_seed(7))
    x, index, weights = routing(E, 30, 3)
    with torch.no_grad():
        container.way = "gathered"
        at_once = container(x, index, weights)
    assert_near(container(x, index, weights), at_once, 1e-5)


# --- which columns go ---------------------------------------------------------------------------------------------


def widths(layer: LayerPlan, f: int) -> list[int]:
    return [f if slot == KEPT else slot.parts[0].width for slot in layer.slots]


TOY = toy_shape(layers=2, experts=5, d=8, f=6)


@functools.cache
def seen_by_toy() -> Statistics:
    seen = make_statistics(TOY)
    for named in seen.layers.values():  # what a backward pass would find
        named["hidden_gradient_square"] = named["hidden_square"].flip(1).exp()
    return seen


@pytest.mark.parametrize("amount", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("budget", ["layer", "global", "expert"])
@pytest.mark.parametrize("score", COLUMNS)
def test_single_columns_go_as_a_slow_loop_says(score: str, budget: str, amount: float) -> None:
    shape, seen = TOY, seen_by_toy()
    energy = camera if score == "camera" else heapr
    columns = []  # those that may go: all but each expert's best two
    for i, layer in enumerate(shape.layers):
        for e in range(5):
            scores = energy(seen.layer(layer.name), e)
            columns += [(scores[c], i, e) for c in range(6) if c not in best(scores, 2)]
    pools = {"layer": [[x for x in columns if x[1] == i] for i in (0, 1)], "global": [columns]}
    pools["expert"] = [[x for x in columns if x[1:] == key] for key in itertools.product((0, 1), range(5))]
    left = dict.fromkeys(itertools.product((0, 1), range(5)), 6)
    for pool in pools[budget]:
        for _, i, e in sorted(pool)[: int(amount * len(pool) + 1e-9)]:
            left[i, e] -= 1
    planned = layers_of(Narrow(score, budget, minimum=2, multiple=1), seen, shape, amount)
    for i, layer in enumerate(planned):
        assert widths(layer, 6) == [left[i, e] for e in range(5)]
        assert all(slot == KEPT or slot.parts == (Narrowed(left[i, e], score),) for e, slot in enumerate(layer.slots))


def test_blocks_that_go_have_the_smallest_sum_that_can_be_had() -> None:
    """All ways to take so many blocks of four columns off the ends of experts, tried one by one."""
    shape = toy_shape(layers=1, experts=3, d=64, f=16)
    seen = make_statistics(shape)
    (layer,) = layers_of(Narrow(multiple=4), seen, shape, 0.5)
    ordered = [sorted(camera(seen.layer(layer.layer), e), reverse=True) for e in range(3)]
    ways = [w for w in itertools.product((4, 8, 12, 16), repeat=3) if sum(w) == sum(widths(layer, 16)) == 48 - 16]
    lost = {w: sum(sum(scores[n:]) for scores, n in zip(ordered, w, strict=True)) for w in ways}
    assert tuple(widths(layer, 16)) == min(lost, key=lost.get)


@pytest.mark.parametrize("score", COLUMNS)
def test_columns_that_do_nothing_are_found_and_their_loss_is_none(score: str) -> None:
    """Half of the columns of every expert, at random places, in unequal numbers, have a down of zero."""
    model, draw = tiny_model("olmoe"), torch.Generator().manual_seed(0)
    for layer in find_layers(model):
        for e in range(layer.shape.num_experts):
            weights, dead = read_expert(layer.experts, e), torch.randperm(16, generator=draw)[: 4 if e % 2 else 12]
            write_expert(
                layer.experts, e, weights.map(lambda n, t, d=dead: t.index_fill(1, d, 0) if n == "down_DF" else t)
            )
    shape, ids = shape_of(model), tiny_ids(6, 32)
    seen = calibrate(model, tokens_of(ids), needs=COLUMNS[score].needs)
    layers = layers_of(Narrow(score, multiple=1, minimum=4), seen, shape, 8 / 12)
    assert [widths(layer, 16) for layer in layers] == [[4, 12] * 4] * 2
    plan = make_plan(shape, layers)
    assert plan.removed(shape) == 0.5
    with torch.no_grad():
        before = model(ids).logits
        assert_near(apply_plan(model, plan, seen)(ids).logits, before, 1e-5)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(checkpoint, words, tmp_path_factory):
    """Statistics of `checkpoint` and its narrowed copy, by the command line."""
    folder = tmp_path_factory.mktemp("narrow")
    needs = [word for need in COLUMNS["camera"].needs for word in ("--also", need)]
    line = ("calibrate", checkpoint, "--data", words, "--tokens", 512, "--length", 32, *needs)
    for words_of in (
        (*line, "--out", folder / "stats"),
        ("plan", folder / "stats", "--method", "narrow", "--remove", "0.4", "--out", folder / "plan.json"),
        (
            "apply",
            checkpoint,
            "--plan",
            folder / "plan.json",
            "--statistics",
            folder / "stats",
            "--out",
            folder / "small",
        ),
    ):
        done = command(*words_of)
        assert done.exit_code == 0, done.output + done.stderr
    return folder


def logits(model) -> torch.Tensor:
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model.eval()(tiny_ids()).logits


def test_files_equal_the_live_model_to_the_bit_and_have_the_size_that_was_planned(checkpoint, made, tmp_path) -> None:
    plan, shape = locum.load_plan(made / "plan.json"), locum.read_shape(checkpoint)
    found = [sorted({slot.parts[0].width for slot in x.slots if slot != KEPT}) for x in plan.layers]
    assert all(len(ws) > 1 and all(w % 4 == 0 for w in ws) for ws in found)  # of unequal widths
    assert abs(plan.removed(shape) - 0.4) < 0.02
    tensors = {k: v for file in (made / "small").glob("*.safetensors") for k, v in load_file(file).items()}
    assert sum(t.nbytes for t in tensors.values()) == plan.size(shape).bytes
    live = apply_plan(locum.load_model(checkpoint), plan, locum.load_statistics(made / "stats"))
    again = AutoModelForCausalLM.from_pretrained(made / "small")
    assert torch.equal(logits(again), logits(live))
    locum.export(made / "small", to="stock", out=tmp_path / "stock")
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), logits(live), 1e-5)


@pytest.mark.parametrize(
    ("family", "name"), [("olmoe", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size"), ("deepseek_v3", None)]
)
def test_experts_of_one_width_export_to_a_stock_checkpoint_as_small(family: str, name: str | None, tmp_path) -> None:
    """Where the config has a number for their width alone; of DeepSeek, shared experts follow it."""
    original = write_checkpoint(tmp_path / "original", family)
    shape = locum.read_shape(original)
    ones = [torch.rand(x.num_experts, 16, generator=torch.Generator().manual_seed(3)) for x in shape.layers]
    seen = with_sums(shape, **dict.fromkeys(COLUMNS["camera"].needs, ones))
    layers = [LayerPlan(x.name, (Slot((Narrowed(12),)),) * x.num_experts) for x in shape.layers]
    live = apply_plan(locum.load_model(original), make_plan(shape, layers), seen)
    expected = logits(live)
    stock = to_stock(live)
    stock.save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert "quantization_config" not in config and (name is None or config[name] == 12)
    width = locum.read_shape(tmp_path / "stock").layers[0].expert_width
    assert width == (16 if name is None else 12)
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), expected, 1e-5)


def test_the_export_says_that_it_is_no_larger(checkpoint, made, tmp_path) -> None:
    plan = locum.plan(made / "stats", method="narrow", budget="expert", remove=0.25)
    small = locum.apply(checkpoint, plan=plan, statistics=made / "stats", out=tmp_path / "small")
    done = command("export", small, "--to", "stock", "--out", tmp_path / "stock")
    assert done.exit_code == 0 and "the stock layout with experts of width 12" in done.output, done.output
    sizes = [locum.inspect(folder)["bytes"] for folder in (small, tmp_path / "stock")]
    assert sizes[0] == sizes[1] < locum.inspect(checkpoint)["bytes"]
    assert "computes the same and is as large" in (tmp_path / "stock" / "README.md").read_text()


@pytest.mark.journeys
def test_engines_keep_the_promise(made) -> None:
    verified = command(
        "verify", made / "small", "--engine", "transformers", "--statistics", made / "stats", "--long-tokens", 64
    )
    assert verified.exit_code == 0, verified.output


def test_narrowed_experts_train_with_bases_and_do_not_fade(checkpoint, made) -> None:
    plan = locum.load_plan(made / "plan.json")
    original = locum.load_model(checkpoint).float()
    model = apply_plan(copy.deepcopy(original), plan, locum.load_statistics(made / "stats"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".narrowed." in name}
    run(model, plan, original, how="lora", rank=2)
    after = model.state_dict()
    assert before and all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(OptionError, match=r"fades out the old weights .* the plan \(narrow\) leaves none"):
        run(model, plan, original, how="annealed")
    both = make_plan(
        shape_of(original), [LayerPlan(x.layer, (stand_in(rank=2, start="svd"), *x.slots[1:])) for x in plan.layers]
    )
    small = apply_plan(copy.deepcopy(original), both, locum.load_statistics(made / "stats"))
    run(small, both, original, how="annealed", end_fraction=0.5)  # the others' old weights do


def test_narrowed_experts_may_be_in_few_bits() -> None:
    shape = layer_of()
    model = toy_shape(layers=1, experts=E, d=D, f=F)
    plan = FewBits("int8-g32", "nearest").applied([LayerPlan(model.layers[0].name, SLOTS)], model)[0]
    layout, tensors = build_layer(plan, shape, drawn_experts("swiglu").__getitem__, statistics(shape))
    assert sum(t.nbytes for t in tensors.values()) == plan.bytes(model.layers[0], model) == layout.nbytes(4)
    packed, (x, index, weights) = StandInExperts(layout, KINDS["swiglu"][0], torch.float32, "meta"), routing(E, 30, 3)
    packed.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        assert_near(packed(x, index, weights), narrowed_layer("swiglu")(x, index, weights), 0.03)


@pytest.mark.parametrize(
    ("slot", "words"),
    [
        (Slot((Narrowed(16),)), "narrowed to 16 columns; allowed: 1 to 15"),
        (Slot((Narrowed(0),)), "narrowed to 0 columns"),
        (Slot((Narrowed(4, "camara"),)), "unknown score of columns 'camara': did you mean 'camera'"),
        (stand_in(None, 2, "svd", False, Narrowed(4)), "is narrowed and has rank 2"),
        (stand_in(constant=True), None),
        (DROPPED, None),
    ],
)
def test_what_cannot_be_is_refused(slot: Slot, words: str | None) -> None:
    shape = shape_of(tiny_model("olmoe"))
    layers = [LayerPlan(shape.layers[0].name, (slot, *[KEPT] * 7))]
    if words is None:
        assert make_plan(shape, layers).layers
        return
    with pytest.raises(PlanError, match=words):
        make_plan(shape, layers)
