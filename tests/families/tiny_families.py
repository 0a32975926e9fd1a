"""A tiny real model of every family, built from its own config class: entries are shrunk by name, exceptions are rows.

`SIZES` is what an entry of this name becomes in any config (text, vision and audio alike); `CHANGES` is what one
family needs beyond that. A new family that uses the usual names needs no row here.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from locum.cli import cli
from locum.models.families import FAMILIES, model_class

MODELS = Path(transformers.__file__).parent / "models"
LAYERS, EXPERTS, TOP_K = 2, 8, 2

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "unpadded_vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 64,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "hc_sinkhorn_iters": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "projector_hidden_size": 32,
    "downsample_hidden_size": 8,
    "text_hidden_size": 32,
    "o_lora_rank": 8,
    "o_groups": 2,
    "image_token_id": 127,
    "video_token_id": 126,
    "audio_token_id": 125,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 8,
    "num_position_embeddings": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
}
SPARSE = {"mlp_layer_types": ["sparse"] * LAYERS}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EQUAL_HEADS = {"num_key_value_heads": 4}
SAM = {"num_hidden_layers": 1, "output_channels": 8, "downsample_channels": [8, 32], "global_attn_indexes": [0]}
CHANGES: dict[str, dict[str, Any]] = {  # by model type
    "aria": {"vision_config": {"model_type": "idefics3_vision"}, "projector_patch_to_query_dict": {4: 2}},
    "axk1": SPARSE,
    "axk2": SPARSE,
    "bailing_hybrid": HYBRID,
    "beam": SPARSE,
    "deepseek_ocr2_sam_vision_model": SAM,
    "deepseek_ocr2_text": SPARSE,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision"}},
    "diffusion_gemma_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dots1": {"n_shared_experts": 1, **EQUAL_HEADS},
    "dots3_note_text": {**SPARSE},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 12],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        **SPARSE,
    },
    "flint": {"mlp_only_layers": [], "layer_types": ["full_attention", "sliding_attention"]},
    "gemma4": {"vision_config": None, "audio_config": None},
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    "glm4_moe_lite": {**SPARSE},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next_text": {
        "num_hidden_layers": 4,  # the last of four has full attention, under a name that changed between versions
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"],
        "mamba_chunk_size": 8,
    },
    "hy_v3": SPARSE,
    "hy_v4": SPARSE,
    "hy_v4_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        **SPARSE,
    },
    "inkling2_loop": {"vision_config": {"model_type": "inkling2_vision"}},
    "inkling2_loop_text": {  # of three layers the second is run twice
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "jamba": {
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**SPARSE, **HYBRID},
    "laguna": SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "mimo_v2_flash": SPARSE,
    "mistral_large4": {"vision_config": {"model_type": "pixtral"}},
    "minimax_m3_vl": {
        "text_config": {"model_type": "minimax_m3_vl_text"},
        "vision_config": {"model_type": "minimax_m3_vl_vision"},
    },
    "muse_spark_audio": {"patch_sizes": [2, 2], "hidden_sizes": [8, 16], "depths": [1, 1]},
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
    "muse_spark_text": {"moe_hidden_size": 24},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
    },
    "qwen3_5_moe_text": {**HYBRID, **LINEAR},
    "qwen3_next": {**HYBRID, **LINEAR},
    "qwen4_exp_text": {
        **HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        **LINEAR,
    },
    "qwen3_omni_moe_text": {"sliding_window": None},  # its cache would slide, its attention does not
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 124
    },  # generate reads it, and only the whole model's config has it
    "unlimited_ocr_sam_vision_model": SAM,
    "unlimited_ocr_text": SPARSE,
    "step3p5": {  # the text part of step3p7; its experts clamp what goes into their last layer
        "layer_types": ["full_attention", "sliding_attention"],
        "share_expert_dim": 24,
        "moe_router_scaling_factor": 1.5,
        "swiglu_limits": [0.2, 0.0],
        "swiglu_limits_shared": [0.0, 0.2],
        **SPARSE,
    },
    "zaya": {"num_experts_per_tok": 1},
}
CHANGES["afmoe"] = {"num_dense_layers": 0}
STAYS = re.compile(r"norm|inv_freq|A_log|dt_bias|\bD$|layer_scalar|sinks|decay|slope_rate")
BIASES = re.compile(r"correction_bias|expert_bias|moe_statics")
MAIN_TYPES = {"qwen3_omni_moe": "qwen3_omni_moe_thinker"}  # the whole one makes speech, and has no forward of its own


def decorated_families() -> tuple[str, ...]:
    """Every family of the installed transformers whose experts are behind the experts interface."""
    found = {
        file.parent.name for file in MODELS.glob("*/modeling_*.py") if "@use_experts_implementation" in file.read_text()
    }
    return tuple(sorted(found))


def adapted_families() -> tuple[str, ...]:
    """Those that Locum puts behind the interface itself."""
    rows = {name for name, row in FAMILIES.items() if row.undecorated and name in CONFIG_MAPPING}
    return tuple(sorted(rows - set(decorated_families())))


def all_families() -> tuple[str, ...]:
    return tuple(sorted((*decorated_families(), *adapted_families())))


# Families whose experts transformers keeps out of the interface and Locum refuses, by model type, and what turns the
# experts on.
OTHERS: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 1, "attn_config": {"rope_theta": 10000.0}},
    "doge": {"is_moe": True, "num_experts": 16},
    "jetmoe": {},
    "llama4_text": {},
    "longcat_flash": {},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "decoder_layers": 1},
    "switch_transformers": {},
}


def other_families() -> tuple[str, ...]:
    return tuple(name for name in OTHERS if name in CONFIG_MAPPING)


def empty_other(model_type: str) -> PreTrainedModel:
    """A model of another family without weights."""
    found = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    config = tiny_config(model_type, **OTHERS[model_type])
    with torch.device("meta"):
        return (getattr(transformers, found) if found else model_class(config))(config)


def refused_with(model_type: str) -> str:
    """What `locum inspect` says to a checkpoint of another family. Raises where it is not refused."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_config(model_type, **OTHERS[model_type]).save_pretrained(folder)
        save_file({}, Path(folder) / "model.safetensors")  # it is refused before a weight is looked for
        said = CliRunner().invoke(cli, ["inspect", folder])
    assert said.exit_code not in (0, None) and "not supported" in said.output, said.output
    return said.output.strip().partition(f"{folder}: ")[2]


