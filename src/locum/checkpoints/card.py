"""The model card that every compressed checkpoint carries."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from typing import Any

from ..containers.layout import active_parameters
from ..plans.plan import Plan
from ..shapes import ModelShape


def describe_size(count: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def plain(text: Any) -> str:
    """Text from a file or an option as one line of Markdown that says it and does nothing else."""
    return re.sub(r"([\\`*_{}\[\]#|!~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _saved(plan: Plan, shape: ModelShape) -> str:
    """What a plan saves, in words: parameters that are stored, or those that a token uses, whichever it is about."""
    said = [f"{plan.removed(shape):.1%} of the routed experts' parameters removed"] if plan.removed(shape) > 0 else []
    if any(layer.routing for layer in plan.layers):
        share = 1 - active_parameters(shape, plan) / active_parameters(shape)
        said.append(f"{share:.1%} fewer parameters active for a token")
    return ", ".join(said) or "nothing removed"


def _loading(name: str, opens: str, stock: bool, base: str | None) -> list[str]:
    """What it needs to load, and the call."""
    call = [f"from transformers import {opens}", f"model = {opens}.from_pretrained({json.dumps(name)})"]
    needs = (
        "It is an ordinary checkpoint and loads without Locum."
        if stock
        else "Its compressed layers need Locum to load: without `import locum` first, transformers only warns of an unknown "
        "quantization type and fills the experts at random."
    )
    if base is not None:
        needs = "It holds routers and the vectors of experts alone; all weights are those of its base."
        call = ["import locum", f"model = locum.load_model({json.dumps(name)})  # over {json.dumps(base)}"]
    elif not stock:
        call.insert(0, "import locum  # registers the loader for its layers")
    return [needs, "", "```python", *call, "```"]


def model_card(plan: Plan, shape: ModelShape, name: str, provenance: dict[str, Any], opens: str) -> str:
    """Markdown with a Hub header: what was done, how to load it, sizes, fates of the experts, provenance.

    `opens` is the class of transformers that loads it.
    """
    size = plan.size(shape)
    over = provenance.get("adapter")
    fates: Counter[str] = Counter(slot.fate for layer in plan.layers for slot in layer.slots)
    options = ", ".join(f"{plain(key)}={plain(value)}" for key, value in plan.options.items())
    rows = [
        ("parameters", f"{shape.parameters:,}", f"{size.parameters:,}"),
        ("expert parameters", f"{shape.expert_parameters:,}", f"{size.expert_parameters:,}"),
        ("active parameters, at most", f"{active_parameters(shape):,}", f"{active_parameters(shape, plan):,}"),
        ("tensor bytes", f"{shape.bytes:,}", f"{size.bytes:,}"),
    ]
    experts = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mixture-of-experts, compressed, locum]",
        "---",
        f"# {plain(name)}",
        "",
        f"Made with Locum: {_saved(plan, shape)} by {plain(plan.method)}" + (f" ({options})." if options else "."),
        "",
        *_loading(name, opens, plan.is_stock(shape), None if over is None else over["base"]),
        "",
        "| | original | this |",
        "|---|---|---|",
        *(f"| {label} | {before} | {after} |" for label, before, after in rows),
        "",
        f"Experts over all layers: {experts}. The exact fate of each is in `plan.json`.",
        "",
        "## Provenance",
        "",
        *(
            f"- {plain(key)}: {plain(value)}"
            for key, value in provenance.items()
            if key not in ("original", "original_shape")
        ),
        "",
    ]
    return "\n".join(lines)
