"""Layers whose answer is known: expert 2 is made best and expert 3 worst, in the sense of each criterion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from criterion_cases import Layer, T, V

LOUD = torch.tensor([1.0, 1.0, 8.0, 0.05, 1.0, 1.0])
POPULAR = torch.tensor([0.0, 0.0, 3.0, -3.0, 0.0, 0.0])
FOUND = torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.0])


def planted(**changes: Callable[[Layer], object]) -> Callable[[], Layer]:
    """A layer with some of its raw numbers changed."""

    def make() -> Layer:
        layer = Layer(3)
        for name, change in changes.items():
            setattr(layer, name, change(layer))
        return layer

    return make


def concentrated(layer: Layer) -> list[tuple[Tensor, ...]]:
    """Expert 2 has a few large weights, expert 3 weights of one size."""
    weights = list(layer.weights)
    weights[2] = tuple(m**5 for m in weights[2])
    weights[3] = tuple(m.sign() for m in weights[3])
    return weights


def spread_out(layer: Layer) -> list[tuple[Tensor, ...]]:
    """Expert 2 has all directions alike, expert 3 one alone."""
    weights = list(layer.weights)
    weights[2] = tuple(torch.eye(*m.shape) for m in weights[2])
    weights[3] = tuple(torch.ones_like(m) for m in weights[3])
    return weights


def alike(name: str) -> Callable[[Layer], list[tuple[Tensor, ...]]]:
    """Expert 2 is the mean of all, expert 3 its opposite."""

    def change(layer: Layer) -> list[tuple[Tensor, ...]]:
        weights = list(getattr(layer, name))
        others = [weights[e] for e in (0, 1, 4, 5)]
        weights[2] = tuple(sum(same) for same in zip(*others, strict=True))
        weights[3] = tuple(-m for m in weights[2])
        return weights

    return change


def alike_outputs(layer: Layer) -> Tensor:
    every_TED = layer.every_TED.clone()
    every_TED[:, 2] = every_TED[:, [0, 1, 4, 5]].sum(dim=1)
    every_TED[:, 3] = -every_TED[:, 2]
    return every_TED


def extreme(layer: Layer) -> list[tuple[Tensor, ...]]:
    """Expert 2 has gradients that stand out, expert 3 has none; the others have one."""
    gradients = [tuple(m.sign() for m in expert) for expert in layer.weights_back]
    for e, many in ((0, 1), (1, 1), (2, 2), (4, 1), (5, 1)):
        gradients[e][0].flatten()[:many] = 40.0
    return gradients


def extreme_outputs(layer: Layer) -> Tensor:
    """Expert 2 has outputs that stand out, expert 3 has none; the others have one."""
    out_TKD = layer.out_TKD.sign()
    for e, many in ((0, 1), (1, 1), (2, 4), (4, 1)):
        for pair in layer.pairs(e)[:many]:
            out_TKD[pair][0] = -90.0
    return out_TKD


PLANTED: dict[str, Callable[[], Layer]] = {
    "aimer": planted(weights=concentrated),
    "wsr": planted(weights=spread_out),
    "ews": planted(weights=alike("weights")),
    "egs": planted(weights_back=alike("weights_back")),
    "eas": planted(every_TED=alike_outputs),
    "ego": planted(weights_back=extreme),
    "eao": planted(out_TKD=extreme_outputs),
    "removal_loss": planted(found=lambda layer: {**layer.found, "removal_loss": FOUND}),
    "evtc": planted(id_T=lambda layer: torch.arange(T) % V, index_TK=lambda layer: few_tokens()),
    **dict.fromkeys(("frequency", "gate", "gate_softmax", "proficiency"), lambda: Layer(3, prefer_E=POPULAR)),
    **dict.fromkeys(
        (
            "ean",
            "ean_dims",
            "man",
            "msan",
            "weighted_ean",
            "easy_ep",
            "reap",
            "reap_renormalised",
            "mesa",
            "mone",
            "spread",
        ),
        lambda: Layer(3, scale_E=LOUD),
    ),
    **dict.fromkeys(("eae", "ewn", "rwn", "camera", "heapr", "egn", "ege"), lambda: Layer(3, scale_E=LOUD)),
}


def few_tokens() -> Tensor:
    """Expert 2 is selected by every token, expert 3 by one."""
    index_TK = torch.tensor([[2, (0, 1, 4)[t % 3]] for t in range(T)])
    index_TK[0, 1] = 3
    return index_TK


# What stands for a planted case is a test of its own in test_criteria.py; of an order turned round, the oracle says it all.
PLANTED_ELSEWHERE = {
    "random",
    "ecc_max",
    "ecc_min",
    "ets_max",
    "ets_min",
    "ean_dims_max",
    "evtc_max",
    "eae_max",
    "eao_max",
    "eas_max",
}
PLANTED_ELSEWHERE |= {"euf_max"} | {f"{name}_max" for name in ("ewn", "ews", "rwn", "wsr", "egn", "egs", "ege", "ego")}
