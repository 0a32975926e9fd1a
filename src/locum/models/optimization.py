"""A model on the processor whose steps of few tokens are as fast as its matrices are read: `locum.optimize(model)`.

What it does to a module is an attribute `forward` of its own, which takes few rows to Locum's compiled products (few_rows.py) and
everything else to the module's class, as before: many rows, gradients, autocast, torch.compile, another device, another number
format. Weights stay where they are and are read when they are used, so nothing is held twice, and saving, casting, hooks and
adapters work as before. A module whose `forward` somebody has replaced already is left alone.

Attention is chosen by a name in transformers: `sdpa` becomes `locum_sdpa`, which is the same but for one query over a cache of which
nothing is masked. Models whose code asks for that very name keep it.

One token of each prompt goes through a decoder layer, up to its experts, in two calls where the layer is known (decoder_steps.py).

No family is named here. Norms, routers and activations are known by their numbers: each is tried on a few rows, and is replaced if
the compiled product gives what it gives.

Letters: X rows of x, T tokens, K top-k, E experts, D model width.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..containers.container import is_swiglu
from ..errors import OptionError, UnsupportedModel
from ..kernels import choice, few_rows
from .decoder_layers import decoder_stack, place_in
from .decoder_steps import first_half, step
from .families import MoeLayer, canonical_activation, find_layers, is_stock_experts

# Measured on one core of an EPYC with avx512_bf16, shared with other work: a matrix of 2048 x 2048 in bfloat16 times M rows,
# microseconds of the core's own time, the fastest of seven loops over 32 of them. Reading one at 20 GB/s takes 410.
#   M                    1     2     4     8    12    16    24    32
#   torch              799   731   794   960  1112  1276  1582  1893
#   few_rows           413   441   431   593   668   873  1214  1585
ROWS = 32  # the most of a linear layer
NORM_NUMBERS = 2**17  # the most of a norm's input: it has one thread
TRIED, NEAR = 16, 1e-5  # rows that a norm and a router are tried on, and how near they come

OURS = (__name__, step.__module__)  # whose functions stand for forwards

Model = TypeVar("Model", bound=nn.Module)


def optimize(model: Model) -> Model:
    """Make a loaded MoE model's steps of few tokens fast on the processor, in place; the same model is returned.

    `generate` works as before, for any number of prompts and any cache. Results are torch's within rounding. It costs no memory.
    Where there is no C++ compiler or no avx512_bf16, nothing changes. Raises UnsupportedModel as everything does that looks for
    a model's experts, and OptionError for a model that is no transformers model.

        model = locum.optimize(AutoModelForCausalLM.from_pretrained(folder))
    """
    if not hasattr(model, "config"):
        raise OptionError(f"optimize takes a transformers model, not {type(model).__name__}")
    layers = find_layers(model)
    if not few_rows.library():
        return model
    with torch.no_grad():
        _set_steps(model, layers)
        for layer in layers:
            _set(layer.router, _routing(layer))
            _set(layer.experts, _expert_products(layer))
        for module in model.modules():
            if type(module) is nn.Linear:
                _set(module, _linear)
            elif not [*module.children()]:
                _set(module, _norming(module))
    _exchange(model, TORCH, ATTENTION)
    return model


def restore(model: nn.Module) -> None:
    """Take back what `optimize` did, in place."""
    _exchange(model, ATTENTION, TORCH)
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, functools.partial) and getattr(forward.func, "__module__", None) in OURS:
            del module.forward


def _set(module: nn.Module, function: Callable[..., Any] | None) -> None:
    """Let a function of the module and its arguments be its forward. Copies and pickles of the module have it too."""
    if function is not None and "forward" not in vars(module):
        module.forward = functools.partial(function, module)


def _set_steps(model: nn.Module, layers: Sequence[MoeLayer]) -> None:
    """Let decoder layers with one MoE block take one token of each prompt in few calls, where they are known (decoder_steps.py)."""
    names = [layer.shape.name for layer in layers]
    try:
        prefix, stack = decoder_stack(model, names)
    except UnsupportedModel:
        return
    tried: dict[Any, bool] = {}
    for name in names:
        index = place_in(prefix, name)
        block = name.removeprefix(f"{prefix}.{index}.").partition(".")[0]
        half = first_half(stack[index], block, _plus_and_eps, tried)
        if half is not None:
            _set(stack[index], functools.partial(step, half=half, implementation=ATTENTION))


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    if x.numel() <= ROWS * module.in_features and few_rows.serves(x, module.weight, module.bias):
        return few_rows.linear(x, module.weight, module.bias)
    return type(module).forward(module, x)


# --- attention --------------------------------------------------------------------------------------------------------

ATTENTION, TORCH = "locum_sdpa", "sdpa"  # the implementations of attention, as transformers calls them


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query of each prompt over all that is in the cache, where nothing is masked; all other by torch."""
    one = query.ndim == 4 and query.shape[2] == 1 and attention_mask is None and not more.get("dropout")
    known = all(more.get(name) is None for name in UNKNOWN) and key.shape[:3] == value.shape[:3]
    if one and known and few_rows.serves(query) and all(few_rows.has_rows(x, query.dtype) for x in (key, value)):
        scale = more.get("scaling")
        return few_rows.attend(query, key, value, query.shape[3] ** -0.5 if scale is None else scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


UNKNOWN = ("softcap", "position_bias", "s_aux", "output_attentions")  # which torch's attention knows, or refuses
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[TORCH])


def _exchange(model: nn.Module, found: str, wanted: str) -> None:
    """Another implementation of attention, where it is this one; sliding windows are in its masks, as in torch's."""
    if getattr(model.config, "_attn_implementation", None) == found and not _asks_for(model, TORCH):
        model.set_attn_implementation(wanted)


