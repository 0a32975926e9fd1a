"""Recovery training: what it starts from, what it trains, where it ends, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.nn import functional

from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.placing import LocumConfig
from locum.checkpoints.skeleton import skeleton
from locum.containers.build import old_weights
from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.errors import OptionError, PlanError
from locum.models.families import canonical_activation, find_layers, is_stock_experts, read_expert
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, make_plan, stand_in
from locum.training.context import Context, Original
from locum.training.layer import open_layer, set_beta
from locum.training.options import learning_rate_at, make_recovery
from locum.training.recovery import count_trainable, recover_model
from locum.training.states import forget
from locum.training.ways.annealed import beta_at
from making.slots import rows_of
from making.tiny_models import tiny_ids, tiny_model
from making.training import QUICK, Killed, compressed, light, run, tiny_tokens


def opened(model, plan, original=None, how="annealed", **options):
    """The context and the way, as before the first step."""
    chosen = make_recovery({"how": how, **QUICK, **options})
    known = None if original is None else Original.of(original)
    context = Context(model, plan, chosen.steps, chosen.seed, known)
    chosen.way.check(context)
    chosen.way.prepare(context, 0)
    return context, chosen.way


@torch.no_grad()
def logits(model):
    return model(tiny_ids()).logits


def close(a, b, limit=1e-5):
    assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_before_the_first_step_the_model_is_the_original(model_type, align):
    original = tiny_model(model_type)
    plan = light(original, align=align)
    model = compressed(original, plan)
    assert float((logits(model) - logits(original)).abs().max()) > 1e-2
    opened(model, plan, original)
    close(logits(model), logits(original))


@pytest.mark.parametrize(
    "kind", [{"start": "svd"}, {"bases": False}, {"bases": False, "rank": 0, "constant": True}, {"rest": NOTHING}]
)
def test_so_it_is_whatever_the_start_of_a_stand_in(olmoe, kind):
    plan = light(olmoe, **kind)
    model = compressed(olmoe, plan)
    opened(model, plan, olmoe)
    close(logits(model), logits(olmoe))


def products(stack, a):
    """B A of gate and up together, and of down."""
    gate_A, up_A = stack.gate_up_A[a].chunk(2)
    first = torch.cat([stack.gate_B_FR[a] @ gate_A, stack.up_B_FR[a] @ up_A])
    return first, stack.down_B_DR[a] @ stack.down_A_RF[a]


def naive(layer, original, start, x_TD, index_TK, gate_TK, beta):
    """The layer with every W(beta) written out: Eq. 6 of LightMoE, the adapter's start taken off the old weights."""
    container, activate = layer.container, canonical_activation(original)
    old = old_weights(layer.plan, lambda e: read_expert(original, e))
    dense = [s for s in (getattr(container, "dense", None), container.shared) if s is not None]
    rows = {n: torch.cat([getattr(s, n) for s in dense]) for n, _ in dense[0].named_parameters()}
    out_TD = torch.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for e, gate in zip(index_TK[t].tolist(), gate_TK[t], strict=True):
            row, index, a = (
                of[e]
                for of in (
                    container.layout.dense_of,
                    rows_of(container.layout).rank_of,
                    rows_of(container.layout).adapter_of,
                )
            )
            first, down = rows["gate_up_NGD"][row], rows["down_NDF"][row]
            if e in old:
                first0, down0 = products(start[index], a)
                first = beta * (old[e].gate_up_GD - first0) + (1 - beta) * first
                down = beta * (old[e].down_DF - down0) + (1 - beta) * down
            first1, down1 = products(container.adapters[index], a)
            out_TD[t] += gate * ((down + down1) @ activate(((first + first1) @ x_TD[t])[None])[0])
    return out_TD


@pytest.mark.parametrize("start", ["gaussian", "svd"])
@pytest.mark.parametrize("beta", [1.0, 0.6, 0.0])
def test_annealing_equals_the_written_out_weights(olmoe, beta, start):
    plan = light(olmoe, align=True, start=start)
    context, _ = opened(compressed(olmoe, plan), plan, olmoe)
    layer = context.layers[0]
    container, generator = layer.container, torch.Generator().manual_seed(5)
    at_start = copy.deepcopy(container.adapters)
    with torch.no_grad():
        for name, parameter in container.adapters.named_parameters():
            if "_B_" in name:  # as after some training
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        container.beta = beta
        x, index = torch.randn(20, 32, generator=generator), torch.rand(20, 8, generator=generator).topk(3).indices
        gates = torch.rand(20, 3, generator=generator)
        expected = naive(layer, find_layers(olmoe)[0].experts, at_start, x, index, gates, beta)
        close(container(x, index, gates), expected)


