"""What every number format must do, those of other packages included, and what plain ones are, bit by bit.

Letters: N rows, D columns.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from locum.checkpoints.read import read_header, read_headers
from locum.checkpoints.skeleton import read_shape
from locum.errors import OptionError, UnsupportedModel
from locum.formats.format import FORMATS, format_of
from locum.formats.plain import COMPUTE_DTYPES, PLAIN
from making.checkpoints import write_checkpoint

FOREIGN = '''
"""Integers of eight bits with a scale for every row: a number format of another package, in one file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from locum.errors import OptionError
from locum.formats.format import register_format


@dataclass(frozen=True)
class Rows:
    name: str = "int8-rows"
    dtype: None = None

    def is_declared(self, quantization):
        return quantization.get("quant_method") == "rows"

    def recognise(self, entries):
        found = {name: entry["dtype"] for name, entry in entries.items()}
        return self if found == {"_rows": "I8", "_scale": "F32"} else None

    def nbytes(self, shape):
        return math.prod(shape) + 4 * shape[0]

    def read(self, tensors):
        return tensors["_rows"].float() * tensors["_scale"][:, None]

    def write(self, weight):
        if weight.ndim != 2:
            raise OptionError("rows need a matrix")
        scale_N = weight.float().abs().amax(1).clamp(min=1e-12) / 127
        return {"_rows": (weight / scale_N[:, None]).round().to(torch.int8), "_scale": scale_N}


register_format(Rows())
'''
NAMES = (*(item.name for item in PLAIN), "int8-rows")
WRITTEN = (*COMPUTE_DTYPES, "int8-rows")  # those in which a weight can be written


@pytest.fixture(autouse=True)
def formats(tmp_path_factory, monkeypatch):
    """The registered formats and one of another package."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "foreign_rows.py").write_text(FOREIGN)
    monkeypatch.setattr(FORMATS, "_items", dict(FORMATS.items()))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "foreign_rows", raising=False)
    __import__("foreign_rows")
    return FORMATS


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 100 + columns))


def in_file(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, dict]:
    """The header entries of one weight's tensors in a file, by what follows its name."""
    save_file({f"w{name}": tensor for name, tensor in tensors.items()}, folder / "one.safetensors")
    return {name.removeprefix("w"): entry for name, entry in read_header(folder / "one.safetensors").items()}


def test_every_format_is_tried():
    assert set(FORMATS) == set(NAMES), "add the new format to NAMES, and to WRITTEN if weights can be written in it"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 128)])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_weight_has_the_size_it_was_promised_and_comes_back(name, shape, tmp_path):
    item, weight = FORMATS[name], matrix(*shape)
    tensors = item.write(weight)
    entries = in_file(tensors, tmp_path)
    assert item.nbytes(shape) == sum(e["data_offsets"][1] - e["data_offsets"][0] for e in entries.values())
    assert format_of(entries) == item
    assert [other for other, one in FORMATS.items() if one.recognise(entries) is not None] == [name]
    again = item.read(tensors)
    assert again.shape == weight.shape
    assert float((again.float() - weight).abs().max()) <= 0.01 * float(weight.abs().max())
    twice = item.write(again)
    assert tensors.keys() == twice.keys()
    assert torch.allclose(item.read(twice).float(), again.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("item", PLAIN, ids=lambda item: item.name)
def test_plain_numbers_are_sized_as_the_file_has_them(item, tmp_path):
    for shape in ((3, 5), (7,), (0, 4), ()):
        entries = in_file({"": torch.zeros(shape, dtype=item.stored)}, tmp_path)
        assert format_of(entries) == item
        assert item.nbytes(shape) == entries[""]["data_offsets"][1] - entries[""]["data_offsets"][0]
    assert format_of({"": entries[""], "_scale": entries[""]}) is None
    if item.name not in WRITTEN:
        with pytest.raises(OptionError, match=f"not written in {item.name}; allowed: fp32, bf16, fp16"):
            item.write(torch.ones(2, 2))


def test_rounding_is_to_the_nearest_even():
    """Against numbers made bit by bit: of bfloat16 from the halves of a float32, of float16 by Python's own packing."""
    weight = torch.cat([matrix(16, 16).flatten(), torch.tensor([1.00390625, 1.01171875, -0.0, 65504.0])])
    halves = []
    for value in weight.tolist():
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        bits += 0x7FFF + ((bits >> 16) & 1)
        halves.append(struct.unpack("<f", struct.pack("<I", bits >> 16 << 16))[0])
    assert FORMATS["bf16"].write(weight)[""].float().tolist() == halves
    packed = [struct.unpack("<e", struct.pack("<e", value))[0] for value in weight.tolist()]
    assert FORMATS["fp16"].write(weight)[""].float().tolist() == packed
    assert torch.equal(FORMATS["fp32"].write(weight)[""], weight)


@pytest.mark.parametrize("name", COMPUTE_DTYPES)
def test_a_checkpoint_is_sized_in_its_format(name, tmp_path):
    """Also where its config names no dtype."""
    model = write_checkpoint(tmp_path / "model", dtype=None)
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config))
    tensors = {key: FORMATS[name].write(tensor)[""] for key, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    shape = read_shape(model)
    assert shape.expert_itemsize == FORMATS[name].nbytes((1,))
    assert shape.parameters == sum(math.prod(entry["shape"]) for entry in read_headers(model).values())
    assert shape.layers[0].router_bytes == shape.layers[0].router_numel * FORMATS[name].nbytes((1,))


def test_quantised_checkpoints_are_refused_with_the_formats_that_are_known(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedModel, match=r"quantised with 'awq', .* known \(bf16, .*int8-rows.*\)"):
        read_shape(model)
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "rows"}}))
    assert read_shape(model).parameters > 0  # a registered format says that it knows them
