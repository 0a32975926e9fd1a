"""LightMoE's published arithmetic (arXiv 2603.12645, Tables 1 and 8), on full-size shapes without a single weight.

The paper prints the mean number of replaced experts per layer only roughly; 24.4, 31.3 and 38.2 of 64 are the ones that
its total parameters imply with three bases per layer and rank 16. Counts per layer are whole numbers, so the tests take
the nearest totals over 16 layers: 390, 501 and 611. Ratios that follow from the printed (rounded) parameters, 32.6, 43.2
and 53.6 % by Eq. 5, are met within 0.15: one expert of 1024 is 0.1 %.

MoE-I2's (arXiv 2411.01016): the ranks behind its printed reductions are not stated; mean ranks of 512 (DeepSeek-V2-Lite)
and 2048 (Mixtral) give exactly the figures that it prints.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from locum.budgets.ranks import rank_bounds
from locum.checkpoints.placing import place_containers
from locum.containers.layout import Layout, active_parameters
from locum.methods.compressed_experts import CompressedExperts
from locum.methods.moe_i2 import MoEI2
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, Base, LayerPlan, Plan, make_plan, stand_in
from locum.shapes import ModelShape
from locum.training.options import make_recovery
from locum.training.recovery import count_trainable
from making.handmade import with_sums
from making.slots import rank_of

BASES, RANK = 3, 16
OLMOE = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
# replaced experts in all layers, parameters in B, memory in GiB, Eq. 5 ratio in %
TABLE = [(390, "4.82", "9.09", 32.6), (501, "4.14", "7.85", 43.2), (611, "3.47", "6.63", 53.6)]


def full_size(model_type: str, config: dict) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def olmoe() -> ModelShape:
    return shape_of(full_size("olmoe", OLMOE))


@pytest.fixture(scope="module")
def deepseek() -> ModelShape:
    return shape_of(full_size("deepseek_v2", DEEPSEEK))


def lightmoe(shape: ModelShape, replaced: int) -> Plan:
    """`replaced` experts over all layers, as evenly as whole numbers go; every third one in the same base."""
    layers = []
    for index, layer in enumerate(shape.layers):
        count = (replaced + index) // len(shape.layers)
        slots = [stand_in(base=e % BASES, rank=RANK) if e < count else KEPT for e in range(layer.num_experts)]
        members = [tuple(range(b, count, BASES)) for b in range(BASES)]
        bases = tuple(Base(m, (1 / len(m),) * len(m)) for m in members)
        layers.append(LayerPlan(layer.name, tuple(slots), bases))
    plan = make_plan(shape, layers)
    assert sum(len(layer.replaced) for layer in plan.layers) == replaced
    return plan


def billions(number: float) -> str:
    return f"{number / 1e9:.2f}"


def test_originals(olmoe: ModelShape, deepseek: ModelShape) -> None:
    assert billions(olmoe.parameters) == "6.92" and olmoe.bytes == 2 * olmoe.parameters
    assert f"{olmoe.bytes / 2**30:.2f}" == "12.89"
    assert len(olmoe.layers) == 16 and {(s.num_experts, s.top_k) for s in olmoe.layers} == {(64, 8)}
    assert not olmoe.layers[0].renormalised and olmoe.layers[0].router_kind == "softmax"
    assert f"{deepseek.parameters / 1e9:.1f}" == "15.7"
    assert len(deepseek.layers) == 26 and {(s.num_experts, s.top_k) for s in deepseek.layers} == {(64, 6)}
    assert {(s.num_groups, s.expert_width) for s in deepseek.layers} == {(1, 1408)} and deepseek.layers[
        0
    ].shared_experts


def test_one_expert_and_one_adapter(olmoe: ModelShape) -> None:
    layer = olmoe.layers[0]
    assert layer.parameters() == 6_291_456 and layer.adapter_parameters(RANK) == 147_456
    assert layer.adapter_parameters(RANK) / layer.parameters() == pytest.approx(0.0234, abs=5e-5)


@pytest.mark.parametrize(("replaced", "parameters", "memory", "_rho"), TABLE)
def test_table_8_parameters_and_memory(
    olmoe: ModelShape, replaced: int, parameters: str, memory: str, _rho: float
) -> None:
    """Memory: 2 bytes per parameter, and 2 more for those of the replaced experts' adapters, which stay in float32."""
    plan = lightmoe(olmoe, replaced)
    assert billions(plan.size(olmoe).parameters) == parameters
    wider = 2 * replaced * olmoe.layers[0].adapter_parameters(RANK)
    assert f"{(plan.size(olmoe).bytes + wider) / 2**30:.2f}" == memory
    assert plan.size(olmoe).bytes == 2 * plan.size(olmoe).parameters


