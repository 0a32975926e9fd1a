"""Training of SmolMoE: one expert per domain, routers by regression, and, if asked for, everything together.

Branch-Train-MiX (2403.07816), with the routers fitted instead of trained: a router only has to tell from a token's
hidden state which domain it is in, which is logistic regression on what the dense model's MLPs see.

Everything depends on the seed, the text and the number of steps and threads; never on time.

Shapes: W windows, B rows of a batch, S positions, T tokens, D model width, V vocabulary, L layers, C classes (MLPs).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, MixtralForCausalLM

from benchmarks.reference.train import balance_loss, learning_rate
from benchmarks.smolmoe.mixtral import PROJECTIONS, mlps_of

RIDGE = 3e-3  # per squared weight on features of unit size, beside the mean cross-entropy of a token
WARM_UP, FLOOR = 0.1, 0.1  # fraction of the steps; fraction of the peak learning rate at the end
JOINT_RATE = 1e-4
BALANCE = 0.01  # weight of Mixtral's load-balancing loss in joint training


@dataclass(frozen=True)
class Trained:
    """What training one expert gave: its MLPs and the mean loss, nats per token, of the first and last few steps."""

    mlps: dict[str, Tensor]
    first: float
    last: float


def precision(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 products with fp32 weights: twice as fast as fp32 where the processor has bf16 products."""
    return torch.autocast(device.type, torch.bfloat16)


def backward(model: nn.Module, hidden_BSD: Tensor, ids_BS: Tensor, extra: Tensor | None = None) -> float:
    """Mean cross-entropy of the next tokens, and its gradients; the head takes a row at a time, to hold few logits.

    `extra` is a loss of its own that is added.
    """
    leaf_BSD = hidden_BSD.detach().requires_grad_()
    count = ids_BS[:, 1:].numel()
    total = 0.0
    for row_SD, ids_S in zip(leaf_BSD, ids_BS, strict=True):
        with precision(row_SD.device):
            logits_SV = model.lm_head(row_SD[:-1])
        loss = cross_entropy(logits_SV.float(), ids_S[1:], reduction="sum") / count
        loss.backward()
        total += loss.item()
    roots = [(hidden_BSD, leaf_BSD.grad)] + ([] if extra is None else [(extra, None)])
    torch.autograd.backward(*zip(*roots, strict=True))
    return total


