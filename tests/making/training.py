"""Models compressed for training, what trains them, and short runs."""

from __future__ import annotations

import copy

import torch

from locum.checkpoints.application import apply_plan
from locum.data.tokens import Batch, Tokens
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, Base, LayerPlan, make_plan, stand_in
from locum.training.context import Original
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from making.handmade import with_sums
from making.tiny_models import tiny_ids

QUICK = {"steps": 6, "batch_size": 2, "learning_rate": 3e-3, "warmup_fraction": 0.0, "checkpoint_every": 0}


def tiny_tokens(blocks=6, length=16, seed=1) -> Tokens:
    ids = tiny_ids(blocks, length, seed=seed)
    loss = torch.ones_like(ids, dtype=torch.bool)
    loss[:, 0] = False
    loss[0, :5] = False  # a prompt
    batch = Batch(ids, loss, torch.ones_like(ids), torch.ones_like(ids), torch.zeros(blocks, dtype=torch.int64))
    return Tokens(
        **vars(batch), domains=("a",), weights=(1.0,), fingerprint=f"{seed}", sources=(), split="train", length=length
    )


def light(model, *, rank=3, start="gaussian", align=False, bases=True, constant=False, rest=KEPT):
    """Per layer: experts 0-3 kept, 4-7 stand-ins on two bases (or none)."""
    layers = []
    for layer in shape_of(model).layers:
        slots = [
            stand_in(
                base=(e // 6 if bases else None),
                rank=rank,
                start=start if rank else "gaussian",
                constant=constant,
            )
            for e in range(4, 8)
        ]
        made = (Base((4, 5), (0.3, 0.7), align), Base((6, 7), (0.5, 0.5), align)) if bases else ()
        layers.append(LayerPlan(layer.name, (KEPT, KEPT, KEPT, rest, *slots), made))
    return make_plan(shape_of(model), layers)


def compressed(model, plan):
    means = [torch.randn(8, 32, generator=torch.Generator().manual_seed(3)) for _ in shape_of(model).layers]
    statistics = with_sums(shape_of(model), output_sum=means, count=[torch.ones(8)] * len(means))
    return apply_plan(copy.deepcopy(model), plan, statistics)


def run(model, plan, original=None, validation=None, **options):
    kwargs = {k: options.pop(k) for k in ("workdir", "log", "progress", "restart") if k in options}
    options = make_recovery({"how": "annealed", **QUICK, **options})
    known = None if original is None else Original.of(original)
    return recover_model(model, plan, tiny_tokens(), validation, options, known, **kwargs)


class Killed(Exception):
    pass
