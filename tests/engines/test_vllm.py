"""Locum's checkpoints in vLLM's own engine, against transformers in the same environment. Run by `make test-vllm`."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engines.made import PLANS, REFERENCE, make
from locum.checkpoint import load_tokenizer

TESTS = Path(__file__).parents[1]
NEW = 64
COMPRESSED = tuple(name for name in PLANS if name != "uniform")
# vLLM 0.32's rotary kernel for CPU is wrong for interleaved pairs (DeepSeek) in float32; its PyTorch form is right.
MORE = {"deepseek_v3": {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}}
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM; `make test-vllm` has an environment with it"),
]


def serve(folder: Path, jobs: list[dict], **environment: str) -> list[dict]:
    """What engines answer, each started after the other in one process of its own."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder.parent / "vllm"),  # what it learns of a model class serves the next start
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    asked, answers = folder / "jobs.json", folder / "answers.json"
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, str(TESTS / "engines" / "serve.py"), str(asked), str(answers)]
    done = subprocess.run(command, env={**os.environ, **settings, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answers.read_text())


def reference_ids(count: int, length: int) -> list[list[int]]:
    texts = sorted((REFERENCE.parent / "text").glob("*.txt"))
    tokenizer = load_tokenizer(REFERENCE)
    ids = [tokenizer(file.read_text(encoding="utf-8")[:20_000])["input_ids"] for file in texts]
    return [ids[i % len(ids)][i * length : (i + 1) * length] for i in range(count)]


def prompts(family: str) -> list[list[int]]:
    if family == "reference":
        return reference_ids(8, 20)
    return torch.randint(2, 320, (8, 20), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[list[int]]) -> list[list[int]]:
    """The NEW likeliest tokens after each prompt, one after another; no end of text stops them."""
    ids_BS = torch.tensor(ids)
    for _ in range(NEW):
        ids_BS = torch.cat([ids_BS, model(ids_BS).logits[:, -1:].argmax(-1)], dim=1)
    return ids_BS[:, len(ids[0]) :].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Callable[[str], dict[str, dict]]:
    """By family: what vLLM and transformers say of every compressed checkpoint, in float32."""

    @functools.cache
    def answers(family: str) -> dict[str, dict]:
        folder, ids = tmp_path_factory.mktemp(family), prompts(family)
        expected, jobs = {}, []
        for name in COMPRESSED:
            model, size = make(folder / name, family, name, torch.float32)
            expected[name] = {"expected": greedy(model, ids), "promised": size}
            job = {"folder": str(folder / name), "dtype": "float32", "generate": ids, "more": MORE.get(family, {})}
            jobs.append(job)
        return {n: {**expected[n], **a} for n, a in zip(COMPRESSED, serve(folder, jobs), strict=True)}

    return answers


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("family", ["reference", "qwen3_moe", "deepseek_v3", "mixtral"])
def test_the_engine_writes_what_transformers_writes(served, family, name):
    answer = served(family)[name]
    assert answer.get("error") is None
    assert answer["tokens"] == answer["expected"]
    assert len({tuple(row) for row in answer["tokens"]}) > 1
    assert answer["bytes"] == pytest.approx(answer["promised"], rel=0.05)


def agreement(logits_BSV: torch.Tensor, token_BS: torch.Tensor) -> float:
    """How often a token is the likeliest. In bfloat16 the two likeliest tie at some 2 % of positions, and rounding
    decides: a token whose logit is within one step of bfloat16 of the largest counts.
    """
    largest_BS = logits_BSV.amax(-1)
    found_BS = logits_BSV.gather(-1, token_BS[..., None])[..., 0]
    step = torch.finfo(torch.bfloat16).eps
    return (found_BS >= largest_BS - step * largest_BS.abs()).float().mean().item()


@torch.no_grad()
def test_the_next_token_is_the_same_in_bfloat16(tmp_path):
    """Teacher-forced on held-out text, of the bundled model in its own format.

    A routing policy cuts between experts whose gates may be all but equal. Where transformers' own float32 agrees less
    with its bfloat16 than 99 %, that is what can be asked of the engine too.
    """
    ids, jobs, logits, own = torch.tensor(reference_ids(12, 128)), [], {}, {}
    for name in COMPRESSED:
        model, _ = make(tmp_path / name, "reference", name, torch.bfloat16)
        logits[name] = model(ids).logits[:, :-1].float()
        own[name] = agreement(logits[name], model.float()(ids).logits[:, :-1].argmax(-1))
        jobs.append({"folder": str(tmp_path / name), "dtype": "bfloat16", "score": ids.tolist()})
    answers = dict(zip(COMPRESSED, serve(tmp_path, jobs), strict=True))
    found = {name: agreement(logits[name], torch.tensor(answer["top"])) for name, answer in answers.items()}
    assert all(found[name] >= min(0.99, own[name] - 0.005) for name in COMPRESSED), (found, own)


def test_a_uniformly_pruned_checkpoint_needs_no_plugin(tmp_path):
    ids = prompts("qwen3_moe")
    model, _ = make(tmp_path / "uniform", "qwen3_moe", "uniform", torch.float32)
    make(tmp_path / "other", "qwen3_moe", "uneven", torch.float32)
    jobs = [{"folder": str(tmp_path / name), "dtype": "float32", "generate": ids} for name in ("uniform", "other")]
    stock, other = serve(tmp_path, jobs, VLLM_PLUGINS="")
    assert stock["tokens"] == greedy(model, ids)
    assert "locum" in other["error"][1]  # the plugin was out: what needs it is refused


@pytest.mark.parametrize("how", ["compiled", "own process"])
def test_the_engine_as_users_start_it(tmp_path, how):
    """Compiled by torch.compile, as vLLM does unless it is told not to; and with the engine in a process of its own."""
    ids = prompts("reference")
    model, _ = make(tmp_path / "light", "reference", "lightmoe", torch.float32)
    job = {"folder": str(tmp_path / "light"), "dtype": "float32", "generate": ids}
    job["more"] = {"enforce_eager": how != "compiled"}
    (answer,) = serve(tmp_path, [job], VLLM_ENABLE_V1_MULTIPROCESSING="0" if how == "compiled" else "1")
    assert answer.get("error") is None
    assert answer["tokens"] == greedy(model, ids)


# --- checkpoints that are broken on purpose ------------------------------------------------------------------------


def without_a_tensor(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("adapters.0.up_B_FR"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"lacks 1 of its containers' tensors (first: {name})"


def of_another_shape(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("dense.down_NDF"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{name} has shape"


def of_another_version(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    return "Locum format version 99"


def truncated(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "is damaged"


def test_broken_checkpoints_are_refused_with_one_message(tmp_path):
    make(tmp_path / "whole", "qwen3_moe", "lightmoe", torch.float32)
    jobs, messages = [], []
    for damage in (without_a_tensor, of_another_shape, of_another_version, truncated):
        folder = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "whole", folder)
        messages.append(damage(folder))
        jobs.append({"folder": str(folder), "dtype": "float32"})
    for damage in (without_a_tensor, of_another_shape):  # found while loading where nothing could be read before
        jobs.append({"folder": str(tmp_path / damage.__name__), "dtype": "float32", "unchecked": True})
    for answer, message in zip(serve(tmp_path, jobs), [*messages, *messages[:2]], strict=True):
        kind, text = answer["error"]
        assert kind == "CheckpointError"
        assert message in text
        assert "again" in text or "install" in text  # what to do


def test_more_than_one_device_is_refused(tmp_path):
    make(tmp_path / "light", "qwen3_moe", "lightmoe", torch.float32)
    code = """
import sys
from vllm.engine.arg_utils import EngineArgs
from locum.errors import UnsupportedModel
from locum.vllm_plugin import check_engine
for more in ({}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}):
    config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, **more).create_engine_config()
    try:
        check_engine(config)
        print("answer: fine")
    except UnsupportedModel as error:
        print("answer:", error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "light")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    one, *more = [line for line in output.splitlines() if line.startswith("answer:")]  # vLLM's own log goes there too
    assert one == "answer: fine"
    assert len(more) == 2
    assert all("one device" in line and "tensor_parallel_size=2" in line for line in more)
