"""Recovery training: a compressed (or pruned, or stock) model is trained back to strength.

A way to recover (ways/) says what is trained, what each step does and which loss is lowered. Here is what is alike for
all of them: checks, states to resume from, precision, and that the model comes back in the dtypes that it came with.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import ranks
from ..data.tokens import Batch, Tokens, batches, training_batches
from ..errors import OptionError
from ..files import fingerprint, provenance, versions
from ..measure.use import Use, in_short, uses_of
from ..models.output_head import vocabulary
from ..plans.plan import Plan
from .context import Context, Original, check_layers, mark_of
from .decoder import DecoderLayers
from .kept_logits import keep_logits
from .loop import Hooks, accelerated, check_tokens, train, validation_loss
from .options import UNTRACKED, Recovery, check_recovery
from .router_losses import check_router_losses
from .states import State, load_state, sample
from .ways import WAYS, Way

USE_TOKENS = 131_072  # of training text, by whose use a way chooses (ESFT, arXiv 2407.01906)
ROUTING_TOKENS = 4096  # of validation text, that the use of experts is reported of


def check_fits(way: Way, plan: Plan | None, flag: str = "--how") -> None:
    """Refuse a plan that this way cannot train; say which ways can. Raises OptionError."""
    if plan is not None and any(layer.rewritten for layer in plan.layers):
        raise OptionError(
            f"{flag} {way.name} trains no masked experts, whose zeros would not stay; train before, and mask the result"
        )
    if plan is not None and plan.numbering.gone and way.layer_by_layer:
        raise OptionError(
            f"{flag} {way.name} goes by the original's layers, and the plan drops some of them; use {flag} kd, lora or full"
        )
    objection = way.objection(plan)
    if objection is not None:
        others = [f"{flag} {name}" for name, cls in WAYS.items() if cls().objection(plan) is None]
        raise OptionError(f"{flag} {way.name} {objection}; use {' or '.join(others)}")


def count_trainable(
    model: nn.Module, plan: Plan | None, options: Recovery, uses: Mapping[str, Use] | None = None
) -> int:
    """How many parameters recovery would train: for a way that chooses by use, without it, at most. `model` is used up; it may be on
    the meta device (skeleton)."""
    check_recovery(options)
    context = Context(model, plan and plan.of_result(), options.steps, options.seed, uses=uses)
    check_layers(context)
    options.way.prepare(context, options.steps)  # the end of training, when no old weights are needed
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def recover_model(
    model: PreTrainedModel,
    plan: Plan | None,
    tokens: Tokens,
    validation: Tokens | None,
    options: Recovery,
    original: Original | None = None,
    workdir: Path | None = None,
    log: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    restart: bool = False,
    about: Mapping[str, Any] | None = None,
    uses: Mapping[str, Use] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a live model back to strength, in place, on the device where it is.

    `plan` is the one the checkpoint was made by; None for a model that was never compressed. `original` is the model
    before, for ways that need it. With a `workdir`, an interrupted run goes on where its last state was when it is
    called again with the same arguments; the last state stays there until the caller, having saved the result, calls
    `states.forget(workdir)`. `about` is added to the log's provenance. `uses`, for ways that read it, is how text uses the experts;
    without it, the first 131,072 tokens of the training are looked at.

    Where there is validation text, the result is the best validated state, which may be the model as it came.

    Ranks that have met share the training, and the first one then has the model, in the host's memory; others have none of it.

    Returns the model, in the layout and dtype it came with, and a summary. If it raises after training has begun, the
    live model is left as it was in training: load it again. Raises OptionError, PlanError, DataError, UnsupportedModel.
    """
    check_recovery(options)
    check_fits(way := options.way, plan)
    plan = plan and plan.of_result()
    context = Context(model, plan, options.steps, options.seed, original, workdir)
    if original is None and way.needs_original(plan):
        raise OptionError(f"--how {way.name} needs the original model; give it with --original (original=...)")
    check_tokens(model, tokens, options)
    if way.reads_use:
        context.uses = uses or _uses_in_training(model, tokens, options)
    way.check(context)
    check_router_losses(model, options)
    identity = _identity(context, options, tokens, validation) | way.identity(context)
    state = _left_behind(workdir, identity, restart)
    context.dtypes = {name: tensor.dtype for name, tensor in _floats(model)}
    if way.top_logits:
        context.original = _kept(context, options, tokens)
    routing = {"routing_before": _routing(model, validation, options)}
    before = None
    if validation is not None and state.step == 0 and not way.is_result(context, 0):
        before = _loss_before(model, validation, options)
    way.prepare(context, state.step)
    decoder = DecoderLayers(model, options.precision, options.checkpointing)
    decoder.set_precision(model)
    made = provenance(data_fingerprint=tokens.fingerprint, identity=identity, **(about or {}))
    header = {"options": options.to_json(), "provenance": made, **context.said}
    hooks = Hooks(
        at_step=lambda step: way.at_step(context, step),
        is_result=lambda step: way.is_result(context, step),
        before=before,
        loss=lambda batch: way.loss(context, batch),
        workdir=workdir,
        identity=identity,
        log=log if ranks.is_first() else None,
        header=header,
        progress=progress,
    )
    with decoder:
        summary = train(model, tokens, validation, options, state, hooks)
    summary |= {"checkpointed": decoder.checkpoints, "layer_activation_bytes": decoder.kept_bytes}
    summary |= context.said
    if not ranks.is_first():
        return model, summary
    _close(model, context, way)
    routing["routing"] = _routing(model, validation, options)
    return model.eval(), summary | {name: said for name, said in routing.items() if said is not None}