def test_schedules_at_points_computed_by_hand():
    assert [beta_at(t, 100, 0.2) for t in (0, 5, 10, 19, 20, 99)] == pytest.approx([1, 0.75, 0.5, 0.05, 0, 0])
    assert beta_at(0, 100, 0.0) == 0 and beta_at(7, 10, 0.7) == 0 and beta_at(10, 10, 1.0) == 0
    e = math.e
    for g, half in ((1.0, (e**-0.5 - e**-1) / (1 - e**-1)), (3.0, 0.18242552), (5.0, 0.07585818)):
        assert beta_at(0, 100, 0.2, "exponential", g) == pytest.approx(1)
        assert beta_at(10, 100, 0.2, "exponential", g) == pytest.approx(half, abs=1e-7)
        assert beta_at(20, 100, 0.2, "exponential", g) == 0
    options = make_recovery({"steps": 100, "learning_rate": 1.0, "warmup_fraction": 0.04, "schedule": "cosine"})
    assert [learning_rate_at(t, options) for t in (0, 3, 4, 52)] == pytest.approx([0.25, 1, 1, 0.5])


@pytest.mark.parametrize("kind", [{}, {"constant": True}])
def test_letting_the_old_weights_go_changes_nothing(olmoe, kind):
    plan = light(olmoe, **kind)
    model = compressed(olmoe, plan)
    context, _ = opened(model, plan, olmoe)
    for layer in context.layers:
        layer.container.beta = 0.0
    before = logits(model)
    for layer in context.layers:
        assert layer.container.old is not None
        set_beta(layer, 0.0)
        assert layer.container.old is None
    assert torch.equal(logits(model), before)
    close(logits(model), logits(compressed(olmoe, plan)))


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("how", ["annealed", "lora"])
def test_what_is_frozen_stays_to_the_bit_and_the_layout_is_the_plans(model_type, how):
    original = tiny_model(model_type)
    plan = light(original)
    model = compressed(original, plan)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trained = {}

    def watch(step, steps, loss):
        trained.update({name: t.clone() for name, t in model.named_parameters()})

    model, summary = run(model, plan, original, how=how, progress=watch)
    after = model.state_dict()
    assert list(after) == list(before) and summary["steps"] == 6
    for layer in find_layers(model):
        assert layer.experts.layout == Layout.of(plan.layer(layer.shape.name), layer.shape)
        assert torch.equal(
            trained[layer.shape.name + ".dense.down_NDF"], before[layer.shape.name + ".dense.down_NDF"][:4]
        )
        for part in ("dense.down_NDF", "adapters.0.down_B_DR"):
            assert not torch.equal(after[f"{layer.shape.name}.{part}"], before[f"{layer.shape.name}.{part}"])
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(after[name], tensor), name


