"""Checkpoints with one expert left in every layer as dense models: equal logits, no MoE layer, and what cannot be one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import read_shape
from locum.errors import UnsupportedModel
from locum.exports.dense import DENSE
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from making.checkpoints import write_checkpoint
from making.tiny_models import tiny_ids


def one_left(folder: Path, family: str, experts: int = 1, **changes: object) -> Path:
    """A checkpoint that keeps so many experts of every layer, other ones in each."""
    source = write_checkpoint(folder / "model", family, **changes)
    shape = read_shape(source)
    kept = [{(3 + index + other) % 8 for other in range(experts)} for index in range(len(shape.layers))]
    slots = [tuple(KEPT if e in left else DROPPED for e in range(8)) for left in kept]
    layers = [LayerPlan(x.name, s, top_k=1) for x, s in zip(shape.layers, slots, strict=True)]
    return locum.apply(source, plan=make_plan(shape, layers), out=folder / "pruned")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_the_dense_model_computes_the_same(family, tied, tmp_path) -> None:
    small = one_left(tmp_path, family, tie_word_embeddings=tied)
    said = locum.export(small, to="dense", out=tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config.model_type == DENSE[family] and DENSE[family] in said["form"]
    assert not any("expert" in name or "router" in name for name, _ in dense.named_modules())
    ids = tiny_ids()
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, load_model(small)(ids).logits)
    words = AutoTokenizer.from_pretrained(tmp_path / "dense")("some words", return_tensors="pt")
    assert dense.generate(**words, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] > 3


def test_what_is_not_dense_is_refused(tmp_path) -> None:
    two = one_left(tmp_path / "two", "mixtral", experts=2)
    mixed = one_left(tmp_path / "mixed", "qwen3_moe", mlp_only_layers=[0])
    window = one_left(tmp_path / "window", "qwen3_moe", use_sliding_window=True, sliding_window=8)
    refused = {
        window: "its attention sees a window",
        two: "have up to 2 experts.*--lower-top-k",
        one_left(tmp_path / "olmoe", "olmoe"): "no dense family is olmoe without its MoE layers; known: mixtral",
        mixed: r"the dense family has model\.layers\.0\.mlp\..* otherwise",
    }
    for model, words in refused.items():
        with pytest.raises(UnsupportedModel, match=words):
            locum.export(model, to="dense", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
