"""Trying removals on a live model, against models that were really pruned, one question and one family at a time."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import locum.measure.removals
from families.case import near, tokens_of
from families.tiny_families import tiny
from locum.checkpoints.application import apply_plan
from locum.errors import OptionError, PlanError, UnsupportedModel
from locum.measure.every_output import gram_of_outputs
from locum.measure.removals import ModelExplorer, draw_sample
from locum.models.families import find_layers, read_expert, write_expert
from locum.models.next_token_loss import loss_sum
from locum.models.router_rules import spread_gates
from locum.models.watch import run_experts
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from making.tiny_models import tiny_ids, tiny_model
from test_calibrate import make_tokens

FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe", "lfm2_moe", "gemma4")
BY_RULE = ("olmoe", "mixtral", "gpt_oss", "qwen3_moe", "lfm2_moe")  # routers whose rule is found
SETS = ((1, 6), (0, 5), (3, 4), (1, 2, 5, 6), ())  # as many of the first four experts as of the last: for two groups
E = 8


def masks(*sets: tuple[int, ...]) -> Tensor:
    return torch.tensor([[e in members for e in range(E)] for members in sets])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = tiny(request.param)
    model.set_experts_implementation("eager")
    model.family = request.param
    return model


@pytest.fixture(scope="module")
def explorer(model):
    return ModelExplorer(model, tokens_of(tiny_ids(4, 16)), sample=64)


def pruned(model: nn.Module, removed: dict[str, tuple[int, ...]]) -> nn.Module:
    """A copy of the model that a plan was applied to."""
    shape = locum.models.sizes.shape_of(model)
    layers = [
        LayerPlan(name, tuple(DROPPED if e in gone else KEPT for e in range(shape.layer(name).num_experts)))
        for name, gone in removed.items()
    ]
    return apply_plan(copy.deepcopy(model), make_plan(shape, layers))


def run(model: nn.Module, explorer: ModelExplorer, name: str) -> dict[str, Tensor]:
    """What the module of this name gets and gives in a plain pass over the explorer's sample."""
    seen: dict[str, Tensor] = {}

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen["inputs"], seen["output"] = inputs, output[0] if isinstance(output, tuple) else output

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model.base_model(explorer.batches[0].ids_BS, use_cache=False)
    handle.remove()
    return seen


def state(model: nn.Module) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    return hooks, modes, sorted(ALL_EXPERTS_FUNCTIONS), {n: t.clone() for n, t in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: tuple) -> None:
    after = state(model)
    assert after[:-1] == before[:-1]
    assert after[-1].keys() == before[-1].keys()
    assert all(torch.equal(after[-1][name], before[-1][name]) for name in after[-1])


# --- the three questions -------------------------------------------------------------------------------------------


def test_output_error_is_that_of_a_pruned_layer(model, explorer):
    before = state(model)
    for layer in explorer.shape.layers:
        errors = explorer.output_error(layer.name, masks(*SETS))
        whole = run(model, explorer, layer.name)["output"].double()
        for members, error in zip(SETS, errors, strict=True):
            ours = run(pruned(model, {layer.name: members}), explorer, layer.name)["output"].double()
            near(error, (ours - whole).norm(), 1e-5)
        assert errors[-1] == 0 and errors[:-1].min() > 1
    assert_untouched(model, before)


def test_rule_and_real_router_give_the_same(model, explorer, monkeypatch):
    name = explorer.shape.layers[0].name
    by_rule = explorer.output_error(name, masks(*SETS))
    assert (explorer._caches[name].rule is not None) == (model.family in BY_RULE)
    monkeypatch.setattr(locum.measure.removals, "find_rule", lambda *_: None)
    slow = ModelExplorer(model, tokens_of(tiny_ids(4, 16)), sample=64)
    near(slow.output_error(name, masks(*SETS)), by_rule, 1e-6)
    assert slow._caches[name].rule is None


