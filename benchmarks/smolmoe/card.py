"""The model card of SmolMoE, from the record of its build."""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig

from benchmarks.corpora.corpora import DOMAINS
from benchmarks.smolmoe.dense import PACKAGE

HEAD = """---
license: other
language: en
library_name: transformers
tags: [moe, mixtral, locum]
---

"""


def _shape(done: dict[str, Any], config: MixtralConfig) -> str:
    return (
        f"{done['parameters']:,} parameters, {done['active_parameters']:,} of them active for a token; "
        f"{config.num_hidden_layers} layers, {config.num_local_experts} experts of width {config.intermediate_size}, "
        f"top-{config.num_experts_per_tok}, gates renormalised."
    )


def _domain_rows(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if line["event"] == "expert":
            domain = DOMAINS.get(line["domain"])
            source = (
                f"{domain.source}, `{domain.package}` {domain.version} | {domain.licence}" if domain else "given | "
            )
            rows.append(
                f"| {len(rows)} | {line['domain']} | {source} | {line['tokens']:,} "
                f"| {line['loss_first']:.3f} to {line['loss_last']:.3f} |"
            )
    return "\n".join(rows)


def model_card(lines: list[dict[str, Any]], config: MixtralConfig) -> str:
    """Markdown: what the model is, what went into it, under which licences, and how to build it again."""
    start, done = lines[0], lines[-1]
    recipe = start["recipe"]
    parent = f"SmolLM2-135M-Instruct (Hugging Face; {PACKAGE.licence}; the 4-bit GGUF in `{PACKAGE.package}` {PACKAGE.version})"
    made = (
        f"Options: `{recipe}`, {start['threads']} threads, torch {start['torch']}, transformers {start['transformers']}, "
        f"{start['cpu']}. The whole record is in `training.jsonl`. Built by `benchmarks/smolmoe/build.py` of Locum.\n"
    )
    if recipe["exact"]:
        return f"""{HEAD}# SmolMoE, exact

{parent}, upcycled into a Mixtral whose experts are equal copies of its MLPs, fp32. It computes what the dense model
computes, whatever its (random) routers choose: merging copies must be lossless. It is an oracle for tests, not a model
whose experts differ.

{_shape(done, config)} {made}"""
    shards = recipe["granularity"]
    groups = f"Every MLP is {shards} neighbouring experts, which share a router row.\n" if shards > 1 else ""
    return f"""{HEAD}# SmolMoE

A Mixture-of-Experts language model made from {parent}: its MLPs were trained on one domain at a time and became the
experts of a Mixtral; the routers were fitted to tell the domains apart (Branch-Train-MiX, 2403.07816). It is made for
tests and benchmarks of compression: small, but a real language model with experts that have specialised.

{_shape(done, config)} {groups}
| {"MLP" if shards > 1 else "expert"} | domain | text | licence of the text | tokens | training loss, first to last steps |
|---|---|---|---|---|---|
{_domain_rows(lines)}

Licences of single texts differ and forbid, some of them, that the text is passed on; build the model where you need it.

{made}"""
