"""The model card that every compressed checkpoint carries."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .plan import Plan
from .shapes import ModelShape


def describe_size(count: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def model_card(plan: Plan, shape: ModelShape, name: str, provenance: dict[str, Any]) -> str:
    """Markdown with a Hub header: what was done, how to load it, sizes, fates of the experts, provenance."""
    size = plan.size(shape)
    stock = plan.is_stock(shape)
    fates: Counter[str] = Counter(slot.becomes for layer in plan.layers for slot in layer.slots)
    load = [
        "```python",
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
    ]
    if not stock:
        load.insert(1, "import locum  # registers the loader for its layers")
    options = ", ".join(f"{key}={value}" for key, value in plan.options.items())
    rows = [
        ("parameters", f"{shape.parameters:,}", f"{size.parameters:,}"),
        ("expert parameters", f"{shape.expert_parameters:,}", f"{size.expert_parameters:,}"),
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
        f"Made with Locum: {plan.removed(shape):.1%} of the routed experts' parameters removed by `{plan.method}`"
        + (f" ({options})." if options else "."),
        "",
        "It is an ordinary checkpoint and loads without Locum."
        if stock
        else "Its compressed layers need Locum to load.",
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
