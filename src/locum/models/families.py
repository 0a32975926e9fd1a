"""Finding the MoE layers of any transformers model by one rule, and reading and slicing their experts.

The rule: an experts module carries the flags that transformers' `use_experts_implementation` gives it (`has_gate`,
`is_transposed`, ...) and a `down_proj`; its router is the sibling named `gate` or `router`, and every tensor of the
router has the expert axis first. A selection bias may live in the block around the two. Experts of vision and audio
towers are left alone: text never reaches them. What does not fit gets a row in `FAMILIES`, also experts that transformers
left without the flags; what is not safe is refused there, by name, with the reason. There is no other per-model code.

Letters: E experts, K top-k, T tokens, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation
from transformers.models.auto import modeling_auto

from ..containers.container import StandInExperts
from ..errors import UnsupportedModel
from ..experts.weights import ExpertWeights
from ..shapes import LayerShape
from .activation import Activation
from .routers import RouterRule, RouterTensor, probe_router, router_tensors

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # where configs hold E
TOP_KS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")  # and K; modules say top_k too
EXPERT_TENSORS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
KNOWN_FLAGS = frozenset(  # of the decorator that puts experts behind transformers' experts interface
    (
        "experts_class",
        "experts_interface",
        "is_concatenated",
        "is_transposed",
        "has_bias",
        "has_gate",
        "has_post_expert_norm",
    )
)
PAST_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # were in files once; models make them anew
OTHER_TOWERS = ("vision", "visual", "audio", "talker")  # parts of a module's path that text does not run through
AUTO_CLASSES = {  # by the task of their models, in order of choice
    "CAUSAL_LM": "AutoModelForCausalLM",
    "MULTIMODAL_LM": "AutoModelForMultimodalLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "TOKEN_CLASSIFICATION": "AutoModelForTokenClassification",
}
CLASSES = tuple(AUTO_CLASSES)


@dataclass(frozen=True)
class Family:
    """An exception to the rule for one `model_type` (and for the same name with "_text" behind it)."""

    refuse: str = ""  # why nothing can be done safely
    refuse_dropping: str = ""  # why no expert may leave the router; replacing experts is safe
    router: RouterRule = field(default_factory=RouterRule)
    undecorated: str = ""  # the class of its experts, which follow the rule but lack transformers' decorator


GEMMA = RouterRule(shared=("scale",), probabilities=True)
INKLING = RouterRule(shared=("global_scale",), rows_after=("weight",))  # the shared experts' gates come after
ERNIE = RouterRule(expert_axis={"moe_statics.e_score_correction_bias": 1})
FAMILIES: dict[str, Family] = {
    "gemma4": Family(router=GEMMA),
    "inkling_mm_model": Family(router=INKLING),
    "inkling_text": Family(router=INKLING),
    "ernie4_5_moe": Family(router=ERNIE),
    "ernie4_5_vl_moe": Family(
        refuse="its files keep text and vision experts in one list, which transformers splits by one number of experts: "
        "neither kind can change without the other, and text never reaches the vision experts to measure them",
        router=ERNIE,
    ),
    "qwen3_omni_moe": Family(
        refuse="the whole model has no forward of its own; save its thinker (model.thinker.save_pretrained), which is a "
        "model of type 'qwen3_omni_moe_thinker', and compress that"
    ),
    "deepseek_v4": Family(
        refuse_dropping="its hash-routed layers map token ids to experts, so experts cannot be renumbered",
        router=RouterRule(shared=("tid2eid",)),
    ),
    "diffusion_gemma": Family(
        refuse="it writes text by diffusion: the same experts serve its encoder and its decoder, which reads noise, so "
        "next-token calibration, recovery and evaluation do not describe what its experts do"
    ),
    "inkling2_loop": Family(
        refuse="its files hold experts in NVFP4 and MXFP8, which transformers turns into the model's dtype as it loads them, "
        "so no size that is counted from the files holds for what would be written; and some of its layers run several "
        "times for a token, so no such layer can be rerun alone to try a removal"
    ),
    "zaya": Family(
        refuse="its router has a skip class beside the experts and reports skipped tokens as expert 0 with gate 0, so "
        "what is counted for expert 0 is not its own"
    ),
    # Families whose experts transformers keeps out of its experts interface.
    "step3p7": Family(undecorated="Step3p7Experts"),
    "dbrx": Family(
        refuse="its experts have no axis of their own: the rows of all of them follow one another in three flat matrices of "
        "a module inside, which neither transformers' kernels nor a router's index can address by expert"
    ),
    "doge": Family(
        refuse="its experts are rows of embeddings found by product keys, not networks that could be replaced"
    ),
    "jetmoe": Family(
        refuse="its attention is a mixture of experts too, under the same number of experts in the config, and its "
        "feed-forward experts are two layers of their own called one after the other on tokens sorted by expert, so there "
        "is no one call with a token's experts and gates to observe or replace"
    ),
    "llama4": Family(
        refuse="its gates multiply what goes into an expert, not what comes out, and every expert runs on every token, so "
        "its layer is not the sum of gates times outputs that statistics, merging and stand-ins describe"
    ),
    "longcat_flash": Family(
        refuse="its router also selects zero-computation experts, which hand a token on as it is, so what it selects is not "
        "always an expert that could be measured or replaced"
    ),
    "nllb-moe": Family(
        refuse="it is an encoder-decoder whose router turns tokens away from an expert beyond its capacity, so what an expert "
        "does depends on the other tokens of the batch, and next-token calibration reaches one half of it only"
    ),
    "switch_transformers": Family(
        refuse="it is an encoder-decoder whose router turns tokens away from an expert beyond its capacity, so what an expert "
        "does depends on the other tokens of the sequence, and next-token calibration reaches one half of it only"
    ),
}


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type) or FAMILIES.get(model_type.removesuffix("_text")) or Family()


def check_supported(model_type: str) -> None:
    """Refuse a family on which nothing is safe."""
    if reason := family_of(model_type).refuse:
        raise UnsupportedModel(f"model type {model_type!r} is not supported: {reason}")


@dataclass(frozen=True)
class MoeLayer:
    """A live layer: its shape, its two modules and the block that holds them. `experts` may be a container."""

    shape: LayerShape
    experts: nn.Module
    router: nn.Module
    block: nn.Module
    per_expert: tuple[RouterTensor, ...]  # what the router, and the block for it, has for every expert
    family: Family


def is_stock_experts(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def find_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """The MoE layers of a live model in model order (on any device, meta included).

    Experts that a row of `FAMILIES` calls undecorated get the experts interface, in this model alone.
    Raises UnsupportedModel for a dense model, a family that is refused and a layer that does not fit the rule.
    """
    model_type = model.config.model_type
    check_supported(model_type)
    family = family_of(model_type)
    _decorate(model, family.undecorated)
    modules = dict(model.named_modules())
    experts = [n for n, m in modules.items() if is_stock_experts(m) or isinstance(m, StandInExperts)]
    names = [n for n in experts if not _is_elsewhere(n)]
    if not names:
        raise UnsupportedModel(_why_no_layers(model_type, modules))
    configs_elsewhere = {id(getattr(modules[n], "config", None)) for n in experts if _is_elsewhere(n)}
    return tuple(_layer(name, modules, model_type, family, configs_elsewhere) for name in names)


def _decorate(model: nn.Module, class_name: str) -> None:
    """Put the experts of this class behind the experts interface. Their tensors and transformers' class do not change."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)] if class_name else []
    for part in reversed(parts):  # the innermost first: its config is the one that its experts follow
        found = [module for module in part.modules() if type(module).__name__ == class_name]
        for experts in found:
            if not is_stock_experts(experts):
                experts.__class__ = _decorated(type(experts))
                experts.__init__(part.config)  # sets the flags
        if found:  # transformers itself looks for the decorator in the source file of a model's class
            part._can_set_experts_implementation = lambda: True


