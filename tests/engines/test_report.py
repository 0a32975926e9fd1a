"""docs/engines.md is what its results say, and tells failures and what was not run apart."""

from __future__ import annotations

from engines.report import PAGE, all_cases, page, read_results, said
from locum.engines.engines import ENGINES
from locum.verification.folder import FAILED, OK, SKIPPED


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(read_results())


def check(result: str, detail: str = "", engine: str = "vllm", name: str = "logits") -> dict[str, str]:
    return {"check": name, "engine": engine, "result": result, "detail": detail}


def test_one_word_per_engine():
    absent = check(SKIPPED, ENGINES["vllm"].absence)
    assert said([check(OK), check(SKIPPED)], "vllm") == "ok"
    assert said([check(OK), check(FAILED)], "vllm") == "**fails**: logits"
    assert said([absent, check(OK, engine="transformers")], "vllm") == "not run"
    assert said([check(SKIPPED, "GGUF cannot hold it")], "vllm") == "cannot"


def test_a_case_without_results_is_not_run():
    lines = page({}).splitlines()
    rows = [line for line in lines if line.startswith(("| reference", "| qwen3_moe", "| deepseek_v3"))]
    assert len(rows) == len(all_cases())
    assert all(row.count("not run") == 1 + len(ENGINES) for row in rows)