@pytest.mark.parametrize(("replaced", "_parameters", "_memory", "rho"), TABLE)
def test_eq_5_is_the_fraction_that_remove_means(
    olmoe: ModelShape, replaced: int, _parameters: str, _memory: str, rho: float
) -> None:
    """rho = 1 - [(N - N' + M) n m + N' r (n + m)] / (N n m), from the formula and from the plan."""
    n, m, experts, mean = 2048, 1024, 64, replaced / 16
    formula = 1 - ((experts - mean + BASES) * n * m + mean * RANK * (n + m)) / (experts * n * m)
    assert lightmoe(olmoe, replaced).removed(olmoe) == pytest.approx(formula, abs=1e-12)
    assert 100 * formula == pytest.approx(rho, abs=0.15)


@pytest.mark.parametrize(("replaced", "total"), [(390, 30.3), (501, 40.2), (611, 49.9)])
def test_total_ratios(olmoe: ModelShape, replaced: int, total: float) -> None:
    """The 30, 40 and 50 % of the paper's tables are shares of all parameters."""
    size = lightmoe(olmoe, replaced).size(olmoe).parameters
    assert 100 * (1 - size / olmoe.parameters) == pytest.approx(total, abs=0.15)


PHI = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def phi() -> ModelShape:
    return shape_of(full_size("phimoe", PHI))


def halved(shape: ModelShape) -> Plan:
    return make_plan(shape, CompressedExperts().plan(None, shape, 1.0), method="compressed-experts")


