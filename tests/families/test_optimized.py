"""Every family after `locum.optimize`: what it generates has the logits that it had."""

from __future__ import annotations

import pytest
import torch

import locum
from families.case import Case, near, skip_refused
from families.tiny_families import all_families
from locum.kernels import few_rows

pytestmark = [
    pytest.mark.families,
    pytest.mark.skipif(not few_rows.library(), reason="no C++ compiler or no avx512_bf16"),
]
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}


@pytest.mark.parametrize("family", all_families())
def test_family(family: str) -> None:
    skip_refused(family)
    case = Case(family)
    model = case.model()
    if not model.can_generate():
        pytest.skip("it does not generate")

    def logits() -> torch.Tensor:
        made = model.generate(case.ids_BS, **SETTINGS, return_dict_in_generate=True)
        return torch.stack(made.logits)

    expected = logits()
    locum.optimize(model)
    near(logits(), expected)