def batches_of(tokens: Tokens, options: Recovery) -> Iterator[Batch]:
    """All batches of a run, in their order."""
    return islice(training_batches(tokens, options.batch_size, options.seed), options.steps * options.accumulate)


def _kept(context: Context, options: Recovery, tokens: Tokens) -> Original:
    """The logits that are kept of an original, in its place."""
    original, folder = context.original, context.workdir
    if original.logits is None and folder is None:
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(context, shutil.rmtree, folder, ignore_errors=True)  # it is there as long as the run is
    if (kept := original.logits) is None:
        asked = (options.way.top_logits, options.way.temperature, mark_of(original), vocabulary(original.model))
        kept = keep_logits(folder, batches_of(tokens, options), *asked, lambda: original.model)
    context.said["logits_seconds"] = kept.seconds
    return Original({}, logits=kept)


def _close(model: PreTrainedModel, context: Context, way: Way) -> None:
    """Back to the layout and the dtypes that the model came with."""
    if ranks.count() > 1:  # which share a model that no device may hold alone
        context.layers = [replace(layer, device=torch.device("cpu")) for layer in context.layers]
    way.finish(context)
    for name, tensor in _floats(model):
        # Adapters that stay are in that of the checkpoint.
        tensor.data = tensor.data.to(context.dtypes.get(name, tensor.dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _uses_in_training(model: PreTrainedModel, tokens: Tokens, options: Recovery) -> dict[str, Use]:
    """How the first tokens of the training use the experts of the model as it came. Every rank looks at all of them."""
    size = min(options.batch_size, len(tokens))
    count = math.ceil(min(USE_TOKENS / options.length, len(tokens)) / size)
    first = islice(training_batches(tokens, size, options.seed), count)
    return uses_of(model.eval(), ((batch.ids_BS, batch.attention_BS) for batch in first))


def _routing(model: PreTrainedModel, validation: Tokens | None, options: Recovery) -> dict[str, float] | None:
    """How the first tokens of the validation use the experts, in short: training may let experts die. Not where ranks share it."""
    if validation is None or ranks.count() > 1:
        return None
    count = math.ceil(ROUTING_TOKENS / (options.batch_size * options.length))
    first = islice(batches(validation, options.batch_size), count)
    return in_short(uses_of(model.eval(), ((batch.ids_BS, batch.attention_BS) for batch in first)))


def _left_behind(workdir: Path | None, identity: dict[str, Any], restart: bool) -> State:
    """The state to go on from. The first rank sees to what cannot be gone on from; the others read what it found."""
    state = load_state(workdir, identity, restart) if ranks.is_first() else State()
    if ranks.told(state.step) and not ranks.is_first():
        state = load_state(workdir, identity, restart=False)
    return state


def _loss_before(model: PreTrainedModel, validation: Tokens, options: Recovery) -> float:
    """The validation loss of the model as it came, in the precision of the run."""
    dtypes = {name: tensor.dtype for name, tensor in _floats(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # so that weights of decoder layers stay as they are
    decoder = DecoderLayers(model, options.precision, "off")
    decoder.set_precision(model)
    with decoder, accelerated(options.precision, model.device) as accelerator:
        loss = validation_loss(model.eval(), validation, options, accelerator)
    for name, tensor in _floats(model):
        tensor.data = tensor.data.to(dtypes[name])
    for parameter in trained:
        parameter.requires_grad_(True)
    return loss


def _identity(context: Context, options: Recovery, tokens: Tokens, validation: Tokens | None) -> dict[str, Any]:
    """What a run's course depends on; a state is resumed only by a run with the same."""
    tracked = {name: value for name, value in options.to_json().items() if name not in UNTRACKED}
    samples = [part for name, tensor in context.model.state_dict().items() for part in (name, sample(tensor))]
    plan = None if context.plan is None else context.plan.id
    data = {"data": tokens.fingerprint, "validation": None if validation is None else validation.fingerprint}
    return {**tracked, **data, "model": fingerprint(*samples), "plan": plan, "versions": versions()}


def _floats(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
