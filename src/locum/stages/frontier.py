"""`frontier`: what every size costs, from one search, so that a point is picked by looking."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..budgets.target import Target
from ..errors import OptionError
from ..files import check_output, or_else_printed, provenance, write_text
from ..methods import PredictingMethod
from ..places import name_of
from ..plans.plan import Plan, make_plan
from ..reports.frontier import make_page
from ..shapes import ModelShape
from ..stats.statistics_file import load_statistics
from ..stats.sums import Statistics
from .options import Force, Help, Out, Preset, alone, check_number
from .planning import as_searched, chosen_method

KIND, FORMAT_VERSION = "locum.frontier", 1
MOST = 512


@alone
def frontier(
    statistics: Path | Statistics,
    *,
    method: Annotated[str, Help("a method that predicts what its plans cost; see locum list")] = "auto",
    preset: Preset = "best",
    points: Annotated[int, Help("sizes, from the smallest that can be had to the original's")] = 24,
    out: Out = None,
    picture: Annotated[Path | None, Help("write the curve and the table to this HTML page")] = None,
    force: Force = False,
    **options: Any,
) -> dict[str, Any]:
    """The predicted loss of the best plan of every size, from one search. Nothing is run or written but this.

    What is said is a prediction, by which the sizes of one model compare; `locum eval` measures.
    """
    for path in (out, picture):
        if path is not None:
            check_output(path, force, inputs=[] if isinstance(statistics, Statistics) else [Path(statistics)])
    check_number("points", points, 2, MOST)
    chosen = chosen_method(method, options, preset, frontier)
    if not isinstance(chosen, PredictingMethod):
        raise OptionError(f"method {method} does not say what its plans cost; use auto, or measure with locum compare")
    loaded = statistics if isinstance(statistics, Statistics) else load_statistics(statistics)
    chosen = as_searched(chosen, options, loaded)
    named = "STATISTICS" if isinstance(statistics, Statistics) else name_of(statistics)
    result = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "method": method,
        "statistics_file": named,
        "bytes": loaded.shape.bytes,
        "points": points_of(chosen, loaded, points),
        "provenance": provenance(statistics=loaded.id, options=dict(sorted(vars(chosen).items()))),
    }
    text = json.dumps(result, indent=1)
    with or_else_printed(text):
        if out is not None:
            write_text(Path(out), text)
        if picture is not None:
            write_text(Path(picture), make_page(result))
    return result


def points_of(chosen: PredictingMethod, statistics: Statistics, count: int) -> list[dict[str, Any]]:
    """The sizes, the smallest first, evenly apart in the logarithm of the experts' bytes; equal plans once.

    Raises StatisticsError where the file is not of a search.
    """
    shape = statistics.shape
    for name in chosen.needs():
        statistics.layer(shape.layers[0].name)[name]  # says how to get it where it is not there
    scored = chosen.score_experts(statistics, shape)
    rest = shape.bytes - shape.bytes_of_experts
    smallest = make_plan(shape, chosen.plan(scored, shape, 1.0))
    least = max(1, smallest.size(shape).bytes - rest)
    found: dict[str, dict[str, Any]] = {}
    for of_experts in np.geomspace(least, max(shape.bytes_of_experts, least + 1), count):
        target = Target(fit=int(rest + of_experts + 0.5))
        plan = make_plan(shape, chosen.plan_for(scored, shape, target))
        found.setdefault(plan.id, _point(plan, shape, chosen.predicted(scored, plan.layers)))
    return sorted(found.values(), key=lambda point: point["bytes"])


def _point(plan: Plan, shape: ModelShape, predicted: float) -> dict[str, Any]:
    size = plan.size(shape).bytes
    of_experts = max(
        0, size - shape.bytes + shape.bytes_of_experts
    )  # router rows that go can outweigh the little that is left
    became = Counter(str(slot) for layer in plan.layers for slot in layer.slots)
    return {
        "bytes": size,
        "bits_per_weight": 8 * of_experts / shape.expert_parameters,
        "predicted_kl": predicted,
        "became": dict(became.most_common()),
        "plan": plan.id,
    }


def curves_of(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The frontiers of those statistics files that were searched by a method that predicts, for reports."""
    made = []
    for file in files:
        searched = load_statistics(file).searched
        if searched is not None and isinstance(chosen_method(searched.name, {}, "best"), PredictingMethod):
            made.append(frontier(file, method=searched.name))
    return made
