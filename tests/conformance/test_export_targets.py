"""What every export target must do, those of other packages included; and how `locum export` chooses one."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import locum
from engines.made import PLANS, statistics
from locum.checkpoints.skeleton import read_shape
from locum.engines.engines import Engine
from locum.errors import LocumError, OptionError, UnsupportedModel
from locum.exports.target import TARGETS
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from locum.verification.folder import FAILED, SKIPPED, Folder
from locum.verification.verify import check_engine
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint

CONVERTER = """#!/bin/sh
while [ "$1" != --outfile ]; do shift; done
echo stands for the converter > "$2"
"""
# What each form can hold, by hand. The plans are those of tests/engines/made.py.
STAND_INS = {"lightmoe", "low_rank", "merged"}
HOLDS = {
    "compressed-tensors": {"original", "tied", "uniform", "single"},
    "dense": {"single"},
    "gguf": {"original", "tied", "uniform", "single"},
    "imatrix": {"original"},
    "stock": {"tied"} | STAND_INS,
    "vllm": {"constants"},
    "remote-code": {"uneven", "constants", "vectors"} | STAND_INS,
    "listing": {"original", "tied", "uniform", "single", "uneven", "constants", "vectors"} | STAND_INS,
}
HOLDS = {name: kinds for name, kinds in HOLDS.items() if name in TARGETS}  # the last is another package's
STATISTICS = ("imatrix",)  # forms that are made from statistics, here those of the original
MADE = ("original", "tied", *PLANS, "adapter", "single")


@pytest.fixture(scope="module")
def folders(words, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every kind that Locum writes, by name."""
    root = tmp_path_factory.mktemp("exports")
    wide = {"intermediate_size": 32}  # a whole group of numbers in few bits
    original = write_checkpoint(root / "original", **wide)
    made = {"original": original, "tied": write_checkpoint(root / "tied", tie_word_embeddings=True, **wide)}
    shape = read_shape(original)
    observed = statistics(shape, torch.Generator().manual_seed(3))
    for name, plan_of in PLANS.items():
        plan = make_plan(shape, plan_of(shape.layers))
        made[name] = locum.apply(original, plan=plan, statistics=observed, out=root / name)
    active = locum.compress(original, method="compressed-experts", out=root / "active")
    how = {"how": "vectors", "data": [str(words)], "steps": 1, "batch_size": 1, "length": 32}
    locum.recover(active, out=root / "adapter", adapter_only=True, **how)
    locum.calibrate(original, data=[str(words)], tokens=256, length=64, out=root / "stats")
    several = write_checkpoint(root / "several", "mixtral", **wide)
    shape = read_shape(several)
    one = [LayerPlan(layer.name, (KEPT, *(DROPPED,) * 7), top_k=1) for layer in shape.layers]
    single = locum.apply(several, plan=make_plan(shape, one), out=root / "single")
    return made | {"adapter": root / "adapter", "single": single}


def given(form: str, folders: dict[str, Path], name: str = "original") -> dict[str, str]:
    """The options that a form needs for a checkpoint of that name."""
    return (
        {"statistics": str(folders["original"].parent / "stats")} if form in STATISTICS and name == "original" else {}
    )


@pytest.fixture(autouse=True)
def converter(tmp_path_factory, monkeypatch):
    """For GGUF, a script in the place of the converter."""
    folder = tmp_path_factory.mktemp("converter")
    (folder / "python").write_text(CONVERTER)
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("LOCUM_LLAMACPP_PYTHON", str(folder / "python"))


def test_every_target_is_tried():
    assert set(HOLDS) >= set(TARGETS), "add what the new form can hold to HOLDS"


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("form", HOLDS)
def test_a_form_is_written_whole_or_refused_with_the_reason(form, name, folders, tmp_path):
    folder, out = folders[name], tmp_path / "out"
    before = tree(folder)
    more = given(form, folders, name)
    fault = TARGETS[form](**more).fault(folder)
    assert (fault == "") == (name in HOLDS[form]), fault
    if fault:
        with pytest.raises(UnsupportedModel, match=re.escape(f"{folder}: {fault}")):
            locum.export(folder, to=form, out=out)
        assert tree(tmp_path) == {}
        assert "\n" not in fault
    else:
        said = locum.export(folder, to=form, out=out, **more)
        assert out.is_dir() == (TARGETS[form].kind == "folder")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert said["form"] and said["bytes"][1] > 0
    assert tree(folder) == before, "the checkpoint was changed"


@pytest.mark.parametrize("form", HOLDS)
def test_what_fails_at_the_end_leaves_nothing(form, folders, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr("locum.files.os.replace", fail)
    with pytest.raises(OSError, match="the disk went away"):
        locum.export(folders[min(HOLDS[form])], to=form, out=tmp_path / "out", **given(form, folders))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("form", HOLDS)
def test_options_are_those_of_the_form(form, folders, tmp_path):
    folder, out = folders[min(HOLDS[form])], tmp_path / "out"
    with pytest.raises(OptionError, match=r"option of an export '--no-such'.* allowed: .*--type"):
        locum.export(folder, to=form, out=out, no_such=1)
    own = {field.name for field in dataclasses.fields(TARGETS[form])}
    for other, cls in TARGETS.items():
        for field in dataclasses.fields(cls):
            flag = "--" + field.name.replace("_", "-")
            if field.name not in own:
                with pytest.raises(
                    OptionError, match=f"^{flag} is an option of .*--to {other}.*; --to {form} does not"
                ):
                    locum.export(folder, to=form, out=out, **{field.name: field.default})
            elif other == form:
                with pytest.raises(OptionError, match=flag):
                    locum.export(folder, to=form, out=out, **{field.name: object()})
    assert not out.exists()


@pytest.mark.parametrize("form", HOLDS)
def test_a_damaged_checkpoint_is_one_error(form, folders, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folders[min(HOLDS[form])].iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    with pytest.raises(LocumError, match="fetch it again"):
        locum.export(damaged, to=form, out=tmp_path / "out", **given(form, folders))
    assert not (tmp_path / "out").exists()


def test_an_option_of_another_form_is_one_line(folders, tmp_path):
    result = command("export", folders["merged"], "--to", "stock", "--type", "q8_0", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "--type" in result.stderr and "gguf" in result.stderr and "stock" in result.stderr


def test_verify_asks_an_engine_what_its_form_can_hold(folders, monkeypatch):
    monkeypatch.setattr(TARGETS, "_items", dict(TARGETS.items()))
    monkeypatch.delitem(sys.modules, "making.foreign.listing", raising=False)
    importlib.import_module("making.foreign.listing")
    reads_lists = Engine("reader", "Reader", "transformers", form="listing")
    for named, result in ((True, FAILED), (False, SKIPPED)):
        (check,) = check_engine(
            dataclasses.replace(reads_lists, adapters=True),
            Folder(folders["adapter"], None, "cpu"),
            None,
            "fp32",
            4,
            named=named,
        )
        assert (check.engine, check.result) == ("reader", result)
        assert check.detail == "it is an adapter, whose tensors are not all there; give its base"
