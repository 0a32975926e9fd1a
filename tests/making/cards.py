"""What a hub checks of a model card's head, as far as that can be checked without one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from transformers.pipelines import SUPPORTED_TASKS

RELATIONS = ("adapter", "merge", "quantized", "finetune")
LISTS = ("tags", "datasets")


def checked(folder: Path) -> dict[str, Any]:
    """The head of a folder's card, if a hub would take it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    card, head = ModelCard(text), metadata_load(folder / "README.md")
    assert head == yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")) == card.data.to_dict()
    assert all(isinstance(head.get(key, []), list) for key in LISTS)
    assert all(isinstance(x, str) for key in LISTS for x in head.get(key, []))
    for name in (*head.get("datasets", []), *([head["base_model"]] if "base_model" in head else [])):
        validate_repo_id(name)
    assert head.get("base_model_relation", "finetune") in RELATIONS
    assert ("base_model_relation" in head) <= ("base_model" in head)
    assert head.get("pipeline_tag", "text-generation") in SUPPORTED_TASKS
    licence = head.get("license", "mit")
    assert all(isinstance(x, str) and x == x.lower() and " " not in x for x in [licence] if isinstance(licence, str))
    assert ("license_name" in head and "license_link" in head) or licence != "other"
    if "model-index" in head:
        name, results = model_index_to_eval_results(head["model-index"])
        assert eval_results_to_model_index(name, results) == head["model-index"]
        assert results and all(math.isfinite(x.metric_value) for x in results)
    return head
