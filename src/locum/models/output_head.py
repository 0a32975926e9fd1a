"""A causal language model in two: its body runs on a whole batch, its output head on a stretch of what that gave.

Logits are the largest tensor of most models: four bytes a token and word of the vocabulary, and in training several times that.

Letters: B blocks, S tokens of a block, W positions of a stretch, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModel


def check_predicts(model: Any, so: str) -> None:
    """Raises UnsupportedModel for a model that gives no probabilities of tokens; `so` says what it can therefore not do."""
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{type(model).__name__} does not predict tokens, so {so}")


def run_body(model: Any, ids_BS: Tensor, attention_BS: Tensor) -> tuple[Any, Any]:
    """The model inside any adapters, and its body's output on a batch."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(model, model.base_model_prefix)
    given = {"input_ids": ids_BS.to(model.device), "attention_mask": attention_BS.to(model.device)}
    return model, body(**given, use_cache=False)


def run_head(model: Any, output: Any, hidden_BWD: Tensor, ids_BW: Tensor) -> Tensor:
    """Float32 logits [B, W, V] of hidden states from a body's `output`. Raises UnsupportedModel for a model without a body.

    The model's own forward runs with its body answering from memory, so scaling and soft caps are the model's.
    """
    body: nn.Module = getattr(model, model.base_model_prefix)
    part = type(output)(last_hidden_state=hidden_BWD)
    previous = body.__dict__.get("forward")  # accelerate puts its own forward there
    body.forward = lambda *args, **kwargs: part
    try:
        logits_BWV = model(input_ids=ids_BW.to(model.device), use_cache=False).logits
    finally:
        del body.forward
        if previous is not None:
            body.forward = previous
    if logits_BWV.shape[1] != hidden_BWD.shape[1]:
        raise UnsupportedModel(f"{type(model).__name__} does not call its {model.base_model_prefix!r}; it has no body")
    return logits_BWV.float()


def vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size
