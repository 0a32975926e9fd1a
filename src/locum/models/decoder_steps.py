"""A decoder layer up to its experts, for one token of each prompt, in two calls of compiled products: norm, queries, keys, values and their
positions; then attention over the cache, what it adds, and the norm before the experts. What follows, the MoE block, runs as it is.

No family is named here. A layer is looked at by the names that most of transformers' layers have (`_find`), and is then known by its
numbers: two tokens go through a float32 copy with random weights, whose MoE block is a simple function, and have to come out as that
copy's own class says.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..kernels import few_rows
from ..kernels.few_rows import Norm

TRIED, NEAR = 5, 1e-4  # tokens in the cache of a trial, and how near its results come
CACHE = ("cache", "past_key_values")  # what transformers calls it, from 5.24 on and before
# Arguments that change nothing where there is one token and no mask. Any other must be None or False.
WITHOUT_EFFECT = ("position_ids", "cache_position", "use_cache", "position_embeddings", *CACHE)

Known = Callable[[nn.Module], tuple[float, float] | None]  # plus and eps of a root-mean-square norm


@dataclass(frozen=True, eq=False)
class FirstHalf:
    """What a decoder layer computes up to its MoE block."""

    layer: nn.Module
    attention: nn.Module
    block: nn.Module
    parts: tuple[
        tuple[nn.Module, str, nn.Module], ...
    ]  # modules that do not run then: where they are, and under which name
    norms: Mapping[str, tuple[float, float]]  # plus and eps

    def serves(self, x: Tensor, args: tuple[Any, ...], named: Mapping[str, Any], implementation: str) -> bool:
        """Whether a call of the layer is one that it knows."""
        if args or x.ndim != 3 or x.shape[1] != 1 or self.layer.training:
            return False
        if any(value is not None and value is not False for name, value in named.items() if name not in WITHOUT_EFFECT):
            return False
        if self.attention.config._attn_implementation != implementation:
            return False
        for parent, name, module in self.parts:
            if parent._modules.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
                return False
        angles = named.get("position_embeddings")
        if not isinstance(angles, tuple) or len(angles) != 2:
            return False
        fits = all(few_rows.has_rows(a, x.dtype) and a.shape[-1] == self.attention.head_dim for a in angles)
        return fits and angles[0].stride() == angles[1].stride() and few_rows.serves(x, *self._tensors())

    def run(self, x: Tensor, cache: Cache | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state [prompts, 1, D] to which the MoE block adds, and what that is given."""
        of_qkv = [self.attention._modules[name]._parameters for name in ("q_proj", "k_proj", "v_proj")]
        last = self.attention._modules["o_proj"]._parameters
        query, key, value = few_rows.project(
            x if x.stride(2) == 1 else x.contiguous(),
            self._norm(self.layer, "input_layernorm"),
            [held["weight"] for held in of_qkv],
            [held["bias"] for held in of_qkv],
            self._norm(self.attention, "q_norm"),
            self._norm(self.attention, "k_norm"),
            cos,
            sin,
        )
        if cache is not None:
            key, value = cache.update(key, value, self.attention.layer_idx)
        after = self._norm(self.layer, "post_attention_layernorm")
        return few_rows.attended(x, query, key, value, self.attention.scaling, last["weight"], last["bias"], after)

    def _norm(self, parent: nn.Module, name: str) -> Norm | None:
        return Norm(parent._modules[name]._parameters["weight"], *self.norms[name]) if name in self.norms else None

    def _tensors(self) -> list[Tensor]:
        return [tensor for _, _, module in self.parts for tensor in module._parameters.values() if tensor is not None]


def step(
    layer: nn.Module, hidden_states: Tensor, *args: Any, half: FirstHalf, implementation: str, **named: Any
) -> Any:
    """A decoder layer's forward, where it is asked for one token of each prompt; else its class's."""
    if not half.serves(hidden_states, args, named, implementation):
        return type(layer).forward(layer, hidden_states, *args, **named)
    cache = next((named[name] for name in CACHE if named.get(name) is not None), None)
    hidden, normed = half.run(hidden_states, cache, *named["position_embeddings"])
    return hidden + half.block(normed)


