"""`recover --how layerwise --stream`: one decoder layer of both models in memory at a time (training/one_by_one.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints.read import fingerprint_checkpoint
from ..checkpoints.retrained import check_rewritable, write_retrained
from ..checkpoints.skeleton import Source, open_source
from ..checkpoints.streamed import stream_model
from ..data.tokens import Tokens
from ..errors import OptionError
from ..files import provenance, versions, write_text
from ..plans.plan import Plan
from ..training.one_by_one import KeptLayers, OneByOne
from ..training.options import UNTRACKED, Recovery
from ..training.ways.layerwise import Layerwise
from .opening import is_to_stream


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


def is_one_by_one(model: Path, original: Path | None, stream: bool | None, options: Recovery, device: str) -> bool:
    """Whether a training goes layer by layer: as asked, else where both models do not fit. Raises OptionError for other ways."""
    if isinstance(options.way, Layerwise):
        wanted = is_to_stream([model, original], stream, device)
        if wanted and (options.balance or options.precision != "fp32"):
            raise OptionError(
                "layer by layer, --balance is 0 and --precision fp32; leave them out, or give --no-stream"
            )
        return wanted
    if stream:
        raise OptionError(
            f"--stream trains one layer at a time, and --how {options.way.name} all at once; use --how layerwise"
        )
    return False


def train_one_by_one(
    model: Path,
    original: Path,
    plan: Plan,
    blocks: Tokens,
    validation: Tokens,
    options: Recovery,
    *,
    device: str,
    workdir: Path,
    log: Path,
    progress: Callable[[int, int, float], None],
) -> tuple[Retrained, dict[str, Any]]:
    """The result, which is not in memory, and the summary."""
    source = open_source(model)
    check_rewritable(model, source)
    identity = _identity(model, original, plan, blocks, validation, options)
    kept = KeptLayers(workdir, identity)
    workdir.mkdir(parents=True, exist_ok=True)
    header = {"event": "start", "options": options.to_json(), "provenance": provenance(identity=identity)}
    write_text(log, json.dumps(header) + "\n")

    def note(line: dict[str, Any]) -> None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    live, theirs = (stream_model(path, device, torch.float32) for path in (model, original))
    run = OneByOne(live, theirs, plan, blocks, options, kept, source.model.dtype, progress, note)
    summary = run.run(validation)
    for step, key in ((0, "validation_loss_before"), (options.steps, "validation_loss")):
        note({"event": "validation", "step": step, "validation_loss": summary[key]})
    note({"event": "kept", "kept_step": summary["kept_step"], "kept_loss": summary["validation_loss"]})
    return Retrained(source, kept, len(run.layers.modules) if summary["kept_step"] else 0), summary


def _identity(
    model: Path, original: Path, plan: Plan, blocks: Tokens, validation: Tokens, options: Recovery
) -> dict[str, Any]:
    tracked = {name: value for name, value in options.to_json().items() if name not in UNTRACKED}
    data = {"data": blocks.fingerprint, "validation": validation.fingerprint}
    models = {"model": fingerprint_checkpoint(model), "original": fingerprint_checkpoint(original)}
    return {**tracked, **data, **models, "plan": plan.id, "versions": versions()}
