"""What statistics are of: one model, one tokenizer, some data; and what a search was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import StatisticsError
from ..shapes import ModelShape


@dataclass(frozen=True)
class Origin:
    """The model, tokenizer and data behind statistics. A fingerprint that nobody knows is None."""

    shape: ModelShape
    model_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    data_fingerprints: tuple[str, ...] = ()  # one for each of the data that were added up, in order

    def check_same_model(self, other: Origin) -> None:
        """Raise StatisticsError unless both are of the same model, tokenizer and shape of MoE layers."""
        sides = [
            {
                "model_fingerprint": one.model_fingerprint,
                "tokenizer_fingerprint": one.tokenizer_fingerprint,
                "shape": one.shape.fingerprint,
            }
            for one in (self, other)
        ]
        for key, first in sides[0].items():
            if first != sides[1][key]:
                raise StatisticsError(
                    f"statistics cannot be added: {key} is {first!r} on one side and {sides[1][key]!r} on the other; only "
                    f"statistics of the same model and tokenizer add up: calibrate both with them"
                )

    def __add__(self, other: Origin) -> Origin:
        """The same model and the data of both. Raises StatisticsError for different models."""
        self.check_same_model(other)
        data = dict.fromkeys((*self.data_fingerprints, *other.data_fingerprints))
        return replace(self, data_fingerprints=tuple(data))

    def words(self) -> dict[str, Any]:
        """Fingerprints, for provenance: of data, one alone or a list."""
        data = self.data_fingerprints
        return {
            "model_fingerprint": self.model_fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "data_fingerprint": data[0] if len(data) == 1 else list(data),
        }


@dataclass(frozen=True)
class SearchedBy:
    """The method that searched, with its options. Plans take what the search read from here."""

    name: str
    options: Mapping[str, Any]