@functools.cache
def _decorated(experts_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass with transformers' own decorator, for modules that are built already."""
    own = {
        "__init__": lambda self, config: None,
        "__reduce__": lambda self: (_unpickled, (experts_class,), self.__dict__),
    }
    return use_experts_implementation(type(experts_class.__name__, (experts_class,), own))


def _unpickled(experts_class: type[nn.Module]) -> nn.Module:
    """What pickle fills again: the decorated class itself has no place that it could be found by."""
    decorated = _decorated(experts_class)
    return decorated.__new__(decorated)


def unread_tensors(model: PreTrainedModel, names: Iterable[str]) -> frozenset[str]:
    """Those of a checkpoint's tensors that transformers leaves out on purpose, such as multi-token-prediction heads."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *PAST_BUFFERS]
    config = model.config.get_text_config()
    first, more = (getattr(config, name, None) or 0 for name in ("num_hidden_layers", "num_nextn_predict_layers"))
    patterns += [rf"\blayers\.{layer}\." for layer in range(first, first + more)]
    known = model.state_dict().keys()  # parts bring their patterns along, which may match what the whole does have
    return frozenset(n for n in names if n not in known and any(re.search(pattern, n) for pattern in patterns))


def notes_on(model: PreTrainedModel, layers: tuple[MoeLayer, ...], unread: frozenset[str]) -> tuple[str, ...]:
    """What a user should know of a model before compressing it."""
    notes = []
    if reason := layers[0].shape.refuse_dropping:
        notes.append(f"no expert of this model can be dropped, only replaced: {reason}")
    if elsewhere := [n for n, m in model.named_modules() if is_stock_experts(m) and _is_elsewhere(n)]:
        notes.append(f"experts that text does not reach are left alone: {elsewhere[0]} (one of {len(elsewhere)})")
    if unread:
        notes.append(
            f"transformers does not load {len(unread)} tensors of this checkpoint (such as a multi-token-prediction head: "
            f"{min(unread)}); apply copies them as they are, training and exports leave them out"
        )
    return tuple(notes)


def _is_elsewhere(name: str) -> bool:
    return any(tower in part for part in name.split(".") for tower in OTHER_TOWERS)


def _why_no_layers(model_type: str, modules: dict[str, nn.Module]) -> str:
    if any(name.rpartition(".")[2] in ("experts", "local_experts") for name in modules):
        return (
            f"model type {model_type!r} has experts, but not behind transformers' experts interface, which is where "
            f"Locum observes and replaces them; this family is not supported"
        )
    return f"model type {model_type!r} has no mixture-of-experts layers; Locum compresses MoE models only"


def _layer(
    name: str, modules: dict[str, nn.Module], model_type: str, family: Family, configs_elsewhere: set[int]
) -> MoeLayer:
    experts = modules[name]
    if not isinstance(experts, StandInExperts):
        _check_experts(experts, f"{name} ({model_type})")
    block_name = name.rpartition(".")[0]
    block = modules[block_name]
    found = [n for n in ("gate", "router") if isinstance(getattr(block, n, None), nn.Module)]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{name} ({model_type}): expected one router named 'gate' or 'router' beside it, found {found or 'none'}"
        )
    router_name = f"{block_name}.{found[0]}"
    router = modules[router_name]
    per_expert = router_tensors(router, block, experts.num_experts, family.router, f"{router_name} ({model_type})")
    kind = probe_router(router, block, _router_input(router, experts), experts.num_experts, family.router)
    top_k = int(getattr(router, "top_k", 0) or getattr(block, "top_k", 0) or kind.top_k)
    if not top_k:
        raise UnsupportedModel(f"{router_name} ({model_type}): it does not say how many experts it selects (top_k)")
    groups = _groups(router, top_k)
    _check_selection(f"{router_name} ({model_type})", experts.num_experts, top_k, router, groups["num_groups"])
    sizes = _sizes(experts)
    shape = LayerShape(
        name=name,
        num_experts=experts.num_experts,
        top_k=top_k,
        hidden_size=sizes[0],
        expert_width=sizes[1],
        router=router_name,
        router_kind=kind.scores,
        renormalised=kind.renormalised,
        **groups,
        shared_experts=sum("shared_" in n and "gate" not in n for n, _ in block.named_children()),
        has_gate=sizes[2],
        has_bias=sizes[3],
        router_numel=sum(t.numel for t in per_expert),
        router_bytes=sum(t.numel * t.tensor.element_size() for t in per_expert),
        refuse_dropping=family.refuse_dropping,
        stock_can_drop=id(getattr(experts, "config", None)) not in configs_elsewhere,
    )
    return MoeLayer(shape, experts, router, block, per_expert, family)


def _check_experts(experts: nn.Module, where: str) -> None:
    """Refuse experts that compute something which Locum does not know of: a stand-in would leave it out in silence."""
    flags = set(inspect.signature(use_experts_implementation).parameters) - KNOWN_FLAGS
    if new := sorted(flag for flag in flags if getattr(experts, flag, False)):
        raise UnsupportedModel(
            f"{where}: transformers gives these experts the flag {new[0]!r}, which this Locum does not know"
        )
    norm = "post_expert_norm." if getattr(experts, "has_post_expert_norm", False) else "\n"
    strange = [n for n, _ in experts.named_parameters() if n not in EXPERT_TENSORS and not n.startswith(norm)]
    if strange:
        raise UnsupportedModel(
            f"{where}: these experts have a tensor {strange[0]!r}; Locum knows {', '.join(EXPERT_TENSORS)} and a norm after "
            f"the expert, and does not support this family"
        )


def _sizes(experts: nn.Module) -> tuple[int, int, bool, bool]:
    """D, F, and whether there are gates and biases."""
    if isinstance(experts, StandInExperts):
        layout = experts.layout
        return layout.hidden_size, layout.expert_width, layout.has_gate, layout.has_bias
    d, f = experts.down_proj.shape[1:] if not experts.is_transposed else reversed(experts.down_proj.shape[1:])
    return int(d), int(f), experts.has_gate, experts.has_bias


def _router_input(router: nn.Module, experts: nn.Module) -> int:
    """The width of what a router reads; where experts work in a narrower space, it is not theirs."""
    weights = [t for t in router.state_dict().values() if t.ndim == 2 and t.shape[0] >= experts.num_experts]
    return int(weights[0].shape[1]) if weights else _sizes(experts)[0]


def _groups(router: nn.Module, top_k: int) -> dict[str, int]:
    groups = getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1
    if (getattr(router, "topk_method", None) or "").startswith("greedy"):
        groups = 1  # DeepSeek-V2 keeps the setting but does not use it
    open_groups = max(1, getattr(router, "topk_group", None) or 1)
    # Groups are ranked by the sum of their best two; the selected ones must hold top-k experts between them.
    return {"num_groups": int(groups), "min_per_group": max(2, -(-top_k // open_groups)) if groups > 1 else 1}


def opening_class(config: PreTrainedConfig) -> str:
    """The name, in transformers, of what opens a checkpoint as `model_class` does: an AutoModel, or else that class."""
    name = model_class(config).__name__
    for task, auto in AUTO_CLASSES.items():
        if getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(config.model_type) == name:
            return auto
    return name


def _check_selection(where: str, num_experts: int, top_k: int, router: nn.Module, num_groups: int) -> None:
    """Refuse a router that selects what is not there: sizes of config.json that its forward pass would fail on."""
    if not 1 <= top_k <= num_experts:
        raise UnsupportedModel(
            f"{where}: it selects {top_k} of {num_experts} experts; possible are 1 to {num_experts}; restore config.json"
        )
    open_groups = getattr(router, "topk_group", None) or 1
    if num_groups == 1:
        return
    if (
        not 1 <= open_groups <= num_groups
        or num_experts % num_groups
        or top_k > open_groups * num_experts // num_groups
    ):
        raise UnsupportedModel(
            f"{where}: it selects {top_k} experts from {open_groups} of {num_groups} equal groups of {num_experts} experts, "
            f"which cannot be; restore config.json"
        )


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that holds a whole checkpoint: of a multimodal model its towers too, which a text class would lose."""
    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, list) else ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and getattr(config, "sub_configs", None):
            return found
    order = CLASSES if not getattr(config, "sub_configs", None) else (*CLASSES[1:3], CLASSES[0])
    for task in order:
        if found := getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(config.model_type):
            return getattr(transformers, found)
    check_supported(config.model_type)
    raise UnsupportedModel(
        f"model type {config.model_type!r} is not a language model that transformers can load as one"
    )