def config_types(family: str) -> list[str]:
    """The model types that a family's folder defines."""
    return [t for t in CONFIG_MAPPING if CONFIG_MAPPING[t].__module__.split(".")[2] == family]


def main_type(family: str) -> str:
    """The model type of whole checkpoints: the one that is named like the folder, or the one with parts."""
    types = config_types(family)
    if family in MAIN_TYPES:
        return MAIN_TYPES[family]
    return family if family in types else next(t for t in types if CONFIG_MAPPING[t].sub_configs)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of this type with every entry shrunk, sub-configs too."""
    return _shrunk(CONFIG_MAPPING[model_type], {**CHANGES.get(model_type, {}), **changes})


def _shrunk(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    names = set(inspect.signature(config_class.__init__).parameters) | set(
        getattr(config_class, "__dataclass_fields__", ())
    )
    entries = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:
        entries["num_key_value_heads"] = entries["num_attention_heads"]  # latent attention has as many of both
    for name, sub_class in getattr(config_class, "sub_configs", {}).items():
        inside = changes.get(name, {})
        if inside is None or name not in names:
            continue
        sub_class = CONFIG_MAPPING[inside["model_type"]] if "model_type" in inside else sub_class
        rest = {key: value for key, value in inside.items() if key != "model_type"}
        entries[name] = _shrunk(sub_class, {**CHANGES.get(sub_class.model_type, {}), **rest})
    entries |= {n: v for n, v in changes.items() if n not in entries or not isinstance(v, dict)}
    return config_class(**entries)


def tiny(family: str, seed: int = 0, std: float = 0.3, **changes: Any) -> PreTrainedModel:
    config = tiny_config(main_type(family), **changes)
    torch.manual_seed(seed)
    model = model_class(config)._from_config(config, dtype=torch.float32).eval()
    return draw_wide(model, seed, std)


def draw_wide(model: PreTrainedModel, seed: int, std: float) -> PreTrainedModel:
    """Weights drawn wide, so that routing is decisive; norms and what is computed from the config stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "tid2eid" in name:  # a table of experts by token, different ones for each
                tensor.copy_(torch.rand(len(tensor), EXPERTS, generator=generator).argsort(dim=1)[:, : tensor.shape[1]])
            if tensor.is_floating_point() and not STAYS.search(name):
                scale = 0.1 if BIASES.search(name) else std
                drawn = torch.randn(tensor.shape, generator=generator) * scale
                # Positive biases: some routers give closed groups the score 0, which a negative one would lose against.
                tensor.copy_(drawn.abs() if BIASES.search(name) else drawn)
    return model
