"""Every family, changed in its last MoE layer alone: a pass that begins at that layer gives what the whole one gives, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

from families.case import Case, skip_refused, tokens_of
from families.tiny_families import all_families
from locum.measure.changes import ChangingModel
from locum.models.decoder_layers import decoder_stack
from locum.models.known_layers import KnownLayers
from locum.models.masking import MaskedRouters

pytestmark = pytest.mark.families


@contextmanager
def without_first_expert(layer) -> Iterator[None]:
    gone_E = torch.arange(layer.shape.num_experts) == 0
    with MaskedRouters([(layer, gone_E)]):
        yield


@pytest.mark.parametrize("family", all_families())
def test_family(family: str) -> None:
    skip_refused(family)
    case = Case(family)
    model, tokens = case.model(), tokens_of(case.ids_BS)
    given = {"input_ids": tokens.ids_BS, "attention_mask": tokens.attention_BS}
    last = case.shape.layers[-1].name
    ran: list[int] = []  # calls of something in the first decoder layer

    def run() -> torch.Tensor:
        return model.base_model(**given, use_cache=False).last_hidden_state

    def answers(live: ChangingModel) -> list[torch.Tensor]:
        with live.quiet():
            return [x for (x,) in live.results([{}, {last: without_first_expert}, {}], [run], tokens.ids_BS.numel())]

    _, stack = decoder_stack(model, [layer.name for layer in case.shape.layers])
    first = next(module for module in stack[0].modules() if isinstance(module, nn.Linear))
    first.register_forward_hook(lambda *_: ran.append(1))
    with mock.patch.object(KnownLayers, "try_beginning"):  # nothing is tried, so all is run
        expected = answers(ChangingModel(model))
    of_three = len(ran)
    made = answers(ChangingModel(model))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert not torch.equal(made[0], made[1])
    assert len(ran) - of_three == 2 * of_three // 3 > 0