def canonical_activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """The family's own activation as a function of [P, G] with all gate columns before all up columns."""
    return experts.activate if isinstance(experts, StandInExperts) else Activation(experts)


def read_expert(experts: nn.Module, e: int) -> ExpertWeights:
    """Expert `e` of a stock experts module, in the one orientation that stand-ins use. Views where possible."""
    first_GD = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[e].detach()
    down_DF = experts.down_proj[e].detach()
    if experts.is_transposed:
        first_GD, down_DF = first_GD.T, down_DF.T
    bias_G = down_bias_D = None
    if experts.has_bias:
        bias_G = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[e].detach()
        down_bias_D = experts.down_proj_bias[e].detach()
    if not experts.has_gate:
        return ExpertWeights(None, first_GD, down_DF, None, bias_G, down_bias_D)
    gate_FD, up_FD = _split_gate(first_GD, experts.is_concatenated)
    gate_bias_F, up_bias_F = (None, None) if bias_G is None else _split_gate(bias_G, experts.is_concatenated)
    return ExpertWeights(gate_FD, up_FD, down_DF, gate_bias_F, up_bias_F, down_bias_D)


def _split_gate(gate_up_G: Tensor, is_concatenated: bool) -> tuple[Tensor, Tensor]:
    if is_concatenated:
        gate, up = gate_up_G.chunk(2, dim=0)
        return gate, up
    return gate_up_G[0::2], gate_up_G[1::2]


