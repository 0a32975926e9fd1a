"""One training on several ranks: each holds a part of every weight and its moments, and takes some blocks of every batch.

FSDP2 (torch.distributed.fsdp.fully_shard), with a group for every decoder layer: its weights are whole on a rank for as long as
it computes, and its activations are computed again for the gradient. Gradients are added up over ranks, so that a step is that
of one process on the whole batch.

Letters: B blocks of a batch, S tokens of a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ranks
from ..data.tokens import Batch, take
from ..errors import UnsupportedModel
from ..models.decoder_layers import decoder_stack
from ..models.families import find_layers


def share_of(batch: Batch) -> Batch:
    """This rank's blocks of a batch. Every rank has to run the model: one that has none left runs the first without loss."""
    if ranks.count() == 1:
        return batch
    mine_B = torch.arange(len(batch.ids_BS))[ranks.number() :: ranks.count()]
    if len(mine_B):
        return take(batch, mine_B)
    spare = take(batch, torch.zeros(1, dtype=torch.int64))
    spare.loss_mask_BS.zero_()
    return spare


def shard(model: nn.Module) -> None:
    """Leave on every rank a part of each parameter, along its first axis. Nothing happens on one rank alone."""
    if ranks.count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.count(),))
    layers = _decoder_layers(model)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        module.set_gradient_divide_factor(1.0)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Those of the one stack that holds the MoE layers; none where several do, and the model is one group."""
    try:
        _, stack = decoder_stack(model, (layer.shape.name for layer in find_layers(model)))
    except UnsupportedModel:
        return []
    return list(stack)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the first rank, which has it in the host's memory; nothing of it on the others. All must ask."""
    tensor = tensor.detach()
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if ranks.is_first() else full.new_empty(0)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every rank has, in the parts and on the devices of another."""
    if ranks.count() == 1:
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def gather(model: nn.Module) -> None:
    """Give the first rank whole parameters again, in the host's memory, and the others none. The model can then be saved; it is
    not to be run."""
    if ranks.count() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    made: dict[Tensor, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[parameter])
    for module in sharded:
        module.__class__ = type(module).__mro__[2]  # after FSDP's own class of it, and FSDPModule
        module.__dict__.pop("forward", None)
