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
from locum.formats.format import FORMATS, declared_formats, format_of
from locum.formats.plain import COMPUTE_DTYPES, PLAIN
from making.checkpoints import write_checkpoint
from making.quantised import KINDS, part_name

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

    parts: tuple = ("_rows", "_scale")

    def declared(self, quantization):
        return self if quantization.get("quant_method") == "rows" else None

    def recognise(self, entries):
        found = {name: entry["dtype"] for name, entry in entries.items()}
        return self if found == {"_rows": "I8", "_scale": "F32"} else None

    def shape(self, entries):
        return tuple(entries["_rows"]["shape"])

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
# Those in which a weight can be written: how far it may be off, of its largest number, and a shape of its own to try.
QUANTISED = {
    "int8-rows": (0.005, (8, 128)),
    "fp8-block": (0.04, (200, 300)),
    "fp8-scaled": (0.04, (8, 128)),
    "int8-scaled": (0.005, (8, 128)),
    "int-packed": (0.08, (8, 128)),
    "mxfp4": (0.26, (3, 64, 5)),
    "mxfp4-packed": (0.26, (8, 128)),
    "nvfp4": (0.2, (8, 128)),
    "nvfp4-modelopt": (0.2, (8, 128)),
}
NAMES = (*(item.name for item in PLAIN), *QUANTISED)
WRITTEN = [(name, shape, 0.01) for name in COMPUTE_DTYPES for shape in ((1, 1), (3, 5), (8, 128))]
WRITTEN += [(name, shape, off) for name, (off, shape) in QUANTISED.items()]


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


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 100 + shape[1]))


