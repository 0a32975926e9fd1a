"""`recover --how layerwise`: one decoder layer after the other (training/one_by_one.py), of models that are streamed or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.load import load_model
from ..checkpoints.read import fingerprint_checkpoint
from ..checkpoints.retrained import check_rewritable, write_retrained
from ..checkpoints.skeleton import Source, open_source
from ..checkpoints.streamed import stream_model
from ..checkpoints.weight_files import is_adapter
from ..data.tokens import Tokens
from ..errors import OptionError
from ..files import provenance, versions
from ..models.decoder_layers import decoder_stack
from ..models.families import find_layers
from ..models.layer_major import NOTE, WholeLayers
from ..plans.plan import Plan
from ..training.loop import open_log, write_log
from ..training.one_by_one import KeptLayers, OneByOne
from ..training.options import UNTRACKED, Recovery
from ..training.router_losses import LOSSES
from ..training.ways.layerwise import Layerwise


@dataclass(frozen=True)
class Retrained:
    """A checkpoint of which some layers were trained: the first so many, where they are kept."""

    source: Source
    kept: KeptLayers
    layers: int

    @property
    def config(self) -> PreTrainedConfig:
        return self.source.model.config

    def write(self, folder: Path) -> None:
        """Weights and config."""
        found = (self.kept.load(index) for index in range(self.layers))
        write_retrained(folder, self.source, (tensors for tensors in found if tensors is not None))

    def put_into(self, live: PreTrainedModel) -> PreTrainedModel:
        """The checkpoint's live model, with the layers that were trained."""
        for index in range(self.layers):
            for name, tensor in (self.kept.load(index) or {}).items():
                parameter = live.get_parameter(name)
                parameter.data = tensor.to(parameter.device, parameter.dtype)
        return live


def goes_by_layer(options: Recovery, stream: bool | None) -> bool:
    """Whether a training goes layer by layer. Raises OptionError for what does not go with that, or without it."""
    if isinstance(options.way, Layerwise):
        given = [f"--{name}".replace("_", "-") for name in (*LOSSES, "patience") if getattr(options, name)]
        if given:
            raise OptionError(
                f"--how {options.way.name} trains every layer by its own error and validates at both ends, to which "
                f"{' and '.join(given)} can add nothing; leave them out"
            )
        return True
    if stream:
        raise OptionError(
            f"--stream trains one layer at a time, and --how {options.way.name} all at once; use --how layerwise"
        )
    return False


def train_by_layer(
    model: Path,
    original: Path,
    plan: Plan,
    blocks: Tokens,
    validation: Tokens,
    options: Recovery,
    *,
    streamed: bool,
    trainable: int,
    device: str,
    workdir: Path,
    log: Path,
    progress: Callable[[int, int, float], None],
) -> tuple[Retrained | PreTrainedModel, dict[str, Any]]:
    """The result, which is in memory only where files cannot be rewritten, and the summary."""
    source = open_source(model)
    if streamed:
        check_rewritable(model, source)
    identity = _identity(model, original, plan, blocks, validation, options)
    kept = KeptLayers(workdir, identity)
    kept.open()
    open_ = _streamed if streamed else _whole
    live, theirs = (open_(path, device) for path in (model, original))
    note = lambda line: write_log(log, line)  # noqa: E731
    run = OneByOne(live, theirs, plan, blocks, options, kept, source.model.dtype, progress, note)
    header = {"options": options.to_json(), "provenance": provenance(identity=identity)}
    open_log(log, header, run.resumed_at, trainable, said_again=("validation", "kept"))
    summary = run.run(validation) | {"trainable_parameters": trainable}
    for step, key in ((0, "validation_loss_before"), (options.steps, "validation_loss")):
        note({"event": "validation", "step": step, "validation_loss": summary[key]})
    note({"event": "kept", "kept_step": summary["kept_step"], "kept_loss": summary["validation_loss"]})
    made = Retrained(source, kept, len(run.layers.modules) if summary["kept_step"] else 0)
    if not (source.packed or is_adapter(model)):
        return made, summary
    del run, live, theirs
    return made.put_into(load_model(model, device=device)), summary


def _streamed(path: Path, device: str) -> PreTrainedModel:
    return stream_model(path, device, torch.float32)


def _whole(path: Path, device: str) -> PreTrainedModel:
    model = load_model(path, torch.float32, device)
    _, stack = decoder_stack(model, [layer.shape.name for layer in find_layers(model)])
    setattr(model, NOTE, WholeLayers(list[nn.Module](stack)))
    return model


def _identity(
    model: Path, original: Path, plan: Plan, blocks: Tokens, validation: Tokens, options: Recovery
) -> dict[str, Any]:
    tracked = {name: value for name, value in options.to_json().items() if name not in UNTRACKED}
    data = {"data": blocks.fingerprint, "validation": validation.fingerprint}
    models = {"model": fingerprint_checkpoint(model), "original": fingerprint_checkpoint(original)}
    return {**tracked, **data, **models, "plan": plan.id, "versions": versions()}