def test_loss_increase_is_that_of_a_pruned_model(model, explorer):
    before = state(model)
    for layer in explorer.shape.layers:
        increase = explorer.loss_increase(layer.name, masks(*SETS))
        with torch.no_grad():
            whole, count = loss_sum(model, explorer.batches[0], model.device)
            for members, found in zip(SETS, increase, strict=True):
                ours, _ = loss_sum(pruned(model, {layer.name: members}), explorer.batches[0], model.device)
                near(found, ((ours - whole) / count).double(), 1e-5)
        assert increase[-1] == 0 and increase[:-1].abs().min() > 0
    both = dict(zip([layer.name for layer in explorer.shape.layers], SETS[:2], strict=True))
    without = explorer.loss_without([{name: masks(members)[0] for name, members in both.items()}, {}])
    with torch.no_grad():
        ours, _ = loss_sum(pruned(model, both), explorer.batches[0], model.device)
    near(without[0], ((ours - whole) / count).double(), 1e-5)
    assert without[1] == 0
    assert_untouched(model, before)


def test_loss_merged_is_that_of_a_model_with_these_mixtures(model, explorer):
    before, (name, *_) = state(model), [layer.name for layer in explorer.shape.layers]
    weight_EE = torch.eye(8, dtype=torch.float64)
    weight_EE[[1, 6]] = 0
    weight_EE[3, [3, 6]] = torch.tensor([0.75, 0.25], dtype=torch.float64)
    merged, pruned_only = explorer.loss_merged([{name: weight_EE}, {name: (weight_EE > 0.5).double()}])
    assert pruned_only == explorer.loss_without([{name: masks((1, 6))[0]}]) != merged
    assert_untouched(model, before)
    twin = copy.deepcopy(model)
    experts = twin.get_submodule(name)
    one, other = (read_expert(experts, e) for e in (3, 6))
    write_expert(experts, 3, one.map(lambda key, tensor: 0.75 * tensor + 0.25 * getattr(other, key)))
    with torch.no_grad():
        whole, count = loss_sum(model, explorer.batches[0], model.device)
        ours, _ = loss_sum(pruned(twin, {name: (1, 6)}), explorer.batches[0], model.device)
    near(merged, ((ours - whole) / count).double(), 1e-4)


def test_block_error_is_that_of_pruned_decoder_layers(model, explorer):
    before = state(model)
    names = [layer.name for layer in explorer.shape.layers]
    decoder = names[0][: names[0].index("layers.") + len("layers.")]
    candidates = [dict(zip(names, pair, strict=True)) for pair in itertools.pairwise(SETS)]
    for block in (names, names[:1], names[1:]):
        asked = [{name: masks(members)[0] for name, members in c.items() if name in block} for c in candidates]
        errors = explorer.block_error(asked)
        last = decoder + block[-1].removeprefix(decoder).split(".")[0]
        whole = run(model, explorer, last)["output"].double()
        for candidate, error in zip(asked, errors, strict=True):
            gone = {n: tuple(mask.nonzero().squeeze(1).tolist()) for n, mask in candidate.items()}
            ours = run(pruned(model, gone), explorer, last)["output"].double()
            near(error, (ours - whole).norm(), 1e-5)
    assert explorer.block_error([]).shape == (0,)
    assert_untouched(model, before)


def test_prune_is_applying_the_plan_and_changes_both_sides(model):
    live = copy.deepcopy(model)
    explorer = ModelExplorer(live, tokens_of(tiny_ids(4, 16)), sample=64)
    names = [layer.name for layer in explorer.shape.layers]
    gone = {names[0]: (1, 6), names[-1]: (0, 3, 4, 7) if model.family != "deepseek_v3" else (0, 7)}
    explorer.prune({name: masks(members)[0] for name, members in gone.items()})
    expected = pruned(model, gone)
    ids_BS = tiny_ids(2, 9)
    with torch.no_grad():
        near(live(ids_BS, use_cache=False).logits, expected(ids_BS, use_cache=False).logits)
    # What is gone counts as removed already, named again or not.
    again, more = masks(gone[names[0]], ()), masks((1, 2, 5, 6), (2, 5))
    assert explorer.output_error(names[0], again).tolist() == [0, 0]
    assert explorer.loss_increase(names[0], again).tolist() == [0, 0]
    assert explorer.block_error([{names[0]: again[0]}]).tolist() == [0]
    one, same = explorer.output_error(names[0], more)
    assert one == same
    whole = run(live, explorer, names[0])["output"].double()
    ours = run(pruned(model, gone | {names[0]: (1, 2, 5, 6)}), explorer, names[0])["output"].double()
    near(one, (ours - whole).norm(), 1e-5)


