"""From a dense Llama and several versions of its MLPs to an ordinary Mixtral: sparse upcycling and Branch-Train-MiX.

A Llama layer is a Mixtral layer whose MLP became experts behind a router; everything else is taken over as it is.

- Mixtral renormalises the gates of the chosen experts, so equal copies of an MLP compute exactly that MLP, whatever the
  router says: sparse upcycling (2212.05055). With different MLPs it is Branch-Train-MiX (2403.07816).
- Granular: each MLP is cut along its hidden units into `granularity` shards, an expert each, which share a router row
  (virtual groups, 2410.07524). A token takes all shards of `active` MLPs; each shard gets 1/granularity of the MLP's
  gate, which a `down_proj` that is `granularity` times as large makes up for. The rows tie exactly, so a group is
  chosen whole, but for the rare token on which two groups tie too: rounding of bf16 logits can do that. Joint training
  moves the rows apart.

Shapes: C copies (MLPs) of a layer, G granularity, E = C*G experts, D model width, F width of an MLP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.initialization import no_init_weights

from locum.files import whole

SHARED = (  # what the two architectures have in common
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "rope_parameters"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"),
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Mlps = Mapping[str, Tensor]  # "LAYER.PROJECTION" -> weight, gate and up [F, D], down [D, F]


def mixtral_config(dense: LlamaConfig, copies: int, active: int, granularity: int = 1) -> MixtralConfig:
    """The config of a Mixtral with `copies` MLPs per layer, `active` of them for each token. Raises ValueError."""
    if dense.attention_bias or dense.mlp_bias:
        raise ValueError("a Mixtral has no biases; the dense model has attention_bias or mlp_bias")
    if not 1 <= active <= copies:
        raise ValueError(f"{active} active MLPs of {copies}; allowed: 1 to {copies}")
    if granularity < 1 or dense.intermediate_size % granularity:
        raise ValueError(f"granularity {granularity} does not divide the width {dense.intermediate_size} of an MLP")
    return MixtralConfig(
        **{name: getattr(dense, name) for name in SHARED},
        intermediate_size=dense.intermediate_size // granularity,
        num_local_experts=copies * granularity,
        num_experts_per_tok=active * granularity,
        architectures=["MixtralForCausalLM"],
    )


def mlps_of(dense: LlamaForCausalLM) -> dict[str, Tensor]:
    """The MLP weights of a dense model, not copied."""
    return {
        f"{i}.{name}": getattr(layer.mlp, name).weight.detach()
        for i, layer in enumerate(dense.model.layers)
        for name in PROJECTIONS
    }


@torch.no_grad()
def assemble(
    dense: LlamaForCausalLM,
    mlps: Iterable[Mlps],
    routers: list[Tensor],
    *,
    active: int,
    granularity: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> MixtralForCausalLM:
    """A Mixtral of `dense` whose experts are `mlps`, taken one after the other, behind `routers` (one [C, D] per layer).

    Beside the dense model and one entry of `mlps`, only the result is held in memory, in `dtype`.
    Raises ValueError if the numbers of MLPs and router rows differ, or the config is not possible.
    """
    copies = len(routers[0])
    config = mixtral_config(dense.config, copies, active, granularity)
    with no_init_weights():
        moe = MixtralForCausalLM._from_config(config, dtype=dtype)
    others = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing = moe.load_state_dict(others, strict=False).missing_keys
    if left := [name for name in missing if ".mlp." not in name]:
        raise ValueError(f"the dense model has nothing for {', '.join(left)}")
    for layer, router_CD in zip(moe.model.layers, routers, strict=True):
        layer.mlp.gate.weight.copy_(router_CD.repeat_interleave(granularity, dim=0))
    count = 0
    for count, mlp in enumerate(mlps, start=1):
        if count <= copies:
            _place(moe, (count - 1) * granularity, mlp, granularity)
    if count != copies:
        raise ValueError(f"{count} MLPs for routers of {copies} rows; give one row for each")
    moe.tie_weights()
    moe.generation_config = dense.generation_config
    return moe.eval()


def _place(moe: MixtralForCausalLM, first: int, mlp: Mlps, granularity: int) -> None:
    """Write one MLP as experts `first`, `first + 1`, ... of every layer, a shard each."""
    for i, layer in enumerate(moe.model.layers):
        experts = layer.mlp.experts
        shards = zip(
            mlp[f"{i}.gate_proj"].chunk(granularity, dim=0),
            mlp[f"{i}.up_proj"].chunk(granularity, dim=0),
            mlp[f"{i}.down_proj"].chunk(granularity, dim=1),
            strict=True,
        )
        for e, (gate_FD, up_FD, down_DF) in enumerate(shards, start=first):
            experts.gate_up_proj[e].copy_(torch.cat([gate_FD, up_FD]))
            experts.down_proj[e].copy_(down_DF.float() * granularity)


def taken_mlp(moe: MixtralForCausalLM, copy: int, granularity: int = 1) -> dict[str, Tensor]:
    """One MLP back out of a Mixtral, its shards joined: what `assemble` was given, in the Mixtral's dtype."""
    found = {}
    chosen = slice(copy * granularity, (copy + 1) * granularity)
    for i, layer in enumerate(moe.model.layers):
        gates, ups = zip(*(e.chunk(2) for e in layer.mlp.experts.gate_up_proj[chosen].detach()), strict=True)
        found[f"{i}.gate_proj"], found[f"{i}.up_proj"] = torch.cat(gates), torch.cat(ups)
        found[f"{i}.down_proj"] = torch.cat(list(layer.mlp.experts.down_proj[chosen].detach()), dim=1) / granularity
    return found


def upcycled(
    dense: LlamaForCausalLM, copies: int, active: int, granularity: int = 1, seed: int = 0
) -> MixtralForCausalLM:
    """The noise-free upcycle in fp32: equal copies behind random routers, with the dense model's logits."""
    generator = torch.Generator().manual_seed(seed)
    width = dense.config.hidden_size
    routers = [torch.randn(copies, width, generator=generator) / width**0.5 for _ in dense.model.layers]
    kept = mlps_of(dense)
    return assemble(
        dense, (kept for _ in range(copies)), routers, active=active, granularity=granularity, dtype=torch.float32
    )


def save_mlps(mlps: Mlps, path: Path, notes: Mapping[str, Any]) -> None:
    """Write MLPs in bf16 with what they depend on, whole or not at all."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in mlps.items()}
    with whole(path) as scratch:  # one entry of metadata: safetensors writes several in a random order
        save_file(tensors, scratch, {"smolmoe": json.dumps(dict(notes))})


def load_mlps(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """MLPs and the notes that were saved with them."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["smolmoe"])  # noqa: SIM118
