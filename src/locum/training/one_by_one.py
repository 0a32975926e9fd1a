"""Layer-wise recovery of one decoder layer after the other.

    for every decoder layer, in order
        bring it, and that of the original
        open its MoE layer with adapters; AdamW lowers its loss for all steps, on the inputs that the layers before it give
        close it, so that its tensors are those of the checkpoint; keep them in a file
        compute its outputs with these for all batches, and drop it

The loss is that of `layerwise`, of one layer. The batches are those of `training_batches`, as many as the steps need and at most
all blocks once; they come again for further steps. A run goes on after the last layer that is kept.

Models are float32, and streamed or whole: results are the same to the bit. Of streamed ones memory holds a layer of both, and the
hidden states of all batches; where these are many (HELD), they lie on the disk.

Letters: B blocks, S tokens of a block.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.tokens import Batch, Tokens, batches, training_batches
from ..errors import OptionError
from ..files import read_tensors, write_tensors
from ..json_text import parse_json
from ..measure.memory import peak_bytes
from ..models.decoder_layers import decoder_stack, place_in
from ..models.families import MoeLayer, find_layers
from ..models.layer_major import COPIES, HELD, BeforeLayer, Job, LayerCall, Layers, held_bytes, layers_of, passes
from ..models.next_token_loss import loss_sum
from ..plans.plan import Plan
from ..runs import differences, set_aside
from ..shapes import ModelShape
from .adapters import check_adapters, close_adapters, open_adapter
from .closed_form import LinearFit, watching
from .context import Context
from .imitation import learning
from .loop import check_tokens
from .options import Recovery, learning_rate_at
from .states import LAYER_FILES, STATE_FILE
from .ways.layerwise import Layerwise, changed_layers

NOTES, LOSS = "locum-layer", "loss"  # entries of a file's metadata: what it answers, and the loss of the last step


@dataclass(frozen=True)
class KeptLayers:
    """The tensors of layers that are trained, each layer's in a file; `identity` says what they answer."""

    folder: Path
    identity: Mapping[str, Any]

    def file(self, index: int) -> Path:
        return self.folder / LAYER_FILES.replace("*", f"{index:05}")

    def open(self) -> None:
        """Make the folder. What an interrupted run of something else left there is set aside, with a word."""
        if (self.folder / STATE_FILE).exists():
            set_aside(self.folder, f"{self.folder} is of an interrupted run that trained all layers at once")
        if differ := next(filter(None, map(self._unlike, sorted(self.folder.glob(LAYER_FILES)))), ""):
            set_aside(self.folder, f"{self.folder} is of an interrupted run of something else: {differ}")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _unlike(self, file: Path) -> str:
        """How what a file answers differs from what is asked, in words; empty where it does not, and for a file that is damaged."""
        try:
            with safe_open(file, "pt") as opened:
                theirs = parse_json(opened.metadata()[NOTES])
            return differences(theirs, parse_json(json.dumps(self.identity)))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return ""

    def load(self, index: int) -> dict[str, Tensor] | None:
        """What was kept of a layer, by this run or by one that asked the same, if the file is not damaged."""
        file = self.file(index)
        if not file.is_file() or self._unlike(file):
            return None
        try:
            return read_tensors(file)[0]
        except SafetensorError:
            return None

    def loss(self, index: int) -> float:
        """The loss of the last step of a layer that is kept."""
        with safe_open(self.file(index), "pt") as opened:
            return float(opened.metadata()[LOSS])

    def save(self, index: int, tensors: Mapping[str, Tensor], loss: float = 0.0) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(self.file(index), ready, {NOTES: json.dumps(self.identity), LOSS: repr(loss)})


def number_of_batches(tokens: Tokens, options: Recovery) -> int:
    return min(options.steps * options.accumulate, math.ceil(len(tokens) / options.batch_size))


def waiting_bytes(shape: ModelShape, tokens: Tokens, validation: Tokens, options: Recovery) -> int:
    """What the hidden states of all batches take on the disk; 0 where memory holds them."""
    count = number_of_batches(tokens, options) * options.batch_size * tokens.length + validation.ids_BS.numel()
    states = count * shape.layers[0].hidden_size * torch.float32.itemsize
    return states if states * COPIES > HELD else 0


