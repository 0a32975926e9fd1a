"""What Locum exports, in llama.cpp's own engine, against transformers. Run by `make test-llamacpp`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import locum
from engines.made import PLANS, REFERENCE, original
from locum.bundled import sample_texts
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.checkpoints.skeleton import read_shape
from locum.engines import timing
from locum.engines.engines import ENGINES, ask
from locum.exports.gguf import Gguf
from locum.exports.target import write_form
from locum.plans.plan import make_plan
from locum.verification.folder import FAILED, OK
from making.checkpoints import write_tokenizer

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp; `make test-llamacpp` has it"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Stock checkpoints, pruned alike in every layer or merged, with whole experts: of the bundled model, and a DeepSeek."""
    folder, shape = tmp_path_factory.mktemp("llamacpp"), read_shape(REFERENCE)
    made = {
        name: locum.apply(REFERENCE, plan=make_plan(shape, PLANS[name](shape.layers)), out=folder / name)
        for name in ("uniform", "merged")
    }
    locum.export(made["merged"], to="stock", out=folder / "whole")
    original("deepseek_v3", torch.float32).save_pretrained(folder / "deepseek")
    write_tokenizer(folder / "deepseek")
    plan = make_plan(shape := read_shape(folder / "deepseek"), PLANS["uniform"](shape.layers))
    locum.apply(folder / "deepseek", plan=plan, out=folder / "latent")
    return {"pruned": made["uniform"], "merged": folder / "whole", "deepseek": folder / "latent"}


@pytest.mark.parametrize("name", ["pruned", "merged", "deepseek"])
def test_the_engine_says_what_transformers_says(folders, name):
    """Logits within 1e-2, the same greedy tokens, the same cuts of text."""
    checks = [c for c in locum.verify(folders[name], engine="llamacpp", long_tokens=0) if c.engine == "llamacpp"]
    assert [c for c in checks if c.result == FAILED] == []
    assert {"logits", "greedy tokens", "tokenizer"} <= {c.check for c in checks if c.result == OK}
    tokens = next(c for c in checks if c.check == "greedy tokens")
    assert tokens.detail == "8 x 32 tokens are the same"


def test_it_is_timed_beside_transformers(folders, tmp_path):
    """From a file that is exported for it, and from one that is given, which has half of the bytes."""
    short = {"prompt": 24, "new_tokens": 4, "batch_sizes": (1, 3), "rounds": 1, "threads": 1}
    write_form(Gguf("q8_0"), folders["pruned"], file := tmp_path / "eight.gguf")
    shares = []
    for given in (None, file):
        result = locum.bench(folders["pruned"], engine="llamacpp,transformers", gguf=given, **short)
        assert result["not_run"] == []
        rows = {(r["batch"], r["phase"]): r for r in result["rows"] if r["engine"] == "llamacpp"}
        assert set(rows) == {(size, phase) for size in (1, 3) for phase in ("prefill", "decode")}
        assert rows[3, "prefill"]["tokens"] == 72 and all(min(row["seconds"]) > 0 for row in rows.values())
        shares.append(result["models"]["model"]["engines"]["llamacpp"]["share"])
    assert 1 <= shares[0] < 1.2  # it holds a tied head twice
    assert 0.5 < shares[1] / shares[0] < 0.65  # 8.5 bits for 16, norms and routers apart


def test_several_prompts_at_a_time_are_read_as_one_by_one(folders, tmp_path):
    """What is timed are the logits of these tokens: the last ones of each prompt are those of transformers."""
    write_form(Gguf("f32"), folders["pruned"], file := tmp_path / "model.gguf")
    tokenizer = load_tokenizer(REFERENCE)
    ids = [tokenizer(text)["input_ids"][:12] for text in sample_texts(3, 400)]
    subject = timing.LlamaCpp()
    subject.load(str(file), ids, 8, 1)
    subject.generate(3)  # leaves the logits of the last pass, over the tokens before the last
    library = subject.library
    logits_BV = torch.tensor([library.llama_get_logits_ith(subject.context, b)[:4096] for b in range(3)])
    with torch.no_grad():
        expected_BV = load_model(folders["pruned"], torch.float32)(torch.tensor(ids)[:, :-1]).logits[:, -1]
    assert (logits_BV - expected_BV).abs().max() < 0.05  # its cache is in 16 bits


def perplexity(file: Path, ids: list[list[int]], workdir: Path) -> float:
    engine = ENGINES["llamacpp"]
    job = {"folder": str(file), "prompts": ids, "texts": [], "new_tokens": 0}
    logits_BSV = ask(engine, engine.python(), job, workdir).values
    loss = functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), torch.tensor(ids)[:, 1:].flatten())
    return float(loss.exp())


