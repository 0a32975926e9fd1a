"""Locum's checkpoints in vLLM's own engine, against transformers in the same environment. Run by `make test-vllm`."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import locum
from engines.made import MIXED, PLANS, REFERENCE, make, original
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer, read_config
from locum.checkpoints.shard_reader import ShardReader
from locum.checkpoints.skeleton import read_shape, skeleton
from locum.containers.container import StandInExperts
from locum.engines.engines import ENGINES, ask_all
from locum.errors import CheckpointError, UnsupportedModel
from locum.experts.parts.part import PARTS
from locum.experts.policies.group_local import GroupLocal
from locum.experts.policies.in_turn import InTurn
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.experts.policies.policy import POLICIES
from locum.experts.policies.skip import Skip
from locum.experts.policies.soft_lora import SoftLora
from locum.experts.policies.top_p import TopP
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, Slot, make_plan
from locum.verification.verify import agreement
from making import foreign
from making.broken import DAMAGES
from making.quantised import LINEAR, group_of, int4, quantise_by

NEW = 64
COMPRESSED = tuple(name for name in PLANS if name != "uniform")
# Of the bundled model each kind by itself; of the others several in one checkpoint, for every start takes its time.
CASES = {"reference": COMPRESSED, **dict.fromkeys(("qwen3_moe", "deepseek_v3", "mixtral"), tuple(MIXED))}
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM; `make test-vllm` has an environment with it"),
]


def serve(folder: Path, jobs: list[dict], **environment: str) -> list[dict]:
    """What engines answer, each started after the other in one process of its own: locum/engines/run.py says what."""
    jobs = [{"dtype": "float32", "prompts": [[0]], "texts": [], "new_tokens": NEW} | job for job in jobs]
    root = str(folder.parent / "vllm")  # what it learns of a model class serves the next start
    settings = {"VLLM_CACHE_ROOT": root, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return ask_all(ENGINES["vllm"], Path(sys.executable), jobs, folder / "asked", **settings)


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
    """By family: what vLLM and transformers say of its compressed checkpoints, in float32."""

    @functools.cache
    def answers(family: str) -> dict[str, dict]:
        folder, ids = tmp_path_factory.mktemp(family), prompts(family)
        expected, jobs = {}, []
        for name in CASES[family]:
            model, size = make(folder / name, family, name, torch.float32)
            expected[name] = {"expected": greedy(model, ids), "promised": size}
            jobs.append({"folder": str(folder / name), "prompts": ids})
        return {n: {**expected[n], **a} for n, a in zip(expected, serve(folder, jobs), strict=True)}

    return answers


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in CASES.items() for name in names])
def test_the_engine_writes_what_transformers_writes(served, family, name):
    answer = served(family)[name]
    assert answer.get("error") is None
    assert answer["tokens"] == answer["expected"]
    assert len({tuple(row) for row in answer["tokens"]}) > 1
    assert answer["bytes"] == pytest.approx(answer["promised"], rel=0.05)


def test_policies_run_the_experts_that_they_run_in_transformers(tmp_path):
    """One in each layer: fewer experts, skipped ones with two sets of small experts beside, experts of one of two groups, and vectors with
    top-p among the others."""
    model = original("reference", torch.float32)
    shape = shape_of(model)
    policies = [
        TopP(0.6),
        InTurn((Skip(0.4, renormalise=True), SoftLora(3, 2), SoftLora(2, 4, "b-2"))),
        GroupLocal((0, 1) * (shape.layers[2].num_experts // 2)),
        InTurn((GroupLocal((0, 0, 1, 1) * (shape.layers[3].num_experts // 4)), MainWithVectors(3), TopP(0.7))),
    ]
    layers = zip(shape.layers, policies, strict=True)
    plan = [LayerPlan(x.name, (KEPT,) * x.num_experts, routing=policy) for x, policy in layers]
    apply_plan(model, make_plan(shape, plan))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "soft_" in name:  # at first they add nothing
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "out")
    ids = prompts("reference")
    expected, plain = greedy(model, ids), greedy(original("reference", torch.float32), ids)
    (answer,) = serve(tmp_path / "out", [{"folder": str(tmp_path / "out"), "prompts": ids}])
    assert answer.get("error") is None and answer["tokens"] == expected != plain


@torch.no_grad()
def test_the_next_token_is_the_same_in_bfloat16(tmp_path):
    """Teacher-forced on held-out text, of the bundled model in its own format.

    A routing policy cuts between experts whose gates may be all but equal. Where transformers' own float32 agrees less
    with its bfloat16 than 99 %, that is what can be asked of the engine too.
    """
    ids, jobs, logits, own = torch.tensor(reference_ids(12, 128)), [], {}, {}
    for name in MIXED:
        model, _ = make(tmp_path / name, "reference", name, torch.bfloat16)
        logits[name] = model(ids).logits.float()
        own[name] = agreement(logits[name], model.float()(ids).logits.argmax(-1), torch.bfloat16)
        jobs.append({"folder": str(tmp_path / name), "dtype": "bfloat16", "prompts": ids.tolist(), "new_tokens": 1})
    found = {}
    for name, answer in zip(MIXED, serve(tmp_path, jobs), strict=True):
        likeliest_BS = torch.from_numpy(np.load(tmp_path / "asked" / answer["ids"]))[..., 0]
        found[name] = agreement(logits[name], likeliest_BS, torch.bfloat16)
    assert all(found[name] >= min(0.99, own[name] - 0.005) for name in MIXED), (found, own)


def test_a_uniformly_pruned_checkpoint_needs_no_plugin(tmp_path):
    ids = prompts("qwen3_moe")
    model, _ = make(tmp_path / "uniform", "qwen3_moe", "uniform", torch.float32)
    make(tmp_path / "other", "qwen3_moe", "uneven", torch.float32)
    jobs = [{"folder": str(tmp_path / name), "prompts": ids} for name in ("uniform", "other")]
    stock, other = serve(tmp_path, jobs, VLLM_PLUGINS="")
    assert stock["tokens"] == greedy(model, ids)
    assert "locum" in other["error"][1]  # the plugin was out: what needs it is refused


def test_an_exported_checkpoint_needs_no_plugin(tmp_path):
    """The bundled model ties its head to its embedding, and vLLM's class of the family does not."""
    ids = prompts("reference")
    plan = make_plan((shape := read_shape(REFERENCE)), PLANS["merged"](shape.layers))
    made = locum.apply(REFERENCE, plan=plan, out=tmp_path / "merged")
    locum.export(made, to="stock", out=tmp_path / "stock")
    (answer,) = serve(tmp_path, [{"folder": str(tmp_path / "stock"), "prompts": ids}], VLLM_PLUGINS="")
    assert answer.get("error") is None
    assert answer["tokens"] == greedy(load_model(made, dtype=torch.float32), ids)