class OneByOne:
    """One such run, of models in float32 that are run layer by layer. `dtype` is that in which the checkpoint has experts: layers
    give their outputs with numbers that were rounded to it, as the result will."""

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        plan: Plan,
        tokens: Tokens,
        options: Recovery,
        kept: KeptLayers,
        dtype: torch.dtype,
        progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
        log: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        self.model, self.original, self.options, self.kept, self.dtype = model, original, options, kept, dtype
        self.way: Layerwise = options.way
        self.context = Context(model, plan, options.steps, options.seed)
        check_adapters(self.context, self.way)
        check_tokens(model, tokens, options)
        self.changed, self.progress, self.log = changed_layers(plan), progress, log
        self.layers: Layers = layers_of(model)
        self.prefix, _ = decoder_stack(model, [layer.shape.name for layer in find_layers(model)])
        every = training_batches(tokens, options.batch_size, options.seed)
        self.batches = list(islice(every, number_of_batches(tokens, options)))
        self.places = sorted({place_in(self.prefix, name) for name in self.changed})  # the decoder layers that learn
        self.steps_done = 0

    @functools.cached_property
    def resumed_at(self) -> int:
        """The steps of the layers that an earlier run kept, up to the first one that it did not."""
        kept = itertools.takewhile(lambda index: self.kept.load(index) is not None, self.places)
        return self.options.steps * sum(1 for _ in kept)

    def run(self, validation: Tokens | None) -> dict[str, Any]:
        """Train all layers; what they are now is kept. Returns the summary.

        `kept_step` is 0 where the model as it came predicts the validation text as well: nothing kept is to be taken then.
        """
        begin = time.monotonic()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        before = self._losses(validation, lambda index, calls: self._ready(index))
        jobs = [functools.partial(_hidden, self.model, batch, self.options) for batch in self.batches]
        after = self._losses(validation, self._learn_layer, jobs)
        better = before is None or after < before
        return {
            "steps": self.options.steps,
            "loss": sum(self.kept.loss(index) for index in self.places),
            "kept_step": self.options.steps if better else 0,
            "validation_loss_before": before,
            "validation_loss": after if better else before,
            "tokens": self.options.steps * sum(int(b.attention_BS.sum()) for b in self.batches) // len(self.batches),
            "seconds": time.monotonic() - begin,
            "peak_bytes": peak_bytes(self.model.device),
        }

    def _losses(
        self, validation: Tokens | None, before_layer: BeforeLayer, jobs: Sequence[Job[Any]] = ()
    ) -> float | None:
        """A pass of these jobs, if there are any, and of the validation, whose mean loss is returned."""
        asked = [] if validation is None else list(batches(validation, self.options.batch_size))
        if not asked and not jobs:
            return None
        measuring = [functools.partial(_loss, self.model, batch, self.options) for batch in asked]
        tokens = sum(batch.ids_BS.numel() for batch in [*asked, *(self.batches if jobs else ())])
        scratch = self.kept.folder if held_bytes(self.model, tokens) > HELD else None
        results = list(passes(self.model, [*jobs, *measuring], before_layer=before_layer, scratch=scratch))[len(jobs) :]
        count = sum(positions for _, positions in results)
        return sum(loss for loss, _ in results) / count if count else None

    def _ready(self, index: int) -> None:
        """A layer that was brought computes in float32."""
        module = self.layers.modules[index]
        module.requires_grad_(False)
        _widen([*module.parameters(), *module.buffers()])

    def _moe_layers(self, model: nn.Module, index: int) -> list[tuple[int, MoeLayer]]:
        """The MoE layers in a decoder layer, with their numbers in the model."""
        found = enumerate(find_layers(model))
        return [(number, layer) for number, layer in found if place_in(self.prefix, layer.shape.name) == index]

    def _learn_layer(self, index: int, calls: list[LayerCall | None]) -> None:
        """Train a layer, or take what is kept of it."""
        mine = [(n, layer) for n, layer in self._moe_layers(self.model, index) if layer.shape.name in self.changed]
        if mine and self.steps_done < self.resumed_at and (tensors := self.kept.load(index)) is not None:
            self._take(mine, tensors)
            self.steps_done += self.options.steps
        elif mine:
            self._train(index, mine, calls)
        self._ready(index)

    def _take(self, mine: list[tuple[int, MoeLayer]], tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            module._parameters[leaf] = nn.Parameter(tensor.to(self.model.device), requires_grad=False)

    def _train(self, index: int, mine: list[tuple[int, MoeLayer]], calls: list[LayerCall | None]) -> None:
        module, theirs = self.layers.modules[index], layers_of(self.original)
        theirs.bring(index)
        for tensor in theirs.modules[index].parameters():
            tensor.data = tensor.data.clone()
        names = [layer.shape.name for _, layer in mine]
        teachers = {layer.shape.name: layer.block for _, layer in self._moe_layers(self.original, index)}
        module.requires_grad_(False)
        for number, layer in mine:
            open_adapter(self.context, number, layer, self.way)
        routers = (
            {n: p for _, layer in mine for n, p in _named(layer.shape.router, layer.router)} if self.way.routers else {}
        )
        dtypes = {name: tensor.dtype for name, tensor in routers.items()}
        for tensor in routers.values():
            tensor.requires_grad_(tensor.is_floating_point())
        _widen([*module.parameters(), *module.buffers()])
        opened = {layer.shape.name: layer.block for _, layer in self._moe_layers(self.model, index)}
        pairs = [(opened[name], teachers[name]) for name in names]
        if self.way.closed_form:
            self._fit(module, pairs, calls)
        loss = self._steps(module, pairs, calls, names[0])
        theirs.drop(index)
        close_adapters(self.context)
        for name, tensor in routers.items():
            tensor.data = tensor.data.to(dtypes[name])
        closed = [layer for _, layer in self._moe_layers(self.model, index) if layer.shape.name in names]
        made = {n: t for layer in closed for n, t in _named(layer.shape.name, layer.experts)}
        for tensor in made.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(self.dtype)
        self.kept.save(index, made | routers, loss)

    def _fit(self, module: nn.Module, pairs: list[tuple[nn.Module, nn.Module]], calls: list[LayerCall | None]) -> None:
        """Begin at the least squares of all batches, in what a layer that is open is linear in."""
        opened = [layer.container for layer in self.context.layers]
        fits = [LinearFit(container, *pair, len(self.batches)) for container, pair in zip(opened, pairs, strict=True)]
        for i, batch in enumerate(self.batches):
            mask_BS = _mask(batch, self.model.device)
            with calls[i].there():
                _run(module, calls[i], watching(fits, i, mask_BS))
        for fit in fits:
            fit.finish()

    def _steps(
        self, module: nn.Module, pairs: list[tuple[nn.Module, nn.Module]], calls: list[LayerCall | None], name: str
    ) -> float:
        """Train a layer that is open. Returns the loss of the last step."""
        options = self.options
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:  # all of the layer is in few bits, and stays as large as it is
            self.steps_done += options.steps
            return 0.0
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay)
        total = options.steps * len(self.changed)
        for step in range(options.steps):
            rate = learning_rate_at(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            places = [(step * options.accumulate + part) % len(self.batches) for part in range(options.accumulate)]
            count = max(sum(int(self.batches[i].loss_mask_BS[:, 1:].sum()) for i in places), 1)
            loss = 0.0
            for i in places:
                with calls[i].there():
                    part = _loss_of(module, pairs, calls[i], self.batches[i], self.model.device) / count
                    part.backward()
                loss += float(part.detach())
            if not math.isfinite(loss):
                raise OptionError(
                    f"the loss of {name} is {loss} at step {step + 1}; lower --learning-rate (it is {options.learning_rate:g})"
                )
            if options.clip:
                torch.nn.utils.clip_grad_norm_(trained, options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.steps_done += 1
            self.log({"event": "step", "step": self.steps_done, "layer": name, "loss": loss, "learning_rate": rate})
            self.progress(self.steps_done, total, loss)
        return loss


def _loss_of(
    module: nn.Module,
    pairs: list[tuple[nn.Module, nn.Module]],
    call: LayerCall,
    batch: Batch,
    device: torch.device,
) -> Tensor:
    """The summed loss of the blocks of a layer, called as a batch calls it."""
    losses: list[Tensor] = []
    _run(module, call, learning(pairs, _mask(batch, device), losses))
    return torch.stack(losses).sum()


def _run(module: nn.Module, call: LayerCall, watching: contextlib.AbstractContextManager[Any]) -> None:
    """Call a layer as a batch calls it, watched, which may change the forward of the layer itself."""
    asking = module.__dict__.pop("forward")  # the run's own, which would wait for this very call
    try:
        with watching, call.torch.entered():
            call.context.run(module.forward, *call.given, **call.named)
    finally:
        module.forward = asking


def _mask(batch: Batch, device: torch.device) -> Tensor:
    return torch.nn.functional.pad(batch.loss_mask_BS[:, 1:], (0, 1)).to(device)


def _named(prefix: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters()]


def _widen(tensors: list[Tensor]) -> None:
    """Float32, in memory of its own: of what lies in a mapped file the address, and so the last bits of products, is chance."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32, copy=True)


def _hidden(model: PreTrainedModel, batch: Batch, options: Recovery) -> None:
    ids_BS, attention_BS = batch.ids_BS.to(model.device), batch.attention_BS.to(model.device)
    with _cast(model, options), torch.no_grad():
        model.base_model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False)


def _loss(model: PreTrainedModel, batch: Batch, options: Recovery) -> tuple[float, int]:
    with _cast(model, options), torch.no_grad():
        summed, positions = loss_sum(model, batch, model.device)
    return float(summed), positions


def _cast(model: PreTrainedModel, options: Recovery) -> contextlib.AbstractContextManager[Any]:
    """What a job enters in its thread; layers compute as the thread that calls them."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bf16")
