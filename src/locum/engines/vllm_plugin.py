"""Serving Locum's checkpoints with vLLM: found through the entry point `vllm.general_plugins`, so installing is enough.

It mirrors the transformers quantizer of checkpoints/quantizer.py. vLLM asks the quantization config named "locum" for the method
of every layer; where config.json describes a container, the answer is a method that holds that very container, built by
transformers' own classes without weights, and calls it at vLLM's own seam (x, gates, indices). No stock expert weights
are ever allocated there. vLLM has no hook between building a model and loading it, so `BaseModelLoader.create_model` is
wrapped: there routers are cut to the experts that are left, and the container's tensors are taken out of the stream of
weights before the model's class sees them, so no model class is known by name here.

vLLM renames modules (`mlp` may be `block_sparse_moe`, `model.` may be `language_model.model.`) but never renumbers
layers: a container is recognised by the numbers in its path.

In a quantised checkpoint, all that is in no container belongs to vLLM's own quantization config for it, which is asked in
turn. Weights that a container's experts keep in the checkpoint's number format are read as numbers (checkpoints/own_rows.py).

Letters: T tokens, K top-k, D model width, E experts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ..checkpoints.fit import check_shape
from ..checkpoints.own_rows import OwnRows, see
from ..checkpoints.packed import Files
from ..checkpoints.placing import ENTRIES, REST, LocumConfig, read_layout
from ..checkpoints.read import file_headers
from ..checkpoints.shard_reader import ShardReader
from ..checkpoints.skeleton import skeleton
from ..checkpoints.weight_files import other_weights
from ..containers.container import StandInExperts
from ..errors import CheckpointError, UnsupportedModel
from ..experts.policies.policy import Policy

Numbers = tuple[int, ...]


def path_numbers(path: str) -> Numbers:
    """The numbers in a module's path: those of `model.layers.3.mlp.experts` are (3,)."""
    return tuple(int(part) for part in path.split(".") if part.isdecimal())


class OwnWeights(NamedTuple):
    """Containers' tensors whose numbers lie in a quantised checkpoint's own tensors of experts, in its format."""

    files: ShardReader
    names: tuple[str, ...] = ()  # of the containers' tensors
    parts: frozenset[str] = frozenset()  # of the files'