def _asks_for(model: nn.Module, name: str) -> bool:
    """Whether the code of any of its modules names an implementation: another one would do something else there."""
    modules = {type(module).__module__ for module in model.modules()}
    own = [module for module in modules if module.partition(".")[0] not in ("torch", "locum")]
    try:
        return any(f'"{name}"' in inspect.getsource(sys.modules[module]) for module in own)
    except (OSError, TypeError, KeyError):  # without its source
        return True


# --- norms ------------------------------------------------------------------------------------------------------------


def _norming(module: nn.Module) -> Callable[..., Any] | None:
    """What stands for a root-mean-square norm's forward; None for what is none that the compiled products know."""
    known = _plus_and_eps(module)
    return None if known is None else functools.partial(_norm, plus=known[0], eps=known[1])


def _plus_and_eps(module: nn.Module) -> tuple[float, float] | None:
    """What a root-mean-square norm adds to its weights, and to the mean of squares; None for what is no such norm."""
    eps = next((value for name in ("variance_epsilon", "eps") if (value := vars(module).get(name)) is not None), None)
    weight_D = getattr(module, "weight", None)
    if [*module.state_dict()] != ["weight"] or weight_D.ndim != 1 or not isinstance(eps, float) or not weight_D.is_cpu:
        return None
    twin, generator = copy.deepcopy(module).float(), torch.Generator().manual_seed(0)
    twin.weight.copy_(torch.randn(len(weight_D), generator=generator))
    sizes_X1 = torch.logspace(-4, 2, TRIED)[:, None]
    x_XD = torch.randn(TRIED, len(weight_D), generator=generator) * sizes_X1
    expected_XD = _tried(twin, x_XD)
    for plus in (0.0, 1.0):
        made_XD = few_rows.norm(x_XD, twin.weight, plus, eps)
        if isinstance(expected_XD, Tensor) and torch.allclose(made_XD, expected_XD, NEAR, NEAR):
            return plus, eps
    return None


def _norm(module: nn.Module, x: Tensor, *more: Any, plus: float, eps: float, **named: Any) -> Tensor:
    alone = not more and not named  # a gate may come along
    if alone and x.numel() <= NORM_NUMBERS and few_rows.serves(x, module.weight):
        return few_rows.norm(x, module.weight, plus, eps)
    return type(module).forward(module, x, *more, **named)


# --- routers and experts ----------------------------------------------------------------------------------------------


def _routing(layer: MoeLayer) -> Callable[..., Any] | None:
    """What stands for a router's forward, where it is a linear layer, softmax and the K largest; else None."""
    router, top_k = layer.router, layer.shape.top_k
    held = router.state_dict()
    size = (layer.shape.num_experts, layer.shape.hidden_size)
    if not {"weight"} <= {*held} <= {"weight", "bias"} or held["weight"].shape != size or not held["weight"].is_cpu:
        return None
    twin, generator = copy.deepcopy(router).float().eval(), torch.Generator().manual_seed(0)
    for tensor in twin.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    x_TD = torch.randn(TRIED, size[1], generator=generator) / size[1] ** 0.5
    expected = _tried(twin, x_TD)
    as_it_is = _tried(router, x_TD.to(held["weight"].dtype))
    if not isinstance(expected, tuple) or len(expected) != 3 or as_it_is is None:
        return None
    for sums_to_one in (False, True):
        made = few_rows.route(x_TD, twin.weight, getattr(twin, "bias", None), top_k, sums_to_one)
        if all(
            a.shape == b.shape and torch.allclose(a, b.to(a.dtype), NEAR, NEAR)
            for a, b in zip(made, expected, strict=True)
        ):
            return functools.partial(_route, top_k=top_k, sums_to_one=sums_to_one, dtype=as_it_is[1].dtype)
    return None


def _route(module: nn.Module, x_TD: Tensor, *more: Any, top_k: int, sums_to_one: bool, dtype: torch.dtype) -> Any:
    weight_ED, bias_E = module.weight, getattr(module, "bias", None)
    few = x_TD.ndim == 2 and len(x_TD) <= ROWS and not more and not module.training
    if few and few_rows.serves(x_TD, weight_ED, bias_E):
        logits_TE, weight_TK, index_TK = few_rows.route(x_TD, weight_ED, bias_E, top_k, sums_to_one)
        return logits_TE, weight_TK.to(dtype), index_TK
    return type(module).forward(module, x_TD, *more)


def _expert_products(layer: MoeLayer) -> Callable[..., Any] | None:
    """What stands for stock experts' forward, where their weights lie as the compiled products read them; else None."""
    experts = layer.experts
    if not is_stock_experts(experts) or experts.is_transposed or not experts.is_concatenated or not experts.has_gate:
        return None
    if (
        experts.has_bias
        or getattr(experts, "has_post_expert_norm", False)
        or getattr(experts, "_is_expert_parallel", False)
    ):
        return None
    return _experts if is_swiglu(canonical_activation(experts)) else None


def _experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    gate_up_EGD, down_EDF = module.gate_up_proj, module.down_proj
    few = hidden_states.ndim == 2 and top_k_index.numel() <= choice.NATIVE_ROWS * len(down_EDF)
    if few and few_rows.serves(hidden_states, gate_up_EGD, down_EDF):
        return few_rows.experts(hidden_states, gate_up_EGD, down_EDF, top_k_index, top_k_weights)
    return type(module).forward(module, hidden_states, top_k_index, top_k_weights)


def _tried(module: nn.Module, x: Tensor) -> Any:
    """What a module's own class makes of x; None where it cannot."""
    try:
        return type(module).forward(module, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
