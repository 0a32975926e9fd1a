"""Recovery beside weights in few bits: their bytes stay, adapters learn, and the plan of the result says which of them stay.

Letters: D model width, F expert width, T tokens.
"""

from __future__ import annotations

import copy
import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.patch import vectors_and_routers
from locum.checkpoints.skeleton import read_shape
from locum.containers.layout import Layout
from locum.containers.rows import rows_of_expert
from locum.containers.stack import Matrices
from locum.errors import OptionError
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_weights import OwnWeights
from locum.experts.parts.shared_base import SharedBase
from locum.formats.rows import pack, pack_stack, row_format, unpack, unpack_stack
from locum.measure.use import Use
from locum.models.families import find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, Base, LayerPlan, Plan, Slot, make_plan
from locum.plans.plan_file import load_plan
from locum.training.context import Context, Original
from locum.training.one_by_one import OneByOne
from locum.training.options import make_recovery
from locum.training.recovery import count_trainable, recover_model
from locum.training.rounding import Rounding
from making.checkpoints import locum as command
from making.planted import edit
from making.policies import TOP_4
from making.tiny_models import tiny_ids, tiny_model
from making.training import QUICK, Killed, run, tiny_tokens
from test_vectors import changed, routed, state

INT4, INT8 = {"format": "int4-g32"}, {"format": "int8-g64"}
SLOTS = (
    KEPT,
    Slot((OwnWeights(**INT4),)),  # gets an adapter that stays
    Slot((OwnWeights(**INT4), LowRank(2, "svd", **INT8))),
    Slot((SharedBase(0, **INT4), LowRank(3, "svd", **INT4))),
    Slot((SharedBase(0, **INT4),)),  # so does this, of its own
    Slot((LowRank(3, "svd", **INT4),)),
    Slot((SharedBase(1), LowRank(3, "svd"))),
    Slot((SharedBase(1), LowRank(3))),
)
BASES = (Base((3, 4), (0.5, 0.5)), Base((6, 7), (0.5, 0.5)))
HOW = pytest.mark.parametrize("how", ["lora", "kd", "layerwise", "annealed"])


def mixed(model) -> Plan:
    return make_plan(shape_of(model), [LayerPlan(x.name, SLOTS, BASES) for x in shape_of(model).layers])


def in_few_bits(model, *parts, **options) -> Plan:
    """Every expert in int4, with these parts beside it."""
    slot = Slot((OwnWeights(**(INT4 | options)), *parts))
    return make_plan(shape_of(model), [LayerPlan(x.name, (slot,) * x.num_experts) for x in shape_of(model).layers])


@pytest.fixture
def olmoe():
    return tiny_model("olmoe", num_hidden_layers=1)


@pytest.fixture
def small(olmoe):
    return apply_plan(copy.deepcopy(olmoe), mixed(olmoe))


def opened(model, plan, original=None, how="lora", **options):
    chosen = make_recovery({"how": how, **QUICK, **options})
    context = Context(model, plan, chosen.steps, 0, None if original is None else Original.of(original))
    chosen.way.check(context)
    chosen.way.prepare(context, chosen.steps)
    return context, chosen.way


@torch.no_grad()
def logits(model) -> Tensor:
    return model(tiny_ids()).logits


def packed_rows(model) -> dict[str, Tensor]:
    """The bytes of experts' own weights and bases."""
    return {n: t.clone() for n, t in model.state_dict().items() if ".dense_int" in n}