@register_quantization_config("locum")
class LocumQuantization(QuantizationConfig):
    """What config.json says of containers, as vLLM wants to be asked for it. `rest` is what it says of all else."""

    def __init__(self, layers: dict[str, Any], rest: dict[str, Any] | None = None) -> None:
        self.said, self.rest = rest, None
        if rest is not None:
            self.rest = get_quantization_config(rest["quant_method"]).from_config(copy.deepcopy(rest))
        super().__init__()
        self.names = {path_numbers(name): name for name in layers}
        if len(self.names) < len(layers):
            raise UnsupportedModel(
                f"config.json describes two containers with the same layer number ({', '.join(sorted(layers))}); vLLM's "
                f"names cannot be told apart then"
            )
        self.layouts = {path_numbers(name): read_layout(name, data) for name, data in layers.items()}
        self.empty: dict[Numbers, StandInExperts] = {}  # containers that wait for their layer to be built

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LocumQuantization:
        known = {
            name: value for name, value in config.items() if name in (*ENTRIES, REST)
        }  # vLLM may have added entries
        said = LocumConfig.from_dict(known)
        return cls(said.layers, said.rest)

    @property
    def packed_modules_mapping(self) -> dict[str, list[str]]:
        """What vLLM makes of several linear layers: it says so after this was made, and the other config asks for it."""
        return self._packed_modules

    @packed_modules_mapping.setter
    def packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self._packed_modules = mapping
        if self.rest is not None:
            self.rest.packed_modules_mapping = mapping

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.rest is not None:
            self.rest.apply_vllm_mapper(hf_to_vllm_mapper)

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Refuse a checkpoint folder whose layouts or tensors are wrong, before any engine process starts."""
        if hf_config is None:
            return
        _empty_containers(hf_config)
        if not Path(model_name).is_dir():  # vLLM has fetched it by name; every tensor is checked as it loads
            if self.rest is not None:
                raise UnsupportedModel(
                    f"{model_name} has containers in a quantised checkpoint, which Locum's plugin serves from a folder; fetch "
                    f"it (hf download {model_name} --local-dir DIR) and serve that"
                )
            return
        if self.rest is not None:
            self.rest.maybe_update_config(model_name, hf_config, revision)
        if others := other_weights(Path(model_name)):
            raise CheckpointError(
                f"{model_name} holds {others[0]} beside the weights that transformers loads, and vLLM may read it instead; "
                f"keep one of them"
            )
        found: set[tuple[Numbers, str]] = set()
        headers, _ = self.files(Path(model_name), hf_config, torch.bfloat16)
        for name, entry in (item for header in headers.values() for item in header.items()):
            if place := self.place(name):
                check_shape(name, tuple(entry["shape"]), self.layouts[place[0]].tensor_shapes()[place[1]])
                found.add(place)
        self.check_complete(found)

    def files(self, folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Files, OwnWeights]:
        """The headers of a folder's files as if nothing in them were quantised, and what is read as numbers of `dtype`."""
        stored = file_headers(folder)
        if self.said is None:
            return stored, OwnWeights(ShardReader({}))
        headers, packed = see(stored, self.said, config, dtype)
        own = {name: row for name, row in packed.items() if isinstance(row, OwnRows)}
        parts = frozenset(part for row in own.values() for part in row.parts.values())
        return headers, OwnWeights(ShardReader(stored, packed), tuple(own), parts)

    def place(self, name: str) -> tuple[Numbers, str] | None:
        """Which container's tensor a checkpoint's tensor is, if any."""
        numbers = path_numbers(name)
        for count in range(len(numbers), 0, -1):  # the tensor's own name may have numbers too: adapters.0.up_B_FR
            layout = self.layouts.get(numbers[:count])
            for tensor in layout.tensor_shapes() if layout else ():
                if name.endswith(f".{tensor}") and path_numbers(name.removesuffix(f".{tensor}")) == numbers[:count]:
                    return numbers[:count], tensor
        return None

    def check_complete(self, found: set[tuple[Numbers, str]]) -> None:
        needed = {(numbers, tensor) for numbers, layout in self.layouts.items() for tensor in layout.tensor_shapes()}
        if missing := sorted(f"{self.names[numbers]}.{tensor}" for numbers, tensor in needed - found):
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of its containers' tensors (first: {missing[0]}); fetch it again"
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of one layer. Everything but a container is what it is in a model without containers."""
        numbers = path_numbers(prefix)
        if not isinstance(layer, RoutedExperts) or numbers not in self.layouts:
            if self.rest is not None:
                return self.rest.get_quant_method(layer, prefix)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        vllm_config = get_current_vllm_config()
        check_engine(vllm_config)
        if numbers not in self.empty:
            containers = _empty_containers(vllm_config.model_config.hf_config)
            self.empty = {path_numbers(name): container for name, container in containers.items()}
        return StandInMethod(layer.moe_config, self.empty.pop(numbers))

    def get_name(self) -> str:
        return "locum"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        known = [torch.float32, torch.bfloat16, torch.float16]
        return known if self.rest is None else [x for x in known if x in self.rest.get_supported_act_dtypes()]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # plain PyTorch products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def _empty_containers(hf_config: PreTrainedConfig) -> dict[str, StandInExperts]:
    """The containers of a checkpoint by name, without memory, as transformers' own model has them.

    The activation is thus the family's own, and layouts that do not fit the model are refused.
    """
    model = skeleton(hf_config)
    return {name: module for name, module in model.named_modules() if isinstance(module, StandInExperts)}


def check_engine(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    sizes = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
    }
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size != 1]:
        raise UnsupportedModel(
            f"Locum's containers run on one device, but vLLM was started with {', '.join(wrong)}; start it with 1, and "
            f"serve more requests with one engine per device"
        )
    if parallel.enable_expert_parallel:
        raise UnsupportedModel("Locum's containers run on one device; start vLLM without expert parallelism")
    if vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        raise UnsupportedModel(
            "Locum's containers choose their products by what was routed, which a CUDA graph cannot record; start vLLM "
            "with --enforce-eager"
        )


class StandInMethod(FusedMoEMethodBase):
    """Runs a container where vLLM runs routed experts."""

    def __init__(self, moe: Any, container: StandInExperts) -> None:
        super().__init__(moe)
        self.container: StandInExperts | None = container  # until the layer owns it

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if layer.apply_router_weight_on_input:
            raise UnsupportedModel(
                f"{layer.layer_name}: this model scales an expert's input by its gate, which Locum's containers do not"
            )
        container, self.container = self.container, None
        container = container.to(params_dtype).to_empty(device=torch.get_default_device())
        layer.container = container.requires_grad_(False).eval()

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        return layer.container(x, topk_ids.long(), topk_weights)


def prepare_model(model: nn.Module, quantization: LocumQuantization, vllm_config: VllmConfig) -> None:
    """Make a model that vLLM has just built ready to load: cut its routers, and sort out the containers' tensors."""
    containers: dict[Numbers, tuple[str, StandInExperts]] = {}
    for name, runner in model.named_modules():
        if isinstance(runner, MoERunner) and hasattr(runner.routed_experts, "container"):
            container = runner.routed_experts.container
            containers[path_numbers(runner.layer_name)] = f"{name}.routed_experts.container", container
            fit_router(model.get_submodule(name.rpartition(".")[0]), runner, container.num_experts)
            choose_by(runner, container.layout.routing)
            # vLLM's own opaque operator: on CPU it would let torch.compile trace into the experts instead, and a
            # container's products depend on what was routed.
            shared = runner.shared_experts is not None
            runner._forward_entry = torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward
    if without := sorted(name for numbers, name in quantization.names.items() if numbers not in containers):
        raise UnsupportedModel(
            f"vLLM's {type(model).__name__} has no experts layer for the container {without[0]} of config.json"
        )
    said = vllm_config.model_config
    tie_head(model, said.hf_config)
    own = OwnWeights(ShardReader({}))
    if quantization.rest is not None:
        own = quantization.files(Path(said.model), said.hf_config, said.dtype)[1]
    model.load_weights = functools.partial(load_weights, model.load_weights, containers, quantization, own)


