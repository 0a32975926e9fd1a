"""What a router has per expert, how to keep some of its rows, what it puts out, and what kind of router it is.

Nothing here knows a family by name: a `RouterRule` says where one departs from the rule (an expert axis first, E long).

Letters: E experts, K top-k, T tokens, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel

MOST_PROBED = 2**24  # numbers of a router; the largest there are have a sixth of that


@dataclass(frozen=True)
class RouterRule:
    """Where a router departs from the rule. Tensors are named by their path in the router, such as "proj.weight"."""

    shared: tuple[str, ...] = ()  # these have no expert axis
    expert_axis: Mapping[str, int] = field(default_factory=dict)  # in these it is not the first
    rows_after: tuple[str, ...] = ()  # these have more rows after the experts', which stay
    probabilities: bool = False  # it puts out softmax probabilities where others put out logits


@dataclass(frozen=True)
class RouterTensor:
    """A tensor with something for every expert, and the module that holds it."""

    holder: nn.Module
    leaf: str
    tensor: Tensor
    axis: int

    @property
    def numel(self) -> int:
        """What one expert has of it."""
        return self.tensor.numel() // self.tensor.shape[self.axis]

    def keep(self, rows: tuple[int, ...] | int, num_experts: int) -> None:
        """Keep these experts' rows, or make room for so many of them. Rows after the experts' stay."""
        size = self.tensor.shape[self.axis]
        rest = list(range(num_experts, size))
        if isinstance(rows, int):
            shape = list(self.tensor.shape)
            shape[self.axis] = rows + len(rest)
            kept = torch.empty(shape, dtype=self.tensor.dtype, device=self.tensor.device)
        else:
            index = torch.tensor([*rows, *rest], device=self.tensor.device)
            kept = self.tensor.detach().index_select(self.axis, index)
        if isinstance(self.tensor, nn.Parameter):
            setattr(self.holder, self.leaf, nn.Parameter(kept, requires_grad=self.tensor.requires_grad))
        else:
            self.holder._buffers[self.leaf] = kept


def router_tensors(
    router: nn.Module, block: nn.Module, num_experts: int, rule: RouterRule, where: str
) -> tuple[RouterTensor, ...]:
    """Everything a router has per expert, the selection biases that its block keeps for it among it.

    Raises UnsupportedModel for a tensor that fits neither the rule nor what `rule` says of it.
    """
    found = []
    for path, holder in router.named_modules():
        for leaf, tensor in _saved_tensors(holder):
            name = f"{path}.{leaf}".lstrip(".")
            if name in rule.shared:
                continue
            axis = rule.expert_axis.get(name, 0)
            size = tensor.shape[axis] if tensor.ndim > axis else 0
            if size != num_experts and not (name in rule.rows_after and size > num_experts):
                place = ("first", "second", "third")[axis]
                raise UnsupportedModel(
                    f"{where}: its tensor {name} has shape {list(tensor.shape)}; expected the {num_experts} experts on its "
                    f"{place} axis. Locum does not know how to prune this router; it needs a row in locum.families.FAMILIES"
                )
            found.append(RouterTensor(holder, leaf, tensor, axis))
    found += [RouterTensor(block, leaf, tensor, 0) for leaf, tensor in _biases_of_block(block, num_experts)]
    return tuple(found)


def _biases_of_block(block: nn.Module, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    return ((leaf, tensor) for leaf, tensor in _saved_tensors(block) if tensor.shape == (num_experts,))


def _saved_tensors(holder: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own tensors, those of its children left out, that a checkpoint has."""
    own = {**dict(holder.named_parameters(recurse=False)), **dict(holder.named_buffers(recurse=False))}
    saved = holder.state_dict()
    return [(leaf, tensor) for leaf, tensor in own.items() if leaf in saved]


def router_logits(output: Any, rule: RouterRule) -> Any:
    """The logits [T, E] in what a router puts out.

    They come first, except where what comes first is the index (Granite before transformers 5.23): there, last.
    """
    if isinstance(output, tuple | list):
        first = output[0]
        output = first if isinstance(first, Tensor) and first.is_floating_point() else output[-1]
    if rule.probabilities and isinstance(output, Tensor):
        return output.log()  # softmax of them gives the probabilities back
    return output


@dataclass(frozen=True)
class RouterKind:
    """What trying a router on random input tells of it, for people to read: decisions never rest on it."""

    scores: str = "unknown"  # softmax, sigmoid, ...
    renormalised: bool = False  # whether the selected gates add up to the same number for every token
    top_k: int = 0


def probe_router(
    router: nn.Module, block: nn.Module, hidden_size: int, num_experts: int, rule: RouterRule
) -> RouterKind:
    """Try a copy of a router, filled at random, on random tokens. One that is too large to be any is not tried."""
    if num_experts + sum(tensor.numel() for tensor in router.state_dict().values()) > MOST_PROBED:
        return RouterKind()
    biases = [torch.zeros(num_experts) for _ in _biases_of_block(block, num_experts)]
    twin = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    def fill(name: str, tensor: Tensor) -> None:
        scale = any(part in name for part in ("scale", "norm"))
        tensor.copy_(
            normal(*tensor.shape) * 0.3
            if tensor.ndim > 1 and min(tensor.shape) > 1
            else torch.full(tensor.shape, float(scale))
        )

    with torch.no_grad(), torch.device("cpu"):  # from_pretrained builds models inside a meta device context
        for name, tensor in twin.state_dict().items():
            fill(name, tensor)
        for shape in ((16, hidden_size), (1, 16, hidden_size)):
            try:
                output = twin(normal(*shape), *biases)
                logits_TE = router_logits(output, rule).float()
                index_TK = next(part for part in output if not part.is_floating_point())
                gate_TK = next(part for part in output if part.shape == index_TK.shape and part.is_floating_point())
                return _kind(logits_TE, gate_TK.float(), index_TK)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, StopIteration):
                continue
    return RouterKind()


def _kind(logits_TE: Tensor, gate_TK: Tensor, index_TK: Tensor) -> RouterKind:
    top_k = gate_TK.shape[1]
    sums_T = gate_TK.sum(dim=-1)
    renormalised = bool((sums_T / sums_T[0] - 1).abs().max() < 1e-3) and top_k > 1
    for kind, scores_TE in (("softmax", logits_TE.softmax(-1)), ("sigmoid", logits_TE.sigmoid())):
        ratio_TK = gate_TK / scores_TE.gather(1, index_TK)
        if bool((ratio_TK / ratio_TK[:, :1] - 1).abs().max() < 1e-3):
            return RouterKind(kind, renormalised, top_k)
    return RouterKind("other", renormalised, top_k)