def write_expert(experts: nn.Module, e: int, weights: ExpertWeights) -> None:
    """The inverse of `read_expert`: puts one expert's weights into a stock experts module."""

    def first(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return up
        return torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], dim=1).flatten(0, 1)

    name = "gate_up_proj" if experts.has_gate else "up_proj"
    first_GD, down_DF = first(weights.gate_FD, weights.up_FD), weights.down_DF
    with torch.no_grad():
        getattr(experts, name)[e].copy_(first_GD.T if experts.is_transposed else first_GD)
        experts.down_proj[e].copy_(down_DF.T if experts.is_transposed else down_DF)
        if experts.has_bias:
            getattr(experts, name + "_bias")[e].copy_(first(weights.gate_bias_F, weights.up_bias_F))
            experts.down_proj_bias[e].copy_(weights.down_bias_D)


def slice_router(layer: MoeLayer, keep: tuple[int, ...] | int) -> None:
    """Keep these rows of everything the router has per expert (or, given a count, make room for that many rows)."""
    for per_expert in layer.per_expert:
        per_expert.keep(keep, layer.shape.num_experts)
    count = keep if isinstance(keep, int) else len(keep)
    dropped = layer.shape.num_experts - count
    totals = {per_expert.tensor.shape[per_expert.axis] for per_expert in layer.per_expert}
    for holder in (layer.block, *layer.router.modules()):
        for attribute in ("num_experts", "n_routed_experts", "n_total_experts", "out_features"):
            if getattr(holder, attribute, None) in totals:
                setattr(holder, attribute, getattr(holder, attribute) - dropped)


