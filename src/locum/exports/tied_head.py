"""Output heads that are tied to the embedding: some engines need them in the files as well."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.read import read_config, read_headers
from ..checkpoints.skeleton import skeleton
from ..checkpoints.weight_files import is_adapter


def lacks_head(model: Path) -> bool:
    """Whether the files of a checkpoint leave out a head because it is tied to the embedding."""
    tied = skeleton(read_config(model)).all_tied_weights_keys
    return not is_adapter(model) and not tied.keys() <= read_headers(model).keys()


def with_head(model: PreTrainedModel) -> PreTrainedModel:
    """Give an output head that is tied to the embedding memory of its own, so that the file has it too. In place.

    vLLM's classes of a dozen families (OLMoE, DeepSeek, GLM-4, gpt-oss, ...) never tie it and leave it uninitialised in
    silence; transformers ties it again when it loads, because the config still says so and the two are equal.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model
