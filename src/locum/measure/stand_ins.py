"""What stand-ins do to a layer's output, and what errors in a layer's output do to the model.

Letters: C candidates, B blocks, S tokens of a block, T tokens, P pairs (token, expert) sorted by expert, Q pairs of some experts, E experts,
L layers, D model width, Y sums per block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.application import make_containers
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..data.tokens import Batch
from ..models.families import MoeLayer, canonical_activation, read_expert
from ..models.layer_major import HELD, held_bytes, is_streamed
from ..models.masking import MaskedRouters
from ..models.output_head import check_predicts
from ..plans.layer_plan import NOTHING, LayerPlan
from ..shapes import LayerShape
from ..stats.events import RoutedEvent
from ..stats.sums import Statistics
from .changes import Change, ChangingModel
from .loss import SUMS, Output, batch_sums, body_output

ROOM = 2**24  # numbers of inputs that go through a stand-in at a time
BUILT = 2**30  # bytes of containers that are built together
# Bytes of experts that are taken apart side by side: of a streamed model, and of one that is in memory.
BESIDE_STREAMED, BESIDE_HELD = 2**30, 2**33


class StandIns:
    """Trying stand-ins and noise on a live model, whole or streamed. Its divergence is KL(model || changed model), the mean over the sample's
    predicted tokens, in nats.

    Plans of one layer are built together, as many as take BUILT bytes, or one: what they share is made once. Where a streamed model is
    asked, that is when its layer is there, once for errors and divergence. Cost: a pass over the sample for each thing that is
    tried, of a whole model from the first changed layer on.
    """

    def __init__(self, live: ChangingModel, batches: Sequence[Batch], statistics: Statistics | None, seed: int) -> None:
        self.live, self.batches, self.statistics, self.seed = live, batches, statistics, seed
        self._tokens = max(batch.ids_BS.numel() for batch in batches)
        self._made: dict[LayerPlan, StandInExperts] = {}
        self._keeps_made = False
        self._original: list[Output] | None = None  # what its body gives

    @property
    def together(self) -> int:
        """How many plans are best tried at once: all, or as many as have room where the model is streamed."""
        model = self.live.model
        return (
            max(1, HELD // held_bytes(model, self._tokens) // len(self.batches)) if is_streamed(model) else sys.maxsize
        )

    def stand_ins(self, plans: Sequence[LayerPlan], pairs: RoutedEvent, with_losses: bool) -> tuple[Tensor, Tensor]:
        """For plans of one layer, whose pairs of the sample these are: [C, E] of each expert sum g^2 |f(x) - f'(x)|^2, f' what the plan
        makes of it; and [C] the divergence where the layer is that, infinite where that is not asked for."""
        error_CE = torch.full((len(plans), len(plans[0].slots)), torch.nan, dtype=torch.float64)

        def tried(c: int, layer: MoeLayer) -> AbstractContextManager[None]:
            container = self._stand_in(layer, plans[c], plans[c + 1 :])
            if error_CE[c].isnan().all():
                error_CE[c] = stand_in_errors(container, pairs)
            return standing_in(self.live.model, layer, plans[c], container)

        try:
            if with_losses:
                return error_CE, self._divergences([{plan.layer: partial(tried, c)} for c, plan in enumerate(plans)])
            with self.live.quiet():
                for c, plan in enumerate(plans):
                    tried(c, self.live.layers[plan.layer])
            return error_CE, torch.full((len(plans),), torch.inf, dtype=torch.float64)
        finally:
            if is_streamed(self.live.model):
                self._made = {}

    def divergences(self, variants: Sequence[Mapping[str, LayerPlan]]) -> Tensor:
        """[C] the divergence where these layers are what their plans make of them."""

        def becoming(plan: LayerPlan, layer: MoeLayer) -> AbstractContextManager[None]:
            return standing_in(self.live.model, layer, plan, self._stand_in(layer, plan))

        self._keeps_made = not is_streamed(self.live.model)
        try:
            return self._divergences([{name: partial(becoming, x) for name, x in each.items()} for each in variants])
        finally:
            self._keeps_made, self._made = False, {}

    def noise_price(self, size: float) -> Tensor:
        """[L] the divergence where there is noise in a layer's output, divided by the sum of the noise's squares over all text tokens.
        The noise is normal, alike for all numbers of a batch's outputs, with `size` times their root mean square."""
        squares: list[list[float]] = [[] for _ in self.live.layers]

        def noisy(index: int, layer: MoeLayer) -> AbstractContextManager[None]:
            b = len(squares[index])  # batches come in their order
            seed = (self.seed * 1_000_003 + index) * 1_000_003 + b
            return noise(layer.experts, size, seed, self.batches[b].attention_BS, squares[index])

        lost_L = self._divergences([{name: partial(noisy, i)} for i, name in enumerate(self.live.layers)])
        square_L = torch.tensor([sum(each) for each in squares], dtype=torch.float64)
        return torch.where(square_L > 0, lost_L / torch.where(square_L > 0, square_L, 1.0), 0.0)

    def _stand_in(self, layer: MoeLayer, plan: LayerPlan, after: Sequence[LayerPlan] = ()) -> StandInExperts:
        """What was built last is kept, as it is asked for again at once; where the whole model is there and several are tried, all of it.
        `after` are plans of the same layer that are asked for next."""
        if plan not in self._made:
            if not self._keeps_made:
                self._made = {}
            sizes = [Layout.of(each, layer.shape).nbytes(self.live.model.dtype.itemsize) for each in (plan, *after)]
            count = max(1, sum(total <= BUILT for total in accumulate(sizes)))
            some = (plan, *after)[:count]
            made = stand_ins(layer, some, self.statistics, self.seed, self._workers(layer.shape))
            self._made |= zip(some, made, strict=True)
        return self._made[plan]

    def _workers(self, layer: LayerShape) -> int:
        """Threads that build an expert each. One takes its Gram matrices and weights in float64, some of them several times."""
        d, f = layer.hidden_size, layer.expert_width
        beside = BESIDE_STREAMED if is_streamed(self.live.model) else BESIDE_HELD
        room = beside // (8 * (4 * d * d + 3 * f * f + 8 * d * f))
        return max(1, min(torch.get_num_threads(), layer.num_experts, room))

    def _divergences(self, changes: Sequence[Mapping[str, Change]]) -> Tensor:
        model = self.live.model
        check_predicts(model, "it has no loss to increase")
        with self.live.quiet():
            if self._original is None:
                runs = [partial(body_output, model, batch) for batch in self.batches]
                (made,) = self.live.results([{}], runs, self._tokens)
                self._original = [(x, type(output)(last_hidden_state=output.last_hidden_state)) for x, output in made]
            runs = [partial(divergence, model, *pair) for pair in zip(self._original, self.batches, strict=True)]
            found = self.live.results(changes, runs, self._tokens)
        sum_CBY = torch.tensor(found, dtype=torch.float64).view(len(changes), len(runs), 2)
        return sum_CBY[..., 0].sum(1) / sum_CBY[..., 1].sum(1).clamp(min=1)