# d, d_ff, k, L, then the paper's MoE part before and after in B, and its totals (arXiv 2503.00634, App. A)
COMPRESSED = {
    "phi": (4096, 6400, 2, 32, "5.03", "2.52", 7.45, 4.93),
    "olmoe": (2048, 1024, 8, 16, "0.81", "0.40", 1.28, 0.878),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_experts_active_parameters(name: str, request: pytest.FixtureRequest) -> None:
    """The paper's count 3 (d d_ff k_m + 2 d + d_ff) L and ours, L (3 d d_ff k_m + k_a (2 d + d_ff)).

    Its bracket takes three times the vectors of one auxiliary expert; ours the vectors of all k_a of them, once. They
    differ by less than 2 million. The rest of OLMoE is 476.7 M here and 475 M there. The rest of Phi-3.5-MoE is 1.60 B
    by its shapes, where the paper says 2.4 B, so its totals of 7.45 and 4.93 B are 6.64 and 4.12 B here; what is saved,
    2.52 B, is the same.
    """
    shape: ModelShape = request.getfixturevalue(name)
    d, f, k, layers, moe_before, moe_after, before, after = COMPRESSED[name]
    main, rest = k // 2, shape.parameters - shape.expert_parameters
    plan = halved(shape)
    ours = active_parameters(shape, plan) - rest
    theirs = 3 * (d * f * main + 2 * d + f) * layers
    assert ours == layers * (3 * d * f * main + (k - main) * (2 * d + f))
    assert abs(ours - theirs) < 2e6
    assert [billions(x) for x in (active_parameters(shape) - rest, ours, theirs)] == [moe_before, moe_after, moe_after]
    saved = active_parameters(shape) - active_parameters(shape, plan)
    assert saved / 1e9 == pytest.approx(before - after, abs=0.005)
    stored = {"phi": 32 * 16 * 14592, "olmoe": 16 * 64 * 5120}[name]
    assert plan.size(shape).parameters - shape.parameters == stored


def test_compressed_experts_totals(phi: ModelShape, olmoe: ModelShape) -> None:
    assert billions(active_parameters(olmoe)) == "1.28"
    assert f"{active_parameters(olmoe, halved(olmoe)) / 1e6:.0f}" == "880"  # the paper: 878
    assert [billions(active_parameters(phi, plan)) for plan in (None, halved(phi))] == ["6.64", "4.12"]


def test_trainable_parameters_from_shapes(olmoe: ModelShape, deepseek: ModelShape) -> None:
    """Three full-rank bases per layer and a rank-16 adapter on every expert, kept, replaced and shared."""

    def trainable(shape: ModelShape, shared: int) -> int:
        return sum(
            BASES * layer.parameters() + (layer.num_experts + shared) * layer.adapter_parameters(RANK)
            for layer in shape.layers
        )

    assert f"{trainable(olmoe, 0) / 1e9:.3f}" == "0.453"
    assert f"{trainable(deepseek, DEEPSEEK['n_shared_experts']) / 1e9:.3f}" == "0.959"


@pytest.mark.parametrize("replaced", [row[0] for row in TABLE])
def test_recovery_trains_what_the_paper_trains(olmoe: ModelShape, replaced: int) -> None:
    """0.453 B whatever was replaced: each dense row of a kept expert and each replaced one has one adapter."""
    plan = lightmoe(olmoe, replaced)
    model = full_size("olmoe", OLMOE)
    layouts = {layer.layer: Layout.of(layer, olmoe.layer(layer.layer)).to_json() for layer in plan.layers}
    place_containers(model, layouts)
    assert sum(t.numel() for t in model.state_dict().values()) == plan.size(olmoe).parameters
    assert f"{count_trainable(model, plan, make_recovery({'how': 'annealed', 'rank': RANK})) / 1e9:.3f}" == "0.453"


# --- MoE-I2 -----------------------------------------------------------------------------------------------------


def moe_i2(shape: ModelShape, dropped: int, mean_rank: int, exponent: float, **options: bool) -> Plan:
    """The first experts of every layer dropped, the others at this mean rank, by importances from 1 up."""
    experts = [layer.num_experts for layer in shape.layers]
    gone = [(torch.arange(count) < dropped).double() for count in experts]
    worth = [(1 + torch.arange(count)) * (1 - gone_E) for count, gone_E in zip(experts, gone, strict=True)]
    method = MoEI2(exponent=exponent, **options)
    least, dense, _ = rank_bounds(shape.layers[0], method.minimum, method.multiple)
    amount = (dense - mean_rank) / (dense - least)
    statistics = with_sums(shape, dropped=gone, pruned_importance=worth)
    return make_plan(shape, method.plan(method.score_experts(statistics, shape), shape, amount))


@pytest.mark.parametrize("exponent", [0, 0.15])
def test_moe_i2_on_deepseek(deepseek: ModelShape, exponent: float) -> None:
    """A quarter pruned and a mean rank of 512: 53.98 % of the expert parameters, however the ranks are spread."""
    plan = moe_i2(deepseek, 16, 512, exponent)
    ranks = [rank_of(slot) for slot in plan.layers[0].slots if slot.survives]
    assert sum(ranks) == 512 * 48 and (len(set(ranks)) > 1) == (exponent > 0)
    assert f"{100 * plan.removed(deepseek):.2f}" == "53.98"


def test_moe_i2_on_mixtral() -> None:
    """6 of 8 experts at rank 2048: 43.49 GiB in bfloat16, of 86.99; pruning alone 65.99."""
    shape = shape_of(full_size("mixtral", MIXTRAL))
    assert f"{shape.bytes / 2**30:.2f}" == "86.99"
    pruned = moe_i2(shape, 2, 2048, 0, decompose=False).size(shape)
    assert f"{pruned.bytes / 2**30:.2f}" == "65.99"
    assert f"{moe_i2(shape, 2, 2048, 0).size(shape).bytes / 2**30:.2f}" == "43.49"
