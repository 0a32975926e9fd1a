"""Every family's files in compressed-tensors, linear layers beside experts too: transformers computes what Locum computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import locum
from families.case import skip_refused
from families.tiny_families import all_families, tiny
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import open_source, read_shape
from locum.errors import UnsupportedModel
from locum.models.families import model_class
from making.checkpoints import write_tokenizer
from making.tiny_models import tiny_ids

compressors = pytest.importorskip("compressed_tensors.compressors")
pytestmark = pytest.mark.families


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.set_experts_implementation("eager")
    return model(input_ids=tiny_ids(vocab=120), use_cache=False).logits


def numbers_alone(folder: Path) -> bool:
    return all(entry["dtype"] != "F8_E4M3" for file in open_source(folder).stored.values() for entry in file.values())


@pytest.mark.parametrize("family", all_families())
def test_family(family, tmp_path):
    skip_refused(family)
    original, out = tmp_path / "original", tmp_path / "out"
    tiny(family).bfloat16().save_pretrained(original)
    write_tokenizer(original)
    try:
        said = locum.export(original, to="compressed-tensors", bits="fp8", rest="fp8", out=out)
    except UnsupportedModel as error:
        assert "keeps each expert's weights apart" in str(error) and not out.exists()
        return
    assert said["bytes"][1] == read_shape(out).bytes < said["bytes"][0] and not numbers_alone(out)
    ours = load_model(out)
    model, info = model_class(AutoConfig.from_pretrained(out)).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    logits(model)  # unpacks
    theirs = model.state_dict()
    for name, tensor in ours.state_dict(keep_vars=True).items():
        assert torch.equal(theirs[name].float(), tensor.float()), name
        tensor.data = tensor.data.to(theirs[name].dtype)  # some are float32 only where transformers reads numbers
    expected = logits(ours).float()
    assert torch.allclose(logits(model).float(), expected, atol=0.02 * float(expected.abs().max()))
