"""The Triton kernels in Triton's interpreter, and compiled for a GPU that need not be there; without Triton, neither."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from locum import kernels
from locum.kernels import choice
from locum.kernels.packed import Matrices

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with CUDA builds of torch only",
)


def run(*arguments, interpret):
    """Triton reads the variable when it is first imported, and what pytest collects may have imported it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = [str(HERE), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(found)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    made = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


@needs_triton
def test_the_kernels_in_the_interpreter():
    """On a CUDA device where there is one."""
    cases = HERE / "triton_cases.py"
    said = run("-m", "pytest", "-x", "-p", "no:cacheprovider", cases, interpret=not torch.cuda.is_available())
    assert " passed" in said and "skipped" not in said


@needs_triton
def test_the_kernels_compile_for_hopper():
    """Nothing spills, three programs of decoding fit a multiprocessor beside each other, prefill uses its tensor cores."""
    said = run(HERE / "triton_launches.py", "", "int8-g32", "int4-g32", interpret=False)
    found = [json.loads(line) for line in said.splitlines()]
    assert {made["kernel"] for made in found} == {"_few", "_many", "_sort", "_find_units", "_sum_units", "_sum_tokens"}
    for made in found:
        assert made["stack"] == 0
        assert made["shared"] <= (75_000 if made["kernel"] == "_few" else 227_000)
        assert made["kernel"] != "_few" or made["mma"]
        assert made["kernel"] != "_many" or made["wgmma"]


@pytest.mark.journeys
def test_nothing_of_locum_needs_triton():
    said = run(
        "-c",
        "import sys; sys.modules['triton'] = None; import locum.containers.container, locum.kernels.grouped; print('fine')",
        interpret=False,
    )
    assert said.strip() == "fine"


def test_triton_serves_on_cuda_where_it_works(monkeypatch):
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(choice, "triton_is_there", lambda: True)
    assert choice.choose(cuda, bf16, 512, 64, True) == "grouped"  # gradients may be asked for
    with torch.no_grad():
        assert choice.choose(cuda, bf16, 2**20, 64, True) == "triton"
        assert choice.choose(cuda, torch.float16, 1, 64, False) == "triton"
        assert choice.choose(cuda, torch.float64, 65, 64, True) == choice.LOOP
        monkeypatch.setattr(choice, "triton_is_there", lambda: False)
        assert choice.choose(cuda, bf16, 512, 64, True) == "grouped"
        assert choice.choose(cuda, bf16, 512, 64, False) == choice.LOOP


def test_few_bits_go_by_triton_where_it_reads_them_right(monkeypatch, caplog):
    cuda, bf16, few = (
        torch.device("cuda"),
        torch.bfloat16,
        {"in_few_bits": (Matrices("int4-g32", 64, 32), Matrices("nvfp4", 32, 64))},
    )
    monkeypatch.setattr(choice, "triton_is_there", lambda: True)
    monkeypatch.setattr(choice, "triton_reads", lambda kind, dtype: kind.format == "int4-g32" or dtype == bf16)
    assert choice.choose(cuda, bf16, 8, 64, True, **few) == choice.LOOP  # gradients may be asked for
    with torch.no_grad():
        assert choice.choose(cuda, bf16, 2**20, 64, True, **few) == "triton"
        assert choice.choose(cuda, torch.float16, 8, 64, True, **few) == choice.LOOP
        monkeypatch.setattr(choice, "triton_is_there", lambda: False)
        assert choice.choose(cuda, bf16, 8, 64, True, **few) == choice.LOOP


@pytest.mark.parametrize(
    ("made", "said"), [(lambda *_: "off by 3", "off by 3"), (lambda *_: 1 / 0, "ZeroDivisionError")]
)
def test_a_format_that_triton_reads_wrongly_is_told_once_and_not_served(made, said, monkeypatch, caplog):
    ways = types.ModuleType("locum.kernels.triton_ways")
    ways.fault = made
    monkeypatch.setitem(sys.modules, "locum.kernels.triton_ways", ways)
    monkeypatch.setattr(kernels, "triton_ways", ways, raising=False)
    choice.triton_reads.cache_clear()
    assert not any(choice.triton_reads(Matrices("int4-g32", 64, 32), torch.bfloat16) for _ in range(2))
    choice.triton_reads.cache_clear()
    assert caplog.text.count("do not serve int4-g32 of 64 x 32 here") == 1 and said in caplog.text


def test_the_table_has_ways_that_are_there():
    assert all(way in choice.PRODUCTS and most > 0 for way, most in choice.CUDA_WAYS)
    assert choice.CUDA_WAYS[-1] == ("gathered", choice.GATHERED_PAIRS)
    assert math.isinf(dict(choice.CUDA_WAYS)["grouped"])


@pytest.fixture
def started_anew():
    choice._triton_starts.cache_clear()
    yield
    choice._triton_starts.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton starts here")
def test_without_a_device_triton_is_not_there(started_anew):
    assert not choice.triton_is_there()


def test_a_triton_that_does_not_start_is_told_once(started_anew, monkeypatch, caplog):
    """As on a machine without a C compiler."""
    broken = types.ModuleType("triton")
    broken.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", broken)
    monkeypatch.setitem(sys.modules, "triton.runtime", types.ModuleType("triton.runtime"))
    assert not choice.triton_is_there() and not choice.triton_is_there()
    assert caplog.text.count("Triton does not start here") == 1
