"""Hidden states that wait in a file come back as they were, to all that look at them; what is none stays in memory."""

from __future__ import annotations

import torch
from torch import nn

from locum.models.waiting import WaitingStates, tensors_in

D = 6


def nest():
    """Hidden states, one of them a view of another, and what is none: another width, whole numbers."""
    hidden = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    return {"hidden": hidden, "more": (hidden[:, 1:], torch.randn(1, 4 * D)), "mask": torch.ones(2, D + 1)}, torch.ones(
        2, D, dtype=torch.int64
    )


def test_states_come_back_to_all_that_look_at_them(tmp_path):
    model = nn.Linear(D, D)
    states, (given, ids) = WaitingStates(tmp_path, model, D), nest()
    given["own"] = model.weight  # which all jobs share
    before = [tensor.clone() for tensor in tensors_in((given, ids))]
    first, second = states.put(0, (given, ids)), states.put(1, other := torch.randn(4, D))
    kept = other.untyped_storage().nbytes(), model.weight.untyped_storage().nbytes(), ids.untyped_storage().nbytes()
    assert kept == (0, D * D * 4, 2 * D * 8) and len(first.storages) == 2 and len(second.storages) == 1
    with first.there():
        assert all(map(torch.equal, tensors_in((given, ids)), before))
        given["hidden"][0, 1, 0] = 7
        assert given["more"][0][0, 0, 0] == 7
    first.bring()
    assert all(map(torch.equal, tensors_in((given, ids)), before))  # what was written meanwhile is lost
    given["hidden"].add_(1)
    states.put(0, (given, ids)).bring()  # the room that the job had
    assert torch.equal(given["hidden"], before[0] + 1) and torch.equal(given["more"][0], before[1] + 1)
    states.put(2, ids).bring()  # a job without any
    assert not list(tmp_path.iterdir())
