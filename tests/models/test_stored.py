"""What a plan does not touch is written in the dtype, and with the numbers, that it has in the original's files."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.weight_files import ADAPTER
from locum.containers.container import StandInExperts
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.models.stored import live_names
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, make_plan, stand_in
from making.checkpoints import write_checkpoint

# What config.json says, and what the files hold of a tensor with this name.
KINDS = {
    "bfloat16": ("bfloat16", lambda name: torch.bfloat16),
    "float32": ("float32", lambda name: torch.float32),
    "bfloat16, norms and selection biases in float32": (
        "bfloat16",
        lambda name: torch.float32 if "norm" in name or "correction_bias" in name else torch.bfloat16,
    ),
    "float32, which the config calls bfloat16": ("bfloat16", lambda name: torch.float32),
    "bfloat16, which the config calls float32": ("float32", lambda name: torch.bfloat16),
    "bfloat16, norms in float32, and the config says float32": (
        "float32",
        lambda name: torch.float32 if "norm" in name else torch.bfloat16,
    ),
}
CALLED, WIDE = list(KINDS)[3], list(KINDS)[2]
EVERY = [(family, kind) for family in ("olmoe", "deepseek_v2", "deepseek_v3") for kind in KINDS]
EVERY += [(family, kind) for family in ("mixtral", "granitemoe", "gpt_oss") for kind in (WIDE, CALLED)]
EVERY += [("olmoe tied", kind) for kind in KINDS]
SOME = [("deepseek_v3", kind) for kind in KINDS if kind != "float32"] + [("deepseek_v2", "bfloat16"), ("olmoe", CALLED)]
UNIFORM = (DROPPED, *[KEPT] * 6, DROPPED)
STAND_INS = (DROPPED, *[KEPT] * 3, stand_in(0, 2), stand_in(0, 2), KEPT, DROPPED)


def in_kind(folder, kind):
    """Give a checkpoint in float32 these dtypes. Norms get numbers that bfloat16 cannot hold."""
    said, of = KINDS[kind]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor += 0.01 * torch.rand(tensor.shape, generator=generator)
    save_file({n: t.to(of(n)) for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": said}))
    return folder


def apart(names, shape):
    """The names that are neither of experts nor of routers, by what they are in the live model."""
    touched = tuple(f"{module}." for layer in shape.layers for module in (layer.name, layer.router))
    return [name for name, live in names.items() if not live.startswith(touched)]


def assert_as_before(original, folder):
    """Every tensor that both have in one dtype, equal where neither a plan nor training touches it. Returns the tensors."""
    before, after = (load_file(x / "model.safetensors") for x in (original, folder))
    experts = {t.dtype for n, t in before.items() if "expert" in n or "block_sparse_moe.input_linear" in n}
    for name in before.keys() & after.keys():
        assert after[name].dtype == before[name].dtype, name
    for name in after.keys() - before.keys() - {"lm_head.weight"}:
        assert after[name].dtype in experts, name
    shape = read_shape(folder)
    assert shape.bytes == sum(t.nbytes for t in after.values()) == locum.inspect(folder)["bytes"]
    assert shape_of(load_model(folder)) == shape
    return before, after


def made(tmp_path, family, kind, slots):
    name, _, tied = family.partition(" ")
    original = in_kind(write_checkpoint(tmp_path / "original", name, tie_word_embeddings=bool(tied)), kind)
    shape = read_shape(original)
    assert shape_of(load_model(original)) == shape
    bases = (Base((4, 5), (0.5, 0.5)),) if slots is STAND_INS else ()
    plan = make_plan(shape, [LayerPlan(layer.name, slots, bases) for layer in shape.layers])
    out = locum.apply(original, plan=plan, out=tmp_path / "out")
    return original, out, plan.size(shape).bytes


@pytest.mark.parametrize("slots", [UNIFORM, STAND_INS], ids=["stock", "containers"])
@pytest.mark.parametrize("family, kind", EVERY)
def test_apply_writes_what_it_read(family, slots, kind, tmp_path):
    original, out, promised = made(tmp_path, family, kind, slots)
    before, after = assert_as_before(original, out)
    assert sum(t.nbytes for t in after.values()) == promised
    names = live_names(load_model(original), before)
    assert names.keys() == before.keys()
    same = apart(names, read_shape(original))
    assert len(same) > 8 and all(torch.equal(after[name], before[name]) for name in same)
    assert any(isinstance(layer.experts, StandInExperts) for layer in find_layers(load_model(out))) == (
        slots is STAND_INS
    )


@pytest.mark.parametrize(
    "family, kind", [SOME[0], SOME[-1], *(pytest.param(*pair, marks=pytest.mark.journeys) for pair in SOME[1:-1])]
)
def test_recovery_and_export_write_what_they_read(family, kind, words, tmp_path):
    original, out, promised = made(tmp_path, family, kind, STAND_INS)
    few = {"steps": 1, "batch_size": 1, "length": 32, "validation_tokens": 64}
    for how in ("lora", "full") if kind == "bfloat16" else ("full",):
        locum.recover(out, data=[str(words)], how=how, out=tmp_path / how, **few)
        before, after = assert_as_before(out, tmp_path / how)
        assert after.keys() == before.keys() and sum(t.nbytes for t in after.values()) == promised
    assert_as_before(original, tmp_path / how)
    locum.export(tmp_path / how, to="stock", out=tmp_path / "stock")
    before, after = assert_as_before(original, tmp_path / "stock")
    assert after.keys() - before.keys() <= {"lm_head.weight"}


@pytest.mark.parametrize("family, kind", SOME)
def test_an_adapter_holds_routers_as_its_base_has_them(family, kind, words, tmp_path, monkeypatch):
    original = in_kind(write_checkpoint(tmp_path / "original", family), kind)
    plan = locum.plan([original], method="compressed-experts")
    half = locum.apply(original, plan=plan, out=tmp_path / "half")
    assert_as_before(original, half)
    few = {"steps": 1, "batch_size": 1, "length": 32, "validation_tokens": 64}
    falling = itertools.count(9.0, -1.0)  # or a single step on noise would not be kept
    monkeypatch.setattr("locum.training.loop.validation_loss", lambda *_: next(falling))
    locum.recover(half, data=[str(words)], how="vectors", adapter_only=True, out=tmp_path / "adapter", **few)
    base, own = load_file(half / "model.safetensors"), load_file(tmp_path / "adapter" / ADAPTER)
    names = live_names(load_model(half), base)
    assert {n: t.dtype for n, t in own.items()} == {n: base[f].dtype for f, n in names.items() if n in own}
    assert read_shape(tmp_path / "adapter") == shape_of(load_model(tmp_path / "adapter")) == read_shape(half)
    assert [
        name for name, tensor in own.items() if not torch.equal(tensor, base[{n: f for f, n in names.items()}[name]])
    ]


def test_only_differences_are_noted(checkpoint):
    """Where memory has what the files have, nothing is noted and saving is transformers' own."""
    assert "_locum_stored" not in vars(load_model(checkpoint))
    assert "_locum_stored" not in vars(load_model(checkpoint, dtype=torch.bfloat16))  # asked for: not what was read