def first_half(layer: nn.Module, block: str, known: Known, tried: dict[Any, bool]) -> FirstHalf | None:
    """What stands for a decoder layer up to the block of this name; None for a layer that computes something else. `tried` remembers what came of
    layers that are alike."""
    if (half := _find(layer, block, known)) is None:
        return None
    alike = (
        type(layer),
        *(type(module) for _, _, module in half.parts),
        *(tuple(tensor.shape) for tensor in half._tensors()),
        *(f"{n}={v}" for x in (layer, half.attention) for n, v in vars(x).items() if isinstance(v, float | int | str)),
    )
    key = tuple(item for item in alike if not str(item).startswith("layer_idx="))
    if key not in tried:
        tried[key] = _computes_that(layer, block, known)
    return half if tried[key] else None


def _find(layer: nn.Module, block: str, known: Known) -> FirstHalf | None:
    attention = layer._modules.get("self_attn")
    if (
        attention is None
        or not hasattr(attention, "config")
        or not isinstance(getattr(attention, "head_dim", None), int)
    ):
        return None
    linears, of_qk = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
    norms = [(layer, "input_layernorm"), (layer, "post_attention_layernorm")]
    norms += [(attention, name) for name in of_qk if name in attention._modules]
    named = [(layer, "self_attn"), *((attention, name) for name in linears), *norms]
    parts = [(parent, name, parent._modules.get(name)) for parent, name in named]
    if any(module is None or "forward" in vars(module) for _, _, module in parts):
        return None
    if {*layer._modules} != {"self_attn", block, "input_layernorm", "post_attention_layernorm"}:
        return None
    if {*attention._modules} - {*linears, *of_qk} or not all(
        type(attention._modules[name]) is nn.Linear for name in linears
    ):
        return None
    found = {name: known(parent._modules[name]) for parent, name in norms}
    if None in found.values() or len(norms) == 3 or not isinstance(getattr(attention, "scaling", None), float):
        return None
    return FirstHalf(layer, attention, layer._modules[block], tuple(parts), found)


class _Simple(nn.Module):
    """In the place of a MoE block."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


@torch.no_grad()
def _computes_that(layer: nn.Module, block: str, known: Known) -> bool:
    """Whether a float32 copy of the layer gives what is computed here, for tokens after others and with what both put into a cache."""
    twin = copy.deepcopy(layer, {id(layer._modules[block]): _Simple()}).float().eval()
    half = _find(twin, block, known)
    if half is None or twin.training:
        return False
    generator = torch.Generator().manual_seed(0)
    for name, tensor in twin.named_parameters():
        spread = tensor.shape[-1] ** -0.5 * (30 if "v_proj" in name else 1)  # so large that what is cut off shows
        tensor.copy_(
            torch.randn(tensor.shape, generator=generator) * spread
            if tensor.ndim > 1
            else torch.rand(tensor.shape, generator=generator)
        )
    width, head = half.attention.q_proj.in_features, half.attention.head_dim
    called = next((name for name in CACHE if name in inspect.signature(type(twin).forward).parameters), None)
    if called is None:
        return False
    caches = DynamicCache(), DynamicCache()
    try:
        for begin, count in ((0, TRIED), (TRIED, 1), (TRIED + 1, 1)):
            x = torch.randn(1, count, width, generator=generator)
            angles = tuple(torch.randn(1, count, head, generator=generator) for _ in range(2))
            places = torch.arange(begin, begin + count)[None]

            def by_class(cache: Cache, x: Tensor = x, angles: Any = angles, places: Tensor = places) -> Any:
                given = {"attention_mask": None, "position_ids": places, "position_embeddings": angles, called: cache}
                return type(twin).forward(twin, x, **given)

            expected = by_class(caches[0])
            if count > 1:
                by_class(caches[1])
                continue
            hidden, normed = half.run(x, caches[1], *angles)
            made = hidden + normed.tanh()
            if not isinstance(expected, Tensor) or not torch.allclose(made, expected, NEAR, NEAR):
                return False
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    return True
