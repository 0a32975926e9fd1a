"""The shape of a model as far as Locum needs it: numbers only, no weights, JSON both ways.

Letters: E experts, K top-k, D model width, F expert width, L layers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

KINDS = {"int": int, "str": str, "bool": bool}
# Fields that came later: in JSON only where they say something, since ids of statistics hash it.
LATER = ("around_numel", "around_bytes")


class _Checked:
    """A dataclass that takes values of the kinds that its fields are of, and no negative numbers. Raises TypeError."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, item.name), KINDS.get(str(item.type))
            if kind is not None and type(value) is not kind:
                raise TypeError(f"{item.name} is {value!r:.60}, not {item.type}")
            if kind is int and value < 0:
                raise TypeError(f"{item.name} is {value}, below 0")


@dataclass(frozen=True)
class LayerShape(_Checked):
    """One layer's routed experts and their router."""

    name: str  # module path of the experts, e.g. "model.layers.0.mlp.experts"
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    router: str  # module path of the router
    router_kind: (
        str  # "softmax", "sigmoid", ... as far as known; for people (and for what a load-balance loss balances)
    )
    renormalised: bool  # whether the selected gates are scaled to sum to one (or a constant)
    num_groups: int = 1  # group-limited routing: every group must keep the same number of experts
    min_per_group: int = 1  # and at least so many, or its router fails
    shared_experts: int = 0  # experts that every token runs; never touched
    has_gate: bool = True
    has_bias: bool = False
    router_numel: int = 0  # parameters and buffers of the router per expert (row, selection bias, ...)
    router_bytes: int = 0  # the same in bytes of the checkpoint
    expert_bytes: int = 0  # of one expert as a quantised checkpoint has it, scales included; 0: its parameters say it
    around_numel: int = 0  # what its decoder layer has beside that of its experts; 0: it cannot leave the model
    around_bytes: int = 0  # the same in bytes of the checkpoint
    refuse_dropping: str = ""  # why none of its experts may be dropped, if so
    stock_can_drop: bool = (
        True  # not where other experts, which text does not reach, share the config's number of experts
    )

    @property
    def gate_width(self) -> int:
        """Outputs of the first product of an expert: 2F with a gate, F without."""
        return self.expert_width * (2 if self.has_gate else 1)

    @property
    def fewest_experts(self) -> int:
        """The fewest experts with which the router still works."""
        if self.num_groups == 1:
            return self.top_k
        return self.num_groups * max(self.min_per_group, -(-self.top_k // self.num_groups))

    def parameters(self, width: int | None = None) -> int:
        """Parameters of one dense expert (or base) of this layer, at another width if one is given."""
        width = self.expert_width if width is None else width
        weights = (3 if self.has_gate else 2) * self.hidden_size * width
        return weights + self.bias_parameters(width)

    def bias_parameters(self, width: int | None = None) -> int:
        """Biases of one expert."""
        width = self.expert_width if width is None else width
        return (2 if self.has_gate else 1) * width + self.hidden_size if self.has_bias else 0

    def adapter_parameters(self, rank: int, width: int | None = None) -> int:
        """Parameters of a rank-`rank` adapter on every projection of one expert."""
        width = self.expert_width if width is None else width
        return (3 if self.has_gate else 2) * rank * (self.hidden_size + width)


@dataclass(frozen=True)
class Aside(_Checked):
    """What a checkpoint has beside the model that runs, such as layers that predict further tokens. It goes along as it is.

    Where experts leave a stock checkpoint, whose config has one number for all layers, prediction layers follow the last
    MoE layer (checkpoints/prediction.py).
    """

    parameters: int = 0
    bytes: int = 0  # second copies of tied matrices too, which are no parameters of their own
    expert_numel: int = 0  # of these, what there is for every expert of the last MoE layer, and leaves with it
    expert_bytes: int = 0
    left_numel: int = 0  # what goes as a whole where experts leave
    left_bytes: int = 0


@dataclass(frozen=True)
class ModelShape(_Checked):
    """All MoE layers of a model, with its totals."""

    model_type: str
    layers: tuple[LayerShape, ...]
    parameters: int  # every distinct parameter and buffer in the checkpoint
    bytes: int  # of its tensors, headers not counted
    expert_itemsize: int  # bytes of one expert parameter in the checkpoint, or of what stands in for quantised ones
    notes: tuple[str, ...] = field(default=())
    aside: Aside = field(default=Aside())  # counted above
    vocab_size: int = 0  # tokens that have an embedding; 0 where it is not known

    @property
    def model(self) -> ModelShape:
        """The shape of what transformers loads of the checkpoint."""
        parameters, size = self.parameters - self.aside.parameters, self.bytes - self.aside.bytes
        return replace(self, parameters=parameters, bytes=size, aside=Aside())

    @property
    def expert_parameters(self) -> int:
        return sum(layer.num_experts * layer.parameters() for layer in self.layers)

    def bytes_of_expert(self, layer: LayerShape) -> int:
        """Bytes of one of a layer's experts in the checkpoint."""
        return layer.expert_bytes or layer.parameters() * self.expert_itemsize

    @property
    def bytes_of_experts(self) -> int:
        return sum(layer.num_experts * self.bytes_of_expert(layer) for layer in self.layers)

    def layer(self, name: str) -> LayerShape:
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def fingerprint(self) -> str:
        """Equal for models whose MoE layers look alike, such as a base model and its fine-tune."""
        keys = ("name", "num_experts", "top_k", "hidden_size", "expert_width", "num_groups", "has_gate", "has_bias")
        layers = [[asdict(layer)[key] for key in keys] for layer in self.layers]
        return hashlib.sha256(json.dumps([self.model_type, layers]).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        made = asdict(self)
        layers = [{key: x for key, x in layer.items() if x or key not in LATER} for layer in made["layers"]]
        return made | {"layers": layers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelShape:
        layers = tuple(LayerShape(**layer) for layer in data["layers"])
        aside = Aside(**data.get("aside", {}))
        return cls(**{**data, "layers": layers, "notes": tuple(data.get("notes", ())), "aside": aside})