def near(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    return float((a - b).detach().abs().max()) <= limit * float(b.detach().abs().max())


# --- what is trained, and what it begins and ends as


def test_a_run_begins_with_the_model_as_it_came_and_gives_it_back_to_the_bit(olmoe, small):
    before, rows = {n: t.clone() for n, t in small.state_dict().items()}, packed_rows(small)
    expected = logits(small)
    context, way = opened(small, mixed(olmoe))
    assert near(logits(small), expected) and len(rows) == 2
    way.finish(context)
    after = small.state_dict()
    assert near(logits(small), expected)
    assert all(torch.equal(after[n], t) for n, t in before.items() if ".adapters." not in n)
    for layer, plan in zip(find_layers(small), mixed(olmoe).layers, strict=True):
        came, now = Layout.of(plan, layer.shape), layer.experts.layout
        for stack in came.stacks_of(LowRank):  # whatever their stacks are numbered now
            prefix, old = next((p, s) for p, s in came.prefixed() if s is stack)
            found, new_stack = next(
                (p, s)
                for p, s in now.prefixed()
                if (s.part, s.variant, s.format) == (old.part, old.variant, old.format)
            )
            for leaf in LowRank.tensors(old.variant, came):
                for e, row in enumerate(old.rows):
                    if row >= 0:
                        one = before[f"{layer.shape.name}.{prefix}{leaf}"][row]
                        assert torch.equal(after[f"{layer.shape.name}.{found}{leaf}"][new_stack.rows[e]], one)


def written_out(container, x_TD, index_TK, gate_TK) -> Tensor:
    """The layer by weights that are written out from the numbers that bytes stand for; adapters as they are trained."""
    layout, total = container.layout, torch.zeros_like(x_TD)
    kinds = dict(layout.prefixed())
    for e in range(layout.num_experts):
        first, down = 0.0, 0.0
        for prefix, stack in kinds.items():
            if (row := stack.rows[e]) < 0:
                continue
            path, shapes = prefix.removesuffix("."), stack.kind.tensors(stack.variant, layout)
            if stack.part == OwnWeights.name:
                module, own = container.stack(path), container.layout.num_whole_numbers - 1
                if not stack.format and container.shared is not None and row >= own:
                    module, row = container.shared, row - own
                found = {n: getattr(module, n)[row] for n in shapes}
                if stack.format:
                    found = {n: unpack(stack.format, t, shapes[n], torch.float32) for n, t in found.items()}
                first, down = first + found["gate_up_NGD"], down + found["down_NDF"]
                continue
            a = {n: getattr(container.stack(path), n) for n in shapes}
            if path in container.rounding:  # straight through: the value is the rounded one
                a = {
                    n: t
                    + (
                        torch.stack(
                            [
                                container.rounding[path][n].numbers(container.rounding[path][n].bytes(t))[i]
                                for i in range(len(t))
                            ]
                        )
                        - t
                    ).detach()
                    for n, t in a.items()
                }
            r = a["up_B_FR"].shape[-1]
            gate, up = a["gate_up_A"][row][:r], a["gate_up_A"][row][r:]
            first = first + torch.cat([a["gate_B_FR"][row] @ gate, a["up_B_FR"][row] @ up])
            down = down + a["down_B_DR"][row] @ a["down_A_RF"][row]
        out_TD = container.activate(x_TD @ first.T) @ down.T
        total = total + (gate_TK * (index_TK == e)).sum(1, keepdim=True) * out_TD
    return total


def test_gradients_are_those_of_the_dequantised_model(olmoe, small):
    context, _ = opened(small, mixed(olmoe), rank=4)
    container, generator = context.layers[0].container, torch.Generator().manual_seed(3)
    trained = {n: p for n, p in container.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():  # as after some training
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    x_TD = torch.randn(24, 32, generator=generator, requires_grad=True)
    index_TK, gate_TK = torch.rand(24, 8, generator=generator).topk(3).indices, torch.rand(24, 3, generator=generator)
    gate_TK.requires_grad_(True)
    ours, theirs = container(x_TD, index_TK, gate_TK), written_out(container, x_TD, index_TK, gate_TK)
    assert near(ours, theirs)
    about = {"x": x_TD, "gates": gate_TK, **trained}
    one, two = (torch.autograd.grad(y.square().sum(), about.values()) for y in (ours, theirs))
    for name, a, b in zip(about, one, two, strict=True):
        assert near(a, b, 1e-4) and float(b.abs().max()) > 0, name
    assert len(trained) == 4 * 5 + 2 and len(container.rounding) == 2


def test_autograd_keeps_bytes_and_not_numbers(olmoe, small, monkeypatch):
    """What is made of a row is gone after the forward pass, and is made again for backward."""
    context, _ = opened(small, mixed(olmoe))
    container, made, read = context.layers[0].container, [], Matrices.__getitem__
    monkeypatch.setattr(Matrices, "__getitem__", lambda self, row: made.append(weakref.ref(x := read(self, row))) or x)
    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index_TK = torch.arange(40)[:, None] % 8
    out_TD = container(x_TD, index_TK, torch.ones(40, 1))
    assert len(made) == 2 * 3 and not any(ref() is not None for ref in made)
    out_TD.sum().backward()
    assert len(made) == 4 * 3 and x_TD.grad.abs().sum() > 0


@HOW
def test_rows_keep_their_bytes_and_the_result_is_what_the_plan_now_says(olmoe, small, how):
    plan, rows, shape = mixed(olmoe), packed_rows(small), shape_of(olmoe)
    way = make_recovery({"how": how}).way
    grown = way.becomes(plan, shape_of(small).layers)
    model, summary = run(small, plan, olmoe, how=how, steps=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in rows.items())
    assert grown.size(shape).bytes == sum(t.nbytes for t in after.values()) > plan.size(shape).bytes
    said = model.config.quantization_config.layers
    for layer in find_layers(model):
        layout = Layout.of(grown.layer(layer.shape.name), layer.shape)
        assert layer.experts.layout == layout and said[layer.shape.name] == layout.to_json()
    parts = [slot.parts for slot in grown.layers[0].slots]
    assert parts[1] == (OwnWeights(**INT4), LowRank(3)) and parts[4] == (SharedBase(0, **INT4), LowRank(3))
    assert [parts[e] == SLOTS[e].parts for e in range(8)] == [True, False, True, True, False, True, True, True]
    assert summary["trainable_parameters"] == count_trainable(
        apply_plan(copy.deepcopy(olmoe), plan), plan, make_recovery({"how": how})
    )


def test_what_was_trained_is_what_is_written(olmoe, small):
    """Adapters in few bits are rounded while they learn: closing changes nothing, and they moved."""
    plan = mixed(olmoe)
    before = {e: rows_of_expert(find_layers(small)[0].experts, e) for e in (2, 3, 5)}
    context, way = opened(small, plan, train_bases=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in small.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    trained = logits(small)
    way.finish(context)
    assert near(logits(small), trained)
    after = {e: rows_of_expert(find_layers(small)[0].experts, e) for e in before}
    for e, rows in before.items():
        moved = [
            not torch.equal(t, after[e][p][leaf])
            for p, row in rows.items()
            if "down_A_RF" in row
            for leaf, t in row.items()
        ]
        assert all(moved) and len(moved) == 5, e


@pytest.mark.parametrize("format", ["int4-g32", "int2-g64-z", "int8-g128", "fp8-scaled", "mxfp4"])
def test_a_stack_of_matrices_is_its_matrices(format):
    weight = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    bytes_NY = pack_stack(format, weight)
    assert torch.equal(bytes_NY, torch.stack([pack(format, row_format(format).write(x)) for x in weight]))
    each = torch.stack([unpack(format, x, (7, 64), torch.float32) for x in bytes_NY])
    assert torch.equal(unpack_stack(format, bytes_NY, (7, 64), torch.float32), each)


def test_a_matrix_keeps_its_bytes_until_its_nearest_levels_are_nearer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, 40, generator=generator)
    came = pack_stack("int4-g32", weight)
    other = came.clone()
    other[:, 0] ^= 0x11  # levels that nobody's nearest are, as GPTQ's
    rounding = Rounding(other, "int4-g32", (6, 40))
    start = rounding.numbers(other).requires_grad_(True)
    assert torch.equal(rounding.bytes(start), other) and torch.equal(rounding(start), start)
    with torch.no_grad():
        start[0] += 0.3 * torch.randn(6, 40, generator=generator)
    assert torch.equal(rounding.bytes(start)[1], other[1])
    assert torch.equal(rounding.bytes(start)[0], pack_stack("int4-g32", start.detach())[0])
    (gradient,) = torch.autograd.grad((3 * rounding(start)).sum(), start)
    assert torch.equal(gradient, torch.full_like(start, 3.0))


# --- planted truth, and going on


def low_rank_error(model, plan, size=0.1):
    """A model whose weights are the numbers that the plan's bytes stand for, and something of rank 1 that they lack."""
    made, generator = apply_plan(copy.deepcopy(model), plan), torch.Generator().manual_seed(7)
    for layer, packed in zip(find_layers(model), find_layers(made), strict=True):
        for e in range(layer.shape.num_experts):
            (row,) = rows_of_expert(packed.experts, e).values()
            gate, up = row["gate_up_NGD"].chunk(2)
            numbers = {"gate_FD": gate, "up_FD": up, "down_DF": row["down_NDF"]}
            more = {
                n: size * torch.outer(*(torch.randn(k, generator=generator) for k in t.shape))
                for n, t in numbers.items()
            }
            edit(layer, {e: replace(read_expert(layer.experts, e), **{n: t + more[n] for n, t in numbers.items()})})
    return model, made


def test_what_quantising_lost_is_found_where_it_is_of_low_rank():
    """Nearly all of it by recovery, from the original's layer alone."""
    original = tiny_model("olmoe", num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)
    plan = in_few_bits(original)
    original, small = low_rank_error(original, plan)
    gap = float((logits(small) - logits(original)).square().mean())
    given = {"how": "layerwise", "rank": 1, "steps": 40, "batch_size": 8, "learning_rate": 5e-2, "schedule": "cosine"}
    model, _ = recover_model(
        small, plan, tiny_tokens(32, 24), None, make_recovery(QUICK | given), Original.of(original)
    )
    assert float((logits(model) - logits(original)).square().mean()) < 0.15 * gap


@pytest.mark.parametrize("how", ["lora", "annealed"])
def test_a_killed_run_goes_on_to_the_same_bytes(olmoe, small, how, tmp_path):
    plan, options = (
        mixed(olmoe),
        {"how": how, "steps": 5, "checkpoint_every": 2, "schedule": "cosine", "learning_rate": 1e-2},
    )
    options |= {"end_fraction": 0.9} if how == "annealed" else {}
    whole, _ = run(copy.deepcopy(small), plan, olmoe, tiny_tokens(3), **options)

    def kill(step, steps, loss):
        if step == 3:
            raise Killed

    given = options | {"workdir": tmp_path / "work"}
    with pytest.raises(Killed):
        run(copy.deepcopy(small), plan, olmoe, tiny_tokens(3), progress=kill, **given)
    resumed, _ = run(copy.deepcopy(small), plan, olmoe, tiny_tokens(3), **given)
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_in_sixteen_bits_what_stays_is_in_sixteen_bits(olmoe):
    original = olmoe.bfloat16()
    plan = in_few_bits(original)
    model, _ = run(apply_plan(copy.deepcopy(original), plan), plan, original, how="lora", precision="bf16")
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in model.state_dict().items() if ".experts." in name}
    assert dtypes.pop("gate_up_NGD") == dtypes.pop("down_NDF") == torch.uint8 and {*dtypes.values()} == {torch.bfloat16}


# --- ways that train something else than adapters


@pytest.mark.parametrize("how", ["router", "router-kd"])
def test_routers_learn_beside_bytes(olmoe, small, how):
    before, layouts = state(small), [layer.experts.layout for layer in find_layers(small)]
    model, _ = run(small, mixed(olmoe), olmoe, how=how)
    assert changed(before, model) == set(vectors_and_routers(model)) != set()
    assert [layer.experts.layout for layer in find_layers(model)] == layouts


def test_fewer_and_fewer_experts_run_beside_bytes():
    original = tiny_model("olmoe", num_hidden_layers=1, **TOP_4)
    plan = routed(mixed(original))
    model = apply_plan(copy.deepcopy(original), plan)
    rows, routers = packed_rows(model), {n: t.clone() for n, t in vectors_and_routers(model).items()}
    model, _ = run(model, plan, original, how="seer")
    after = model.state_dict()
    assert rows and all(torch.equal(after[name], tensor) for name, tensor in rows.items())
    assert not any(torch.equal(after[n], t) for n, t in routers.items() if "offsets" not in n)
    grown = make_recovery({"how": "seer"}).way.becomes(plan, shape_of(original).layers)
    assert [x.experts.layout for x in find_layers(model)] == [
        Layout.of(x, y.shape) for x, y in zip(grown.layers, find_layers(model), strict=True)
    ]


def used(model, *experts):
    """Text that selects these experts alone."""
    count_E = torch.zeros(8, dtype=torch.float64)
    count_E[list(experts)] = 1
    return {x.shape.name: Use(len(experts), 1, count_E, count_E) for x in find_layers(model)}


def test_chosen_experts_that_are_numbers_learn_beside_bytes(olmoe, small):
    """6 and 7 with the base that they share."""
    before, expected = state(small), logits(small)
    options, uses = make_recovery({**QUICK, "how": "esft", "threshold": 1.0}), used(small, 0, 6, 7)
    context = Context(small, mixed(olmoe), 1, 0, uses=uses)
    options.way.check(context)
    options.way.prepare(context, 0)
    (opened_layer,) = context.layers
    assert opened_layer.container.apart.keys() == {"dense", "adapters.1"} and near(logits(small), expected)
    assert opened_layer.container.apart["dense"] == (0, 1)
    options.way.finish(context)
    assert changed(before, small) == set()
    model, _ = recover_model(small, mixed(olmoe), tiny_tokens(), None, options, uses=uses)
    assert changed(before, model) and not any("_int" in name for name in changed(before, model))


def test_chosen_experts_in_few_bits_are_refused(olmoe, small):
    before, options = state(small), make_recovery({**QUICK, "how": "esft", "threshold": 1.0})
    words = r"of the 3 that it chose in .* 2 are in few bits \(first: 3\), which stay as they are; use --how lora"
    with pytest.raises(OptionError, match=words):
        recover_model(small, mixed(olmoe), tiny_tokens(), None, options, uses=used(small, 0, 3, 5))
    assert changed(before, small) == set()


# --- sizes and refusals


def test_with_keep_size_nothing_is_added(olmoe, small):
    plan = mixed(olmoe)
    layouts = [layer.experts.layout for layer in find_layers(small)]
    model, _ = run(small, plan, olmoe, how="lora", keep_size=True)
    assert [layer.experts.layout for layer in find_layers(model)] == layouts
    assert sum(t.nbytes for t in model.state_dict().values()) == plan.size(shape_of(olmoe)).bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"how": "lora", "keep_size": True}, "--how lora would train nothing: all experts are in few bits"),
        (
            {"how": "full"},
            r"--how full trains every weight, and those in few bits \(int4-g32\) stay as they are; use --how kd",
        ),
        (
            {"how": "experts"},
            r"--how experts trains every weight of experts, and those in few bits \(int4-g32\) stay as they are",
        ),
        ({"how": "esft"}, r"--how esft trains whole experts, and all are in few bits \(int4-g32\), .*; use --how kd"),
        ({"how": "annealed"}, "fades out the old weights of replaced experts"),
        ({"how": "lora", "rank": 17}, "--rank is 17; allowed: at most 16"),
    ],
)
def test_what_cannot_be_is_refused_by_name(olmoe, options, words):
    plan = in_few_bits(olmoe)
    model = apply_plan(copy.deepcopy(olmoe), plan)
    with pytest.raises(OptionError, match=words):
        run(model, plan, olmoe, **options)
    assert [layer.experts.layout for layer in find_layers(model)] == [
        Layout.of(layer, shape.shape) for layer, shape in zip(plan.layers, find_layers(model), strict=True)
    ]


