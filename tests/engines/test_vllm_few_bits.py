"""Experts and the rest in few bits, in vLLM's own engine, against transformers. Run by `make test-vllm`.

vLLM 0.32's CPU engine has products for experts in 4 bits whose groups are 64 or 128 long, on processors with AMX, and says of all
others that it has none. Those products round activations to 8 bits, so logits are near transformers' and not the same: how near is
asserted here. Containers are computed by Locum's own products in both.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import locum
from engines.made import PLANS, REFERENCE
from engines.test_vllm import greedy, prompts, reference_ids, serve
from locum.checkpoints.load import load_model
from locum.checkpoints.rest import pack_rest
from locum.checkpoints.skeleton import read_shape
from locum.formats.schemes import scheme_of
from locum.plans.bits import FewBits
from locum.plans.plan import make_plan
from locum.verification.verify import agreement

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM; `make test-vllm` has an environment with it"),
]
WIDTH = 64  # of experts: whole groups of 64, where the bundled model's 96 are none
NO_PRODUCTS = "No WNA16 MoE backend supports"


def narrow_reference(folder: Path) -> Path:
    """The bundled, trained model with the WIDTH columns of each expert that weigh most. A random model would be all rounding."""
    shutil.copytree(REFERENCE, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        up, gate = (name.replace("down_proj", f"{which}_proj") for which in ("up", "gate"))
        weigh_F = (
            tensors[name].float().norm(dim=0) * tensors[up].float().norm(dim=1) * tensors[gate].float().norm(dim=1)
        )
        keep = weigh_F.topk(WIDTH).indices.sort().values
        tensors[name] = tensors[name][:, keep].contiguous()
        tensors |= {which: tensors[which][keep].contiguous() for which in (up, gate)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": WIDTH}))
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A stock checkpoint with three quarters of the experts. Tests only read it."""
    folder = tmp_path_factory.mktemp("narrow")
    source = narrow_reference(folder / "original")
    shape = read_shape(source)
    return locum.apply(source, plan=make_plan(shape, PLANS["uniform"](shape.layers)), out=folder / "pruned")


def apart(folder: Path, answer: dict, asked: Path, ids: list[list[int]]) -> tuple[float, float, float]:
    """Of an engine's answer in bfloat16: how often the likeliest token is transformers', how often that is its own in float32,
    and the mean difference of the log-probabilities of the likeliest tokens."""
    with torch.no_grad():
        exact_BSV = load_model(folder, dtype=torch.float32)(torch.tensor(ids)).logits
        own_BSV = load_model(folder, dtype=torch.bfloat16)(torch.tensor(ids)).logits.float()
    likeliest_BSJ, values_BSJ = (torch.from_numpy(np.load(asked / "asked" / answer[x])) for x in ("ids", "values"))
    off = (exact_BSV.log_softmax(-1).gather(-1, likeliest_BSJ) - values_BSJ).abs().mean().item()
    found = agreement(exact_BSV, likeliest_BSJ[..., 0], torch.bfloat16)
    return found, agreement(exact_BSV, own_BSV.argmax(-1), torch.bfloat16), off


def test_a_pruned_checkpoint_in_four_bits_is_served_by_its_own_kernels(pruned, tmp_path):
    ids, jobs = reference_ids(8, 64), []
    for group, rest in ((64, None), (64, "4"), (32, None)):
        out = tmp_path / f"{group}-{rest}"
        locum.export(pruned, to="compressed-tensors", group=group, rest=rest, out=out)
        jobs.append({"folder": str(out), "dtype": "bfloat16", "prompts": ids, "new_tokens": 16})
    *taken, refused = serve(tmp_path, jobs, VLLM_PLUGINS="")
    assert NO_PRODUCTS in refused["error"][1]
    if not torch.cpu._is_amx_tile_supported():
        assert all(NO_PRODUCTS in answer["error"][1] for answer in taken)
        pytest.skip("this processor has no AMX, so vLLM's CPU engine has no products for int4 experts")
    found = [apart(Path(job["folder"]), answer, tmp_path, ids) for job, answer in zip(jobs, taken, strict=False)]
    assert all(same >= min(0.99, own) - 0.02 and off <= 0.05 for same, own, off in found), found


def test_containers_in_four_bits_are_served_with_the_same_tokens(tmp_path):
    """In float32 to the token; in bfloat16, with attention in 4 bits by vLLM's own kernels, as near as bfloat16 is to float32."""
    shape, few = read_shape(REFERENCE), FewBits.of("4", 32, "nearest")
    plan = make_plan(shape, few.applied(PLANS["lightmoe"](shape.layers), shape))
    light = locum.apply(REFERENCE, plan=plan, out=tmp_path / "light")
    pack_rest(light, scheme_of("4", 32), tmp_path / "packed")
    ids = prompts("reference")
    jobs = [{"folder": str(light), "prompts": ids}]
    jobs.append(
        {"folder": str(tmp_path / "packed"), "dtype": "bfloat16", "prompts": reference_ids(8, 64), "new_tokens": 4}
    )
    exact, packed = serve(tmp_path, jobs)
    assert exact.get("error") is None and exact["tokens"] == greedy(load_model(light, dtype=torch.float32), ids)
    others = shape.bytes - shape.bytes_of_experts  # which float32 makes twice as large; experts stay packed
    assert exact["bytes"] == pytest.approx(read_shape(light).bytes + others, rel=0.001)
    assert packed.get("error") is None
    same, own, off = apart(tmp_path / "packed", packed, tmp_path, jobs[1]["prompts"])
    assert same >= min(0.99, own) - 0.02 and off <= 0.05, (same, own, off)


def test_of_other_formats_it_says_that_it_has_no_products(pruned, tmp_path):
    """8 bits, and FP8 with a scale for each row."""
    jobs = []
    for bits in ("8", "fp8"):
        locum.export(pruned, to="compressed-tensors", bits=bits, group=64, out=tmp_path / bits)
        jobs.append({"folder": str(tmp_path / bits), "dtype": "bfloat16", "prompts": [[5, 6]], "new_tokens": 1})
    whole, fp8 = serve(tmp_path, jobs, VLLM_PLUGINS="")
    assert NO_PRODUCTS in whole["error"][1]
    assert "FP8 MoE backend" in fp8["error"][1]
