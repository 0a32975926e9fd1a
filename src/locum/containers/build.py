"""One layer built from its plan: the tensors of a container, from the original experts and the statistics.

Nothing here knows where weights come from or where they go. A layer's experts arrive through a function
`read(expert) -> ExpertWeights`; what leaves is a dictionary of tensors in the container's layout. What a part makes of
them, its kind says (experts/parts/).

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, PlanError, StatisticsError
from ..experts.fitting import Activation, fit_down
from ..experts.parts.own_weights import OwnWeights, rows_of, weights_of
from ..experts.parts.part import Part
from ..experts.parts.shared_base import SharedBase
from ..experts.quantisers import QUANTISERS, Gram, layer_means, seen_by, writer
from ..experts.weights import ExpertWeights, alignment, mean_expert, permute_hidden
from ..plans.layer_plan import MERGES
from ..plans.plan import LayerPlan
from ..shapes import LayerShape
from ..stats.sums import LayerStatistics
from .layout import Layout
from .stack import as_numbers

Read = Callable[[int], ExpertWeights]


def check_statistics(plan: LayerPlan, layer: Mapping[str, Tensor] | None) -> None:
    """Raise PlanError unless the statistics that building a layer reads are there."""
    if missing := [name for name in plan.needs if name not in (layer or {})]:
        made = [*(part.words() for part in plan.parts if part.reads())]
        made += [f"bases by {base.merge}" for base in plan.bases if MERGES[base.merge]]
        has = " and ".join(dict.fromkeys(made))
        raise PlanError(
            f"{plan.layer}: the plan has parts made from statistics ({has}), so the statistics it was made from are needed "
            f"too (missing: {', '.join(missing)})"
        )


class Shared:
    """What plans of one layer are built from alike, made once. Of an expert a thread has one thing by each name, until its next expert:
    its factored Gram matrices are as large as all of its weights in float64, several times."""

    def __init__(self) -> None:
        self._of_expert, self._of_layer = threading.local(), {}
        self._one_by_one = threading.RLock()

    def of_layer(self, name: Hashable, make: Callable[[], Any]) -> Any:
        with self._one_by_one:
            if name not in self._of_layer:
                self._of_layer[name] = make()
            return self._of_layer[name]

    def of_expert(self, e: int, name: Hashable, which: Hashable, make: Callable[[], Any]) -> Any:
        """The thing of this name, if it is still the one that is asked for."""
        mine = self._of_expert
        if getattr(mine, "e", -1) != e:
            mine.e, mine.found = e, {}
        found: dict[Hashable, tuple[Hashable, Any]] = mine.found
        if name not in found or found[name][0] != which:
            found.pop(name, None)  # first, as both may be large
            made = make()  # which may ask for another expert, and so end the things of this one
            found[name] = which, made
        return found[name][1]


class BuildSite:
    """One layer, as parts are built from it (experts/parts/part.py: Site). Several plans of it may share what they are built from."""

    def __init__(
        self,
        plan: LayerPlan,
        read: Read,
        statistics: LayerStatistics | None,
        seed: int,
        activate: Activation | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.plan, self._read, self.statistics, self._activate = plan, read, statistics, activate
        self.generator = torch.Generator().manual_seed(seed)
        own_order = any(base.align for base in plan.bases)  # of hidden units: other plans have another
        self._shared = Shared() if shared is None or own_order else shared
        self._once: dict[Hashable, Any] = {}

    def read(self, e: int) -> ExpertWeights:
        """An expert as it is. Raises CheckpointError for numbers that nothing can be made of."""
        expert = self._read(e)
        if not all(bool(tensor.isfinite().all()) for tensor in vars(expert).values() if tensor is not None):
            raise CheckpointError(
                f"weights of expert {e} of {self.plan.layer} are not finite numbers; fetch the checkpoint again"
            )
        return expert

    @functools.cached_property
    def orders(self) -> list[dict[int, Tensor]]:
        """For each base that aligns, the order of each member's hidden units: the heaviest one's. Else nothing."""
        orders = []
        for base in self.plan.bases:
            heaviest = base.experts[max(range(len(base.experts)), key=lambda i: base.weights[i])]
            reference = self.read(heaviest) if base.align else None
            orders.append({e: alignment(self.read(e), reference) for e in base.experts} if base.align else {})
        return orders

    def _order(self, e: int) -> Tensor | None:
        index = self.plan.slots[e].base
        return None if index is None else self.orders[index].get(e)

    def original(self, e: int) -> ExpertWeights:
        def made() -> ExpertWeights:
            order_F = self._order(e)
            return self.read(e) if order_F is None else permute_hidden(self.read(e), order_F)

        return self._shared.of_expert(e, "original", None, made)

    def base(self, index: int) -> ExpertWeights:
        base = self.plan.bases[index]

        def made() -> ExpertWeights:
            order = self.orders[index]

            def members() -> Iterator[ExpertWeights]:
                return (permute_hidden(self.read(e), order[e]) if e in order else self.read(e) for e in base.experts)

            mean = mean_expert(members(), base.weights)
            if base.merge != "least-squares":
                return mean
            if self._activate is None:
                raise ValueError("a base that is fitted needs the family's activation")
            return fit_down(mean, members(), base.weights, self.statistics["input_sample"], self._activate)

        return self._shared.of_layer(("base", base), made)

    def _whole_part(self, e: int) -> Part | None:
        return next((part for part in self.plan.slots[e].parts if isinstance(part, (OwnWeights, SharedBase))), None)

    def others(self, e: int) -> ExpertWeights | None:
        part = self._whole_part(e)
        if part is None:
            return None
        weights = self.base(part.base) if isinstance(part, SharedBase) else self.original(e)
        if not part.format:
            return weights
        stored, numbers = self.row(part, e), {}
        for leaf, tensor in rows_of(weights).items():
            size = tuple(tensor.shape)
            numbers[leaf] = as_numbers(stored[leaf][None], part.format, size, tensor.dtype)[0]
        return weights_of(numbers, weights.gate_FD is not None)

    def row(self, part: Part, e: int) -> dict[str, Tensor]:
        """A part's row as it is stored. What others of the expert, or of its base, ask for next is not made again."""
        if not part.format:
            return part.build(e, self)

        def made() -> dict[str, Tensor]:
            grams = self._seen_by(part, e) if QUANTISERS[part.quantiser].needs else {}
            return part.store(part.build(e, self), writer(part.format, part.quantiser), grams)

        if isinstance(part, SharedBase):
            return self._shared.of_layer(("row", *self._which(part)), made)
        return self._shared.of_expert(e, "row", part, made) if part.is_whole else made()

    def _which(self, part: Part | None) -> tuple[Hashable, ...]:
        """What tells a part's whole weights from others that an expert may have in other plans."""
        if isinstance(part, SharedBase):
            return part.format, part.quantiser, self.plan.bases[part.base], self.members(part)
        return (part,)

    def _seen_by(self, part: Part, e: int) -> dict[str, Gram]:
        """The mean Gram matrices of the inputs of a part's whole weights; a base sees what all experts see that use it."""
        return self._seen(*self.members(part)) if isinstance(part, SharedBase) else self.seen(e)

    def seen(self, e: int) -> dict[str, Gram]:
        return self._shared.of_expert(e, "seen", None, lambda: self._seen(e))

    def _seen(self, *experts: int) -> dict[str, Gram]:
        """The same of experts together, added up one by one."""
        grams = (self.input_grams(x) for x in experts)
        sums = {name: gram.clone() for name, gram in next(grams).items() if name != "gate_FD"}
        for gram in grams:
            for name, total in sums.items():
                total += gram[name]
        seen = seen_by(sums, float(self.statistics["count"][list(experts)].sum()), *self._means)
        device = self.original(experts[0]).up_FD.device
        inputs, hidden = Gram(seen["up_FD"].to(device)), Gram(seen["down_DF"].to(device))
        return {"gate_FD": inputs, "up_FD": inputs, "down_DF": hidden}

    def members(self, part: Part) -> tuple[int, ...]:
        return tuple(e for e in self.plan.survivors if part in self.plan.slots[e].all_parts(has_bias=False))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def once_over(self, e: int, key: Hashable, make: Callable[[], Any]) -> Any:
        return self._shared.of_expert(e, key, self._which(self._whole_part(e)), make)

    @property
    def _means(self) -> tuple[Tensor, float]:
        """The mean of x x^T over what the layer gives its experts, and the mean square of a hidden unit."""
        both = (self._each_gram(name) for name in ("input_gram", "hidden_gram"))
        return self._shared.of_layer("means", lambda: layer_means(*both, self.statistics["count"]))

    def _each_gram(self, name: str) -> Iterator[Tensor]:
        """Of every expert. All of a layer's may be more than memory holds: one is mapped from its file whenever it is asked for."""
        return (self.statistics[name][e] for e in range(len(self.plan.slots)))

    @property
    def _has_finite_grams(self) -> bool:
        grams = (x for name in ("input_gram", "hidden_gram") for x in self._each_gram(name))
        return self._shared.of_layer("finite", lambda: all(bool(x.isfinite().all()) for x in grams))

    def _gram(self, name: str, e: int) -> Tensor:
        if not self._has_finite_grams:
            raise StatisticsError(
                f"the Gram matrices of layer {self.plan.layer} are not finite; calibrate in bfloat16 or float32 instead of "
                f"float16"
            )
        return self.statistics[name][e]

    def input_grams(self, e: int) -> dict[str, Tensor]:
        """They are those of the original expert, also for down, whose inputs change once gate and up are approximated."""
        input_DD, hidden_FF, order_F = self._gram("input_gram", e), self._gram("hidden_gram", e), self._order(e)
        if order_F is not None:
            order_F = order_F.to(hidden_FF.device)
            hidden_FF = hidden_FF[order_F][:, order_F]
        return {"gate_FD": input_DD, "up_FD": input_DD, "down_DF": hidden_FF}