# --- files


@pytest.fixture(scope="module")
def few(checkpoint, tmp_path_factory):
    """A checkpoint in few bits, all but the last layer by the mixed plan; the rest in int4 alone."""
    folder, shape = tmp_path_factory.mktemp("few"), read_shape(checkpoint)
    plain = (Slot((OwnWeights(**INT4),)),) * 8
    layers = [LayerPlan(shape.layers[0].name, SLOTS, BASES), LayerPlan(shape.layers[1].name, plain)]
    return locum.apply(checkpoint, plan=make_plan(shape, layers), out=folder / "few")


SHORT = ("--steps", 2, "--batch-size", 1, "--length", 32, "--validation-tokens", 64)


def test_the_command_writes_an_ordinary_checkpoint(few, checkpoint, words, tmp_path):
    said = command("recover", few, "--data", words, "--out", tmp_path / "out", *SHORT)
    assert said.exit_code == 0, said.output
    here, there = load_file(few / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    rows = [name for name in here if ".dense_int4" in name]
    assert len(rows) == 4 and all(torch.equal(here[name], there[name]) for name in rows)
    plan, shape = load_plan(tmp_path / "out" / "plan.json"), read_shape(checkpoint)
    assert plan.size(shape).bytes == read_shape(tmp_path / "out").bytes > read_shape(few).bytes
    assert json.loads((tmp_path / "out" / "locum.json").read_text())["plan"] == plan.id
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(logits(again)).all()
    more = command("recover", tmp_path / "out", "--data", words, "--out", tmp_path / "more", *SHORT)
    assert more.exit_code == 0, more.output
    assert load_plan(tmp_path / "more" / "plan.json").id == plan.id  # it grows once


@pytest.mark.journeys
def test_verify_passes_what_was_recovered(few, words, tmp_path):
    command("recover", few, "--data", words, "--out", tmp_path / "out", *SHORT)
    checks = locum.verify(tmp_path / "out", engine="transformers", prompts=1, new_tokens=2)
    assert not [check for check in checks if check.result == "failed"], checks


def test_layer_by_layer_files_get_no_new_adapters(few, words, tmp_path):
    given = ("recover", few, "--data", words, "--how", "layerwise", *SHORT)
    said = command(*given, "--out", tmp_path / "no")
    assert said.exit_code == 2 and "give --keep-size, or use --how kd or --how lora" in " ".join(said.output.split()), (
        said.output
    )


def test_layer_by_layer_what_is_there_is_trained(few, words, tmp_path, monkeypatch):
    real, losses = OneByOne._losses, iter((2.0, 1.0))  # as if it had become better, so that it is taken
    monkeypatch.setattr(OneByOne, "_losses", lambda *given: (real(*given), next(losses))[1])
    given = ("--how", "layerwise", "--stream", "--keep-size", "--learning-rate", 1e-2, *SHORT)
    said = command("recover", few, "--data", words, *given, "--out", tmp_path / "out")
    assert said.exit_code == 0, said.output
    here, there = load_file(few / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in here if not torch.equal(here[name], there[name])}
    assert here.keys() == there.keys() and {t.shape for t in here.values()} == {t.shape for t in there.values()}
    assert changed and all(".experts.adapters." in name or ".experts.dense." in name for name in changed), changed


def advice_of(said) -> str:
    """One line of an error, without the breaks of the terminal."""
    assert said.exit_code == 2, said.output
    return " ".join(said.output.split())


def test_compress_holds_what_fit_promised(checkpoint, words, tmp_path):
    """And what it advises instead does what was asked: to the byte, with options that the way has."""
    shape = read_shape(checkpoint)
    given = ("compress", checkpoint, "--method", "prune", "--data", words, "--tokens", 256, "--length", 32)
    given += ("--bits", 4, "--quantiser", "nearest")
    training = ("--recover", "lora", "--recover-rank", 2, "--recover-steps", 1, "--recover-length", 32)
    most = shape.bytes - shape.bytes_of_experts * 3 // 4
    why = advice_of(command(*given, *training, "--fit", most, "--out", tmp_path / "no"))
    assert "keep-size" not in why  # all is in few bits, and nothing else is there to train
    left = int(re.search(r"give --fit ([\d,]+) without --recover", why)[1].replace(",", ""))
    whole = int(re.search(r"give --fit ([\d,]+), or", why)[1].replace(",", ""))
    added, before = (
        int(n.replace(",", "")) for n in re.search(r"adds ([\d,]+) bytes .* to the ([\d,]+)", why).groups()
    )
    assert left == most - added and before + added > most
    assert command(*given, "--fit", left, "--out", tmp_path / "small").exit_code == 0
    how = why.partition("by locum ")[2].split()[:3]
    quick = ("--rank", 2, "--steps", 1, "--length", 32)
    said = command(how[0], tmp_path / "small", *how[1:], *quick, "--data", words, "--out", tmp_path / "yes")
    assert said.exit_code == 0, said.output
    assert left < read_shape(tmp_path / "yes").bytes <= most
    assert command(*given, *training, "--fit", whole, "--out", tmp_path / "whole").exit_code == 0
    assert read_shape(tmp_path / "whole").bytes == whole


def test_keep_size_is_advised_where_something_is_left_to_train(checkpoint, words, tmp_path):
    shape = read_shape(checkpoint)
    given = ("compress", checkpoint, "--rank", 2, "--data", words, "--tokens", 256, "--length", 32, "--bits", 4)
    given += (
        "--recover",
        "lora",
        "--recover-rank",
        8,
        "--recover-steps",
        1,
        "--recover-length",
        32,
        "--quantiser",
        "nearest",
    )
    most = shape.bytes - int(0.86 * shape.bytes_of_experts)
    assert "give --recover-keep-size, or" in advice_of(command(*given, "--fit", most, "--out", tmp_path / "no"))
    said = command(*given, "--recover-keep-size", "--fit", most, "--out", tmp_path / "yes")
    assert said.exit_code == 0 and read_shape(tmp_path / "yes").bytes <= most, said.output


def test_what_another_way_adds_is_not_said_to_be_on_few_bits(checkpoint, words, tmp_path):
    shape = read_shape(checkpoint)
    given = ("compress", checkpoint, "--method", "prune", "--data", words, "--tokens", 256, "--length", 32)
    given += ("--recover", "smola", "--recover-steps", 1, "--recover-length", 32)
    most = shape.bytes - shape.bytes_of_experts // 4
    why = advice_of(command(*given, "--fit", most, "--out", tmp_path / "no"))
    assert "--recover smola adds" in why and "few bits" not in why and "keep-size" not in why
    out = tmp_path / "yes"
    assert command(*given, "--remove", 0.25, "--out", out).exit_code == 0


def test_a_training_that_no_size_has_room_for_is_refused_so(checkpoint, words, tmp_path):
    shape = read_shape(checkpoint)
    given = ("compress", checkpoint, "--method", "prune", "--data", words, "--tokens", 256, "--length", 32)
    given += ("--bits", 2, "--quantiser", "nearest", "--recover", "lora", "--recover-rank", 16, "--recover-steps", 1)
    most = shape.bytes - shape.bytes_of_experts + shape.bytes_of_experts // 20
    why = advice_of(command(*given, "--fit", most, "--out", tmp_path / "no"))
    assert "give --remove in place of --fit" in why and "without --recover" not in why