@pytest.mark.parametrize("how", ["compiled", "own process"])
def test_the_engine_as_users_start_it(tmp_path, how):
    """Compiled by torch.compile, as vLLM does unless it is told not to; and with the engine in a process of its own."""
    ids = prompts("reference")
    model, _ = make(tmp_path / "light", "reference", "lightmoe", torch.float32)
    job = {"folder": str(tmp_path / "light"), "prompts": ids, "more": {"enforce_eager": how != "compiled"}}
    (answer,) = serve(tmp_path, [job], VLLM_ENABLE_V1_MULTIPROCESSING="0" if how == "compiled" else "1")
    assert answer.get("error") is None
    assert answer["tokens"] == greedy(model, ids)


def test_a_part_and_a_policy_of_another_package_are_served(tmp_path, monkeypatch):
    """Their package is installed where the engine runs, by entry points; the engine is told nothing else."""
    site = foreign.install(tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    for registry in (PARTS, POLICIES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        monkeypatch.setattr(registry, "_offered", True)
    ids, model = prompts("qwen3_moe"), original("qwen3_moe", torch.float32)
    both, shape = Slot((PARTS["shift"](0.2), PARTS["low_rank"](4, "svd"))), shape_of(model)
    layers = [
        LayerPlan(x.name, (KEPT,) * (x.num_experts - 2) + (both,) * 2, routing=POLICIES["skip_light"](0.3))
        for x in shape.layers
    ]
    apply_plan(model, make_plan(shape, layers), None)
    model.save_pretrained(tmp_path / "made")
    jobs = [{"folder": str(tmp_path / "made"), "prompts": ids}]
    (answer,) = serve(tmp_path / "with", jobs, PYTHONPATH=str(site))
    assert answer.get("error") is None
    assert answer["tokens"] == greedy(model, ids)
    (lacking,) = serve(tmp_path / "without", jobs)
    assert "unknown routing policy 'skip_light'" in lacking["error"][1]
    for name in [name for name in sys.modules if name.startswith("locum_foreign")]:
        monkeypatch.delitem(sys.modules, name)


# --- checkpoints that are broken on purpose ------------------------------------------------------------------------


def test_broken_checkpoints_are_refused_with_one_message(tmp_path):
    make(tmp_path / "whole", "qwen3_moe", "lightmoe", torch.float32)
    jobs, words = [], {}
    for name, damage in DAMAGES.items():
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        words[name] = damage(folder)
        jobs.append({"folder": str(folder)})
    for (name, expected), answer in zip(words.items(), serve(tmp_path, jobs), strict=True):
        kind, said = answer["error"]
        if name == "without_a_tensor":  # which is the model's own: vLLM itself misses it
            assert "were not initialized from checkpoint" in said
            continue
        assert kind == "CheckpointError"
        assert all(word in said for word in expected), said


def test_what_vllm_has_fetched_by_name_is_checked_as_it_loads(tmp_path):
    from locum.engines.vllm_plugin import LocumQuantization, OwnWeights, load_weights, path_numbers

    make(tmp_path, "qwen3_moe", "lightmoe", torch.float32)
    config = read_config(tmp_path)
    empty = {n: m for n, m in skeleton(config).named_modules() if isinstance(m, StandInExperts)}
    containers = {path_numbers(name): (name, module.to_empty(device="cpu")) for name, module in empty.items()}
    quantization = LocumQuantization(config.quantization_config["layers"])
    load = functools.partial(
        load_weights, lambda rest: {name for name, _ in rest}, containers, quantization, OwnWeights(ShardReader({}))
    )
    tensors = load_file(tmp_path / "model.safetensors")
    assert load(tensors.items()) == tensors.keys()
    for numbers, (name, container) in containers.items():
        assert torch.equal(container.dense.down_NDF, tensors[f"{name}.dense.down_NDF"]), numbers
    name = min(name for name in tensors if name.endswith("adapters.0.up_B_FR"))
    with pytest.raises(CheckpointError, match=re.escape(f"lacks 1 of its containers' tensors (first: {name})")):
        load((key, tensor) for key, tensor in tensors.items() if key != name)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} has shape")):
        load((tensors | {name: tensors[name][:-1]}).items())


def test_more_than_one_device_is_refused(tmp_path):
    make(tmp_path / "light", "qwen3_moe", "lightmoe", torch.float32)
    code = """
import sys
from vllm.engine.arg_utils import EngineArgs
from locum.errors import UnsupportedModel
from locum.engines.vllm_plugin import check_engine
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


# --- quantised checkpoints -----------------------------------------------------------------------------------------


INT4 = group_of("pack-quantized", group_size=32) | {"ignore": ["lm_head", "re:.*mlp.gate$"]}


def quantised(folder: Path) -> Path:
    """The bundled model with its linear layers and experts in four bits."""
    model = Path(shutil.copytree(REFERENCE, folder))
    quantise_by(model, functools.partial(int4, group=32), INT4, (*LINEAR, ".v_proj.weight"))
    return model


@torch.no_grad()
def test_containers_in_a_quantised_checkpoint_beside_vllms_own_kernels(tmp_path):
    """Attention in four bits is vLLM's, containers are as transformers has them. vLLM 0.32 has no four-bit experts on CPU for
    these groups, so no layer is left to it.
    """
    import vllm._custom_ops  # noqa: F401 (it loads the kernels)

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's CPU build has products in four bits for AVX-512 alone")
    model = quantised(tmp_path / "model")
    shape, ids, jobs, expected, own = read_shape(model), torch.tensor(reference_ids(8, 128)), [], {}, {}
    plans = {"light": PLANS["lightmoe"]((*shape.layers, shape.layers[-1])), "low_rank": PLANS["low_rank"](shape.layers)}
    for name, layers in plans.items():
        made = locum.apply(model, plan=make_plan(shape, layers), out=tmp_path / name)
        ours, exact = (load_model(made, dtype=dtype)(ids).logits for dtype in (torch.bfloat16, torch.float32))
        expected[name], own[name] = exact, agreement(exact, ours.argmax(-1), torch.bfloat16)
        jobs.append({"folder": str(made), "dtype": "bfloat16", "prompts": ids.tolist(), "new_tokens": 1})
    for name, answer in zip(plans, serve(tmp_path, jobs), strict=True):
        assert answer.get("error") is None
        likeliest_BS = torch.from_numpy(np.load(tmp_path / "asked" / answer["ids"]))[..., 0]
        found = agreement(expected[name], likeliest_BS, torch.bfloat16)
        assert found >= min(0.99, own[name] - 0.005), (name, found, own[name])


def test_what_is_in_a_container_is_read_as_numbers_and_the_rest_is_left_to_vllms_own_config(tmp_path):
    """Without an engine: the methods that layers get, and what is loaded."""
    from vllm.model_executor.layers.linear import LinearBase

    from locum.engines.vllm_plugin import LocumQuantization, load_weights, path_numbers

    model = quantised(tmp_path / "model")
    shape = read_shape(model)
    layers = [PLANS["lightmoe"](shape.layers)[0], PLANS["uneven"](shape.layers)[1]]
    made = locum.apply(model, plan=make_plan(shape, layers), out=tmp_path / "made")
    config, expected = read_config(made), load_model(made)
    quantization = LocumQuantization.from_config(json.loads((made / "config.json").read_text())["quantization_config"])
    quantization.maybe_update_config(str(made), config)
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert quantization.rest.packed_modules_mapping is quantization.packed_modules_mapping
    linear = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(linear)
    method = quantization.get_quant_method(linear, "model.layers.3.self_attn.qkv_proj")
    assert type(method).__name__ == "CompressedTensorsLinearMethod"
    assert type(quantization.get_quant_method(linear, "model.layers.3.mlp.gate")).__name__ == "UnquantizedLinearMethod"
    _, own = quantization.files(made, config, torch.bfloat16)
    assert len(own.names) == 4  # up and down of two layers
    empty = {n: m for n, m in skeleton(config).named_modules() if isinstance(m, StandInExperts)}
    containers = {path_numbers(n): (n, m.to(torch.bfloat16).to_empty(device="cpu")) for n, m in empty.items()}
    handed: dict[str, torch.Tensor] = {}

    def stock(rest):
        handed.update(rest)
        return {*handed}

    tensors = load_file(made / "model.safetensors")
    loaded = load_weights(stock, containers, quantization, own, tensors.items())
    assert len(empty) == 2
    for name, container in containers.values():
        reference = expected.get_submodule(name)
        assert {n: p.shape for n, p in container.named_parameters()} == {
            n: p.shape for n, p in reference.named_parameters()
        }
        assert all(torch.equal(p, reference.get_parameter(n)) for n, p in container.named_parameters())
        assert all(f"{name}.{n}" in loaded for n, _ in container.named_parameters())
    packed = {n for n in tensors if n.endswith("_packed")}
    assert {n for n in packed if n.startswith(("model.layers.2.mlp.", "model.layers.0.self_attn."))} <= {*handed}
    assert not any(n.startswith(("model.layers.0.mlp.experts.", "model.layers.1.mlp.experts.")) for n in handed)
    assert all(torch.equal(tensors[n], tensor) for n, tensor in handed.items())


def test_a_quantised_checkpoint_with_containers_is_served_from_a_folder(tmp_path):
    from locum.engines.vllm_plugin import LocumQuantization

    model = quantised(tmp_path / "model")
    shape = read_shape(model)
    made = locum.apply(model, plan=make_plan(shape, PLANS["uneven"](shape.layers)), out=tmp_path / "made")
    said = json.loads((made / "config.json").read_text())["quantization_config"]
    with pytest.raises(UnsupportedModel, match="from a folder; fetch"):
        LocumQuantization.from_config(said).maybe_update_config("somebody/model", read_config(made))


def test_it_is_timed_beside_transformers():
    short = {"prompt": 24, "new_tokens": 4, "batch_sizes": (1, 3), "rounds": 1, "threads": 1}
    result = locum.bench(REFERENCE, engine="vllm,transformers", **short)
    assert result["not_run"] == []
    rows = {(r["batch"], r["phase"]): r for r in result["rows"] if r["engine"] == "vllm"}
    assert set(rows) == {(size, phase) for size in (1, 3) for phase in ("prefill", "decode")}
    assert all(min(row["seconds"]) > 0 for row in rows.values())
    assert result["models"]["model"]["engines"]["vllm"]["share"] == 1.0
