"""Trying removals of experts on a live model: cheaply for one layer, exactly for any family.

    output_error    one layer's output, from cached products of its experts' outputs; no expert runs per candidate
    loss_increase   the whole model's loss on the sample, without experts of one layer
    loss_without    the same without experts of many layers at once
    loss_merged     the same where experts are also mixtures of each other (`merged_experts.py`)
    block_error     the hidden state after a stretch of decoder layers
    stand_ins       one layer's experts, where something else stands in for them, and the whole model then
    divergences     the whole model, where something else stands in for the experts of many layers
    noise_price     the whole model, where there is noise in one layer's output
    prune           for good, in place

All of it is on one sample of the tokens given. For a layer, every expert runs once on every token of the sample; what is
kept is G_t = O_t O_t^T, the products of a token's expert outputs with each other. A candidate changes a token's gates by
d_t, and so the layer's output by O_t^T d_t, whose square is d_t^T G_t d_t. The gates without the removed experts are
always the model's own: by the rule of its router where a simple one was found and agrees with the real router on the
sample and on removals of it (`gate_rules.py`), else by that router itself (`masking.py`).

Of a streamed model, the decoder layers that are asked for are read and no others are there; what was pruned is taken off each time.
For the loss all layers are read one after the other, once for as many candidates as have room for their hidden states (HELD). What
stands in is built when its layer is there, once for its errors and its loss.

Memory: 8 T E^2 bytes for a cached layer (64 MiB for 64 experts and 2,048 tokens, 1 GiB for 256), as many layers as go
into `CACHE_BYTES` but one at least; and the hidden state before every decoder layer (`replay.py`).

Letters: C candidates, T tokens of the sample, E experts, K top-k, M experts at the head of a token's order, D model
width, B blocks, S tokens of a block, P pairs (token, expert).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.tokens import Batch, Tokens, cut, permutation, take
from ..errors import OptionError, UnsupportedModel, unknown
from ..models.families import MoeLayer, slice_experts, slice_router
from ..models.layer_major import is_streamed
from ..models.masking import MaskedRouters
from ..models.next_token_loss import loss_sum
from ..models.output_head import check_predicts
from ..models.replay import Call, Recording
from ..models.router_rules import GateRule, find_rule, same_gates, spread_gates
from ..models.sizes import shape_of
from ..models.watch import observable_layers, run_experts
from ..plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from ..shapes import ModelShape
from ..stats.events import RoutedEvent
from ..stats.sums import Statistics
from .changes import ChangingModel
from .every_output import gram_of_outputs
from .layer_watch import LayerWatch, UpToExperts
from .merged_experts import merged_experts
from .stand_ins import StandIns

SAMPLE = 2048  # tokens
PIECE = 128  # tokens at most that the sample takes of one block: many short pieces say more than a few long ones
TRIALS = 4  # removals on which a rule is compared with the real router
CHUNK = 2**24  # numbers in a temporary
CACHE_BYTES = 2**31
REPLAY_TOLERANCE = 1e-3  # relative; what a rerun of recorded layers may be off by before it is refused


def draw_sample(tokens: Tokens, sample: int, seed: int) -> Batch:
    """The heads of some blocks, equally many of every domain as far as they go, by seed."""
    width = min(tokens.length, PIECE, sample)
    order_B = permutation(len(tokens), seed, "sample")
    order_B = order_B[(tokens.attention_BS[order_B, :width] != 0).any(dim=1)]
    ranks_B = torch.empty_like(order_B)  # how many blocks of its own domain come before one
    for domain in range(len(tokens.domains)):
        of_it_B = tokens.domain_B[order_B] == domain
        ranks_B[of_it_B] = torch.arange(int(of_it_B.sum()))
    chosen_B = order_B[torch.argsort(ranks_B, stable=True)][: max(1, sample // width)]
    return cut(take(tokens, chosen_B), width)


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Gram matrices of expert outputs on one layer's sample, so that no expert runs for a candidate.

    Where a rule of the router was found, experts are in each token's order of preference.
    """

    calls: tuple[Call, ...]  # of the block that holds the layer, one for every batch
    gram_TEE: Tensor  # float64
    gate_TE: Tensor  # float64, with nothing removed
    rule: GateRule | None

    def errors(self, gate_CTM: Tensor) -> Tensor:
        """[C] norms over all tokens of what these gates change in the layer's output."""
        ahead = gate_CTM.shape[2]
        change_TCM = (gate_CTM - self.gate_TE[:, :ahead]).transpose(0, 1)
        square_TCM = change_TCM.bmm(self.gram_TEE[:, :ahead, :ahead]).mul_(change_TCM)
        return square_TCM.sum(dim=(0, 2)).clamp(min=0).sqrt()