def tie_head(model: nn.Module, config: PreTrainedConfig) -> None:
    """Tie the output head to the embedding where the config says so: not every class of vLLM does (OLMoE's does not)."""
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [table for table in tables if isinstance(table, ParallelLMHead)]
    if config.get_text_config().tie_word_embeddings and len(heads) == 1 and len(tables) == 2:
        embedding = next(table for table in tables if table is not heads[0])
        if heads[0].weight.shape == embedding.weight.shape:
            heads[0].tie_weights(embedding)


def fit_router(block: nn.Module, runner: MoERunner, num_experts: int) -> None:
    """Make room for so many experts in everything that a layer's routing has per expert.

    That is what the router has, the block's own tensors (some keep the selection bias there) and what routing was
    handed. Tensors are changed in place: the same parameter may be known under several names.
    """
    stock = runner.moe_config.num_experts
    if num_experts == stock:
        return
    found = {id(m): m for m in (runner.gate, getattr(block, "gate", None), getattr(block, "router", None))}
    routers = [module for module in found.values() if isinstance(module, nn.Module)]
    tensors = [t for module in routers for t in (*module.parameters(), *module.buffers())]
    tensors += [*block.parameters(recurse=False), *block.buffers(recurse=False)]
    tensors += [getattr(holder, "e_score_correction_bias", None) for holder in (runner.router, runner.routed_experts)]
    for tensor in {id(t): t for t in tensors if t is not None}.values():
        if tensor.ndim and tensor.shape[0] == stock:
            tensor.data = tensor.data.new_empty(num_experts, *tensor.shape[1:])
    for linear in (m for router in routers for m in router.modules() if getattr(m, "output_size", None) == stock):
        linear.output_size = linear.output_size_per_partition = num_experts
        linear.allow_fp32_router_gemm = False  # a kernel for the stock number of experts only
    runner.router.global_num_experts = num_experts


def choose_by(runner: MoERunner, policy: Policy | None) -> None:
    """Let a policy choose in place of a layer's router, where it does, from the logits that vLLM hands to that."""
    if policy is None or not policy.chooses:
        return
    router = runner.router
    if getattr(router, "e_score_correction_bias", None) is not None:
        raise UnsupportedModel(
            f"{runner.layer_name}: the router adds a selection bias to its choice; a policy cannot choose in its place"
        )
    stock = router._compute_routing

    def compute(
        hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        weights, index = stock(hidden_states, router_logits, indices_type, **given)
        chosen, mine = policy.choose(router_logits, index.long(), weights)
        return mine, chosen.to(index.dtype)

    router._compute_routing = compute


def load_weights(
    stock_load: Callable[[Iterable[tuple[str, Tensor]]], set[str] | None],
    containers: dict[Numbers, tuple[str, StandInExperts]],
    quantization: LocumQuantization,
    own: OwnWeights,
    weights: Iterable[tuple[str, Tensor]],
) -> set[str] | None:
    """Load the containers' tensors, and leave the rest to the model. Every tensor of a container must be there."""
    found: set[tuple[Numbers, str]] = set()

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in own.parts:
                continue
            place = quantization.place(name)
            if place is None:
                yield name, tensor
                continue
            parameter = containers[place[0]][1].get_parameter(place[1])
            check_shape(name, tuple(tensor.shape), tuple(parameter.shape))
            parameter.data.copy_(tensor)
            found.add(place)

    loaded = stock_load(others())
    for name in own.names:
        place = quantization.place(name)
        rows = containers[place[0]][1].get_parameter(place[1]).data
        for row in range(len(rows)):
            rows[row] = own.files.row(name, row)
        found.add(place)
    quantization.check_complete(found)
    if loaded is None:
        return None
    return loaded | {f"{containers[numbers][0]}.{tensor}" for numbers, tensor in found}


def with_containers(stock_create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`BaseModelLoader.create_model`, and what Locum's checkpoints need on top of it."""

    @functools.wraps(stock_create)
    def create_model(loader: BaseModelLoader, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> nn.Module:
        model = stock_create(loader, vllm_config, *args, **kwargs)
        if isinstance(vllm_config.quant_config, LocumQuantization):
            prepare_model(model, vllm_config.quant_config, vllm_config)
            loader.enable_weights_track = True  # vLLM's own check that every parameter was loaded
        return model

    return create_model


def register() -> None:
    """The entry point. vLLM calls it in every process, perhaps more than once."""
    if not hasattr(BaseModelLoader.create_model, "__wrapped__"):
        BaseModelLoader.create_model = with_containers(BaseModelLoader.create_model)
