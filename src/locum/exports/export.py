"""Other forms of a compressed checkpoint, for those who cannot or do not want to have Locum import its containers.

    gguf         one file for llama.cpp, by the public converter, of a folder that has the stock layout
    stock        a folder with the stock layout, of one with containers: every expert's base, adapter and bias become whole
                 weights, W = base + B A. It computes the same and is larger.
    vllm         a folder for vLLM without Locum's plugin: constants in place of experts (substitution.py)
    remote-code  the same folder with a file that imports Locum, for tools that can do no more than trust_remote_code=True

A stock layout has one number of experts for all layers, and whole experts alone. What it cannot hold is refused, by name.

Letters: E experts, N stacked items, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.application import save_checkpoint
from ..checkpoints.card import describe_size
from ..checkpoints.convert import open_containers
from ..checkpoints.load import load_model
from ..checkpoints.notes import plan_of, read_notes
from ..checkpoints.quantizer import set_module
from ..checkpoints.read import (
    SUBSTITUTED,
    fingerprint_checkpoint,
    is_adapter,
    load_tokenizer,
    read_config,
    read_headers,
    read_json,
)
from ..checkpoints.skeleton import is_compressed, layouts_of, read_shape, skeleton
from ..containers.container import StandInExperts
from ..containers.layout import Layout, StackLayout
from ..containers.rows import whole_weights
from ..engines.engines import ENGINES, LINES
from ..errors import CheckpointError, EngineError, OptionError, UnsupportedModel, unknown
from ..experts.parts.own_weights import OwnWeights
from ..experts.parts.shared_base import SharedBase
from ..files import check_output, provenance, whole
from ..models.families import find_layers, set_expert_count
from ..models.sizes import shape_of
from ..shapes import LayerShape, ModelShape
from ..stages.options import Force, Help, Out, needed
from .vllm_constants import form_faults, substitute

SCRIPT, LOADER = (Path(__file__).with_name(name) for name in ("gguf_run.py", "remote_code.py"))
TYPES = ("f32", "f16", "bf16", "q8_0")
GPT2 = {"type": "ByteLevel", "use_regex": True}  # a pre-tokenizer that is GPT-2's, in tokenizer.json


def export(
    model: Path,
    *,
    to: Annotated[
        str,
        Help(
            "gguf (a file for llama.cpp), stock (whole experts that any engine reads), vllm (what vLLM 0.33 reads without "
            "Locum) or remote-code (loads with trust_remote_code=True)"
        ),
    ],
    out: Out,
    type: Annotated[str, Help(f"of the numbers in a GGUF file: {', '.join(TYPES)}")] = "bf16",
    pre_tokenizer: Annotated[
        str | None, Help("llama.cpp's name of the BPE pre-tokenizer, where the converter does not know it")
    ] = None,
    force: Force = False,
) -> dict[str, Any]:
    """Write a checkpoint in another form: for llama.cpp, for engines without Locum, or for tools that cannot import it.

    transformers and vLLM read the folders that Locum writes as they are, where Locum is installed beside them.
    """
    model = Path(model)
    if to not in TARGETS:
        raise OptionError(unknown("form", to, TARGETS))
    if type not in TYPES:
        raise OptionError(unknown("type of a GGUF file", type, TYPES))
    kind, write = TARGETS[to]
    out = check_output(needed(out, "out"), force, kind, inputs=[model])
    read_shape(model)
    form = write(model, out, type, pre_tokenizer)
    sizes = [_size(model), _size(out)]
    return {"out": str(out), "form": form, "bytes": sizes, "times_larger": sizes[1] / sizes[0]}


def _size(path: Path) -> int:
    """Bytes of the tensors in a folder, or of a file."""
    if path.is_file():
        return path.stat().st_size
    return sum(x["data_offsets"][1] - x["data_offsets"][0] for x in read_headers(path).values())


# --- what a stock layout cannot hold --------------------------------------------------------------------------------


def stock_faults(model: Path) -> list[str]:
    """What keeps a checkpoint with containers from ever being stock, in words; empty where whole experts can hold it."""
    if is_adapter(model):
        return ["it is an adapter, without weights of its own"]
    shape, layouts = read_shape(model), layouts_of(model)
    faults = []
    counts = sorted({layer.num_experts for layer in shape.layers})
    if len(counts) > 1:
        faults.append(f"unequal numbers of experts ({counts[0]} to {counts[-1]})")
    beyond: dict[str, list[str]] = {}
    for name, layout in layouts.items():
        for kind in {stack.kind for stack in layout.stacks if not stack.kind.as_weights}:
            beyond.setdefault(kind.plural, []).append(name)
    faults += [f"{words} ({_first(names)})" for words, names in beyond.items()]
    if routed := [name for name, layout in layouts.items() if layout.routing]:
        faults.append(f"a routing policy ({_first(routed)})")
    if fixed := [x.name for x in _stock_layers(model) if not x.stock_can_drop and [x.num_experts] != counts]:
        faults.append(f"a number of experts that the config shares with other layers ({_first(fixed)})")
    return faults


def _stock_layers(model: Path) -> tuple[LayerShape, ...]:
    """The layers that a checkpoint's config would have without containers."""
    config = read_config(model)
    if is_compressed(config):
        del config.quantization_config
    return tuple(layer.shape for layer in find_layers(skeleton(config)))


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def gguf_fault(model: Path) -> str:
    """Why a checkpoint cannot become a GGUF file as it is, and what to do; empty where it can."""
    layouts = layouts_of(model)
    if faults := stock_faults(model):
        return f"GGUF cannot hold {'; '.join(faults)}; {_nearest(model)}"
    if not layouts:
        return ""
    found = {SharedBase.plural: any(_shares_rows(x) for x in layouts.values())}
    beside = (stack.kind for x in layouts.values() for stack in x.stacks if not stack.kind.is_whole)
    found |= {kind.plural: True for kind in beside if kind.has_products}
    found["experts that are nothing"] = any(_is_nothing(x, e) for x in layouts.values() for e in range(x.num_experts))
    parts = " and ".join(name for name, is_there in found.items() if is_there) or "Locum's containers"
    return (
        f"GGUF cannot hold {parts}; write whole experts first, which are larger but compute the same: locum export "
        f"{model} --to stock --out STOCK"
    )