class ModelExplorer:
    """A live stock model on which removals can be tried; between questions it is as it was, but for `prune`.

    `tokens` are drawn from by `seed`: `sample` of them, `batch_size` pieces at a time. `statistics` are what stand-ins are
    built from. Masks [E] are True for removed
    experts, in the numbering of the original model (`shape`). Answers are float64 on the CPU.

    Raises UnsupportedModel for a model that cannot be observed or whose experts cannot be dropped, and OptionError for a
    mask that does not fit or leaves a router too few experts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        *,
        sample: int = SAMPLE,
        batch_size: int = 8,
        seed: int = 0,
        statistics: Statistics | None = None,
    ) -> None:
        for name, value in (("sample", sample), ("batch_size", batch_size)):
            if value < 1:
                raise OptionError(f"{name} is {value!r}; allowed: whole numbers from 1")
        self.model = model
        self.shape: ModelShape = shape_of(model)
        self.seed, self.statistics = seed, statistics
        drawn = draw_sample(tokens, sample, seed)
        parts = torch.arange(len(drawn.ids_BS)).split(batch_size)
        self.batches = tuple(take(drawn, index_B) for index_B in parts)
        self._find()
        for layer in self.layers.values():
            if layer.shape.refuse_dropping:
                raise UnsupportedModel(f"no expert of {layer.shape.name} can be dropped: {layer.shape.refuse_dropping}")
        self.alive = {name: torch.arange(layer.shape.num_experts) for name, layer in self.layers.items()}

    def _find(self) -> None:
        """Look at the model afresh; what was recorded and cached before is let go."""
        self._live = ChangingModel(self.model)
        self._trials = StandIns(self._live, self.batches, self.statistics, self.seed)
        self._recording: Recording | None = None
        self._caches: dict[str, LayerCache] = {}
        self._pairs: tuple[str, RoutedEvent, Tensor] | None = None
        self._loss: float | None = None
        self._whole: tuple[tuple[int, int], list[Tensor]] | None = None

    @property
    def layers(self) -> dict[str, MoeLayer]:
        return self._live.layers

    def _hold(self, names: Sequence[str]) -> None:
        """Of a streamed model, bring the decoder layers from the first to the last that hold these; no others are there then."""
        if not is_streamed(self.model) or not names:
            return
        for name in names:
            self._check_known(name)
        with self._live.quiet():
            stretch = self._record().stretch(names)
        if self._live.resident.hold(*stretch):
            self._live.see()  # their tensors are new

    def _check_known(self, layer: str) -> None:
        if layer not in self.layers:
            raise OptionError(unknown("layer", layer, self.layers))

    # --- questions ----------------------------------------------------------------------------------------------

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        """[C] ||F(X) - F_without(X)||_F of a layer's routed output over the sample, rerouted without the removed."""
        self._hold([layer])
        removed_CE = self._checked(layer, removed_CE)
        with self._live.quiet():
            cache = self._cache(layer)
            if cache.rule is None:
                errors = [cache.errors(self._real_gates(layer, cache, one_E)[None]) for one_E in removed_CE]
                return torch.cat(errors).cpu() if errors else torch.zeros(0, dtype=torch.float64)
            ahead = cache.rule.top_k + int(removed_CE.sum(dim=1).max()) if len(removed_CE) else 0
            ahead = min(ahead, cache.gate_TE.shape[1])
            parts = removed_CE.to(cache.gate_TE.device).split(max(1, CHUNK // (len(cache.gate_TE) * max(1, ahead))))
            return torch.cat([cache.errors(cache.rule.gates(part_CE, ahead)) for part_CE in parts]).cpu()

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        """[C] mean next-token loss of the whole model on the sample without them, minus with all, in nats per token."""
        removed_CE = self._checked(layer, removed_CE)
        return self._losses([{layer: removed_E} for removed_E in removed_CE])

    def loss_without(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] the same where a candidate maps any layers of the model to their removed experts [E]."""
        checked = [{n: self._checked(n, mask[None])[0] for n, mask in candidate.items()} for candidate in candidates]
        return self._losses(checked)

    def loss_merged(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] the same where a candidate maps any layers of the model to weights [E, E]: expert e becomes sum_i weight[e, i] W_i,
        and goes where its row is zero."""
        if is_streamed(self.model):
            raise UnsupportedModel("mixtures of experts are tried on the whole model alone: give --no-stream")
        self._losses([])  # the whole model's own loss, before anything is mixed
        return torch.cat([torch.zeros(0, dtype=torch.float64), *map(self._loss_of_mixtures, candidates)])

    def _loss_of_mixtures(self, weights: Mapping[str, Tensor]) -> Tensor:
        with contextlib.ExitStack() as stack:
            for name, weight_EE in weights.items():
                alive = self.alive[name]
                stack.enter_context(merged_experts(self.layers[name], weight_EE[alive][:, alive]))
            return self.loss_without([{name: ~weight_EE.any(dim=1) for name, weight_EE in weights.items()}])

    def _losses(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        check_predicts(self.model, "it has no loss to increase")
        with self._live.quiet():
            if self._loss is None:
                (self._loss,) = self._mean_losses([{}])
            losses = [loss - self._loss for loss in self._mean_losses(candidates)]
        return torch.tensor(losses, dtype=torch.float64)

    @property
    def together(self) -> int:
        """How many plans `stand_ins` best tries at once: as many as have room where the model is streamed, else one."""
        return self._trials.together

    def stand_ins(self, plans: Sequence[LayerPlan], with_losses: bool) -> tuple[Tensor, Tensor]:
        """For plans of one layer [C, E] and [C]: the errors and, if asked for, the divergence that each makes (stand_ins.py)."""
        return self._trials.stand_ins(plans, self._routed(plans[0].layer)[0], with_losses)

    def divergences(self, variants: Sequence[Mapping[str, LayerPlan]]) -> Tensor:
        """[C] KL(model || model in which these layers are what their plans make of them), nats per token of the sample."""
        return self._trials.divergences(variants)

    def output_square(self, layer: str) -> Tensor:
        """The sum over the sample of |y|^2, y the routed output of a layer."""
        return self._routed(layer)[1].double().square().sum().cpu()

    def noise_price(self, size: float) -> Tensor:
        """[L] what noise of this share of a layer's output costs the whole model (stand_ins.py)."""
        return self._trials.noise_price(size)

    def block_error(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] ||hidden state after the block's last decoder layer, original minus pruned||_F, from the original input.

        A candidate maps the layers of one block to their removed experts [E]. Attention, norms, residuals and whatever
        else the decoder layers between the first and the last of them do is included.
        """
        names = sorted({name for candidate in candidates for name in candidate})
        self._hold(names)
        masks = [{n: self._checked(n, mask[None])[0] for n, mask in candidate.items()} for candidate in candidates]
        errors = []
        with self._live.quiet():
            if not masks:
                return torch.zeros(0, dtype=torch.float64)
            first, last = self._record().stretch(names)
            whole = self._outputs_of(first, last)
            for mask in masks:
                with self._without(mask):
                    square = sum(
                        (self._hidden(first, last, b) - original).double().square().sum()
                        for b, original in enumerate(whole)
                    )
                errors.append(square.sqrt().cpu())
        return torch.stack(errors)

    def prune(self, removed: Mapping[str, Tensor]) -> None:
        """Remove these experts for good, in place; from now on they count as removed on both sides of a comparison.

        Raises PlanError where the model could not be made without them (see `Plan.validate`).
        """
        gone = {x.name: set(range(x.num_experts)) - set(self.alive[x.name].tolist()) for x in self.shape.layers}
        for name, removed_E in removed.items():
            self._checked(name, removed_E[None])
            gone[name] |= set(removed_E.nonzero().squeeze(1).tolist())
        slots = {
            x.name: tuple(DROPPED if e in gone[x.name] else KEPT for e in range(x.num_experts))
            for x in self.shape.layers
        }
        make_plan(self.shape, [LayerPlan(name, slots[name]) for name in slots])
        self._live.resident.let_go()
        for name in self.layers:
            keep = tuple(i for i, e in enumerate(self.alive[name].tolist()) if e not in gone[name])
            if len(keep) < len(self.alive[name]):
                self.alive[name] = self.alive[name][list(keep)]
                self._cut(name, keep)
        self._find()

    def _cut(self, name: str, keep: tuple[int, ...]) -> None:
        """Leave a layer these of the experts that it has; a streamed one whenever it is read, of all that its files have."""
        if not is_streamed(self.model):
            slice_experts(self.layers[name].experts, keep)
            slice_router(self.layers[name], keep)
            return
        alive = tuple(self.alive[name].tolist())

        def change() -> None:
            layer = next(layer for layer in observable_layers(self.model) if layer.shape.name == name)
            slice_experts(layer.experts, alive)
            slice_router(layer, alive)

        self._live.resident.change(self._record().position[name], change)

    # --- what they need -----------------------------------------------------------------------------------------

    def _checked(self, layer: str, removed_CE: Tensor) -> Tensor:
        """Masks over the experts that are still there."""
        self._check_known(layer)
        shape, total = self.layers[layer].shape, self.shape.layer(layer).num_experts
        if removed_CE.ndim != 2 or removed_CE.shape[1] != total or removed_CE.dtype != torch.bool:
            raise OptionError(
                f"masks for {layer} are {removed_CE.dtype} of shape {list(removed_CE.shape)}; expected true or false for "
                f"each of its {total} experts"
            )
        removed_CE = removed_CE.cpu()[:, self.alive[layer]]
        left_CG = (
            (~removed_CE).view(len(removed_CE), shape.num_groups, len(self.alive[layer]) // shape.num_groups).sum(dim=2)
        )
        if len(removed_CE) and (
            int(left_CG.sum(dim=1).min()) < shape.top_k or int(left_CG.min()) < shape.min_per_group
        ):
            raise OptionError(
                f"a mask for {layer} leaves {int(left_CG.sum(dim=1).min())} experts, in groups of {left_CG.min()} at "
                f"least; its router needs {shape.top_k} (top-k), and {shape.min_per_group} in every one of "
                f"{shape.num_groups} groups"
            )
        return removed_CE

    def _record(self) -> Recording:
        if self._recording is None:
            self._live.resident.let_go()
            self._recording = Recording(self.model, list(self.layers), self.batches)
        return self._recording

    def _cache(self, name: str) -> LayerCache:
        if name not in self._caches:
            size = 8 * int(self._keep().sum()) * self.layers[name].shape.num_experts ** 2
            # Layers are asked for in order, again and again: the first ones stay, or none would be there in time.
            while self._caches and size + sum(c.gram_TEE.nbytes for c in self._caches.values()) > CACHE_BYTES:
                self._caches.popitem()
            self._caches[name] = self._make_cache(name)
        return self._caches[name]

    def _routed(self, name: str) -> tuple[RoutedEvent, Tensor]:
        """The pairs of a layer's sample with what went in and came out, and the layer's outputs. Those of one layer are kept."""
        self._check_known(name)
        self._hold([name])
        if self._pairs is None or self._pairs[0] != name:
            with self._live.quiet():
                watch, keep_T = self._watched(name)
                routed = (x[keep_T] for x in (watch.x_TD, watch.index_TK, watch.gate_TK))
                y_TD, pairs = run_experts(self.layers[name].experts, *routed, inside=True)
                self._pairs = name, pairs, y_TD
        return self._pairs[1:]

    def _watched(self, name: str) -> tuple[LayerWatch, Tensor]:
        """What a layer gets and gives in the sample, and which tokens of it are text."""
        recording = self._record()
        position = recording.position[name]
        with LayerWatch(self.layers[name]) as watch:
            for b in range(len(self.batches)):
                recording.run(position, position, b)
        return watch, self._keep().to(watch.index_TK.device)

    def _make_cache(self, name: str) -> LayerCache:
        layer = self.layers[name]
        watch, keep_T = self._watched(name)
        index_TK, gate_TK, x_TD, logits_TE = (
            x[keep_T] for x in (watch.index_TK, watch.gate_TK, watch.x_TD, watch.logits_TE)
        )
        gram_TEE = gram_of_outputs(layer.experts, x_TD)
        gate_TE = spread_gates(index_TK, gate_TK, layer.shape.num_experts)
        plain = LayerCache(watch.calls, gram_TEE, gate_TE, None)
        rule = None if layer.shape.num_groups > 1 else find_rule(logits_TE, index_TK, gate_TK, _biases(layer))
        if rule is None or not self._agrees(name, plain, rule):
            return plain
        order_TE = rule.order_TE
        ordered_TEE = gram_TEE.gather(1, order_TE[:, :, None].expand_as(gram_TEE))
        ordered_TEE = ordered_TEE.gather(2, order_TE[:, None, :].expand_as(gram_TEE))
        nothing_1E = torch.zeros(1, layer.shape.num_experts, dtype=torch.bool, device=order_TE.device)
        return LayerCache(watch.calls, ordered_TEE, rule.gates(nothing_1E, order_TE.shape[1])[0], rule)

    def _agrees(self, name: str, cache: LayerCache, rule: GateRule) -> bool:
        """Whether a rule gives what the real router gives when some experts are removed at random."""
        shape = self.layers[name].shape
        generator = torch.Generator().manual_seed(self.seed)
        for trial in range(1, TRIALS + 1):
            count = max(1, (shape.num_experts - shape.top_k) * trial // TRIALS)
            removed_E = torch.zeros(shape.num_experts, dtype=torch.bool)
            removed_E[torch.randperm(shape.num_experts, generator=generator)[:count]] = True
            real_TE = self._real_gates(name, cache, removed_E)
            if not same_gates(rule.spread(removed_E[None].to(real_TE.device))[0], real_TE, rule.dtype):
                return False
        return True

    def _real_gates(self, name: str, cache: LayerCache, removed_E: Tensor) -> Tensor:
        """[T, E] gates of the layer's own router and block without the removed experts."""
        layer = self.layers[name]
        found = []
        with MaskedRouters([(layer, removed_E)]), UpToExperts(layer.experts) as stop:
            for call in cache.calls:
                found.append(stop.run(layer.block, call))
        index_TK, gate_TK = (torch.cat(parts)[self._keep().to(parts[0].device)] for parts in zip(*found, strict=True))
        return spread_gates(index_TK, gate_TK, layer.shape.num_experts)

    def _keep(self) -> Tensor:
        """[T] which tokens of the batches, one after the other, are text and not padding."""
        return torch.cat([batch.attention_BS.flatten() != 0 for batch in self.batches])

    def _mean_losses(self, candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """The model's loss on the sample without what each candidate removes."""
        runs = [functools.partial(_loss_of, self.model, batch) for batch in self.batches]
        removed = [{name: functools.partial(_removing, x) for name, x in each.items()} for each in candidates]
        sums = self._live.results(removed, runs, max(batch.ids_BS.numel() for batch in self.batches))
        return [sum(loss for loss, _ in mine) / max(1, sum(count for _, count in mine)) for mine in sums]

    def _without(self, candidate: Mapping[str, Tensor]) -> MaskedRouters:
        return MaskedRouters([(self.layers[name], removed_E) for name, removed_E in candidate.items()])

    def _hidden(self, first: int, last: int, b: int) -> Tensor:
        hidden = self._record().run(first, last, b)
        return hidden[(self.batches[b].attention_BS != 0).to(hidden.device)]

    def _outputs_of(self, first: int, last: int) -> list[Tensor]:
        """What a stretch gives with nothing removed. Raises UnsupportedModel where that is not what it gave in the pass."""
        if self._whole is None or self._whole[0] != (first, last):
            again = [self._hidden(first, last, b) for b in range(len(self.batches))]
            for b, hidden in enumerate(again):
                then = self._record().recorded(last, b)[(self.batches[b].attention_BS != 0).to(hidden.device)]
                if float((hidden - then).norm()) > REPLAY_TOLERANCE * float(then.norm()):
                    raise UnsupportedModel(
                        f"decoder layers {first} to {last}, run again, do not give what they gave in the model; blocks of "
                        f"layers of {self.shape.model_type} cannot be tried"
                    )
            self._whole = ((first, last), again)
        return self._whole[1]


def _loss_of(model: PreTrainedModel, batch: Batch) -> tuple[float, int]:
    with torch.no_grad():  # a streamed model runs in threads of its own
        summed, count = loss_sum(model, batch, model.device)
    return float(summed), count


def _removing(removed_E: Tensor, layer: MoeLayer) -> MaskedRouters:
    return MaskedRouters([(layer, removed_E)])


def _biases(layer: MoeLayer) -> tuple[Tensor, ...]:
    """What may be added to scores when experts are chosen."""
    parts = (p for p in layer.per_expert if p.leaf != "bias" and "bias" in p.leaf)
    return tuple(p.tensor.detach().flatten() for p in parts)
