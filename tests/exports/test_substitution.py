"""What `locum export --to vllm` writes, read back by vLLM's published rules alone (docs, "Expert substitution (MoNE)").

vLLM reads the form from 0.33 on; tests/engines/test_vllm_constants.py runs it there. The reader here knows the rules and
transformers' stock models, nothing of Locum: it is slow, and one expert of one token at a time.

Letters: T tokens, K top-k, D model width.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import locum
from engines.made import PLANS, cycle, statistics
from families.tiny_families import tiny
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_headers
from locum.errors import CheckpointError, UnsupportedModel
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, LayerPlan, make_plan, stand_in
from making.checkpoints import locum as command
from making.checkpoints import write_tokenizer
from making.tiny_models import CONFIGS, tiny_ids, tiny_model

CONSTANT = stand_in(constant=True)


class Experts(nn.Module):
    """One layer's experts by the rules."""

    def __init__(self, tensors: dict[str, torch.Tensor], prefix: str, substituted: list[int]) -> None:
        super().__init__()
        self.tensors, self.prefix, self.substituted = tensors, prefix, substituted
        self.selected: Counter[int] = Counter()

    def forward(self, x_TD, index_TK, gate_TK):
        out_TD = torch.zeros_like(x_TD)
        for t in range(len(x_TD)):
            for e, gate in zip(index_TK[t].tolist(), gate_TK[t], strict=True):
                self.selected[e] += 1
                out_TD[t] += gate * self.expert(e, x_TD[t])
        return out_TD

    def expert(self, e, x_D):
        if e in self.substituted:
            return self.tensors[f"{self.prefix}.{e}.approx_value"]
        gate, up, down = (self.tensors[f"{self.prefix}.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return down @ (functional.silu(gate @ x_D) * (up @ x_D))


def read_by_the_rules(folder: Path) -> tuple[nn.Module, list[Experts]]:
    config = AutoConfig.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rest = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.experts\.\d+\.", name)}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(".experts." in name or name == "lm_head.weight" for name in missing)
    found = []
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            (layer,) = re.findall(r"\d+", name)
            found.append(Experts(tensors, name, config.approximate_experts.get(layer, [])))
            model.get_submodule(name.removesuffix(".experts")).experts = found[-1]
            assert module.num_experts > max(found[-1].substituted, default=0)
    return model, found


def dropped_and_constant(layers):
    """Dropped, constant, silent and kept experts in one layer, and another number of experts in each layer."""
    patterns = ((KEPT, DROPPED, CONSTANT, KEPT), (KEPT, KEPT, NOTHING, KEPT))
    return [LayerPlan(x.name, cycle(x, *patterns[i % 2])) for i, x in enumerate(layers)]


def written(folder: Path, model, plan_of) -> Path:
    shape = shape_of(model)
    plan = make_plan(shape, plan_of(shape.layers))
    apply_plan(model, plan, statistics(shape, torch.Generator().manual_seed(3)))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def of_family(family: str):
    return tiny_model(family) if family in CONFIGS else tiny(family)


CASES = [
    ("olmoe", PLANS["constants"]),
    ("qwen3_moe", PLANS["constants"]),
    ("deepseek_v3", PLANS["constants"]),
    ("deepseek_v3", PLANS["uneven"]),
    ("deepseek_v3", dropped_and_constant),
    ("glm4_moe", PLANS["uneven"]),
    ("glm4_moe", dropped_and_constant),
]


@pytest.mark.parametrize(("family", "plan_of"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_the_files_compute_what_the_containers_do(family, plan_of, tmp_path):
    made = written(tmp_path / "made", of_family(family), plan_of)
    result = command("export", made, "--to", "vllm", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    listed, names = config["approximate_experts"], set(read_headers(tmp_path / "out"))
    assert "quantization_config" not in config
    said = map(int, re.findall(r"(\d+) (?:experts|were)", json.loads(result.stdout)["form"]))
    assert sum(said) == sum(map(len, listed.values()))
    assert {name for name in names if name.endswith(".approx_value")} == {
        f"model.layers.{layer}.mlp.experts.{e}.approx_value" for layer, experts in listed.items() for e in experts
    }
    model, layers = read_by_the_rules(tmp_path / "out")
    with torch.no_grad():
        expected, ours = load_model(made)(tiny_ids()).logits, model(tiny_ids()).logits
    assert torch.allclose(ours, expected, atol=1e-4 * float(expected.abs().max()))
    dead = [
        e
        for layer in layers
        for e in layer.substituted
        if plan_of is PLANS["uneven"]  # every constant stands for an expert that the plan dropped
        and layer.selected[e]
    ]
    assert not dead
    assert all(sum(layer.selected.values()) == tiny_ids().numel() * config["num_experts_per_tok"] for layer in layers)


def test_the_reader_can_fail(tmp_path):
    """A constant that is another, and an expert that comes back, are seen in the logits."""
    made = written(tmp_path / "made", of_family("deepseek_v3"), dropped_and_constant)
    locum.export(made, to="vllm", out=tmp_path / "out")
    with torch.no_grad():
        expected = load_model(made)(tiny_ids()).logits
        for damage in ("approx_value", "e_score_correction_bias"):
            model, layers = read_by_the_rules(tmp_path / "out")
            for name, tensor in [*layers[0].tensors.items(), *model.state_dict().items()]:
                if name.endswith(damage):
                    tensor.clamp_(min=0).add_(0.1)
            assert not torch.allclose(model(tiny_ids()).logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("olmoe", "lightmoe", "low-rank stand-ins"),
        ("olmoe", "merged", "shared bases"),
        ("olmoe", "vectors", "a routing policy"),
        ("olmoe", "uneven", "unequal numbers of experts with a router that selects without a bias"),
        ("gpt_oss", "constants", "a family whose files do not keep the weights of each expert apart"),
    ],
)
def test_what_the_form_cannot_hold_is_named(family, plan, words, tmp_path):
    made = written(tmp_path / "made", of_family(family), PLANS[plan])
    result = command("export", made, "--to", "vllm", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert re.search(r"\(model\.layers\.\d\.mlp\.experts", result.stderr)
    assert ("--to stock" in result.stderr) == (plan in ("lightmoe", "merged"))
    assert "where Locum is installed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_else_takes_it_for_an_ordinary_checkpoint(tmp_path):
    made = written(tmp_path / "made", of_family("olmoe"), PLANS["constants"])
    out = tmp_path / "out"
    locum.export(made, to="vllm", out=out)
    with pytest.raises(UnsupportedModel, match="for vLLM"):
        locum.inspect(out)
    with pytest.raises(UnsupportedModel, match="for vLLM"):
        load_model(out)
    with pytest.raises((RuntimeError, ValueError, CheckpointError)):
        AutoModelForCausalLM.from_pretrained(out)
