"""The model card that every compressed checkpoint carries."""

from __future__ import annotations

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


def _saved(plan: Plan, shape: ModelShape) -> str:
    """What a plan saves, in words: parameters that are stored, or those that a token uses, whichever it is about."""
    said = [f"{plan.removed(shape):.1%} of the routed experts' parameters removed"] if plan.removed(shape) > 0 else []
    if any(layer.routing for layer in plan.layers):
        share = 1 - active_parameters(shape, plan) / active_parameters(shape)
        said.append(f"{share:.1%} fewer parameters active for a token")
    return ", ".join(said) or "nothing removed"


def model_card(plan: Plan, shape: ModelShape, name: str, provenance: dict[str, Any]) -> str:
    """Markdown with a Hub header: what was done, how to load it, sizes, fates of the experts, provenance."""
    size = plan.size(shape)
    stock = plan.is_stock(shape)
    fates: Counter[str] = Counter(slot.fate for layer in plan.layers for slot in layer.slots)
    load = [
        "```python",
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
    ]
    needs = (
        "It is an ordinary checkpoint and loads without Locum."
        if stock
        else "Its compressed layers need Locum to load: without `import locum` first, transformers only warns of an unknown "
        "quantization type and fills the experts at random."
    )
    if over := provenance.get("adapter"):
        needs = "It holds routers and the vectors of experts alone; all weights are those of its base."
        load[1:3] = ["import locum", f'model = locum.load_model("{name}")  # over {over["base"]}']
    elif not stock:
        load.insert(1, "import locum  # registers the loader for its layers")
    options = ", ".join(f"{key}={value}" for key, value in plan.options.items())
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
        f"# {name}",
        "",
        f"Made with Locum: {_saved(plan, shape)} by `{plan.method}`" + (f" ({options})." if options else "."),
        "",
        needs,
        "",
        *load,
        "",
        "| | original | this |",
        "|---|---|---|",
        *(f"| {label} | {before} | {after} |" for label, before, after in rows),
        "",
        f"Experts over all layers: {experts}. The exact fate of each is in `plan.json`.",
        "",
        "## Provenance",
        "",
        *(f"- {key}: {value}" for key, value in provenance.items() if key not in ("original", "original_shape")),
        "",
    ]
    return "\n".join(lines)
