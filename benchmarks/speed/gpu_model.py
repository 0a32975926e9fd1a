"""Whole models on a GPU, for gpu.py: the same answers as on the CPU, a step of recovery, and what calibration costs.

Letters: B prompts, S tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.speed import calibration, generate
from benchmarks.speed.timing import random_olmoe, random_tokens
from locum.bundled import MODEL
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.containers.container import StandInExperts
from locum.kernels import choice
from locum.measure.calibration import calibrate
from locum.models.sizes import shape_of
from locum.training.options import make_recovery
from locum.training.recovery import recover_model

METHODS = ("lightmoe", "decompose", "mone")
LOGITS = 1e-3  # most that logits in float32 may differ, over the largest of them: other orders of adding, many layers
BATCH, PROMPT, NEW = 4, 32, 32


def answers(model: PreTrainedModel, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    ids_BS = ids_BS.to(model.device)
    model.generation_config.pad_token_id = 0
    text_BS = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), do_sample=False, max_new_tokens=NEW)
    return model(ids_BS).logits.float().cpu(), text_BS.cpu()


def same_answers(name: str, model: PreTrainedModel, ids_BS: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """In float32, on the CPU and on the device, by each way that serves a float32 model."""
    logits_BSV, text_BS = answers(model, ids_BS)
    moved = copy.deepcopy(model).to(device)
    containers = [module for module in moved.modules() if isinstance(module, StandInExperts)]
    ways = [None, choice.LOOP] + ["triton"] * (device.type == "cuda" and choice.triton_is_there())
    found = []
    for way in ways if containers else [None]:
        for container in containers:
            container.way = way
        got_BSV, got_BS = answers(moved, ids_BS)
        differs = float((got_BSV - logits_BSV).abs().max() / logits_BSV.abs().max())
        same = bool(got_BS.shape == text_BS.shape and (got_BS == text_BS).all())
        wrong = [f"{name} by {way}"] if not (differs < LOGITS and same) else []
        about = {"model": "reference", "what": name, "way": way or "chosen"}
        found.append(about | {"logits_differ": differs, "same_greedy_tokens": same, "wrong": wrong})
    return found


def one_step(model: PreTrainedModel, observed: Any, device: torch.device) -> dict[str, Any]:
    """Of recovery, after LightMoE at half the experts' parameters."""
    plan = generate.plan_of("lightmoe", {"rank": 4}, observed, shape_of(model))
    compressed = apply_plan(copy.deepcopy(model), plan, observed).to(device)
    tokens = random_tokens(model.config.vocab_size, 4, 64)
    options = make_recovery(
        {"how": "lora", "steps": 1, "batch_size": 2, "length": 64, "warmup_fraction": 0.0, "checkpoint_every": 0}
    )
    losses: list[float] = []
    with torch.enable_grad():
        recover_model(compressed, plan, tokens, None, options, progress=lambda step, steps, loss: losses.append(loss))
    finite = bool(losses) and all(torch.isfinite(torch.tensor(losses)))
    wrong = [] if finite else [f"recovery's losses are {losses}"]
    return {"model": "reference", "what": "one step of recovery", "losses": losses, "wrong": wrong}


def same_statistics(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """Of calibration, within a hundredth of each statistic's largest number: a token may choose another expert."""
    tokens = random_tokens(model.config.vocab_size, 4, 256)
    here, there = calibrate(model, tokens), calibrate(copy.deepcopy(model).to(device), tokens)
    wrong = []
    for layer, sums in here.layers.items():
        for name, found in sums.items():
            room = 1e-2 * float(found.abs().max())
            if not torch.allclose(there.layers[layer][name], found, rtol=1e-2, atol=room):
                wrong.append(f"statistics: {layer} {name}")
    return {"model": "reference", "what": "statistics as on the CPU", "wrong": wrong}


def measure(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    model = load_model(MODEL).float()
    model.set_experts_implementation("eager")  # grouped_mm is made for bfloat16
    ids_BS = generate.text("reference", model.config.vocab_size, BATCH, PROMPT)
    observed = generate.observe(model)
    yield from same_answers("original", model, ids_BS, device)
    for name in METHODS:
        options = generate.RANK["reference"].get(name, {})
        plan = generate.plan_of(name, options, observed, shape_of(model))
        yield from same_answers(name, apply_plan(copy.deepcopy(model), plan, observed), ids_BS, device)
    yield one_step(model, observed, device)
    yield same_statistics(model, device)
    large = random_olmoe(1, vocabulary=8192).to(device) if device.type == "cuda" else model
    cost = calibration.cost(large, random_tokens(large.config.vocab_size, 4, 512), 4, rounds)
    yield {"model": "reference" if large is model else "olmoe, 1 layer", "what": "calibration's cost", **cost}