def slice_experts(experts: nn.Module, keep: tuple[int, ...]) -> None:
    """Keep these experts of a stock experts module."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(
            experts, name, nn.Parameter(parameter.detach()[list(keep)].clone(), requires_grad=parameter.requires_grad)
        )
    experts.num_experts = len(keep)


def leave_router_logits(model: nn.Module) -> None:
    """Do not ask a model's routers for their logits where its config does.

    Families make one loss of all of them, by one number of experts; where numbers differ there is none.
    """
    for module in model.modules():
        if getattr(config := getattr(module, "config", None), "output_router_logits", False):
            config.output_router_logits = False


def set_expert_count(holder: object, count: int) -> None:
    """Write the number of experts into a config or a model, under whichever names it has."""
    for name in EXPERT_COUNTS:
        if isinstance(getattr(holder, name, None), int):
            setattr(holder, name, count)


def places_of_top_k(
    layers: Sequence[MoeLayer], configs: Iterable[PreTrainedConfig], modules: Iterable[nn.Module], top_k: int
) -> list[tuple[object, str]]:
    """Where configs and modules say how many experts the routers of these layers select, which is to become `top_k`: an object and a
    name. Raises UnsupportedModel where no config says it, and for routers that select as many as before whatever is said."""
    before = layers[0].shape.top_k
    found = [(holder, name) for holder in configs for name in TOP_KS if getattr(holder, name, None) == before]
    if not found:
        raise UnsupportedModel(
            f"the plan lets routers select fewer than {before} experts, and the config says that number under no name that Locum knows "
            f"({', '.join(TOP_KS)}); keep {before} experts in every layer"
        )
    for layer in layers[:1]:
        twin = copy.deepcopy(layer.router)
        for holder, name in _saying_top_k(twin.modules(), before):
            setattr(holder, name, top_k)
        width, count = _router_input(twin, layer.experts), layer.shape.num_experts
        selected = probe_router(twin, layer.block, width, count, layer.family.router).top_k
        if selected not in (0, top_k):  # 0: it could not be tried
            raise UnsupportedModel(
                f"{layer.shape.router} selects {selected} experts where its config says {top_k}; keep {before} experts in every layer"
            )
    return found + _saying_top_k(modules, before)


def _saying_top_k(modules: Iterable[nn.Module], top_k: int) -> list[tuple[object, str]]:
    return [(x, name) for x in modules for name in ("top_k", *TOP_KS) if getattr(x, name, None) == top_k]