# --- single removals, dtypes, padding, sampling ----------------------------------------------------------------------


def test_one_expert_of_a_group_can_be_tried_though_not_pruned():
    model = tiny_model("deepseek_v3")
    explorer = ModelExplorer(model, tokens_of(tiny_ids(4, 16)), sample=64)
    name = explorer.shape.layers[0].name
    errors = explorer.output_error(name, torch.eye(E, dtype=torch.bool))
    layer, seen = explorer.layers[name], run(model, explorer, name)
    x_TD, index_TK, _ = seen["inputs"]
    chosen_E = torch.bincount(index_TK.flatten(), minlength=E) > 0
    assert ((errors > 0) >= chosen_E).all() and len(errors.unique()) > 4
    # By hand: the family's rule with minus infinity for one expert.
    gate, bias_E = layer.router, layer.router.e_score_correction_bias
    hidden = run(model, explorer, layer.shape.router)["inputs"][0].flatten(0, 1)
    scores_TE = torch.nn.functional.linear(hidden, gate.weight).sigmoid()
    for e in (0, 5):
        score_TE = scores_TE.index_fill(1, torch.tensor([e]), 0.0)
        choice_TE = (score_TE + bias_E).index_fill(1, torch.tensor([e]), float("-inf"))
        group_TG = choice_TE.view(-1, 2, 4).topk(2, dim=-1).values.sum(-1)
        closed_TE = torch.nn.functional.one_hot(group_TG.argmin(1), 2).bool().repeat_interleave(4, 1)
        index = choice_TE.masked_fill(closed_TE, float("-inf")).topk(2, dim=-1).indices
        weights = score_TE.gather(1, index)
        weights = weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor
        with torch.no_grad():
            ours = run_experts(layer.experts, x_TD, index, weights)[0].double()
        near(errors[e], (ours - seen["output"].double()).norm(), 1e-5)
    with pytest.raises(PlanError, match="group-limited router"):
        explorer.prune({name: masks((1, 2))[0]})


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "mixtral"])
def test_half_precision_is_compared_in_its_own_steps(family):
    model = tiny(family).to(torch.bfloat16)
    explorer = ModelExplorer(model, tokens_of(tiny_ids(4, 16)), sample=64)
    name = explorer.shape.layers[0].name
    error = explorer.output_error(name, masks((1, 6), ()))
    outputs = [run(m, explorer, name)["output"].double() for m in (model, pruned(model, {name: (1, 6)}))]
    near(error[0], (outputs[0] - outputs[1]).norm(), 5e-3)
    assert error[1] == 0
    assert (explorer._caches[name].rule is None) == (family == "deepseek_v3")


def test_padding_counts_in_no_answer():
    model = tiny_model("olmoe")
    ids_BS = tiny_ids(3, 12)
    attention_BS = (torch.arange(12) < torch.tensor([12, 5, 9])[:, None]).long()
    padded = make_tokens(ids_BS * attention_BS, attention_BS=attention_BS)
    whole = ModelExplorer(model, padded, sample=36)
    name = whole.shape.layers[0].name
    asked = masks((1, 6), (2, 3))
    blocks = [dict.fromkeys(whole.layers, asked[0])]
    alone_output, alone_block = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for b, length in enumerate((12, 5, 9)):
        one = ModelExplorer(model, make_tokens(ids_BS[b : b + 1, :length]), sample=length)
        alone_output += one.output_error(name, asked) ** 2
        alone_block += one.block_error(blocks) ** 2
    near(whole.output_error(name, asked), alone_output.sqrt())
    near(whole.block_error(blocks), alone_block.sqrt())


