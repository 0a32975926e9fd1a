"""A family's activation apart from its experts: the same numbers, nothing of theirs kept, and through pickle."""

from __future__ import annotations

import pickle

import pytest
import torch

from families.tiny_families import decorated_families, tiny
from locum.models.families import canonical_activation, find_layers

FAMILIES = ("olmoe", "gpt_oss", "nemotron_h", "deepseek_v3", "step3p7", "muse_spark")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in decorated_families() or name == "step3p7"])
def test_an_activation_and_its_experts_go_through_pickle(family):
    experts = find_layers(tiny(family))[0].experts
    activate = canonical_activation(experts)
    width = (2 if experts.has_gate else 1) * 16
    pre = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    assert list(activate.shell.parameters()) == []
    assert torch.equal(pickle.loads(pickle.dumps(activate))(pre), activate(pre))
    again = pickle.loads(pickle.dumps(experts))
    assert type(again) is type(experts)
    assert torch.equal(again.down_proj, experts.down_proj)