class _Old(Mapping[int, ExpertWeights]):
    def __init__(self, plan: LayerPlan, read: Read) -> None:
        self._experts, self._site = plan.fading, BuildSite(plan, read, None, 0)

    def __getitem__(self, e: int) -> ExpertWeights:
        if e not in self._experts:
            raise KeyError(e)
        return self._site.original(e)

    def __iter__(self) -> Iterator[int]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)


def old_weights(plan: LayerPlan, read: Read) -> Mapping[int, ExpertWeights]:
    """The original weights of every replaced expert that fades in, in the hidden order of its base (annealing blends the two). Each is read when
    it is asked for."""
    return _Old(plan, read)


def build_layer(
    plan: LayerPlan,
    shape: LayerShape,
    read: Read,
    layer: LayerStatistics | None = None,
    seed: int = 0,
    activate: Activation | None = None,
) -> tuple[Layout, dict[str, Tensor]]:
    """One layer of a plan as the container's layout and its tensors. Deterministic for a seed.

    `read(e)` gives the original expert e; `layer` has the statistics that `plan.needs` names, where it names any; `activate` is the
    family's activation, for bases that are fitted to outputs.
    Raises PlanError where they are missing.
    """
    return next(build_layers([plan], shape, read, layer, seed, activate))


def build_layers(
    plans: Sequence[LayerPlan],
    shape: LayerShape,
    read: Read,
    layer: LayerStatistics | None = None,
    seed: int = 0,
    activate: Activation | None = None,
    workers: int = 1,
) -> Iterator[tuple[Layout, dict[str, Tensor]]]:
    """What `build_layer` makes of each plan, expert by expert, so that what an expert's Gram matrices are taken apart into serves all of
    them. All of the results are in memory. So many `workers`, each a thread that computes by itself, take an expert each; but one where
    something is drawn, in the order of the experts."""
    shared = Shared()
    made = [_Rows(plan, shape, read, layer, seed, activate, shared) for plan in plans]
    rows: list[dict[str, dict[int, Tensor]]] = [{name: {} for name in each.layout.tensor_shapes()} for each in made]

    def of_expert(e: int) -> None:
        for each, found in zip(made, rows, strict=True):
            for name, row, tensor in each.of_expert(e):
                found[name][row] = tensor

    are_drawn = any(part.is_drawn for plan in plans for part in plan.parts)
    _side_by_side(of_expert, range(shape.num_experts), 1 if are_drawn else workers)
    for each, found in zip(made, rows, strict=True):
        for name, row, tensor in each.of_routing():
            found[name][row] = tensor
        stacked = {}
        for name in list(found):
            of_name = found.pop(name)
            stacked[name] = torch.stack([of_name[row] for row in range(len(of_name))])
        yield each.layout, stacked


