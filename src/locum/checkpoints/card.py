"""The model card that every compressed checkpoint carries."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..containers.layout import active_parameters
from ..plans.plan import Plan
from ..shapes import ModelShape


def plain(text: Any) -> str:
    """Text from a file or an option as one line of Markdown that says it and does nothing else."""
    return re.sub(r"([\\`*_{}\[\]#|!~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _saved(plan: Plan, shape: ModelShape) -> str:
    """What a plan saves, in words: parameters that are stored, or those that a token uses, whichever it is about."""
    said = [f"{plan.removed(shape):.1%} of the routed experts' parameters removed"] if plan.removed(shape) > 0 else []
    if count := len(plan.numbering.gone):
        said.append(f"{count} whole decoder layer{'s' if count > 1 else ''} dropped")
    if any(layer.routing for layer in plan.layers):
        share = 1 - active_parameters(shape, plan) / active_parameters(shape)
        words = dict.fromkeys(str(layer.routing).partition(",")[0] for layer in plan.layers if layer.routing)
        said.append(
            f"{share:.1%} fewer parameters active for a token" if share > 0 else f"routing changed ({'; '.join(words)})"
        )
    if masked := sum(len(layer.rewritten) for layer in plan.layers):
        said.append(f"nothing removed, weights of {masked} experts set to zero where they lie")
    if plan.formats:
        saved = 1 - (plan.size(shape).bytes - shape.bytes + shape.bytes_of_experts) / shape.bytes_of_experts
        less = f", which take {saved:.1%} fewer bytes than they did" if saved > 0 else ""
        said.append(f"experts in {' and '.join(plan.formats)}{less}")
    return ", ".join(said) or "nothing removed"


def _made(plan: Plan, shape: ModelShape) -> str:
    """What was done, and by which method; a plan that does nothing was made by none."""
    if all(layer.is_identity and not layer.dropped for layer in plan.layers):
        return "trained, nothing removed"
    return f"{_saved(plan, shape)} by {plain(plan.method)}"


def _loading(name: str, opens: str, stock: bool, over: Mapping[str, Any] | None) -> list[str]:
    """What it needs to load, and the call."""
    call = [f"from transformers import {opens}", f"model = {opens}.from_pretrained({json.dumps(name)})"]
    needs = (
        "It is an ordinary checkpoint and loads without Locum."
        if stock
        else "Its compressed layers need Locum to load: without `import locum` first, transformers only warns of an unknown "
        "quantization type and fills the experts at random."
    )
    if over is not None:
        count = sum(map(len, over.get("experts", {}).values()))
        what = f"{count} experts, routers and the vectors of experts" if count else "routers and the vectors of experts"
        needs = f"It holds {what} alone; all {'other ' if count else ''}weights are those of its base."
        call = ["import locum", f"model = locum.load_model({json.dumps(name)})  # over {json.dumps(over['base'])}"]
    elif not stock:
        call.insert(0, "import locum  # registers the loader for its layers")
    return [needs, "", "```python", *call, "```"]


LOST = ("<!-- what was lost, by locum eval --card -->", "<!-- until here -->")  # evaluations write between them


def lost_section(measured: Sequence[str]) -> list[str]:
    """What was lost, as lines of a table."""
    words = [
        "Measured by `locum eval`, this model and its original on the same tokens. What calibration and training saw goes by "
        "the names of domains; what they never saw may have lost more.",
    ]
    unmeasured = ["Not measured yet: `locum eval DIR --data DOMAIN=TEXT --card` writes it here."]
    return [LOST[0], "## What was lost", "", *([*words, "", *measured] if measured else unmeasured), LOST[1]]


def with_section(text: str, section: Sequence[str]) -> str:
    """A card's text with the section of what was lost in place of the one that it has, or at the end."""
    new = "\n".join(section)
    before, begin, rest = text.partition(LOST[0])
    _, end, after = rest.partition(LOST[1])
    return before + new + after if begin and end else f"{text.rstrip()}\n\n{new}\n"


def with_rest(text: str, size: int, words: str) -> str:
    """A card's text for the same checkpoint with weights outside of the experts in few bits: `size` bytes of tensors, and the words
    that say which weights."""
    row = re.compile(r"^(\| tensor bytes \| [\d,]+ \|) [\d,]+ \|\n", re.MULTILINE)
    said = f"\\1 {size:,} |\n\nBesides the experts: {plain(words)}. transformers needs the package compressed-tensors to read them.\n"
    return row.sub(said, text, count=1)