def in_file(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, dict]:
    """The header entries of one weight's tensors in a file, by what follows its name."""
    named = {f"w{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "one.safetensors")
    return {name.removeprefix("w"): entry for name, entry in read_header(folder / "one.safetensors").items()}


def test_every_format_is_tried():
    assert set(FORMATS) == set(NAMES), "add the new format to NAMES, and to WRITTEN if weights can be written in it"


@pytest.mark.parametrize(("name", "shape", "off"), WRITTEN)
def test_a_weight_has_the_size_it_was_promised_and_comes_back(name, shape, off, tmp_path):
    item, weight = FORMATS[name], matrix(*shape)
    tensors = item.write(weight)
    entries = in_file(tensors, tmp_path)
    assert item.nbytes(shape) == sum(e["data_offsets"][1] - e["data_offsets"][0] for e in entries.values())
    assert format_of(entries) == item
    assert [other for other, one in FORMATS.items() if one.recognise(entries) is not None] == [name]
    again = item.read(tensors)
    assert again.shape == weight.shape == torch.Size(item.shape(entries))
    assert float((again.float() - weight).abs().max()) <= off * float(weight.abs().max())
    twice = item.write(again)
    assert tensors.keys() == twice.keys() <= {*item.parts}
    if name not in ("int-packed", "fp8-scaled"):  # whose largest number need not be the largest again
        assert torch.allclose(item.read(twice).float(), again.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("item", PLAIN, ids=lambda item: item.name)
def test_plain_numbers_are_sized_as_the_file_has_them(item, tmp_path):
    for shape in ((3, 5), (7,), (0, 4), ()):
        entries = in_file({"": torch.zeros(shape, dtype=item.stored)}, tmp_path)
        assert format_of(entries) == item
        assert item.nbytes(shape) == entries[""]["data_offsets"][1] - entries[""]["data_offsets"][0]
    assert format_of({"": entries[""], "_scale": entries[""]}) is None
    if item.name not in COMPUTE_DTYPES:
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


# --- as others wrote them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_slow_loop_wrote_is_read_to_the_bit_and_declared_by_its_config(kind, tmp_path):
    _, how, said, _ = KINDS[kind]
    weight = matrix(3, 64, 40) if kind == "mxfp4" else matrix(40, 48)  # in FP8, blocks of 16 rows do not fill 40
    parts, numbers = how(weight)
    (item,) = [one for one in declared_formats(said) if one.name == kind]
    save_file({part_name("a.w", part): one.contiguous() for part, one in parts.items()}, tmp_path / "one.safetensors")
    headers = read_header(tmp_path / "one.safetensors")
    entries = {part: headers[part_name("a.w", part)] for part in item.parts if part_name("a.w", part) in headers}
    found = item.recognise(entries)
    assert found is not None and entries.keys() == parts.keys()
    assert torch.equal(found.read(parts), numbers) or torch.allclose(found.read(parts), numbers, rtol=1e-6, atol=0)
    assert found.shape(entries) == tuple(weight.shape)
    mine = found.read(found.write(weight))  # as near as the loop came
    assert float((mine - weight).abs().mean()) <= 1.02 * float((numbers - weight).abs().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_whole_numbers_are_those_of_compressed_tensors(bits, strategy):
    """Zero points too, which are packed along the rows."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy=strategy, group_size=16 if strategy == "group" else None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    weight, groups = matrix(20, 64), 4 if strategy == "group" else 1
    scale = torch.rand(20, groups, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.05
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (20, groups), generator=torch.Generator().manual_seed(2))
    given = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(given, scheme)
    expected = compressor.decompress(packed, scheme)["weight"]
    parts = {name.removeprefix("weight"): tensor for name, tensor in packed.items()}
    item = declared_formats({"quant_method": "compressed-tensors", "config_groups": {"a": scheme.model_dump()}})[0]
    assert torch.allclose(item.read(parts), expected.float(), rtol=1e-6, atol=1e-7)


def test_nvfp4_is_that_of_compressed_tensors():
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="nvfp4-pack-quantized")
    parts = FORMATS["nvfp4"].write(matrix(20, 64))
    given = {f"weight{part}": tensor for part, tensor in parts.items()}
    compressor = compressors.BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    expected = compressor.decompress(given, scheme)["weight"]
    assert torch.allclose(FORMATS["nvfp4"].read(parts), expected.float(), rtol=0.01, atol=1e-6)


def test_scales_of_ordered_columns_follow_their_groups():
    parts = FORMATS["int-packed"].write(matrix(4, 64))
    order = torch.arange(64) % 2
    groups = parts | {"_g_idx": order.int()}
    numbers = FORMATS["int-packed"].read(parts | {"_scale": torch.ones(4, 1)})
    assert torch.equal(FORMATS["int-packed"].read(groups), numbers * parts["_scale"].float()[:, order])


def test_scales_that_are_exponents_and_scales_of_the_whole():
    item = declared_formats({"quant_method": "mxfp8", "weight_block_size": [1, 32]})[0]
    numbers, bytes_ = matrix(3, 64).to(torch.float8_e4m3fn), torch.tensor([[126, 127], [128, 130], [127, 120]])
    read = item.read({"": numbers, "_scale_inv": bytes_.to(torch.uint8)})
    assert torch.equal(read, numbers.float() * (2.0 ** (bytes_ - 127)).repeat_interleave(32, 1))
    item = declared_formats({"quant_method": "fp8", "weight_block_size": None})[0]
    for scale in (torch.tensor(0.5), torch.tensor([0.5])):
        assert torch.equal(item.read({"": numbers, "_scale_inv": scale}), numbers.float() / 2)
    stacked = matrix(3, 40, 24)  # as fused experts are
    parts = FORMATS["fp8-block"].write(stacked)
    one = FORMATS["fp8-block"].write(stacked[1])
    assert torch.equal(FORMATS["fp8-block"].read(parts)[1], FORMATS["fp8-block"].read(one))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mxfp4", (4, 4)),
        ("mxfp4", (2, 20, 4)),
        ("mxfp4-packed", (4, 20)),
        ("mxfp4-packed", (2, 32, 32)),
        ("nvfp4", (4, 20)),
        ("int-packed", (4, 20)),
        ("fp8-block", (8,)),
    ],
)
def test_weights_that_a_format_cannot_hold_are_refused(name, shape):
    with pytest.raises(OptionError, match=str(list(shape)).replace("[", r"\[")):
        FORMATS[name].write(torch.ones(shape))


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_stay_zeros(name):
    shape = QUANTISED[name][1]
    assert torch.equal(FORMATS[name].read(FORMATS[name].write(torch.zeros(shape))), torch.zeros(shape))
