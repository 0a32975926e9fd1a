"""Searching for sets of experts: which ones a layer misses least when they go together (MoE-I2, arXiv 2411.01016).

    search_sets      the K best sets of one layer, by a genetic search, or by trying all where that costs no more
    choose_in_block  of the K best sets of each of T consecutive layers, those that go together best

Both know errors only as a function of candidates; what the errors are of is the caller's business.

Letters: C candidates, E experts.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import StatisticsError

Experts = tuple[int, ...]  # in ascending order
Errors = Callable[[Tensor], Tensor]  # bools [C, E], true where an expert is removed -> [C]
MOST_INDIVIDUALS = 100_000  # of a generation, all of which are in memory


def removed_mask(sets: Sequence[Experts], num_experts: int) -> Tensor:
    """[C, E] bools, true for the members of each set."""
    mask_CE = torch.zeros(len(sets), num_experts, dtype=torch.bool)
    for row, members in enumerate(sets):
        mask_CE[row, list(members)] = True
    return mask_CE


def search_sets(
    num_experts: int,
    count: int,
    errors: Errors,
    *,
    population: int = 100,
    generations: int = 50,
    keep: int = 3,
    num_groups: int = 1,
    elite_fraction: float = 0.2,
    seed: int = 0,
) -> list[tuple[Experts, float]]:
    """The `keep` sets of `count` experts with the lowest errors that were found, best first, with their errors.

    All sets are tried where there are at most population * generations of them. Otherwise: a population of distinct
    random sets; the best `elite_fraction` stay and are the parents of the rest; a child is drawn from the union of two
    parents and then has one member swapped for an outsider, again until it is a set that was never tried (20 times at
    most). Every set is evaluated once, a generation in one call, and the best are those of all sets ever evaluated. With
    groups, equally many experts come from each. Ties go to the set that comes first in lexicographic order; the same
    seed gives the same result.
    """
    size, share = num_experts // num_groups, count // num_groups
    groups = [range(first, first + size) for first in range(0, num_experts, size)]
    known: dict[Experts, float] = {}

    def evaluate(sets: Sequence[Experts]) -> None:
        known.update(zip(sets, finite(errors(removed_mask(sets, num_experts))), strict=True))

    def best(number: int) -> list[Experts]:
        return sorted(known, key=lambda members: (known[members], members))[:number]

    if math.comb(size, share) ** num_groups <= population * generations:
        for batch in _batches(map(_joined, itertools.product(*(itertools.combinations(g, share) for g in groups)))):
            evaluate(batch)
        return [(members, known[members]) for members in best(keep)]
    draw = random.Random(seed)
    start: dict[Experts, None] = {}
    while len(start) < population:
        start[_joined([draw.sample(group, share) for group in groups])] = None
    evaluate(list(start))
    elites = max(2, round(elite_fraction * population))
    for _ in range(generations):
        parents = best(elites)
        children: dict[Experts, None] = {}
        for _ in range(population - elites):
            child = _child(*draw.sample(parents, 2), groups, draw)
            for _ in range(20):
                child = _swapped(child, groups, draw)
                if child not in known and child not in children:
                    children[child] = None
                    break
        if children:
            evaluate(list(children))
    return [(members, known[members]) for members in best(keep)]


def finite(error_C: Tensor) -> list[float]:
    """Errors as numbers. Raises StatisticsError where one is not finite."""
    if not bool(error_C.isfinite().all()):
        raise StatisticsError(
            "the error of removing experts is not finite: check the checkpoint, or search in bfloat16 or float32 instead "
            "of float16"
        )
    return error_C.tolist()


def _joined(parts: Sequence[Sequence[int]]) -> Experts:
    return tuple(sorted(e for part in parts for e in part))


def _child(one: Experts, two: Experts, groups: list[range], draw: random.Random) -> Experts:
    """As many experts as a parent has, from the union of both."""
    union = sorted({*one, *two})
    share = len(one) // len(groups)
    return _joined([draw.sample([e for e in union if e in group], share) for group in groups])


def _swapped(members: Experts, groups: list[range], draw: random.Random) -> Experts:
    """One member replaced by an expert of its group that is not one."""
    gone = draw.choice(members)
    group = next(group for group in groups if gone in group)
    new = draw.choice([e for e in group if e not in members])
    return tuple(sorted({*members, new} - {gone}))


def _batches(sets: Iterator[Experts], size: int = 256) -> Iterator[list[Experts]]:
    while batch := list(itertools.islice(sets, size)):
        yield batch


def choose_in_block(
    candidates: Mapping[str, Sequence[Experts]],
    num_experts: Mapping[str, int],
    errors: Callable[[Sequence[Mapping[str, Tensor]]], Tensor],
) -> dict[str, Experts]:
    """One set per layer of a block: of all combinations of their candidates, the one with the lowest error.

    The KT-Reception Field of MoE-I2: sets that are best for their layers alone need not be best together. Ties go to the
    combination that has the better candidates in the earlier layers; a single combination is not evaluated.
    """
    combinations = [dict(zip(candidates, chosen, strict=True)) for chosen in itertools.product(*candidates.values())]
    if len(combinations) == 1:
        return combinations[0]
    masks = {
        (layer, members): removed_mask([members], num_experts[layer])[0]
        for layer, sets in candidates.items()
        for members in sets
    }
    error_C = finite(errors([{pair[0]: masks[pair] for pair in chosen.items()} for chosen in combinations]))
    return combinations[min(range(len(combinations)), key=error_C.__getitem__)]
