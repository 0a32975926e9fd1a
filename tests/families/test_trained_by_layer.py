"""Every family trained layer by layer: streamed, with hidden states on the disk, what whole models give, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from families.case import Case, low_rank, skip_refused, tokens_of
from families.tiny_families import all_families
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import open_source, shape_in
from locum.checkpoints.streamed import stream_model
from locum.errors import LocumError
from locum.models.decoder_layers import decoder_stack
from locum.models.families import find_layers
from locum.models.layer_major import NOTE, WholeLayers
from locum.models.output_head import check_predicts
from locum.models.stored import write_model
from locum.plans.plan import LayerPlan, make_plan
from locum.training.one_by_one import KeptLayers, OneByOne
from locum.training.options import make_recovery

pytestmark = pytest.mark.families
SHORT = {
    "how": "layerwise",
    "steps": 2,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_fraction": 0.0,
    "routers": True,
}


def whole(folder: Path):
    model = load_model(folder, dtype=torch.float32)
    setattr(model, NOTE, WholeLayers(decoder_stack(model, [x.shape.name for x in find_layers(model)])[1]))
    return model


def streamed(folder: Path):
    return stream_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", all_families())
def test_family(family: str, tmp_path, monkeypatch) -> None:
    skip_refused(family)
    case, small = Case(family), tmp_path / "small"
    case.model().save_pretrained(tmp_path / "original")
    try:
        source = open_source(tmp_path / "original")
        check_predicts(source.model, "it is not trained")
    except LocumError as error:
        pytest.skip(str(error))
    shape = shape_in(tmp_path / "original", source)
    plan = make_plan(shape, [LayerPlan(x.name, tuple(low_rank(x)[0]), tuple(low_rank(x)[1])) for x in shape.layers])
    write_model(apply_plan(load_model(tmp_path / "original"), plan), small)
    tokens = dataclasses.replace(tokens_of(case.ids_BS), split="train")
    made = []
    for open_, held in ((whole, 2**30), (streamed, 0)):
        monkeypatch.setattr("locum.training.one_by_one.HELD", held)
        kept = KeptLayers(tmp_path / open_.__name__, {})
        kept.open()
        models = (open_(small), open_(tmp_path / "original"))
        run = OneByOne(*models, plan, tokens, make_recovery(SHORT), kept, torch.float32)
        run.run(tokens)
        made.append([kept.load(index) for index in range(len(run.layers.modules))])
    assert sum(tensors is not None for tensors in made[0]) == len(shape.layers)
    for one, two in zip(*made, strict=True):
        assert (one is None) == (two is None)
        assert one is None or (one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one))
