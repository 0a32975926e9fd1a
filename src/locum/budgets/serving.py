"""What an engine that is to run the result allows: the candidates that it runs, and whether all layers have to be alike.

Whatever a container can be, transformers runs with Locum, and vLLM with Locum's plugin, which holds the same container
(engines/vllm_plugin.py). A stock layout has whole experts alone, one number of them for all layers (Plan.is_stock). llama.cpp reads
it as GGUF, whose types of experts' matrices are one for all that is exported (exports/gguf.py); of 8 and 4 bits in groups of 32 it has the
very sizes: q8_0 and q4_0.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plans.layer_plan import Slot
from ..shapes import ModelShape
from .candidates import KINDS


@dataclass(frozen=True)
class Serving:
    """Kinds of candidates (candidates.py), and whether what comes out has to be alike in all layers.

    `formats` are number formats that weights may then be in, one for all; none for any.
    """

    kinds: tuple[str, ...] = KINDS
    formats: tuple[str, ...] = ()
    is_alike: bool = False

    def allows(self, kind: str, slot: Slot) -> bool:
        """Whether an expert may become this."""
        if kind not in self.kinds:
            return False
        return not self.is_alike or not slot.survives or (slot.is_kept and slot.parts[0].format in self.formats)


SERVES = {
    "transformers": Serving(),
    "vllm": Serving(),
    "llamacpp": Serving(("keep", "bits", "drop"), ("", "int8-g32", "int4-g32"), is_alike=True),
    "any": Serving(("keep", "drop"), ("",), is_alike=True),
}


def most_alike(shape: ModelShape) -> int:
    """How many experts every layer of a stock layout can lose, the same number of each."""
    can = len({layer.num_experts for layer in shape.layers}) == 1
    can = can and all(x.stock_can_drop and x.num_groups == 1 and not x.refuse_dropping for x in shape.layers)
    return min(layer.num_experts - layer.fewest_experts for layer in shape.layers) if can else 0