def head_of(data: ModelCardData) -> str:
    """The head of a card, between its lines of dashes."""
    return f"---\n{data.to_yaml()}\n---"


def what_it_is_from(data: ModelCardData, original: str) -> list[str]:
    """The original and its licence, in words, and what is to be added before the card is published."""
    said, base = data.get("license"), data.get("base_model")
    licence = ", ".join(map(str, said)) if isinstance(said, list) else said
    if licence == "other":
        licence = data.get("license_name") or data.get("license_link") or "other"
    lines = [
        f"The licence is that of the original: {plain(licence)}."
        if licence
        else "The original states no licence here: ask for it before you pass this on."
    ]
    if not base:
        lines.append(
            f"What {plain(original)} is called on a hub is not known here: add `base_model: ORGANISATION/NAME` to the head "
            f"of this file before you publish it."
        )
    return lines


def _trained(recovery: dict[str, Any]) -> list[str]:
    """What training changed, as far as its validation says."""
    ends = [recovery.get(key) for key in ("validation_loss_before", "validation_loss")]
    if not all(isinstance(end, float) for end in ends):
        return []
    on = ", ".join(map(plain, recovery.get("domains") or ["text"]))
    return [f"Trained on {on}: the loss on its validation text was {ends[0]:.4f} before and is {ends[1]:.4f}.", ""]


def _told(provenance: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the card says of it: long lists are in locum.json."""
    over = provenance.get("adapter")
    short = {} if over is None else {"adapter": {key: value for key, value in over.items() if key != "experts"}}
    return [(key, value) for key, value in (provenance | short).items() if key != "original_shape"]


def model_card(
    plan: Plan, shape: ModelShape, name: str, provenance: dict[str, Any], opens: str, data: ModelCardData
) -> str:
    """Markdown with a head for hubs: what was done, how to load it, sizes, fates of the experts, what was lost, provenance.

    `opens` is the class of transformers that loads it, `data` the head (card_data.py).
    """
    size, domains = plan.size(shape), plan.provenance.get("domains")
    over, original = provenance.get("adapter"), provenance.get("original", "its original")
    fates: Counter[str] = Counter(slot.fate for layer in plan.layers for slot in layer.slots)
    options = ", ".join(f"{plain(key)}={plain(value)}" for key, value in plan.options.items())
    rows = [
        ("parameters", f"{shape.parameters:,}", f"{size.parameters:,}"),
        ("expert parameters", f"{shape.expert_parameters:,}", f"{size.expert_parameters:,}"),
        ("active parameters of a token", f"{active_parameters(shape):,}", f"{active_parameters(shape, plan):,}"),
        ("tensor bytes", f"{shape.bytes:,}", f"{size.bytes:,}"),
    ]
    if numbers := (provenance.get("recovery") or {}).get("numbers"):  # no plan promised these bytes
        rows[-1] = (
            "tensor bytes",
            f"{shape.bytes:,}",
            f"numbers in {plain(numbers)} since training, where the original has them packed",
        )
    experts = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
    lines = [
        head_of(data),
        f"# {plain(name)}",
        "",
        f"Made with Locum from {plain(data.get('base_model') or original)}: {_made(plan, shape)}"
        + (f" ({options})." if options else "."),
        "",
        *what_it_is_from(data, original if over is None else over["base"]),
        "",
        *_loading(name, opens, plan.is_stock(shape), over),
        "",
        "| | original | this |",
        "|---|---|---|",
        *(f"| {label} | {before} | {after} |" for label, before, after in rows),
        "",
        f"Experts over all layers: {experts}. The exact fate of each is in `plan.json`.",
        "",
        *([f"Calibrated on {', '.join(map(plain, domains))}.", ""] if isinstance(domains, list) and domains else []),
        *_trained(provenance.get("recovery") or {}),
        *lost_section(()),
        "",
        "## Provenance",
        "",
        *(f"- {plain(key)}: {plain(value)}" for key, value in _told(provenance)),
        "",
    ]
    return "\n".join(lines)