def test_answers_do_not_depend_on_batches_or_chunks(monkeypatch):
    model, tokens = tiny_model("olmoe"), make_tokens(tiny_ids(6, 8))
    whole = ModelExplorer(model, tokens, sample=48)
    name, other = (layer.name for layer in whole.shape.layers)
    blocks = [{name: masks((1, 6))[0], other: masks((2,))[0]}]
    expected = whole.output_error(name, masks(*SETS)), whole.block_error(blocks), whole.loss_increase(name, masks((1,)))
    monkeypatch.setattr(locum.measure.removals, "CHUNK", 8)
    monkeypatch.setattr(locum.measure.removals, "CACHE_BYTES", 1)
    parts = ModelExplorer(model, tokens, sample=48, batch_size=2)
    for layer in (name, other, name):  # with room for one cache only
        parts.output_error(layer, masks((1,)))
        assert list(parts._caches) == [layer]
    near(parts.output_error(name, masks(*SETS)), expected[0])
    near(parts.block_error(blocks), expected[1])
    near(parts.loss_increase(name, masks((1,))), expected[2])
    assert parts.output_error(name, masks(())[:0]).shape == (0,)


def test_the_sample_is_spread_over_domains_and_drawn_by_seed():
    tokens = make_tokens(tiny_ids(10, 6), domain_B=(0,) * 8 + (1,) * 2)
    sample = draw_sample(tokens, 24, 0)
    assert sample.ids_BS.shape == (4, 6) and sorted(sample.domain_B.tolist()) == [0, 0, 1, 1]
    assert torch.equal(draw_sample(tokens, 24, 0).ids_BS, sample.ids_BS)
    assert any(not torch.equal(draw_sample(tokens, 24, seed).ids_BS, sample.ids_BS) for seed in (1, 2, 3))
    assert draw_sample(tokens, 4, 0).ids_BS.shape == (1, 4) and draw_sample(tokens, 1000, 0).ids_BS.shape == (10, 6)


def test_gram_is_of_every_expert_on_every_token():
    model = tiny_model("gpt_oss")
    experts = find_layers(model)[0].experts
    x_TD = torch.randn(5, 32)
    with torch.no_grad():
        gram_TEE = gram_of_outputs(experts, x_TD)
        for t in range(5):
            alone = [experts(x_TD[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))[0].double() for e in range(E)]
            near(gram_TEE[t], torch.stack(alone) @ torch.stack(alone).T)
    assert spread_gates(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]), 3).tolist() == [[0.25, 0, 0.5]]


# --- refusals ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_runs():
    model = tiny_model("olmoe")
    explorer = ModelExplorer(model, make_tokens(tiny_ids(2, 8)))
    name = explorer.shape.layers[0].name
    with pytest.raises(OptionError, match=r"expected true or false for each of its 8 experts"):
        explorer.output_error(name, torch.zeros(1, 7, dtype=torch.bool))
    with pytest.raises(OptionError, match=r"leaves 1 experts.*needs 2"):
        explorer.loss_increase(name, masks(tuple(range(7))))
    with pytest.raises(OptionError, match="unknown layer 'model'"):
        explorer.block_error([{"model": masks(())[0]}])
    with pytest.raises(OptionError, match="sample is 0"):
        ModelExplorer(model, make_tokens(tiny_ids(2, 8)), sample=0)
    assert explorer._recording is None
    with pytest.raises(UnsupportedModel, match="hash-routed"):
        ModelExplorer(tiny("deepseek_v4"), make_tokens(tiny_ids(2, 8)))
    with pytest.raises(UnsupportedModel, match="compressed already"):
        ModelExplorer(pruned(model, {name: (1,)}), make_tokens(tiny_ids(2, 8)))


@pytest.mark.parametrize("where", ["experts", "router"])
def test_the_model_is_as_before_after_an_interrupt(where, monkeypatch):
    model = tiny_model("deepseek_v3").train()
    explorer = ModelExplorer(model, make_tokens(tiny_ids(2, 8)))
    name = explorer.shape.layers[0].name
    before = state(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(getattr(explorer.layers[name], where), "forward", fail)
        for question in (
            lambda: explorer.output_error(name, masks((1, 6))),
            lambda: explorer.loss_increase(name, masks((1, 6))),
            lambda: explorer.block_error([{name: masks((1, 6))[0]}]),
        ):
            with pytest.raises(KeyboardInterrupt):
                question()
            assert_untouched(model, before)
    explorer.output_error(name, masks((1, 6)))
    assert_untouched(model, before)