def test_eight_bits_are_nearly_as_good(folders, tmp_path):
    tokenizer = load_tokenizer(REFERENCE)
    ids = [tokenizer(text)["input_ids"][:256] for text in sample_texts(8, 2000)]
    found = {}
    for type_ in ("f32", "q8_0"):
        file = tmp_path / f"{type_}.gguf"
        write_form(Gguf(type_), folders["pruned"], file)
        found[type_] = perplexity(file, ids, tmp_path / type_)
    sizes = [(tmp_path / f"{type_}.gguf").stat().st_size for type_ in ("q8_0", "f32")]
    assert sizes[0] < 0.35 * sizes[1]
    assert found["q8_0"] == pytest.approx(found["f32"], rel=0.01)
    assert found["f32"] < 200  # of 4096 tokens: it does read the text


# --- llama.cpp's own quantiser -----------------------------------------------------------------------------------

EXPERTS_DOWN, EXPERTS_UP = "blk.{}.ffn_down_exps.weight", "blk.{}.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def statistics(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    locum.calibrate(folders["pruned"], data=str(REFERENCE.parent / "text"), tokens=8192, length=256, out=out)
    return out


def tensors_in(file: Path) -> dict:
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def numbers_in(file: Path, name: str) -> torch.Tensor:
    import gguf

    tensor = tensors_in(file)[name]
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).float()


def test_its_recipes_choose_a_type_for_each_tensor_and_the_engine_runs_them(folders, statistics, tmp_path):
    """Rows of experts' last matrices are 96 wide: no whole blocks, so llama.cpp falls back, and the export says to what."""
    tokenizer = load_tokenizer(REFERENCE)
    ids = [tokenizer(text)["input_ids"][:128] for text in sample_texts(8, 1000)]
    found, sizes = {}, {}
    for name, options in {
        "f32": {"type": "f32"},
        "q6_k": {"type": "q6_k"},
        "q4_k_m": {"type": "q4_k_m", "statistics": str(statistics)},
        "q2_k": {"type": "q8_0", "experts": "q2_k", "statistics": str(statistics)},
    }.items():
        file = tmp_path / f"{name}.gguf"
        said = locum.export(folders["pruned"], to="gguf", out=file, **options)["form"]
        found[name], sizes[name] = perplexity(file, ids, tmp_path / name), file.stat().st_size
        assert ("with an importance matrix" in said) == ("statistics" in options)
    assert found["q6_k"] == pytest.approx(found["f32"], rel=0.01)
    assert found["q4_k_m"] == pytest.approx(found["f32"], rel=0.05)
    assert sizes["q2_k"] < sizes["q4_k_m"] < sizes["q6_k"] < 0.3 * sizes["f32"]
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_in(tmp_path / "q4_k_m.gguf").items()}
    assert {kinds[EXPERTS_UP.format(n)] for n in range(4)} == {"Q4_K"}
    assert {kinds[EXPERTS_DOWN.format(n)] for n in range(4)} <= {"Q5_0", "Q8_0"} and kinds["output.weight"] == "Q6_K"
    few = {name: tensor.tensor_type.name for name, tensor in tensors_in(tmp_path / "q2_k.gguf").items()}
    assert {few[EXPERTS_UP.format(n)] for n in range(4)} == {"Q2_K"}
    assert {kind for name, kind in few.items() if name.endswith("attn_q.weight")} == {"Q8_0"}


def test_the_importance_matrix_weighs_the_columns_of_experts_and_nothing_else(folders, statistics, tmp_path):
    asked = {"to": "gguf", "type": "bf16", "experts": "q3_k"}
    wide, plain, weighed = (tmp_path / f"{name}.gguf" for name in ("wide", "plain", "weighed"))
    locum.export(folders["pruned"], to="gguf", out=wide)
    locum.export(folders["pruned"], out=plain, **asked)
    said = locum.export(folders["pruned"], statistics=str(statistics), out=weighed, **asked)["form"]
    assert "8 in q3_k" in said and "18 in bf16" in said  # gate and up of four layers; the last matrices fall back
    before, after = tensors_in(plain), tensors_in(weighed)
    differ = {name for name in before if (before[name].data != after[name].data).any()}
    assert differ and all("_exps" in name for name in differ)
    layer = locum.load_statistics(statistics).layer("model.layers.1.mlp.experts")
    mean_ED = layer["input_gram"].diagonal(dim1=1, dim2=2) / layer["count"][:, None].clamp(min=1)
    name = EXPERTS_UP.format(1)
    exact_EFD = numbers_in(wide, name)
    off = [
        ((numbers_in(file, name) - exact_EFD).square() * mean_ED[:, None].float()).sum().item()
        for file in (plain, weighed)
    ]
    assert off[1] < 0.95 * off[0]
