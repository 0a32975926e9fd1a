"""Every family with experts' own weights and adapters in int4: the size that was promised, and the live model's logits, reloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from families.case import Case, both_ways, checkpoint_of, copied, skip_refused, tokens_of
from families.tiny_families import all_families
from locum.checkpoints.load import load_model
from locum.containers.container import StandInExperts
from locum.measure.calibration import calibrate
from locum.models.families import find_layers
from locum.plans.bits import FewBits
from locum.plans.plan import KEPT, Base, LayerPlan, Plan, make_plan, stand_in
from locum.shapes import ModelShape

pytestmark = pytest.mark.families
NEEDED = ("output_sum", "count", "input_gram", "hidden_gram")


def in_int4(shape: ModelShape) -> Plan:
    """Own weights, adapters alone, and adapters over a base; the last layer by nearest, all others by GPTQ."""
    slots = (KEPT, stand_in(0, 2, "svd"), KEPT, stand_in(None, 3, "whitened"), stand_in(0, 3, "svd"), KEPT, KEPT, KEPT)
    layers = [
        LayerPlan(x.name, (slots * x.num_experts)[: x.num_experts], (Base((1, 4), (0.5, 0.5)),)) for x in shape.layers
    ]
    by_gptq, nearest = (FewBits("int4-g32", name).applied(layers, shape) for name in ("gptq", "nearest"))
    return make_plan(shape, [*by_gptq[:-1], nearest[-1]])


@pytest.mark.parametrize("family", all_families())
def test_family(family):
    skip_refused(family)
    case = Case(family)
    with tempfile.TemporaryDirectory() as folder:
        original, out = (Path(folder) / name for name in ("original", "out"))
        source, shape, live = checkpoint_of(case, original)
        observed = calibrate(case.model(), tokens_of(case.ids_BS), batch_size=2, needs=NEEDED)
        plan = in_int4(shape)
        model = both_ways(source, shape, live, plan, observed, out)
        again = copied(load_model(out))
        assert all(isinstance(x.experts, StandInExperts) and x.experts.layout.formats for x in find_layers(again))
        assert torch.equal(case.logits_of(again), case.logits_of(copied(model)))
