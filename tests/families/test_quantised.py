"""Every family's files in FP8: measured, pruned and given stand-ins as the numbers that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import locum
from families.case import prune, skip_refused
from families.tiny_families import all_families, tiny
from locum.checkpoints.load import load_model
from locum.checkpoints.numbers_quantizer import is_possible
from locum.checkpoints.skeleton import read_shape
from locum.errors import LocumError, UnsupportedModel
from locum.formats.format import declared_formats, part_name
from locum.models.families import model_class
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot, make_plan, stand_in
from locum.shapes import LayerShape
from making.checkpoints import write_tokenizer
from making.tiny_models import tiny_ids

SAID = {"quant_method": "fp8", "weight_block_size": [16, 16]}
pytestmark = pytest.mark.families


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    """Experts, and what else is called a projection: weights that are multiplied with."""
    of_experts = ".experts." in name and not name.endswith(("bias", "norm.weight", "_bias"))
    return tensor.dim() in (2, 3) and (of_experts or name.endswith("_proj.weight")) and "vision" not in name


def in_fp8(family: str, folder: Path) -> tuple[Path, Path]:
    """A family's files in FP8, and the same numbers in bfloat16."""
    quantised, plain = folder / "quantised", folder / "plain"
    tiny(family).bfloat16().save_pretrained(plain)
    write_tokenizer(plain)
    shutil.copytree(plain, quantised)
    (item,) = declared_formats(SAID)
    packed, numbers = {}, load_file(plain / "model.safetensors")
    for name, tensor in list(numbers.items()):
        if is_packed(name, tensor):
            parts = item.write(tensor)
            numbers[name] = item.read(parts).bfloat16()
            packed |= {part_name(name, part): one for part, one in parts.items()}
        else:
            packed[name] = tensor
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    save_file(packed, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": SAID}
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, plain


def stand_ins(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    """Every kind of slot that needs no statistics; in each of two groups one less."""
    gone = NOTHING if shape.refuse_dropping else DROPPED
    of_base, alone = stand_in(0, 2, "svd"), stand_in(rank=3, start="svd")
    return [of_base, gone, of_base, KEPT, alone, NOTHING, gone, KEPT], [Base((0, 2), (0.5, 0.5))]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.set_experts_implementation("eager")
    return model(input_ids=tiny_ids(vocab=120), use_cache=False).logits


@pytest.mark.parametrize("family", all_families())
def test_family(family, tmp_path):
    skip_refused(family)
    both = in_fp8(family, tmp_path)
    shapes = [read_shape(folder) for folder in both]
    assert shapes[0].parameters == shapes[1].parameters and shapes[0].bytes < shapes[1].bytes
    assert torch.equal(logits(load_model(both[0])), logits(load_model(both[1])))
    for make in (prune, stand_ins):
        layers = [LayerPlan(x.name, *map(tuple, make(x))) for x in shapes[0].layers]
        try:
            plan = make_plan(shapes[0], layers)
        except LocumError:  # what may not be dropped
            continue
        out, expected = (locum.apply(x, plan=plan, out=tmp_path / f"{make.__name__} {x.name}") for x in both)
        size = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
        assert size == plan.size(shapes[0]).bytes == read_shape(out).bytes
        computed = logits(load_model(expected))
        assert torch.equal(logits(load_model(out)), computed)
        if make is stand_ins and is_possible():
            try:
                stock = model_class(load_model(out).config).from_pretrained(out)
            except UnsupportedModel as error:
                assert family == "lara_mini" and "locum.load_model" in str(
                    error
                )  # it splits names that say no `weight`
                continue
            assert torch.equal(logits(stock.eval()), computed)


def test_what_is_said_in_the_config_of_the_text_part_holds_for_the_model(tmp_path):
    model, plain = in_fp8("glm4v_moe", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(model)), logits(load_model(plain)))
    shape = read_shape(model)
    out = locum.apply(
        model,
        plan=make_plan(shape, [LayerPlan(x.name, *map(tuple, prune(x))) for x in shape.layers]),
        out=tmp_path / "out",
    )
    said = json.loads((out / "config.json").read_text())
    assert said["quantization_config"] == SAID and "quantization_config" not in said["text_config"]
    load_model(out)
