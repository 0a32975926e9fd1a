"""What stand-ins do to a layer's output, and what errors in a layer's output do to the model.

Letters: B blocks, S tokens of a block, T tokens, P pairs (token, expert) sorted by expert, Q pairs of some experts, E experts, L layers,
D model width, M tokens that have loss, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.application import make_container
from ..containers.container import StandInExperts
from ..data.tokens import Batch
from ..models.families import MoeLayer, canonical_activation, read_expert
from ..plans.layer_plan import LayerPlan
from ..stats.events import RoutedEvent
from ..stats.sums import Statistics

ROOM = 2**24  # numbers of inputs that go through a stand-in at a time


def stand_in(layer: MoeLayer, plan: LayerPlan, statistics: Statistics | None, seed: int) -> StandInExperts:
    """The container of a layer as a plan that drops no expert has it: number formats, biases and norms are what they will be."""
    container = make_container(
        plan,
        layer.shape,
        lambda e: read_expert(layer.experts, e),
        canonical_activation(layer.experts),
        statistics.layer(plan.layer) if statistics is not None and plan.needs else None,
        seed,
    )
    container.post_expert_norm = getattr(layer.experts, "post_expert_norm", None)
    return container


def stand_in_errors(container: StandInExperts, pairs: RoutedEvent) -> Tensor:
    """[E] float64: of each expert sum g^2 |f(x) - f'(x)|^2 over its pairs, f' what the container computes."""
    error_P = torch.empty(len(pairs.expert_P), dtype=torch.float64, device=pairs.in_PD.device)
    for some in torch.arange(len(error_P)).split(max(1, ROOM // pairs.in_PD.shape[1])):
        q = slice(int(some[0]), int(some[-1]) + 1)
        one_Q1 = torch.ones_like(pairs.gate_P[q, None])
        made_QD = container(pairs.in_PD[q], pairs.expert_P[q, None], one_Q1)
        error_P[q] = (made_QD.double() - pairs.out_PD[q].double()).square().sum(dim=1)
    return pairs.sum_pairs(pairs.gate_P.double().square() * error_P).cpu()


def stand_in_loss(
    model: PreTrainedModel, layer: MoeLayer, container: StandInExperts, batches: Sequence[Batch]
) -> Tensor:
    """A float64: KL(model || model with the container in the place of one layer's experts) in nats, the mean over tokens that have
    loss. The model is as it was afterwards."""
    lost, count = 0.0, 0
    for batch in batches:
        whole_MV = _predicted(model, batch)
        model.set_submodule(layer.shape.name, container)
        try:
            changed_MV = _predicted(model, batch)
        finally:
            model.set_submodule(layer.shape.name, layer.experts)
        lost += float((whole_MV.exp() * (whole_MV - changed_MV)).sum(dtype=torch.float64))
        count += len(whole_MV)
    return torch.tensor(max(0.0, lost) / max(1, count), dtype=torch.float64)


def noise_prices(
    model: PreTrainedModel, layers: Sequence[MoeLayer], batches: Sequence[Batch], size: float, seed: int
) -> Tensor:
    """[L] float64: KL(model || model with noise in one layer's output) in nats, the mean over tokens that have loss, for each unit of
    the noise's squares, summed over all text tokens.

    The noise is normal, alike for all numbers of a batch's outputs, with `size` times their root mean square.
    """
    lost_L, square_L = (torch.zeros(len(layers), dtype=torch.float64) for _ in range(2))
    count = 0
    for b, batch in enumerate(batches):
        whole_MV = _predicted(model, batch)
        count += len(whole_MV)
        for index, layer in enumerate(layers):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 1_000_003 + b)
            with _noise(layer.experts, size, generator, batch.attention_BS) as squares:
                noisy_MV = _predicted(model, batch)
            lost_L[index] += float((whole_MV.exp() * (whole_MV - noisy_MV)).sum(dtype=torch.float64))
            square_L[index] += sum(squares)
    mean_L = lost_L.clamp(min=0) / max(1, count)
    return torch.where(square_L > 0, mean_L / torch.where(square_L > 0, square_L, 1.0), 0.0)


def _predicted(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[M, V] float32 logarithms of what the model says of the tokens that have loss."""
    ids_BS, attention_BS = batch.ids_BS.to(model.device), batch.attention_BS.to(model.device)
    logits_BSV = model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False).logits
    return logits_BSV[:, :-1][batch.loss_mask_BS[:, 1:].to(model.device)].float().log_softmax(dim=-1)


@contextmanager
def _noise(experts: nn.Module, size: float, generator: torch.Generator, attention_BS: Tensor) -> Iterator[list[float]]:
    """Noise in what the experts give, while it is entered; the sum of its squares over text tokens."""
    squares: list[float] = []

    def add(_experts: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        scale = size * float(output.double().square().mean().sqrt())
        noise = (torch.randn(output.shape, generator=generator) * scale).to(output)
        is_text_T = (attention_BS != 0).flatten().to(output.device)
        squares.append(float(noise.reshape(len(is_text_T), -1)[is_text_T].double().square().sum()))
        return output + noise

    hook = experts.register_forward_hook(add)
    try:
        yield squares
    finally:
        hook.remove()
