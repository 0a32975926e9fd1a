"""Layouts of Locum's first checkpoints, which had a list of rows for each of four fixed kinds of parts."""

from __future__ import annotations

from itertools import accumulate
from typing import Any


def from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """The layout as it is written today. Raises TypeError, KeyError or ValueError for what cannot be one."""
    given = dict(data)
    dense, rank_of, adapter_of = (list(given.pop(name)) for name in ("dense_of", "rank_of", "adapter_of"))
    constant, ranks = list(given.pop("constant_of")), list(given.pop("ranks"))
    if len({len(dense), len(rank_of), len(adapter_of), len(constant)}) > 1 or not dense:
        raise ValueError(f"its lists name {[len(x) for x in (dense, rank_of, adapter_of, constant)]} experts")
    if any((a < 0) != (r < 0) for a, r in zip(adapter_of, rank_of, strict=True)):
        raise ValueError("an adapter without a rank, or a rank without an adapter")
    if len(ranks) > len(rank_of) or set(rank_of) - {-1} != set(range(len(ranks))):
        raise ValueError(f"rank_of = {rank_of} does not use the ranks {ranks}")
    biased = [bool(given["has_bias"]) and d < 0 <= r for d, r in zip(dense, rank_of, strict=True)]
    biases = [count - 1 if has_one else -1 for count, has_one in zip(accumulate(biased), biased, strict=True)]
    stacks = [("own_weights", (), dense)]
    for index, rank in enumerate(ranks):
        rows = [a if r == index else -1 for a, r in zip(adapter_of, rank_of, strict=True)]
        stacks.append(("low_rank", (rank,), rows))
    stacks += [("own_biases", (), biases), ("constant", (), constant)]
    given["num_experts"] = len(dense)
    given["stacks"] = [{"part": p, "variant": v, "rows": rows} for p, v, rows in stacks if max(rows) >= 0]
    if routing := given.pop("routing", None):
        given["policy"] = {"policy": "main_with_vectors", **routing}
    return given
