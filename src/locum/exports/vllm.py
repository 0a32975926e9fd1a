"""A folder for vLLM without Locum's plugin: constants in place of experts. vllm_constants.py has the rules of the form."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from ..checkpoints.load import load_model
from ..checkpoints.read import SUBSTITUTED, load_tokenizer, read_config
from ..checkpoints.skeleton import layouts_of
from ..checkpoints.weight_files import is_adapter
from .folder import save_folder
from .stock import has_stock_layout, merged_first, stock_faults
from .target import target
from .tied_head import lacks_head, with_head
from .vllm_constants import form_faults, substitute
from .whole_experts import without_rows


@target("vllm")
@dataclass(frozen=True)
class VllmConstants:
    """A folder that vLLM 0.33 or newer serves without Locum, constants in place of experts."""

    kind: ClassVar[str] = "folder"

    def fault(self, model: Path) -> str:
        if has_stock_layout(model):
            head = ", but its tied output head, which some of vLLM's classes leave out: --to stock writes one"
            return f"it has the stock layout already; vLLM reads it as it is{head if lacks_head(model) else ''}"
        if is_adapter(model):
            return merged_first(model)
        if not (faults := form_faults(read_config(model), layouts_of(model))):
            return ""
        whole = f"; or write whole experts, which are larger: locum export {model} --to stock --out STOCK"
        return (
            f"vLLM without Locum's plugin cannot hold {'; '.join(faults)}; vLLM reads it as it is where Locum is installed "
            f"beside it{'' if stock_faults(model) else whole}"
        )

    def write(self, model: Path, out: Path) -> str:
        tokenizer = load_tokenizer(model)
        live = with_head(load_model(model))
        tensors = substitute(live)
        count = sum(map(len, getattr(live.config, SUBSTITUTED).values()))
        replaced = sum(len(without_rows(layout)) for layout in layouts_of(model).values())
        form = (
            f"vLLM's constant-v1 ({SUBSTITUTED}, vLLM 0.33 or newer): {replaced} experts are constants, {count - replaced} "
            f"were dropped and are never selected"
        )
        write = functools.partial(PreTrainedModel.save_pretrained, state_dict=tensors, save_original_format=False)
        words = f"in a form that vLLM 0.33 or newer serves without Locum, and nothing else loads: {form}"
        save_folder(live, tokenizer, model, out, words, write)
        return form
