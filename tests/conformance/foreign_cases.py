"""What another package offers, used: test_foreign.py runs these where tests/making/foreign is installed by entry points."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import locum
from locum.checkpoints.read import read_headers
from locum.containers.container import StandInExperts
from locum.errors import OptionError, PlanError
from locum.experts.parts.part import PARTS
from locum.experts.policies.policy import POLICIES
from locum.plans.plan import KEPT, LayerPlan, Slot, make_plan
from locum.training.context import Original
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from making.checkpoints import locum as command
from making.containers import assert_near, routing
from making.handmade import toy_shape
from making.tiny_models import tiny_ids
from making.training import QUICK, tiny_tokens
from test_parts import PLANNED, E, container_of, policy_of
from test_ways import Case

LOAD = """
import sys, torch, locum
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_a_part_checks_its_own_fields():
    shape = toy_shape(layers=1, experts=E)
    with pytest.raises(PlanError, match="expert 0 has a shift of scale 0"):
        make_plan(shape, [LayerPlan(shape.layers[0].name, (Slot((PARTS["shift"](0.0),)), *(KEPT,) * (E - 1)))])


@pytest.mark.parametrize("part", PLANNED)
def test_experts_that_do_not_run_add_nothing(part):
    """-1 in every place that the policy skips, against the same layer without a policy and weights of zero there."""
    container, _ = container_of(part, policy=policy_of("skip_light"))
    plain = StandInExperts(
        dataclasses.replace(container.layout, routing=None), container.activate, torch.float32, "cpu"
    )
    plain.load_state_dict(container.state_dict())
    x, index, weights = routing(E, 40, 3)
    runs = weights >= 0.5 * weights.amax(dim=1, keepdim=True)
    assert bool((~runs).any())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_near(container(x, index, weights), plain(x, index, weights * runs), 1e-5)


def test_a_way_learns_what_the_original_predicts():
    case = Case()
    losses = []
    case.recover(
        how="distilled", temperature=2.0, steps=30, learning_rate=1e-2, progress=lambda *now: losses.append(now[-1])
    )
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(OptionError, match="whole original model"):
        alone = Original(Original.of(case.original).read)
        recover_model(case.small, case.plan, tiny_tokens(), None, make_recovery({**QUICK, "how": "distilled"}), alone)


def test_a_checkpoint_loads_in_a_fresh_process_or_says_what_is_missing(checkpoint, tmp_path):
    shape = locum.read_shape(checkpoint)
    both = Slot((PARTS["shift"](0.2), PARTS["low_rank"](4, "svd")))
    layers = [
        LayerPlan(x.name, (KEPT,) * (x.num_experts - 2) + (both,) * 2, routing=POLICIES["skip_light"](0.3))
        for x in shape.layers
    ]
    plan = make_plan(shape, layers)
    out = locum.apply(checkpoint, plan=plan, out=tmp_path / "small")
    assert locum.inspect(out)["bytes"] == plan.size(shape).bytes
    ids = tiny_ids()
    torch.save(ids, tmp_path / "ids")
    with torch.no_grad():
        expected = locum.load_model(out)(ids).logits
    line = [sys.executable, "-c", LOAD, str(out), str(tmp_path / "ids"), str(tmp_path / "logits")]
    subprocess.run(line, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)
    without = {**os.environ, "PYTHONPATH": f"{locum.__path__[0]}/.."}
    lacking = subprocess.run(line, capture_output=True, text=True, env=without)
    assert lacking.returncode and "unknown routing policy 'skip_light'" in lacking.stderr  # and not another model


def test_the_command_line_plans_with_it(checkpoint, statistics_file, tmp_path):
    """A criterion of a method that is there, and a method that reads weights."""
    scored = command("plan", statistics_file, "--method", "prune", "--score", "spread", "--remove", "0.25")
    assert scored.exit_code == 0, scored.stderr
    line = (
        "plan",
        statistics_file,
        "--method",
        "pairs",
        "--align",
        "--remove",
        "0.25",
        "--out",
        tmp_path / "plan.json",
    )
    refused = command(*line)
    assert refused.exit_code == 2 and "--model" in refused.stderr
    merged = command(*line, "--model", checkpoint)
    assert merged.exit_code == 0, merged.stderr
    assert all(base.align and len(base.experts) == 2 for x in locum.load_plan(line[-1]).layers for base in x.bases)
    applied = command("apply", checkpoint, "--plan", line[-1], "--out", tmp_path / "merged")
    assert applied.exit_code == 0, applied.stderr


def test_the_command_line_trains_with_it(small, words, tmp_path):
    given = ("--how", "distilled", "--temperature", "2", "--steps", "1", "--length", "32", "--validation-tokens", "64")
    trained = command("recover", small, "--data", words, "--out", tmp_path / "out", *given)
    assert trained.exit_code == 0, trained.stderr
    notes = json.loads((tmp_path / "out" / "locum.json").read_text())["recovery"]
    assert (notes["how"], notes["temperature"], notes["steps"]) == ("distilled", 2.0, 1)
    assert "--recover-temperature" in command("compress", "--recover", "distilled", "--help").stdout


def test_the_command_line_exports_with_it(small, tmp_path):
    line = ("export", small, "--to", "listing", "--ending", "q_proj.weight", "--out", tmp_path / "out", "--json")
    said = json.loads(command(*line).stdout)
    names = [name for name in read_headers(small) if name.endswith("q_proj.weight")]
    assert (tmp_path / "out").read_text().splitlines() == sorted(names)
    assert said["form"] == f"{len(names)} names"
    shown = " ".join(command("export", "--to", "listing", "--help").stdout.split())
    assert "Options of listing:" in shown and "--ending TEXT only names that end so" in shown


def test_it_is_listed():
    listed = json.loads(command("list", "--json").stdout)
    for kind, name in (("criteria", "spread"), ("methods", "pairs"), ("parts", "shift"), ("policies", "skip_light")):
        assert name in listed[kind]
    assert "distilled" in listed["ways"] and "listing" in str(listed)