def _side_by_side(work: Callable[[int], None], items: Sequence[int], workers: int) -> None:
    if workers < 2:
        for item in items:
            work(item)
        return
    threads = torch.get_num_threads()

    def alone(item: int) -> None:
        with torch.no_grad():
            work(item)

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(alone, items):
                pass
    finally:
        torch.set_num_threads(threads)


def build_rows(
    plan: LayerPlan,
    shape: LayerShape,
    read: Read,
    layer: LayerStatistics | None = None,
    seed: int = 0,
    but: Collection[int] = (),
    activate: Activation | None = None,
) -> Iterator[tuple[str, int, Tensor]]:
    """The same a row at a time, in the order of the experts, which fixes what is drawn: a tensor's name, the row, its values.

    Own weights of the experts in `but` are left out.
    """
    rows = _Rows(plan, shape, read, layer, seed, activate)
    for e in plan.survivors:
        yield from rows.of_expert(e, e in but)
    yield from rows.of_routing()


class _Rows:
    """One layer of a plan, as its rows are built."""

    def __init__(
        self,
        plan: LayerPlan,
        shape: LayerShape,
        read: Read,
        layer: LayerStatistics | None,
        seed: int,
        activate: Activation | None,
        shared: Shared | None = None,
    ) -> None:
        check_statistics(plan, layer)
        self.layout, self._plan, self._shape, self._read = Layout.of(plan, shape), plan, shape, read
        self._site = BuildSite(plan, read, layer, seed, activate, shared)
        self._places = {e: place for place, e in enumerate(plan.survivors)}
        stacks = self.layout.prefixed()
        self._prefixes = {(stack.part, stack.variant, stack.format): (prefix, stack.rows) for prefix, stack in stacks}
        self._built: set[tuple[str, int]] = set()

    def of_expert(self, e: int, but_own: bool = False) -> Iterator[tuple[str, int, Tensor]]:
        """What has not been built yet; nothing of an expert that is dropped."""
        if e not in self._places:
            return
        for part in self._plan.slots[e].all_parts(self._shape.has_bias):
            if but_own and isinstance(part, OwnWeights):
                continue
            prefix, rows = self._prefixes[part.stack.name, part.variant(), part.format]
            row = rows[self._places[e]]
            if (prefix, row) not in self._built:
                self._built.add((prefix, row))
                for leaf, tensor in _built(part, e, self._site).items():
                    yield prefix + leaf, row, tensor

    def of_routing(self) -> Iterator[tuple[str, int, Tensor]]:
        stored = self.layout.routing.tensors(self.layout) if self.layout.routing else {}
        for name, (count, *size) in stored.items():
            zeros = self._read(0).down_DF.new_zeros(size)
            yield from ((name, row, zeros) for row in range(count))


def _built(part: Part, e: int, site: BuildSite) -> dict[str, Tensor]:
    try:
        return site.row(part, e)
    except torch.linalg.LinAlgError as error:
        raise CheckpointError(
            f"weights of expert {e} of {site.plan.layer} cannot be taken apart into factors ({error}); look whether they are "
            f"what they should be, or plan with --start gaussian"
        ) from error


def rewritten(plan: LayerPlan, read: Read, layer: LayerStatistics | None = None, seed: int = 0) -> Read:
    """What reads the experts of a layer that a stock layer can hold, as they become. Raises as `build_layer` does."""
    check_statistics(plan, layer)
    site = BuildSite(plan, read, layer, seed)

    def changed(e: int) -> ExpertWeights:
        if e not in plan.rewritten:
            return read(e)
        expert, (part,) = read(e), plan.slots[e].parts
        return weights_of(_built(part, e, site), expert.gate_FD is not None)

    return changed


def stack_dense(experts: list[ExpertWeights]) -> dict[str, Tensor]:
    """Experts side by side under the container's names of whole weights."""
    rows = [rows_of(expert) for expert in experts]
    return {OwnWeights.prefix + leaf: torch.stack([row[leaf] for row in rows]) for leaf in rows[0]}
