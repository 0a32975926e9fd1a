"""Types of a GGUF file chosen per tensor, and importance matrices, as the public gguf package reads them.

The converter itself runs in an environment of its own (tests/engines/test_llamacpp.py); here files stand for what it writes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import locum
from locum.errors import OptionError, StatisticsError
from locum.experts.quantisers import BORROWED
from locum.exports.gguf import Gguf
from locum.exports.gguf_types import retype
from locum.exports.target import write_form
from making.checkpoints import locum as command
from making.checkpoints import tree

gguf = pytest.importorskip("gguf")
EXPERTS, ODD = "blk.0.ffn_up_exps.weight", "blk.0.attn_k.weight"
SHAPES = {"token_embd.weight": (9, 64), EXPERTS: (3, 5, 96), ODD: (4, 48), "blk.0.attn_q.weight": (64, 64)}


def numbers(name: str) -> np.ndarray:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name))).bfloat16().float().numpy()


def converted(file: Path) -> Path:
    """What the converter writes: matrices in bfloat16, all else in float32."""
    writer = gguf.GGUFWriter(file, "olmoe")
    writer.add_string("general.name", "a name")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_uint32("olmoe.expert_count", 3)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name in SHAPES:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(numbers(name), kind), raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((3, 64), dtype=np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def fields(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if "GGUF." not in name}


@pytest.mark.parametrize(("most", "experts"), [("q8_0", "q4_0"), ("q5_1", "q5_0"), ("q4_1", "bf16"), ("bf16", "q8_0")])
def test_each_tensor_has_its_type_and_all_else_its_bytes(most, experts, tmp_path):
    source, out = converted(tmp_path / "wide.gguf"), tmp_path / "out.gguf"
    left = retype(str(source), str(out), most, experts)
    before, after = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in (source, out))
    assert list(before) == list(after)
    assert left == ([ODD] if most != "bf16" else [])  # rows of 48 are no whole blocks of 32
    for name, tensor in after.items():
        kind = experts if name == EXPERTS else most
        if name not in SHAPES or name == ODD or kind == "bf16":
            assert tensor.tensor_type == before[name].tensor_type
            assert tensor.data.tobytes() == before[name].data.tobytes()
            continue
        assert tensor.tensor_type.name.lower() == kind and list(tensor.shape) == list(before[name].shape)
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
        blocks = numbers(name).reshape(-1, 32)
        bits = int(kind[1])
        reach = np.ptp(blocks, axis=1) if kind.endswith("1") else 2 * np.abs(blocks).max(1)
        assert found.shape == blocks.shape
        assert np.abs(found - blocks).max(1) == pytest.approx(
            np.zeros(len(blocks)), abs=float(reach.max()) / (2**bits - 1)
        )
        assert (np.abs(found - blocks).max(1) <= 1.05 * reach / (2**bits - 1)).all()
    mine, theirs = fields(out), fields(source)
    assert mine.pop("general.file_type") == gguf.LlamaFileType[f"MOSTLY_{most.upper()}"]
    assert mine.pop("general.quantization_version") == gguf.GGML_QUANT_VERSION
    theirs.pop("general.file_type")
    assert mine == theirs


CONVERTER = """#!/bin/sh
case "$2" in *gguf_types.py) shift; exec {python} -P "$@";; esac
while [ "$1" != --outfile ]; do shift; done
cp {wide} "$2"
"""


def test_the_form_has_them_and_leaves_nothing_beside(pruned, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(CONVERTER.format(python=sys.executable, wide=converted(tmp_path / "wide.gguf")))
    script.chmod(0o755)
    monkeypatch.setenv("LOCUM_LLAMACPP_PYTHON", str(script))
    said = write_form(Gguf("q8_0", experts="q4_0"), pruned, tmp_path / "out.gguf")
    assert "experts in q4_0 and other matrices in q8_0" in said and ODD in said
    assert {path.name for path in tmp_path.iterdir()} == {"python", "wide.gguf", "out.gguf"}
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types[EXPERTS] == "Q4_0" and types["token_embd.weight"] == "Q8_0" and types[ODD] == "BF16"


def test_an_importance_matrix_has_the_mean_squares_of_what_experts_are_given(checkpoint, statistics_file, tmp_path):
    said = locum.export(checkpoint, to="imatrix", statistics=str(statistics_file), out=tmp_path / "i.gguf")
    reader, statistics = gguf.GGUFReader(tmp_path / "i.gguf"), locum.load_statistics(statistics_file)
    tensors, shape = {t.name: t.data for t in reader.tensors}, statistics.shape
    assert reader.get_field("general.type").contents() == "imatrix" and "borrow more than they saw" in said["form"]
    assert reader.get_field("imatrix.datasets").contents() == list(statistics.domains)
    assert reader.get_field("imatrix.chunk_count").contents() == 1
    assert len(tensors) == 6 * len(shape.layers)
    for i, layer in enumerate(shape.layers):
        sums, seen = statistics.layer(layer.name), {}
        for matrix, gram, width in (
            ("up", "input_gram", layer.hidden_size),
            ("down", "hidden_gram", layer.expert_width),
        ):
            name, borrowed = f"blk.{i}.ffn_{matrix}_exps.weight", BORROWED * width
            squares = sums[gram].diagonal(dim1=1, dim2=2)  # of each expert, over its tokens
            mean = squares.sum(0) / sums["count"].sum()
            mean = mean if matrix == "up" else mean.mean().expand(width)
            for e, count in enumerate(sums["count"].tolist()):
                assert tensors[f"{name}.counts"][e, 0] == pytest.approx(count + borrowed)
                expected = (squares[e] + borrowed * mean) / (count + borrowed)
                found = torch.from_numpy(tensors[f"{name}.in_sum2"][e] / tensors[f"{name}.counts"][e, 0])
                assert torch.allclose(found.double(), expected, rtol=1e-5)
            seen[matrix] = tensors[f"{name}.in_sum2"]
        assert np.array_equal(tensors[f"blk.{i}.ffn_gate_exps.weight.in_sum2"], seen["up"])


def test_what_it_needs_is_said(checkpoint, pruned, small, statistics_file, tmp_path, monkeypatch):
    given = ("--statistics", statistics_file)
    for model, more, words in (
        (small, given, "stock layout"),
        (checkpoint, (), "--statistics FILE"),
        (pruned, given, "belong to another checkpoint"),
    ):
        result = command("export", model, "--to", "imatrix", *more, "--out", tmp_path / "out")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert words in result.stderr
    monkeypatch.setattr("locum.exports.imatrix.importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install gguf"):
        locum.export(checkpoint, to="imatrix", statistics=str(statistics_file), out=tmp_path / "out")
    assert tree(tmp_path) == {}


def test_grams_that_are_not_finite_leave_nothing(checkpoint, statistics_file, tmp_path, monkeypatch):
    statistics = locum.load_statistics(statistics_file)
    name = statistics.shape.layers[1].name
    layer = {**statistics.layers[name]}
    layer["hidden_gram"] = torch.full_like(layer["hidden_gram"], torch.inf)
    broken = dataclasses.replace(statistics, layers={**statistics.layers, name: layer})
    monkeypatch.setattr("locum.exports.experts_seen.load_statistics", lambda path: broken)
    with pytest.raises(StatisticsError, match=f"layer {name} are not finite"):
        locum.export(checkpoint, to="imatrix", statistics="broken", out=tmp_path / "out")
    del layer["hidden_gram"]
    with pytest.raises(StatisticsError, match="lack hidden_gram; calibrate without --no-gram"):
        locum.export(checkpoint, to="imatrix", statistics="broken", out=tmp_path / "out")
    assert tree(tmp_path) == {}