def train_expert(
    dense: LlamaForCausalLM,
    windows_WS: Tensor,
    *,
    steps: int,
    rows: int,
    rate: float,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """The MLPs of a dense model after AdamW on these windows, `rows` a step; everything else, and `dense`, stays as it was.

    On the model's device; what is returned is in ordinary memory.

    Raises ValueError if there are not enough windows and ArithmeticError if the loss is not finite.
    """
    if len(windows_WS) < steps * rows:
        raise ValueError(f"{len(windows_WS)} windows for {steps} steps of {rows}")
    before = {name: tensor.clone() for name, tensor in mlps_of(dense).items()}
    dense.requires_grad_(False)
    trained = [getattr(layer.mlp, name).weight.requires_grad_() for layer in dense.model.layers for name in PROJECTIONS]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    losses = []
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((step + 1) / steps, rate, WARM_UP, FLOOR)
            ids_BS = windows_WS[step * rows : (step + 1) * rows].to(dense.device)
            with precision(dense.device):
                hidden_BSD = dense.model(input_ids=ids_BS, use_cache=False).last_hidden_state
            losses.append(backward(dense, hidden_BSD, ids_BS))
            if not math.isfinite(losses[-1]):
                raise ArithmeticError(f"the loss at step {step} is {losses[-1]}; lower the learning rate {rate}")
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1, losses[-1])
        few = max(1, steps // 5)
        found = {name: tensor.to("cpu", copy=True) for name, tensor in mlps_of(dense).items()}
        return Trained(found, sum(losses[:few]) / few, sum(losses[-few:]) / few)
    finally:
        dense.requires_grad_(False)
        for name, tensor in mlps_of(dense).items():
            tensor.copy_(before[name])


# Routers


@torch.no_grad()
def mlp_inputs(dense: LlamaForCausalLM, windows_WS: Tensor) -> list[Tensor]:
    """What the MLP of every layer gets for these windows: L tensors [T, D], bf16, on the model's device."""
    seen: list[list[Tensor]] = [[] for _ in dense.model.layers]

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen[layer].append(inputs[0].flatten(0, 1).to(torch.bfloat16))

    hooks = [layer.mlp.register_forward_pre_hook(keep(i)) for i, layer in enumerate(dense.model.layers)]
    try:
        for row_S in windows_WS:
            with precision(dense.device):
                dense.model(input_ids=row_S[None].to(dense.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(inputs) for inputs in seen]


def fit_router(x_TD: Tensor, class_T: Tensor, classes: int, ridge: float = RIDGE) -> Tensor:
    """Weights [C, D], without bias, of the ridge logistic regression of classes on hidden states.

    minimise mean_t -log softmax(W x_t)[class_t] + ridge * |W diag(s)|^2, s_d the root mean square of feature d,

    by L-BFGS on features scaled by 1/s, from W = 0. Convex, so the result does not depend on a start.
    """
    x_TD = x_TD.float()
    scale_D = x_TD.square().mean(0).sqrt().clamp_min(1e-6)
    scaled_TD = x_TD / scale_D
    weight_CD = torch.zeros(classes, x_TD.shape[1], device=x_TD.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CD], max_iter=60, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(scaled_TD @ weight_CD.T, class_T) + ridge * weight_CD.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weight_CD.detach() / scale_D).cpu()


def fit_routers(dense: LlamaForCausalLM, windows: list[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """For every layer the router's weights [C, D] and its accuracy on the tokens that it was fitted to.

    `windows` has one tensor [W, S] for every class.
    """
    seen = [mlp_inputs(dense, windows_WS) for windows_WS in windows]
    class_T = torch.cat([torch.full((len(inputs[0]),), c) for c, inputs in enumerate(seen)]).to(dense.device)
    for layer in range(len(dense.model.layers)):
        x_TD = torch.cat([inputs[layer] for inputs in seen])
        weight_CD = fit_router(x_TD, class_T, len(windows))
        accuracy = ((x_TD.float() @ weight_CD.to(x_TD.device).T).argmax(1) == class_T).float().mean().item()
        yield weight_CD, accuracy


# Everything together


def train_jointly(
    moe: MixtralForCausalLM,
    windows_WS: Tensor,
    *,
    steps: int,
    rows: int,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[float, float]:
    """Train routers and experts of an fp32 Mixtral in place, on text of all domains; returns first and last loss.

    Adafactor keeps a row and a column of second moments for every matrix, so that weights and gradients are all that
    is large (692M parameters: 8 GB in all); AdamW would need twice as much. Router logits get Mixtral's load-balancing loss.
    """
    moe.requires_grad_(False)
    trained = [p for layer in moe.model.layers for p in layer.mlp.parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.Adafactor(trained, lr=JOINT_RATE, foreach=False)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / steps, JOINT_RATE, WARM_UP, FLOOR)
        ids_BS = windows_WS[step * rows : (step + 1) * rows].to(moe.device)
        with precision(moe.device):
            out: Any = moe.model(input_ids=ids_BS, use_cache=False, output_router_logits=True)
        balance = BALANCE * balance_loss(out.router_logits, moe.config.num_experts_per_tok)
        losses.append(backward(moe, out.last_hidden_state, ids_BS, balance))
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(f"the loss at joint step {step} is {losses[-1]}")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, losses[-1])
    moe.requires_grad_(False)
    few = max(1, steps // 5)
    return sum(losses[:few]) / few, sum(losses[-few:]) / few
