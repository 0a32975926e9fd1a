"""What calibration collects only when it is asked for, on real tiny models, against passes with hooks of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from locum.errors import UnsupportedModel
from locum.measure.calibration import calibrate
from locum.models.families import find_layers, read_expert
from locum.models.next_token_loss import loss_sum
from locum.stats.sums import Statistics
from making.handmade import tokens_of
from making.tiny_models import tiny_ids, tiny_model
from test_calibrate import make_tokens, watch

E = 8
FAMILIES = ("olmoe", "gpt_oss")
GRADIENTS = ("hidden_gradient_square", "gate_up_gradient", "down_gradient", "count")


def slow_experts(seen: list) -> object:
    """Experts as a plain loop over pairs, which keeps every pair's hidden state."""

    def forward(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        rows = []
        for t, x_D in enumerate(x_TD):
            total = torch.zeros_like(x_D)
            for e, gate in zip(index_TK[t].tolist(), gate_TK[t], strict=True):
                name = "gate_up_proj"
                first = getattr(experts, name)[e].T if experts.is_transposed else getattr(experts, name)[e]
                down = experts.down_proj[e].T if experts.is_transposed else experts.down_proj[e]
                pre = first @ x_D + (getattr(experts, f"{name}_bias")[e] if experts.has_bias else 0)
                hidden_F = experts._apply_gate(pre[None])[0]
                hidden_F.retain_grad()
                seen.append((experts, e, hidden_F))
                total = total + gate * (down @ hidden_F + (experts.down_proj_bias[e] if experts.has_bias else 0))
            rows.append(total)
        return torch.stack(rows)

    return forward


def assert_near(one: Tensor, two: Tensor) -> None:
    """Float32 passes in another order; each expert is compared by the size of its own numbers."""
    assert one.shape == two.shape
    for a, b in zip(one, two, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_a_plain_loop(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(family), tokens_of(tiny_ids(3, 6))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    made = calibrate(model, tokens, batch_size=2, needs=GRADIENTS)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    seen: list = []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "slow", slow_experts(seen))
    model.set_experts_implementation("slow")
    loss_sum(model, tokens, model.device)[0].backward()
    for layer in find_layers(model):
        named, experts = made.layer(layer.shape.name), layer.experts
        squares = torch.zeros_like(named["hidden_gradient_square"])
        for owner, e, hidden_F in seen:
            if owner is experts:
                squares[e] += hidden_F.grad.double() ** 2
        assert_near(named["hidden_gradient_square"], squares)
        first, down = experts.gate_up_proj.grad, experts.down_proj.grad
        first, down = (first.mT, down.mT) if experts.is_transposed else (first, down)
        if not experts.is_concatenated:
            first = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
        assert_near(named["gate_up_gradient"], first.double())
        assert_near(named["down_gradient"], down.double())
        assert float(squares.sum()) > 0 and float(down.abs().sum()) > 0


def test_padding_and_batches_change_no_gradient() -> None:
    model, ids_BS = tiny_model("olmoe"), tiny_ids(3, 6)
    attention_BS = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    tokens = make_tokens(ids_BS, attention_BS=attention_BS)
    tokens.loss_mask_BS[attention_BS == 0] = False
    one, three = (calibrate(model, tokens, batch_size=size, needs=GRADIENTS) for size in (1, 3))
    for layer in find_layers(model):
        for name in GRADIENTS:
            assert_near(*(made.layer(layer.shape.name)[name] for made in (one, three)))


def everything(model: PreTrainedModel, **how: object) -> Statistics:
    needs = (
        "turned_output_norm",
        "turn_sum",
        "output_cosine",
        "weight_square",
        "router_norm",
        "down_column_square",
        "token_count",
    )
    return calibrate(model, make_tokens(tiny_ids(3, 6), **how), needs=(*needs, "gated_output_norm", "count"))


def test_token_contribution_all_outputs_weights_and_vocabulary_equal_a_plain_pass() -> None:
    model, ids_BS = tiny_model("olmoe"), tiny_ids(3, 6)
    made = everything(model)
    model.set_experts_implementation("eager")
    seen, before = watch(model, ids_BS), []
    handles = [
        decoder.post_attention_layernorm.register_forward_pre_hook(lambda _m, inputs: before.append(inputs[0]))
        for decoder in model.model.layers
    ]
    with torch.no_grad():
        model(ids_BS)
    for handle in handles:
        handle.remove()
    for layer, h_BSD in zip(find_layers(model), before, strict=True):
        name, record = layer.shape.name, seen[layer.shape.name]
        turned, cosine, vocabulary, turns = torch.zeros(E), torch.zeros(E, E), {}, 0.0
        for t, x_D in enumerate(record["x_TD"]):
            with torch.no_grad():
                every = [layer.experts(x_D[None], torch.tensor([[e]]), torch.ones(1, 1))[0] for e in range(E)]
                y_D = layer.experts(x_D[None], record["index_TK"][t][None], record["gate_TK"][t][None])[0]
            h_D = h_BSD.flatten(0, 1)[t]
            turn = max(0.0, 1 - float(functional.cosine_similarity(h_D.double(), (h_D + y_D).double(), dim=0)))
            turns += turn
            for e, gate in zip(record["index_TK"][t].tolist(), record["gate_TK"][t], strict=True):
                turned[e] += gate * every[e].norm() * turn
                vocabulary[e, int(ids_BS.flatten()[t])] = vocabulary.get((e, int(ids_BS.flatten()[t])), 0) + 1
            for i in range(E):
                for j in range(E):
                    cosine[i, j] += functional.cosine_similarity(every[i], every[j], dim=0)
        named = made.layer(name)
        torch.testing.assert_close(named["turned_output_norm"], turned.double(), rtol=1e-3, atol=1e-6)
        assert float(named["turn_sum"]) == pytest.approx(turns, rel=1e-3)
        torch.testing.assert_close(named["output_cosine"], cosine.double(), rtol=1e-4, atol=1e-4)
        assert {
            (e, v): int(named["token_count"][e, v]) for e, v in named["token_count"].nonzero().tolist()
        } == vocabulary
        weights = [read_expert(layer.experts, e) for e in range(E)]
        squares = [sum(float(m.double().square().sum()) for m in (w.gate_FD, w.up_FD, w.down_DF)) for w in weights]
        assert named["weight_square"].tolist() == pytest.approx(squares)
        assert named["router_norm"].tolist() == pytest.approx(
            [float(row.norm()) for row in layer.router.weight.detach()]
        )
        assert float(named["down_column_square"].sum()) == pytest.approx(
            sum(float(w.down_DF.double().square().sum()) for w in weights)
        )
        assert float(turned.sum()) > 0 and math.isclose(float(named["output_cosine"][0, 0]), 18, rel_tol=1e-5)


def test_padding_is_left_out_and_domains_share_the_weights() -> None:
    model = tiny_model("olmoe")
    attention_BS = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    padded, whole = everything(model, attention_BS=attention_BS, domain_B=(0, 1, 1)), everything(model)
    name = find_layers(model)[0].shape.name
    assert (
        float(padded.layer(name)["token_count"].sum()) == 2 * 16
        and float(padded.layer(name)["output_cosine"][0, 0]) < 17
    )
    assert torch.equal(padded.layer(name)["weight_square"], whole.layer(name)["weight_square"])
    assert torch.equal((padded + padded).layer(name)["weight_square"], whole.layer(name)["weight_square"])


def test_easy_ep_without_the_token_term_is_the_weighted_sum() -> None:
    """A layer that turns every token by the same angle gives the same order; here the term itself is taken out."""
    model = tiny_model("olmoe")
    name = find_layers(model)[0].shape.name
    named = everything(model).layer(name)
    assert bool((named["turned_output_norm"] <= 2 * named["gated_output_norm"] + 1e-9).all())
    assert bool((named["turned_output_norm"][named["count"] > 0] > 0).all())


def test_a_block_without_a_norm_in_front_is_refused() -> None:
    model = tiny_model("olmoe")
    for decoder in model.model.layers:
        decoder.post_attention_layernorm.forward = lambda x: x * 1.0
        decoder.post_attention_layernorm = Parts(decoder.post_attention_layernorm)
    with pytest.raises(UnsupportedModel, match=r"no norm in front of its block"):
        everything(model)


class Parts(nn.Module):
    """A norm that hides what it was given: its own part gets something else."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:1])[:0].sum() + x
