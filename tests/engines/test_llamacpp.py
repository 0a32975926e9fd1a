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
from locum.checkpoints.read import load_tokenizer
from locum.checkpoints.skeleton import read_shape
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