def _is_nothing(layout: Layout, e: int) -> bool:
    return all(stack.rows[e] < 0 for stack in layout.stacks)


def _shares_rows(layout: Layout) -> bool:
    return layout.num_dense < sum(row >= 0 for row in layout.dense_of)


def _nearest(model: Path) -> str:
    """The plan nearest to a checkpoint's own that a stock layout can hold."""
    plan, notes = plan_of(model), read_notes(model)
    if plan is None or "original_shape" not in notes:
        return "prune the original to equal numbers of experts instead: locum plan STATISTICS --method prune"
    removed = plan.removed(ModelShape.from_json(notes["original_shape"]))
    if removed <= 0:
        return "it keeps every expert's weights, so the original itself is the nearest that can be held"
    return (
        f"the nearest plan that it can hold drops equally many experts of every layer: locum plan STATISTICS --method "
        f"prune --remove {removed:.2f}"
    )


# --- whole experts --------------------------------------------------------------------------------------------------


def with_whole_experts(container: StandInExperts) -> StandInExperts:
    """A container of whole experts that computes what this one does. It must have no constants and no policy."""
    rows = tuple(range(container.num_experts))
    layout = dataclasses.replace(container.layout, stacks=(StackLayout(OwnWeights.name, (), rows),))
    dtype = next(container.parameters()).dtype
    experts = [{name: tensor.to(dtype) for name, tensor in whole_weights(container, e).items()} for e in rows]
    tensors = {OwnWeights.prefix + name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    whole = StandInExperts(layout, container.activate, experts[0]["down_NDF"].dtype, "meta")
    whole.load_state_dict(tensors, strict=True, assign=True)
    whole.post_expert_norm = container.post_expert_norm
    return whole.train(container.training)


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """A live model with stock experts in place of its containers. All layers must have equally many experts."""
    for layer in find_layers(model):
        if isinstance(layer.experts, StandInExperts):
            set_module(model, layer.shape.name, with_whole_experts(layer.experts))
    if is_compressed(model.config):
        model = open_containers(model)
    layers = find_layers(model)
    for config in (model.config, *(layer.experts.config for layer in layers)):
        set_expert_count(config, layers[0].shape.num_experts)
    return model


def with_head(model: PreTrainedModel) -> PreTrainedModel:
    """Give an output head that is tied to the embedding memory of its own, so that the file has it too. In place.

    vLLM's classes of a dozen families (OLMoE, DeepSeek, GLM-4, gpt-oss, ...) never tie it and leave it uninitialised in
    silence; transformers ties it again when it loads, because the config still says so and the two are equal.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def _lacks_head(model: Path) -> bool:
    tied = skeleton(read_config(model)).all_tied_weights_keys
    return not is_adapter(model) and not tied.keys() <= read_headers(model).keys()


def write_stock(model: Path, out: Path, type_: str, pre_tokenizer: str | None) -> str:
    if not _lacks_head(model):
        _check_not_stock(model, "there is nothing to export")
    if faults := stock_faults(model):
        raise UnsupportedModel(f"{model}: the stock layout cannot hold {'; '.join(faults)}; {_nearest(model)}")
    tokenizer = load_tokenizer(model)
    live = with_head(to_stock(load_model(model)))
    words = "with whole experts and an output head: an ordinary checkpoint that loads without Locum, computes the same"
    save_checkpoint(live, tokenizer, out, None, _card(model, out, f"{words} and is larger"), model, _provenance(model))
    return "the stock layout with whole experts and an output head, for any engine"


def _check_not_stock(model: Path, so: str) -> None:
    if not layouts_of(model) and not is_adapter(model):
        raise OptionError(f"{model} has the stock layout already; {so}")


def _provenance(model: Path) -> dict[str, Any]:
    theirs = {k: v for k, v in read_notes(model).items() if k.startswith("original")}
    plan = plan_of(model)
    says = {"fingerprint": fingerprint_checkpoint(model), "plan": None if plan is None else plan.id}
    return provenance(**theirs, exported_from=str(model.resolve()), exported=says)


def _card(model: Path, out: Path, words: str) -> str:
    return (
        f"---\nlibrary_name: transformers\ntags: [mixture-of-experts, compressed, locum]\n---\n# {out.name}\n\n"
        f"Written by Locum from {model.name}, {words}.\n"
    )


# --- vLLM without the plugin ----------------------------------------------------------------------------------------


def vllm_fault(model: Path) -> str:
    """Why vLLM cannot read a checkpoint with containers without Locum's plugin, and what to do; empty where it can."""
    with_plugin = "vLLM reads it as it is where Locum is installed beside it"
    if is_adapter(model):
        return f"it is an adapter, without weights of its own; {with_plugin}"
    found = form_faults(read_config(model), layouts_of(model))
    if not found:
        return ""
    whole = f"; or write whole experts, which are larger: locum export {model} --to stock --out STOCK"
    return f"{'; '.join(found)}; {with_plugin}{'' if stock_faults(model) else whole}"


def write_vllm(model: Path, out: Path, type_: str, pre_tokenizer: str | None) -> str:
    head = "but its tied output head, which some of vLLM's classes leave out: --to stock writes one"
    _check_not_stock(model, f"vLLM reads it as it is{f', {head}' if _lacks_head(model) else ''}")
    if fault := vllm_fault(model):
        raise UnsupportedModel(f"{model}: vLLM without Locum's plugin cannot hold {fault}")
    tokenizer = load_tokenizer(model)
    live = with_head(load_model(model))
    tensors = substitute(live)
    count = sum(map(len, getattr(live.config, SUBSTITUTED).values()))
    replaced = sum(row < 0 for layout in layouts_of(model).values() for row in layout.dense_of)
    form = (
        f"vLLM's constant-v1 ({SUBSTITUTED}, vLLM 0.33 or newer): {replaced} experts are constants, {count - replaced} were "
        f"dropped and are never selected"
    )
    write = functools.partial(PreTrainedModel.save_pretrained, state_dict=tensors, save_original_format=False)
    card = _card(model, out, f"in a form that vLLM 0.33 or newer serves without Locum, and nothing else loads: {form}")
    save_checkpoint(live, tokenizer, out, None, card, model, _provenance(model), write=write)
    return form


# --- loading without the import -------------------------------------------------------------------------------------


def write_remote_code(model: Path, out: Path, type_: str, pre_tokenizer: str | None) -> str:
    _check_not_stock(model, "it loads without Locum")
    if is_adapter(model):
        raise UnsupportedModel(
            f"{model} is an adapter; transformers loads no model from it, with or without the import"
        )
    config = read_json(model / "config.json") | {"auto_map": {"AutoConfig": f"{LOADER.stem}.Config"}}
    with whole(out, "folder") as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        shutil.copyfile(LOADER, folder / LOADER.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(
                f"\nIt also loads without `import locum` before, where Locum is installed: `trust_remote_code=True` lets "
                f"transformers run `{LOADER.name}`, which imports it.\n"
            )
    return "the same folder, which also loads with trust_remote_code=True"


# --- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(model: Path, out: Path, type_: str, pre_tokenizer: str | None = None) -> Path:
    """A GGUF file of a stock checkpoint, whole or not at all.

    Raises UnsupportedModel for what GGUF cannot hold, CheckpointError where weights are missing, OptionError where the
    converter's environment is not there, and EngineError with the converter's own words where it fails.
    """
    if fault := gguf_fault(model):
        raise UnsupportedModel(f"{model}: {fault}")
    _check_whole(model)
    engine = ENGINES["llamacpp"]
    python = engine.python()
    if python is None:
        raise OptionError(f"the converter to GGUF is {engine.absence}")
    named = pre_tokenizer or _known_pre_tokenizer(model)
    with whole(out) as scratch:
        arguments = [str(model.resolve()), "--outfile", str(scratch.resolve()), "--outtype", type_]
        done = subprocess.run(
            [str(python), "-P", str(SCRIPT), named, *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode or not scratch.is_file():
            raise EngineError(f"{model} could not be converted to GGUF: {_reason(done.stderr, named)}")
    return out


def _gguf(model: Path, out: Path, type_: str, pre_tokenizer: str | None) -> str:
    write_gguf(model, out, type_, pre_tokenizer)
    return f"GGUF in {type_}"


def _check_whole(model: Path) -> None:
    """Refuse a folder that lacks weights: the converter does not notice, and llama.cpp names its own tensors."""
    found = read_shape(model).parameters
    described = shape_of(skeleton(read_config(model))).parameters
    if found != described:
        raise CheckpointError(
            f"{model} has {found:,} parameters in its files, its config.json describes {described:,}: tensors are missing, "
            f"too many or of another shape; fetch it again"
        )


def _known_pre_tokenizer(model: Path) -> str:
    """ "gpt-2" for the pre-tokenizer of GPT-2, which many were trained anew with and the converter does not recognise."""
    file = model / "tokenizer.json"
    pre = (read_json(file).get("pre_tokenizer") if file.is_file() else None) or {}
    return "gpt-2" if GPT2.items() <= pre.items() else ""


def _reason(said: str, named: str) -> str:
    if "pre-tokenizer was not recognized" in said and not named:
        return (
            "llama.cpp does not know the tokenizer; name the pre-tokenizer that it was trained with by --pre-tokenizer, such "
            "as gpt-2, qwen2 or llama-bpe (names as in llama.cpp's llama-vocab.cpp)"
        )
    lines = said.strip().splitlines()
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1]  # before it only the places in the converter's files
    return " | ".join(lines[-LINES:]) or "the converter said nothing"


TARGETS: dict[str, tuple[str, Callable[[Path, Path, str, str | None], str]]] = {
    "gguf": ("file", _gguf),
    "stock": ("folder", write_stock),
    "vllm": ("folder", write_vllm),
    "remote-code": ("folder", write_remote_code),
}


def larger(result: dict[str, Any]) -> str:
    """What an export made, in words."""
    before, after = map(describe_size, result["bytes"])
    times = f"{result['times_larger']:.2f} times the {before} of the checkpoint"
    return f"{result['out']}: {result['form']}; {after}, {times}"
