"""Decoder layers in training, in the memory of one: their frozen weights stay narrow, and what backward needs can be made again.

    wide weights     where a run computes in float32, memory holds frozen weights of a decoder layer in the 16 bits that
                     they came in. A layer gets them in float32 when it begins and loses them when it ends. Autograd keeps
                     the narrow ones and widens each when backward asks for it. Numbers are those of weights that are
                     float32 all the time, to the bit: widening is exact.
    old weights      those that lie in mapped files are put down when their layer has run, forward or back: memory holds those of one
                     layer.
    checkpointing    a layer keeps its inputs alone, and is computed again when backward comes to it (arXiv 1604.06174), to the
                     same bits. "auto" begins with it at the first layer after one that keeps so much that all layers together
                     would take more than half of the memory that is free.

What lies outside of the stack of decoder layers (embeddings, norms, the output head) is float32 all the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .. import ranks
from ..errors import UnsupportedModel
from ..measure.memory import free_bytes
from ..models.decoder_layers import decoder_stack
from ..models.families import find_layers
from ..stats.on_disk import is_on_disk, put_down

SHARE = 0.5  # of the free memory that what backward needs may take


class DecoderLayers:
    """The decoder layers of a model in training. While it is entered, they run as said above.

    Raises UnsupportedModel where layers that are in no one stack are to be checkpointed; without, these stay as they are.
    """

    def __init__(self, model: nn.Module, precision: str, checkpointing: str) -> None:
        try:
            _, stack = decoder_stack(model, (layer.shape.name for layer in find_layers(model)))
            self.layers = list(stack)
        except UnsupportedModel as error:
            if checkpointing == "on":
                raise UnsupportedModel(f"{error}, so --checkpointing on cannot work; leave it out") from error
            self.layers = []
        if ranks.count() > 1:  # FSDP wants one dtype, and checkpoints by itself (sharding.py)
            self.layers = []
        self.precision, self.checkpointing = precision, checkpointing
        self.checkpoints = checkpointing == "on"
        self.kept_bytes = 0  # the most that backward needed of a layer, beside its weights
        self._stack = contextlib.ExitStack()

    def set_precision(self, model: nn.Module) -> None:
        """Float32 for what is trained; for fp32 also for what is frozen, but for narrow weights of decoder layers, which are widened
        while their layer runs. Frozen weights of a bf16 run stay as they are: autocast casts both."""
        within = {id(p) for layer in self.layers for p in layer.parameters() if _is_narrow(p)}
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.requires_grad or (self.precision == "fp32" and id(tensor) not in within):
                tensor.data = tensor.data.float()

    def __enter__(self) -> DecoderLayers:
        for layer in self.layers:
            before = layer.__dict__.get("forward")
            self._stack.callback(_put_back, layer, before)
            layer.forward = _Running(self, layer, layer.forward)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def saw(self, kept: int, device: torch.device) -> None:
        """A layer keeps so many bytes for backward."""
        self.kept_bytes = max(self.kept_bytes, kept)
        if self.checkpointing == "auto" and kept * len(self.layers) > SHARE * free_bytes(device):
            self.checkpoints = True


class _Running:
    """What stands in for a layer's forward."""

    def __init__(self, decoder: DecoderLayers, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self.decoder, self.layer, self.forward = decoder, layer, forward

    def __call__(self, *given: Any, **named: Any) -> Any:
        output = self._run(*given, **named)
        if _put_down(self.layer):
            inputs = (tensor for tensor in (*given, *named.values()) if isinstance(tensor, Tensor))
            for tensor in inputs:
                if tensor.requires_grad:
                    tensor.register_hook(self._after)
        return output

    def _after(self, _gradient: Tensor) -> None:
        """The gradient of an input is there, so the layer has run back."""
        _put_down(self.layer)

    def _run(self, *given: Any, **named: Any) -> Any:
        if self.decoder.checkpoints and torch.is_grad_enabled():
            options = {
                "use_reentrant": False,
                "preserve_rng_state": False,
            }  # nothing is drawn: the model is in eval mode
            return checkpoint(self._again, *given, **options, **named)
        with self._wide() as wide, (kept := _Kept(self.layer, wide)):
            output = self.forward(*given, **named)
        if kept.bytes:
            self.decoder.saw(kept.bytes, next(self.layer.parameters()).device)
        return output

    def _again(self, *given: Any, **named: Any) -> Any:
        with self._wide():
            return self.forward(*given, **named)

    @contextlib.contextmanager
    def _wide(self) -> Iterator[dict[int, Tensor]]:
        """The layer with wide weights; yields the narrow ones by where the wide ones lie."""
        narrow: list[tuple[nn.Module, str, nn.Parameter]] = []
        if self.decoder.precision == "fp32":
            owned = ((m, name, p) for m in self.layer.modules() for name, p in m._parameters.items() if p is not None)
            narrow = [(m, name, p) for m, name, p in owned if _is_narrow(p)]
        wide: dict[int, Tensor] = {}
        try:
            for module, name, parameter in narrow:
                made = nn.Parameter(parameter.detach().float(), requires_grad=False)
                wide[made.untyped_storage().data_ptr()] = parameter.detach()
                module._parameters[name] = made
            yield wide
        finally:
            for module, name, parameter in narrow:
                module._parameters[name] = parameter


class _Kept(saved_tensors_hooks):
    """While it is entered, autograd keeps narrow weights in place of wide ones, and what else it keeps is counted."""

    def __init__(self, layer: nn.Module, wide: dict[int, Tensor]) -> None:
        super().__init__(self._pack, self._unpack)
        self._wide = wide
        self._weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self._seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def _pack(self, tensor: Tensor) -> Any:
        place = tensor.untyped_storage().data_ptr()
        if tensor.numel() and place in self._wide:
            narrow = self._wide[place]
            start = narrow.storage_offset() + tensor.storage_offset()
            return narrow.as_strided(tensor.shape, tensor.stride(), start)
        if place not in self._weights:
            self._seen[place] = tensor.untyped_storage().nbytes()
        return tensor, None

    def _unpack(self, kept: Any) -> Tensor:
        return kept.float() if isinstance(kept, Tensor) else kept[0]


def _is_narrow(parameter: Tensor) -> bool:
    is_frozen = not parameter.requires_grad and parameter.is_floating_point()
    return is_frozen and parameter.dtype.itemsize < torch.float32.itemsize and parameter.is_contiguous()


def _put_down(layer: nn.Module) -> int:
    """How many of a layer's weights lie on the disk; none of them takes memory any more."""
    mapped = [parameter for parameter in layer.parameters() if is_on_disk(parameter)]
    for parameter in mapped:
        put_down(parameter)
    return len(mapped)


def _put_back(layer: nn.Module, before: Any) -> None:
    if before is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.forward = before
