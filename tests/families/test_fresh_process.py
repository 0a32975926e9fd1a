"""A uniformly pruned checkpoint of every family, read by one process that has never heard of Locum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from families.case import Case, copied, prune
from families.tiny_families import all_families, main_type
from locum.models.families import family_of

CHILD = """
import copy, json, sys
import torch, transformers
torch.set_num_threads(1)
root = sys.argv[1]
found = {}
for family, class_name in json.load(open(f"{root}/classes.json")).items():
    model, info = getattr(transformers, class_name).from_pretrained(
        f"{root}/{family}", output_loading_info=True, dtype=torch.float32
    )
    model.set_experts_implementation("eager")
    model = copy.deepcopy(model).eval()  # tensors where the allocator puts them: a product's last bit depends on it
    with torch.no_grad():
        logits = model(input_ids=torch.load(f"{root}/ids.pt"), use_cache=False).logits
    found[family] = logits, {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
assert not [name for name in sys.modules if name.partition(".")[0] == "locum"]
torch.save(found, f"{root}/found.pt")
"""


def droppable():
    rows = {family: family_of(main_type(family)) for family in all_families()}
    return [family for family, row in rows.items() if not row.refuse and not row.refuse_dropping]


@pytest.mark.families
def test_stock_transformers_alone_computes_the_same_to_the_bit(tmp_path):
    expected, classes = {}, {}
    for family in droppable():
        case = Case(family)
        plan = case.plan(prune)
        assert plan.is_stock(case.shape)
        model = case.applied(plan)
        model.save_pretrained(tmp_path / family)
        config = (tmp_path / family / "config.json").read_text()
        assert "locum" not in config and "quantization_config" not in config
        expected[family], classes[family] = case.logits_of(copied(model)), type(model).__name__
        assert not torch.equal(expected[family], case.logits)
    torch.save(case.ids_BS, tmp_path / "ids.pt")
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    found = read_by_a_fresh_process(tmp_path)
    assert len(expected) >= 50 and found.keys() == expected.keys()
    assert {family: info for family, (_, info) in found.items() if info} == {}
    assert [family for family, (logits, _) in found.items() if not torch.equal(logits, expected[family])] == []


def read_by_a_fresh_process(root: Path) -> dict[str, tuple[torch.Tensor, dict[str, list[str]]]]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(root)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / "found.pt", weights_only=True)
