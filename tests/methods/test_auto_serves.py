"""Auto for an engine: what it chooses from, and that what it makes is what that engine's own reader takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import locum
from locum.budgets.serving import SERVES
from locum.checkpoints.load import load_model
from locum.errors import OptionError, PlanError
from locum.exports.gguf import Gguf
from locum.exports.gguf_types import retype
from locum.plans.plan import Plan
from making.checkpoints import VOCABULARY, write_checkpoint
from making.handmade import make_statistics, toy_shape

SHAPE = toy_shape(layers=2, experts=8)
WORDS = {"kept", "dropped"}


def planned(serves: str, remove: float, shape=SHAPE, **options) -> Plan:
    return locum.plan([make_statistics(shape)], method="auto", serves=serves, remove=remove, **options)


@pytest.mark.parametrize("remove", [0.1, 0.3, 0.6])
def test_for_any_engine_a_plan_is_stock(remove: float) -> None:
    plan = planned("any", remove)
    assert plan.is_stock(SHAPE) and {str(slot) for layer in plan.layers for slot in layer.slots} <= WORDS
    assert plan.size(SHAPE).bytes <= SHAPE.bytes - remove * SHAPE.bytes_of_experts


@pytest.mark.parametrize(
    ("remove", "formats"), [(0.1, {""}), (0.45, {"int8-g32"}), (0.75, {"int4-g32"}), (0.9, {"int4-g32"})]
)
def test_for_llamacpp_experts_are_whole_in_one_format_and_as_many_in_every_layer(
    remove: float, formats: set[str]
) -> None:
    plan = planned("llamacpp", remove)
    assert {part.format for layer in plan.layers for part in layer.parts} == formats
    assert all(slot.is_kept or not slot.survives for layer in plan.layers for slot in layer.slots)
    assert len({len(layer.survivors) for layer in plan.layers}) == 1
    assert plan.size(SHAPE).bytes <= SHAPE.bytes - remove * SHAPE.bytes_of_experts


def test_what_an_engine_runs_is_all_that_it_is_searched_for() -> None:
    made = {serves: planned(serves, 0.9) for serves in ("transformers", "vllm")}
    assert made["vllm"].layers == made["transformers"].layers  # its plugin holds the same container
    assert not made["vllm"].is_stock(SHAPE) and set(SERVES) == {"transformers", "vllm", "llamacpp", "any"}
    with pytest.raises(OptionError, match=r"--only low-rank with --serves any leaves an expert of .* nothing"):
        planned("any", 0.5, only="low-rank")


def test_where_a_stock_layout_can_lose_nothing_it_loses_nothing() -> None:
    for shape in (
        toy_shape(layers=2, experts=8, num_groups=4),
        dataclasses.replace(SHAPE, layers=tuple(dataclasses.replace(x, stock_can_drop=False) for x in SHAPE.layers)),
    ):
        with pytest.raises(PlanError, match="out of reach"):
            planned("any", 0.5, shape)
        assert {str(slot) for slot in planned("llamacpp", 0.6, shape).layers[0].slots} == {"kept in int4-g32 (gptq)"}


def test_what_leaves_with_the_experts_counts() -> None:
    """Prediction layers go with the last layer's experts, so fewer experts have to."""
    size = SHAPE.bytes_of_expert(SHAPE.layers[0])
    beside = dataclasses.replace(
        SHAPE.aside, bytes=18 * size, parameters=9 * size, expert_bytes=2 * size, left_bytes=2 * size
    )
    shape = dataclasses.replace(SHAPE, aside=beside, bytes=SHAPE.bytes + beside.bytes)
    few, many = planned("any", 0.5, shape), planned("any", 0.5)
    assert len(few.layers[0].survivors) > len(many.layers[0].survivors)
    assert few.size(shape).bytes <= shape.bytes - 0.5 * shape.bytes_of_experts


# --- on a checkpoint: the search, and what each engine reads -------------------------------------------------------

IDS = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return write_checkpoint(tmp_path_factory.mktemp("auto") / "model", **sizes)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(IDS).logits


def compressed(model: Path, words: Path, out: Path, serves: str, **target: object) -> Path:
    short = {"tokens": 1024, "length": 32, "sample": 128}
    return locum.compress(model, data=str(words), method="auto", serves=serves, out=out, **short, **target)


@pytest.mark.journeys
def test_any_engine_loads_it_without_locum(model: Path, words: Path, tmp_path: Path) -> None:
    out = compressed(model, words, tmp_path / "small", "any", remove=0.5)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # a plain olmoe
    assert not hasattr(stock.config, "quantization_config") and stock.config.num_experts < 8
    with torch.no_grad():
        assert torch.equal(stock(IDS).logits, logits(out))
    assert Gguf().fault(out) == ""  # it goes to llama.cpp as it is
    few = locum.export(out, to="compressed-tensors", bits="4", out=tmp_path / "few")
    assert few["out"] if isinstance(few, dict) else (tmp_path / "few").is_dir()


@pytest.mark.journeys
def test_llamacpp_gets_whole_experts_of_the_size_that_was_planned(model: Path, words: Path, tmp_path: Path) -> None:
    out = compressed(model, words, tmp_path / "small", "llamacpp", remove=0.8)
    plan = locum.load_plan(out / "plan.json")
    assert plan.formats == ("int4-g32",)
    locum.export(out, to="stock", out=tmp_path / "stock")
    assert Gguf(type="q4_0").fault(tmp_path / "stock") == ""
    assert torch.allclose(logits(tmp_path / "stock"), logits(out), atol=5e-3)  # products with codes round activations
    gguf = pytest.importorskip("gguf")
    live = load_model(tmp_path / "stock", dtype=torch.float32)
    numbers = live.model.layers[0].mlp.experts.down_proj.detach().numpy()  # [E, D, F] as the converter stacks them
    wide, file = tmp_path / "wide.gguf", tmp_path / "few.gguf"
    kind = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(wide, "olmoe")
    writer.add_tensor("blk.0.ffn_down_exps.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    retype(str(wide), str(file), "bf16", "q4_0")
    (tensor,) = gguf.GGUFReader(file).tensors
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert tensor.n_bytes == numbers.size * 4.5 / 8  # what the plan counts for int4-g32
    assert np.square(found - numbers).sum() < 0.01 * np.square(numbers).sum()
