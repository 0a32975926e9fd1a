"""One expert from the files of a checkpoint, and back, with no other in memory.

transformers' own converter makes of an expert's tensors what the live model would have, in a model whose layers have one
expert each; so there is no code for any family here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..containers.container import StandInExperts
from ..containers.rows import row_weights
from ..errors import CheckpointError
from ..experts.weights import ExpertWeights
from ..models.conversions import as_in_files, converted
from ..models.families import MoeLayer, find_layers, read_expert, slice_experts, write_expert
from ..models.stored import ONE_EXPERT, Place
from .cuts import Cut, LayerCuts
from .empty_model import skeleton
from .read import first_line
from .shard_reader import ShardReader


def one_expert_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock model of a config without weights, whose layers have one expert each."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = skeleton(config)
    for layer in find_layers(model):
        slice_experts(layer.experts, (0,))
    return model


class ExpertReader:
    """The experts of one layer, stock or in a container of whole ones, in the widest dtype that the files have of them.

    `one` is the model whose layers have one expert. Raises CheckpointError for files that cannot be what it asks for.
    """

    def __init__(
        self, layer: MoeLayer, cuts: LayerCuts, places: Mapping[str, Place], files: ShardReader, one: PreTrainedModel
    ) -> None:
        self._layer, self._cuts, self._places, self._files, self._one = layer, cuts.experts, places, files, one
        names = [cut.names[0] for cut in self._cuts]
        self.dtype = max(map(files.dtype, names), key=lambda dtype: dtype.itemsize)
        self._check(self._tensors(0, self._on_meta))

    @property
    def names(self) -> set[str]:
        """The tensors of the files that have all these experts."""
        return {name for cut in self._cuts for name in cut.names}

    def tensors(self, e: int) -> dict[str, Tensor]:
        """One expert's tensors by their names in the experts module, where they have one more axis for the experts."""
        return {name: tensor[0] for name, tensor in self._tensors(e, self._from_file).items()}

    def __call__(self, e: int) -> ExpertWeights:
        tensors = self._tensors(e, self._from_file)
        layout = self._layer.experts.layout if isinstance(self._layer.experts, StandInExperts) else None
        return read_expert(self._holding(tensors), 0) if layout is None else row_weights(tensors, 0, layout)

    def _holding(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer's experts module, with these tensors of one expert in it."""
        experts = copy.copy(self._one.get_submodule(self._layer.shape.name))
        experts._parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        return experts

    def _tensors(self, e: int, read: Callable[[Cut, int], Tensor]) -> dict[str, Tensor]:
        """One expert's tensors by their names in the module, the experts' axis first."""
        found = {cut.name_of(e): read(cut, e).to(self.dtype) for cut in self._cuts}
        places = {name: self._places[name] for name in found}
        try:
            live = converted(self._one, found, places)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self._layer.shape.name}: expert {e} cannot be read from its tensors ({first_line(error)}); fetch them again"
            ) from error
        return {name.removeprefix(f"{self._layer.shape.name}."): tensor for name, tensor in live.items()}

    def _from_file(self, cut: Cut, e: int) -> Tensor:
        return self._files.tensor(cut.names[e]) if cut.axis is None else self._files.row(cut.names[0], e)[None]

    def _on_meta(self, cut: Cut, e: int) -> Tensor:
        shape = self._files.shape(cut.name_of(e))
        return torch.empty(shape if cut.axis is None else [1, *shape[1:]], device="meta")

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {
            name: (1, *parameter.shape[1:])
            for name, parameter in self._layer.experts.named_parameters()
            if not name.startswith("post_expert_norm.")
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
            raise CheckpointError(
                f"{self._layer.shape.name}: the tensors of one expert make {wrong[0]} of shape {found.get(wrong[0])}, and "
                f"config.json lays out {expected.get(wrong[0])}; fetch the files again"
            )


class ExpertSplitter:
    """Experts of a container as the tensors that the family's files have."""

    def __init__(self, layer: MoeLayer, one: PreTrainedModel, dtype: torch.dtype) -> None:
        self._name, self._one, self._dtype = layer.shape.name, one, dtype

    def shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all experts' tensors."""
        found = {}
        for name, tensor in self._in_files(self._one.get_submodule(self._name)).items():
            if (numbered := ONE_EXPERT.search(name)) is None:
                found[name] = (num_experts, *tensor.shape[1:])
            else:
                names = (name[: numbered.start()] + str(e) + name[numbered.end() :] for e in range(num_experts))
                found |= dict.fromkeys(names, tuple(tensor.shape))
        return found

    def split(self, e: int, weights: ExpertWeights) -> dict[str, tuple[int, Tensor]]:
        """One expert as its tensors by name, or as a row of tensors: the row, and its values."""
        experts = copy.copy(self._one.get_submodule(self._name))
        experts._parameters = {
            name: nn.Parameter(torch.empty_like(tensor, dtype=self._dtype, device="cpu"), requires_grad=False)
            for name, tensor in experts._parameters.items()
            if tensor is not None
        }
        write_expert(experts, 0, weights)
        found = {}
        for name, tensor in self._in_files(experts).items():
            numbered = ONE_EXPERT.sub(str(e), name)
            found[numbered] = (0, tensor) if ONE_EXPERT.search(name) else (e, tensor[0])
        return found

    def _in_files(self, experts: nn.Module) -> dict[str, Tensor]:
        own = {f"{self._name}.{leaf}": tensor for leaf, tensor in experts._parameters.items() if tensor is not None}
        return as_in_files(self._one, own)
