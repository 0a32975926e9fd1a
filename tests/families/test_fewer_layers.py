"""Every family without one of its decoder layers: what is left computes what the model computes around it, live and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families.case import Case, both_ways, checkpoint_of, copied, mixed, skip_refused, stored, tokens_of
from families.tiny_families import all_families
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.errors import UnsupportedModel
from locum.measure.calibration import calibrate
from locum.plans.plan import KEPT, LayerPlan, Plan, make_plan
from locum.shapes import ModelShape

pytestmark = pytest.mark.families
NOT = {  # why a layer cannot leave: what another would become
    "beam": "attn_residual_add_idx",  # attention over what earlier layers gave
    "gemma4": "q_proj",  # layers have head sizes of their own, by number
    "inkling2": "attention_input",  # the first layer of several has norms of its own
    "jamba": "self_attn",  # attention in every so many layers
    "minimax": "num_hidden_layers",  # decays fall with depth
}


class Passed(nn.Module):
    """A decoder layer that hands on what it was given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, *given: Any, **named: Any) -> Any:
        output = self.layer(*given, **named)
        hidden = given[0] if given else named["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def without_first(shape: ModelShape, others: bool = False) -> Plan:
    """Without the first decoder layer with experts; of the others' experts, where it is asked for, something of everything."""
    first, *rest = shape.layers
    layers = [LayerPlan(x.name, *map(tuple, mixed(x) if others else ([KEPT] * x.num_experts, []))) for x in rest]
    return make_plan(shape, [LayerPlan.without(first), *layers])


@pytest.mark.parametrize("family", all_families())
def test_family(family: str, tmp_path: Path) -> None:
    skip_refused(family)
    case = Case(family)
    plan = without_first(case.shape)
    if family in NOT:
        with pytest.raises(UnsupportedModel, match=f"cannot be dropped: .*{NOT[family]}"):
            apply_plan(case.model(), plan)
        return
    around = case.model()
    prefix, _, rest = case.shape.layers[0].name.partition(".layers.")
    name = f"{prefix}.layers.{rest.partition('.')[0]}"
    around.set_submodule(name, Passed(around.get_submodule(name)))
    small = apply_plan(case.model(), plan)
    assert torch.equal(case.logits_of(small), case.logits_of(around))
    small.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in (tmp_path / "stock" / "config.json").read_text()
    size = plan.size(case.shape)
    assert stored(str(tmp_path / "stock")) == (size.parameters, size.bytes)
    check_files(case, tmp_path)
    check_generate(case, small)


def check_files(case: Case, folder: Path) -> None:
    """Files that were rewritten, and the live model saved: the same config and tensors to the bit, the size that was promised."""
    original = folder / "original"
    source, shape, live = checkpoint_of(case, original)
    observed = calibrate(case.model(), tokens_of(case.ids_BS), batch_size=2)
    for others in (False, True):
        plan, out = without_first(shape, others), folder / f"out {others}"
        model = both_ways(source, shape, live, plan, observed, out)
        again = copied(load_model(out))
        assert torch.equal(case.logits_of(again), case.logits_of(copied(model)))


def check_generate(case: Case, model: Any) -> None:
    """With a cache as without one."""
    if not model.can_generate():
        return
    model = copied(model)
    model.generation_config.eos_token_id = None
    prompt = case.ids_BS[:2, :9]
    options = {"do_sample": False, "max_new_tokens": 5, "attention_mask": torch.ones_like(prompt)}
    written, slow = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(written, slow) and written.shape[1] == 14
