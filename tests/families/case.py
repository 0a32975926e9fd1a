"""One family of models: a tiny real one, plans for it, and what checks compare it with.

Letters: T tokens, K top-k, E experts, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from families.tiny_families import tiny
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.rewrite import Rewriting
from locum.checkpoints.skeleton import Source, open_source, read_shape, shape_in
from locum.data.tokens import Tokens
from locum.errors import LocumError
from locum.measure.calibration import calibrate
from locum.models.families import family_of
from locum.models.sizes import shape_of
from locum.models.stored import write_model
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Plan, Slot, make_plan, stand_in
from locum.shapes import LayerShape, ModelShape
from locum.stats.sums import Statistics


class NotApplicable(Exception):
    """The family has nothing that this check could look at."""


class Case:
    """One family: a fresh tiny model whenever one is asked for, and what several checks need of it."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.reloaded_mixed: PreTrainedModel | None = None  # left by the check of that plan for the one after it
        self.ids_BS = torch.randint(2, 120, (3, 12), generator=torch.Generator().manual_seed(0))

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = tiny(self.family)
        model.set_experts_implementation("eager")
        return model

    def model(self) -> PreTrainedModel:
        return copy.deepcopy(self._model)

    @cached_property
    def shape(self) -> ModelShape:
        return shape_of(self._model)

    @cached_property
    def logits(self) -> Tensor:
        return self.logits_of(self._model)

    def logits_of(self, model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return model(input_ids=self.ids_BS, use_cache=False).logits

    @cached_property
    def statistics(self) -> Statistics:
        return calibrate(self.model(), tokens_of(self.ids_BS), batch_size=2)

    def plan(self, make: Callable[[LayerShape], tuple[list[Slot], list[Base]]]) -> Plan:
        layers = []
        for shape in self.shape.layers:
            slots, bases = make(shape)
            layers.append(LayerPlan(shape.name, tuple(slots), tuple(bases)))
        return make_plan(self.shape, layers)

    def applied(self, plan: Plan) -> PreTrainedModel:
        return apply_plan(self.model(), plan, self.statistics if plan.needs else None)


def tokens_of(ids_BS: Tensor) -> Tokens:
    blocks, length = ids_BS.shape
    ones = torch.ones_like(ids_BS)
    fields = {"loss_mask_BS": ones.bool(), "attention_BS": ones, "bytes_BS": ones}
    domain_B = torch.zeros(blocks, dtype=torch.long)
    names = {"domains": ("text",), "weights": (1.0,), "fingerprint": "data", "sources": (), "split": "all"}
    return Tokens(ids_BS=ids_BS, domain_B=domain_B, length=length, **fields, **names)


def skip_refused(family: str) -> None:
    """Skip a family that Locum refuses, with its reason; transformers' bars would be most of what a run prints."""
    logging.disable_progress_bar()
    if refused := family_of(family).refuse:
        pytest.skip(refused)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        actual, expected, atol=tolerance * float(expected.abs().max().clamp(min=1)), rtol=tolerance
    )


def dropped_of(shape: LayerShape) -> tuple[int, ...]:
    """Two experts to drop, one in each group where there are two groups."""
    return (1, shape.num_experts - 2)


def prune(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    return [DROPPED if e in dropped_of(shape) else KEPT for e in range(shape.num_experts)], []


def lightmoe(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    half = shape.num_experts // 2
    replaced = stand_in(base=0, rank=2, start="svd")
    return [KEPT] * half + [replaced] * half, [Base(tuple(range(half, 2 * half)), (1 / half,) * half)]


def low_rank(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    return [stand_in(rank=4, start="svd") if e % 2 else KEPT for e in range(shape.num_experts)], []


def constant(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    return [stand_in(constant=True) if e % 2 else KEPT for e in range(shape.num_experts)], []


def merged(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    slots = [stand_in(base=e % 2) if e < 6 else KEPT for e in range(shape.num_experts)]
    return slots, [Base((0, 2, 4), (0.5, 0.25, 0.25)), Base((1, 3, 5), (0.2, 0.2, 0.6), align=True)]


def mixed(shape: LayerShape) -> tuple[list[Slot], list[Base]]:
    """Every kind of slot. Where nothing may be dropped, the two become nothing."""
    slots = [
        stand_in(base=0, rank=2, start="svd"),
        NOTHING if shape.refuse_dropping else DROPPED,
        stand_in(base=0, rank=3, start="svd", constant=True),
        NOTHING,
        stand_in(rank=3, start="svd"),
        stand_in(constant=True),
        NOTHING if shape.refuse_dropping else DROPPED,
        KEPT,
    ]
    return slots, [Base((0, 2), (0.5, 0.5))]


PLANS = {"LightMoE": lightmoe, "low rank": low_rank, "constant": constant, "merged": merged, "mixed": mixed}


def stored(folder: str) -> tuple[int, int]:
    """Numbers and bytes of the tensors in a folder's safetensors files."""
    numbers = size = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                tensor = tensors.get_tensor(name)
                numbers, size = numbers + tensor.numel(), size + tensor.numel() * tensor.element_size()
    return numbers, size


def checkpoint_of(case: Case, folder: Path) -> tuple[Source, ModelShape, PreTrainedModel]:
    """A family's model saved to `folder` and opened: as files, and live. Skips a family that Locum refuses to open."""
    case.model().save_pretrained(folder)
    try:
        source = open_source(folder)
    except LocumError as error:
        pytest.skip(str(error))
    return source, shape_in(folder, source), load_model(folder)


def both_ways(
    source: Source, shape: ModelShape, live: PreTrainedModel, plan: Plan, seen: Statistics, out: Path
) -> PreTrainedModel:
    """What a plan makes of a checkpoint, as files in `out`, and of its live model: the same to the bit, of the promised size."""
    out.mkdir()
    Rewriting(source, shape, plan, seen, seed=3).write(out)
    model = apply_plan(copy.deepcopy(live), plan, seen, seed=3)
    saved = out.with_name(f"{out.name} saved")
    write_model(model, saved)
    here, there = (load_file(x / "model.safetensors") for x in (out, saved))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert (out / "config.json").read_text() == (saved / "config.json").read_text()
    size = plan.size(shape)
    assert stored(str(out))[1] == size.bytes == read_shape(out).bytes and read_shape(out).parameters == size.parameters
    return model


def reloaded(model_class: type[PreTrainedModel], folder: str) -> PreTrainedModel:
    model, info = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(what), (what, sorted(map(str, info[what]))[:3])
    return copied(model)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """Tensors where the allocator puts them, not where a file has them: the last bit of a product depends on alignment."""
    model.set_experts_implementation("eager")
    return copy.deepcopy(model).eval()
