"""Large modules outside of a streamed model's decoder layers, such as the embedding and the output head: in memory while they
are called.

They get their weights when they are called, and lose them when a decoder layer is to be read. In between they are NaN, which
take no memory: a model asks its parameters for their device, and what reads them without a call is seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

LARGE = 2**24  # parameters


class OnCall:
    """The large ones among the modules of a model without weights, and those that are tied to them.

    `outside` are the names of the parameters that belong to no decoder layer; `load` gives parameters their weights by their names.
    """

    def __init__(
        self, model: PreTrainedModel, outside: Collection[str], device: str, load: Callable[[Iterable[str]], None]
    ) -> None:
        self._model, self._device, self._load = model, device, load
        self._there: set[str] = set()
        self._groups: dict[str, list[str]] = {}  # names of parameters by that of the one to which they are tied
        ties = model.all_tied_weights_keys
        for module_name, module in model.named_modules():
            names = [f"{module_name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
            sources = {ties.get(name, name) for name in names}
            known = names and sources <= set(outside) and not list(module.children())
            if not known or sum(math.prod(model.get_parameter(name).shape) for name in names) < LARGE:
                continue
            for source in sources:
                tied = [name for name, of in ties.items() if of == source and name in outside]
                self._groups[source] = [source, *tied]
            module.register_forward_pre_hook(functools.partial(self._bring, sources))

    @property
    def names(self) -> set[str]:
        """The parameters that are not there before they are called for."""
        return {name for group in self._groups.values() for name in group}

    def keep(self) -> None:
        """Give all of them their weights, for good: `drop` must not be called any more."""
        self._bring(self._groups)

    def drop(self) -> None:
        """Take the weights of all of them away."""
        for source, names in self._groups.items():
            parameter = self._model.get_parameter(source)
            if source in self._there or parameter.device.type == "meta":
                nothing = torch.full((), math.nan, dtype=parameter.dtype, device=self._device)
                self._put(names, nn.Parameter(nothing.expand(parameter.shape), requires_grad=False))
        self._there.clear()

    def _bring(self, sources: Iterable[str], *_: Any) -> None:
        for source in sources:
            names = self._groups[source]
            if source not in self._there:
                before = self._model.get_parameter(source)
                with torch.inference_mode(False), torch.no_grad():
                    self._load(names)
                loaded = (self._model.get_parameter(name) for name in names)
                self._put(names, next(parameter for parameter in loaded if parameter is not before))
                self._there.add(source)

    def _put(self, names: Iterable[str], parameter: nn.Parameter) -> None:
        for name in names:
            module, _, leaf = name.rpartition(".")
            self._model.get_submodule(module)._parameters[leaf] = parameter