def test_trained_are_bases_and_an_adapter_on_every_expert(olmoe):
    plan = light(olmoe)
    expert, adapter = 3 * 32 * 16, 3 * 3 * (32 + 16)
    for options, count in (
        ({}, 2 * (2 * expert + 8 * adapter)),
        ({"how": "lora", "rank": 5}, 2 * (2 * expert + 4 * adapter + 4 * (adapter // 3) * 5)),
        ({"how": "lora", "train_bases": False}, 2 * 8 * adapter),
    ):
        assert count_trainable(compressed(olmoe, plan), plan, make_recovery(options)) == count
    merged = light(olmoe, rank=0)  # stand-ins without adapters: a frozen base gets one, for all of its users
    at_16 = 3 * 16 * (32 + 16)
    adapters_alone = make_recovery({"how": "lora", "train_bases": False})
    assert count_trainable(compressed(olmoe, merged), merged, adapters_alone) == 2 * 6 * at_16
    full = compressed(olmoe, plan)
    assert count_trainable(full, plan, make_recovery({"how": "full"})) == sum(p.numel() for p in full.parameters())


def test_the_papers_count_for_olmoe_1b_7b():
    from transformers import OlmoeConfig

    config = OlmoeConfig(intermediate_size=1024)  # else its defaults are those of OLMoE-1B-7B
    original = skeleton(config)
    shape = shape_of(original)
    groups = [tuple(range(26 + b, 64, 3)) for b in range(3)]
    bases = tuple(Base(group, (1 / len(group),) * len(group)) for group in groups)
    slots = (KEPT,) * 26 + tuple(stand_in(base=(e - 26) % 3, rank=16) for e in range(26, 64))
    plan = make_plan(shape, [LayerPlan(layer.name, slots, bases) for layer in shape.layers])
    config.quantization_config = LocumConfig({x.name: Layout.of(plan.layer(x.name), x).to_json() for x in shape.layers})
    count = count_trainable(skeleton(config), plan, make_recovery({}))
    assert count == 3 * 16 * 6_291_456 + 64 * 16 * 147_456 and round(count / 1e9, 3) == 0.453


@pytest.mark.parametrize("how", ["annealed", "lora"])
def test_the_exported_model_is_the_trained_one(olmoe, how):
    plan = light(olmoe)
    model = compressed(olmoe, plan)
    context, way = opened(model, plan, olmoe, how=how, rank=5, train_bases=how == "annealed")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    way.at_step(context, context.steps)
    trained = logits(model)
    way.finish(context)
    close(logits(model), trained)
    assert all(x.experts.layout == Layout.of(plan.layer(x.shape.name), x.shape) for x in find_layers(model))


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_uniformly_pruned_model_stays_stock(model_type):
    original = tiny_model(model_type)
    slots = (KEPT, DROPPED, KEPT, KEPT, DROPPED, KEPT, KEPT, KEPT)
    plan = make_plan(shape_of(original), [LayerPlan(x.name, slots) for x in shape_of(original).layers])
    model = apply_plan(copy.deepcopy(original), plan)
    keys, before = list(model.state_dict()), logits(model)
    context, way = opened(model, plan, how="lora")
    close(logits(model), before)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained = logits(model)
    assert float((trained - before).abs().max()) > 1e-2
    way.finish(context)
    close(logits(model), trained)
    assert list(model.state_dict()) == keys and all(is_stock_experts(x.experts) for x in find_layers(model))
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("how", ["annealed", "lora", "full"])
def test_the_loss_falls_on_what_is_trained(olmoe, how, tmp_path):
    plan = light(olmoe, rank=8)
    log, tokens = tmp_path / "log.jsonl", tiny_tokens()
    _, summary = run(
        compressed(olmoe, plan), plan, olmoe, tokens, how=how, steps=25, learning_rate=1e-2, log=log, accumulate=2
    )
    assert summary["validation_loss"] < summary["validation_loss_before"] - 0.5
    assert summary["tokens"] == 25 * 2 * 2 * 16 and summary["peak_bytes"] > 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["options"]["how"] == how and lines[0]["trainable_parameters"] == summary["trainable_parameters"]
    assert [line["event"] for line in lines] == ["start", "validation", *["step"] * 25, "validation", "kept"]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 26)) and steps[-1]["loss"] == summary["loss"]
    assert ("beta" in steps[0]) == (how == "annealed")


def test_the_first_loss_is_the_mean_over_positions_with_loss(olmoe):
    tokens, model = tiny_tokens(blocks=2), copy.deepcopy(olmoe)
    seen = []
    options = make_recovery({**QUICK, "how": "full", "steps": 1, "batch_size": 1, "accumulate": 2})
    recover_model(model, None, tokens, None, options, progress=lambda step, steps, loss: seen.append(loss))
    with torch.no_grad():
        logits_BSV = olmoe(tokens.ids_BS).logits
    mask = tokens.loss_mask_BS[:, 1:]
    expected = functional.cross_entropy(logits_BSV[:, :-1][mask], tokens.ids_BS[:, 1:][mask])
    assert seen[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["container", "stock"])
def test_what_was_recovered_can_be_saved_and_loaded(olmoe, tmp_path, kind):
    pruned = [LayerPlan(x.name, (KEPT,) * 6 + (DROPPED,) * 2) for x in shape_of(olmoe).layers]
    plan = light(olmoe) if kind == "container" else make_plan(shape_of(olmoe), pruned)
    model, _ = run(compressed(olmoe, plan), plan, olmoe, how="annealed" if kind == "container" else "lora")
    model.save_pretrained(tmp_path / "out")
    close(logits(load_model(tmp_path / "out")), logits(model))


def curve(log):
    return {x["step"]: x["loss"] for x in map(json.loads, log.read_text().splitlines()) if "loss" in x}


@pytest.mark.parametrize("stop", [3, 9])  # before and after the old weights are let go, at step 5 of 10
def test_a_killed_run_goes_on_bit_for_bit(olmoe, tmp_path, stop, caplog):
    plan = light(olmoe)
    options = {"steps": 10, "end_fraction": 0.5, "checkpoint_every": 2, "validate_every": 4, "schedule": "cosine"}
    whole_run, summary = run(compressed(olmoe, plan), plan, olmoe, tiny_tokens(3), log=tmp_path / "a", **options)

    def kill(step, steps, loss):
        if step == stop:
            raise Killed

    given = {**options, "log": tmp_path / "b", "workdir": tmp_path / ".out.recover"}
    with pytest.raises(Killed):
        run(compressed(olmoe, plan), plan, olmoe, tiny_tokens(3), progress=kill, **given)
    resumed, again = run(compressed(olmoe, plan), plan, olmoe, tiny_tokens(3), **given)
    assert curve(tmp_path / "b") == curve(tmp_path / "a") and len(curve(tmp_path / "a")) == 10
    for (name, one), two in zip(whole_run.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for key in ("loss", "validation_loss", "validation_loss_before", "tokens", "steps"):
        assert again[key] == summary[key]
    # Had saving the result failed, the same call gives it again without a step.
    third, summary3 = run(compressed(olmoe, plan), plan, olmoe, tiny_tokens(3), **given)
    assert summary3["loss"] == summary["loss"] and torch.equal(logits(third), logits(resumed))
    run(compressed(olmoe, plan), plan, olmoe, tiny_tokens(3), **given, learning_rate=0.1)
    assert "learning_rate was 0.003 and is 0.1; it was set aside" in caplog.text
    other = tiny_model("olmoe", seed=9)
    run(compressed(other, plan), plan, other, tiny_tokens(3), **given)
    assert "model was" in caplog.messages[-1] and "original was" in caplog.messages[-1]
    run(compressed(olmoe, plan), plan, olmoe, **{**given, "steps": 1, "restart": True})
    forget(given["workdir"])
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", ".out.recover.aside", ".out.recover.aside-2"}


def test_a_stock_layer_of_merged_experts_gets_an_adapter_on_every_expert(olmoe):
    """Its rows are the layer's own, whatever the plan says of them: no whole expert is trained."""
    merged = tuple(stand_in(base=b) for b in range(8))
    layer = find_layers(olmoe)[0]
    plan = LayerPlan(layer.shape.name, merged, tuple(Base((b,), (1.0,)) for b in range(8)))
    opened_layer = open_layer(olmoe, layer, plan, 2, True, 0)
    container = opened_layer.container
    assert container.shared is None and opened_layer.rows == tuple(range(8))
    assert sum(p.numel() for p in container.adapters.parameters()) == 8 * 3 * 2 * (
        32 + 16
    )  # 2,304; 12,288 are the experts


def test_a_base_less_stand_in_has_gradients_from_the_start(olmoe):
    plan = light(olmoe, bases=False)
    model = compressed(olmoe, plan)
    context, _ = opened(model, plan, how="lora")
    model(tiny_ids()).logits.logsumexp(-1).sum().backward()
    for name, parameter in context.layers[0].container.adapters.named_parameters():
        assert float(parameter.grad[:4].abs().max()) > 0, name  # the stand-ins' rows come first


def test_bf16_keeps_masters_of_what_is_trained_and_gives_bf16_back(olmoe):
    original = olmoe.to(torch.bfloat16)
    plan = light(original)
    model, kinds = compressed(original, plan), set()

    def watch(step, steps, loss):
        kinds.update((p.requires_grad, p.dtype) for p in model.parameters())

    model, summary = run(model, plan, original, precision="bf16", progress=watch)
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and math.isfinite(summary["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0; allowed: at least 1"),
        ({"end_fraction": 1.5}, "--end-fraction is 1.5"),
        ({"how": "annealing"}, "did you mean 'annealed'"),
        ({"precision": "fp8"}, "fp8"),
        ({"how": "lora", "rank": 17}, "--rank is 17; allowed: at most 16"),
        ({"learning_rate": math.nan}, "--learning-rate"),
        ({}, "--how annealed needs the original model; give it with --original"),
        ({"how": "lora", "end_fraction": 0.5}, "'lora' has no option --end-fraction; ways that have it: annealed"),
        ({"how": "lora", "learning_rat": 0.5}, "no option '--learning-rat': did you mean '--learning-rate'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(olmoe, options, message):
    plan = light(olmoe)
    with pytest.raises(OptionError, match=message):
        run(compressed(olmoe, plan), plan, **options)


def test_plans_that_do_not_fit_are_refused(olmoe):
    plan = light(olmoe)
    with pytest.raises(PlanError, match="apply the plan"):
        run(copy.deepcopy(olmoe), plan, how="lora")
    with pytest.raises(PlanError, match=r"plan\.json"):
        run(compressed(olmoe, plan), None, how="lora")
    with pytest.raises(PlanError, match="was not made by this plan"):
        run(compressed(olmoe, plan), light(olmoe, rank=4), how="lora")
    with pytest.raises(
        OptionError, match="a model without a plan has none; use --how esft or --how experts or --how full or"
    ):
        run(copy.deepcopy(olmoe), None, how="annealed")
    assert not any(isinstance(m, StandInExperts) for m in olmoe.modules())