def stand_ins(
    layer: MoeLayer, plans: Sequence[LayerPlan], statistics: Statistics | None, seed: int, workers: int = 1
) -> Iterator[StandInExperts]:
    """The containers of a layer as plans have it: number formats, biases and norms are what they will be. Dropped experts keep their
    places, with nothing in them. They are built in the host's memory, as a checkpoint's are, whatever device the model is on: steps are
    many and small."""
    all_there = [replace(x, slots=tuple(slot if slot.survives else NOTHING for slot in x.slots)) for x in plans]
    containers = make_containers(
        all_there,
        layer.shape,
        lambda e: read_expert(layer.experts, e).map(lambda _, tensor: tensor.cpu()),
        canonical_activation(layer.experts),
        statistics.layer(layer.shape.name) if statistics is not None and any(x.needs for x in plans) else None,
        seed,
        workers,
    )
    device = next(layer.experts.parameters()).device
    for container in containers:
        container.to(device).post_expert_norm = getattr(layer.experts, "post_expert_norm", None)
        yield container


def stand_in_errors(container: StandInExperts, pairs: RoutedEvent) -> Tensor:
    """[E] float64: of each expert sum g^2 |f(x) - f'(x)|^2 over its pairs, f' what the container computes."""
    error_P = torch.empty(len(pairs.expert_P), dtype=torch.float64, device=pairs.in_PD.device)
    for some in torch.arange(len(error_P)).split(max(1, ROOM // pairs.in_PD.shape[1])):
        q = slice(int(some[0]), int(some[-1]) + 1)
        one_Q1 = torch.ones_like(pairs.gate_P[q, None])
        made_QD = container(pairs.in_PD[q], pairs.expert_P[q, None], one_Q1)
        error_P[q] = (made_QD.double() - pairs.out_PD[q].double()).square().sum(dim=1)
    return pairs.sum_pairs(pairs.gate_P.double().square() * error_P).cpu()


@contextmanager
def standing_in(model: PreTrainedModel, layer: MoeLayer, plan: LayerPlan, container: StandInExperts) -> Iterator[None]:
    """While it is entered, a layer is what its plan makes of it: the container is there, and what is dropped is not chosen."""
    gone_E = torch.tensor([not slot.survives for slot in plan.slots])
    model.set_submodule(layer.shape.name, container)
    try:
        with MaskedRouters([(layer, gone_E)]):
            yield
    finally:
        model.set_submodule(layer.shape.name, layer.experts)


def divergence(model: PreTrainedModel, original: Output, batch: Batch) -> tuple[float, float]:
    """The sum over a batch's predicted tokens of KL(original || model), in nats, and their number. `original` is what the original's body
    gives."""
    with torch.no_grad():  # a streamed model runs in threads of its own
        sums_BY = batch_sums(*body_output(model, batch), *original, batch)
    return float(sums_BY[:, SUMS.index("kl")].sum()), float(sums_BY[:, SUMS.index("tokens")].sum())


@contextmanager
def noise(experts: nn.Module, size: float, seed: int, attention_BS: Tensor, squares: list[float]) -> Iterator[None]:
    """While it is entered, there is noise in what the experts give; the sum of its squares over text tokens goes to `squares`."""
    generator = torch.Generator().manual_seed(seed)

    def add(_experts: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        scale = size * float(output.double().square().mean().sqrt())
        added = (torch.randn(output.shape, generator=generator) * scale).to(output)
        is_text_T = (attention_BS != 0).flatten().to(output.device)
        squares.append(float(added.reshape(len(is_text_T), -1)[is_text_T].double().square().sum()))
        return output + added

    hook = experts.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
