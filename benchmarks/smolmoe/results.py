"""What SmolMoE is worth: test loss by domain of the dense parent, of every domain's expert alone, and of the model.

    python -m benchmarks.smolmoe.results measure [--quick]     on the model that build.py made; minutes
    python -m benchmarks.smolmoe.results tasks [--quick]       questions with gold answers, by lm-eval; more minutes
    python -m benchmarks.smolmoe.results table [--quick]       Markdown from the results

Losses are Locum's own (`locum eval`), on text that nothing was trained on, of trained and other domains, all models in
bf16 on the same tokens. How far a domain uses its own expert is measured twice: `own_top1` is the share of its tokens
that give their own expert the greatest gate (a hook on the routers), `own_gate` the share of its gates that
its own expert gets (Locum's statistics, which are kept beside the model for `locum report`); both are means over layers.
Tasks are those of tasks/lm_eval, on the same items for parent, model and every domain's expert alone.

Shapes: T tokens, E experts, C domains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM

import locum
from benchmarks.reference.evaluate import environment
from benchmarks.smolmoe.build import BuildError, Recipe, Sources, add_options, cached_model, is_built, recipe_of
from benchmarks.smolmoe.dense import dense_parent, smolmoe_folder
from benchmarks.smolmoe.mixtral import mlps_of, taken_mlp
from benchmarks.smolmoe.text import WINDOW, write_files
from benchmarks.speed.timing import commit
from locum.data.tokens import Tokens, load_tokens
from locum.measure.loss import evaluate
from locum.measure.tasks import evaluate_tasks, find_tasks

RESULTS = Path(__file__).parents[1] / "results" / "smolmoe.jsonl"
OTHERS = ("novels", "scripture", "kernel", "webster", "brown")  # domains that the default model is not trained on
TOKENS = 4096  # of every domain, of documents that are drawn from all of its held-out ones
TASKS = Path(__file__).parents[1] / "tasks" / "lm_eval"
ITEMS = 60  # of every task


def own_experts(recipe: Recipe, domain: str) -> list[int]:
    """Indices of the experts that come from a domain; none for a domain that was not trained on."""
    copies = [c for c, (name, _) in enumerate(recipe.classes) if name == domain]
    return [c * recipe.granularity + shard for c in copies for shard in range(recipe.granularity)]


@contextlib.contextmanager
def counting_top1(moe: MixtralForCausalLM) -> Iterator[list[Tensor]]:
    """For every layer, how many tokens gave expert e the greatest gate while the block ran; E counts each."""
    counts = [torch.zeros(moe.config.num_local_experts, dtype=torch.int64) for _ in moe.model.layers]

    def count(layer: int) -> Any:
        def hook(_: Any, __: Any, output: tuple[Tensor, ...]) -> None:
            counts[layer] += torch.bincount(output[0].argmax(-1).flatten(), minlength=len(counts[layer]))

        return hook

    hooks = [layer.mlp.gate.register_forward_hook(count(i)) for i, layer in enumerate(moe.model.layers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def share(counts: list[Tensor], own: list[int]) -> float | None:
    """Mean over layers of the part of the counts that falls on some experts; None if there are no such experts."""
    return sum(float(count_E[own].sum() / count_E.sum()) for count_E in counts) / len(counts) if own else None


def _loss(model: Any, tokens: Tokens) -> dict[str, Any]:
    found = {row.metric: row for row in evaluate(model, tokens, batch_size=4) if row.domain == tokens.domains[0]}
    loss, bits = found["loss"], found["bits_per_byte"]
    return {
        "loss": loss.value,
        "loss_interval": [loss.low, loss.high],
        "bits_per_byte": bits.value,
        "bits_per_byte_interval": [bits.low, bits.high],
        "tokens": loss.n,
    }


def measure(
    model: Path, parent: Path, recipe: Recipe, specs: list[str], *, tokens: int = TOKENS
) -> list[dict[str, Any]]:
    """A line for every model and domain. `specs` are files as `--data` takes them, with a domain each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    blocks = [load_tokens([spec], tokenizer, split="all", length=WINDOW, tokens=tokens) for spec in specs]
    dense = LlamaForCausalLM.from_pretrained(parent, dtype=torch.bfloat16)
    moe = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lines = []
    for block in blocks:
        domain = block.domains[0]
        own = own_experts(recipe, domain)
        lines.append({"model": "dense", "domain": domain, **_loss(dense, block)})
        with counting_top1(moe) as counts:
            found = _loss(moe, block)
        lines.append({"model": "SmolMoE", "domain": domain, **found, "own_top1": share(counts, own)})
        for copy, (name, part) in enumerate(recipe.classes):
            if name == domain and not recipe.exact:
                with _wearing(dense, taken_mlp(moe, copy, recipe.granularity)):
                    lines.append({"model": "expert", "domain": domain, "part": part, **_loss(dense, block)})
    del dense, moe
    statistics = locum.calibrate(
        model,
        data=specs,
        out=model.with_name(f"{model.name}.statistics.safetensors"),
        tokens=tokens * len(specs),
        length=WINDOW,
        split="all",
        force=True,
    )
    for line in lines:
        if line["model"] == "SmolMoE":
            c = statistics.domains.index(line["domain"])
            counts = [named["gate_sum"][c] for named in statistics.layers.values()]
            line["own_gate"] = share(counts, own_experts(recipe, line["domain"]))
    return lines


def measure_tasks(
    model: Path, parent: Path, recipe: Recipe, folder: Path = TASKS, *, items: int = ITEMS
) -> list[dict[str, Any]]:
    """A line for every task, metric and model, and one for model minus parent, on the first items of each task."""
    tasks = find_tasks([file.stem for file in sorted(folder.glob("*.yaml"))], folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = LlamaForCausalLM.from_pretrained(parent, dtype=torch.bfloat16).eval()
    moe = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    names = {"model_name": "SmolMoE", "against_name": "dense"}
    rows = evaluate_tasks(moe, tokenizer, tasks, against=dense, limit=items, **names)
    for copy, (name, part) in enumerate(recipe.classes):
        with _wearing(dense, taken_mlp(moe, copy, recipe.granularity)):
            rows += evaluate_tasks(dense, tokenizer, tasks, limit=items, model_name=f"expert {name} {part}")
    return [
        {
            "model": row.model,
            "task": row.domain.removeprefix("locum_"),
            "metric": row.metric,
            "value": row.value,
            "interval": [row.low, row.high],
            "items": row.n,
        }
        for row in rows
    ]


@contextlib.contextmanager
def _wearing(dense: LlamaForCausalLM, mlp: dict[str, Tensor]) -> Iterator[None]:
    """The dense model with other MLPs, for as long as the block runs."""
    weights = mlps_of(dense)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    try:
        for name, tensor in weights.items():
            tensor.copy_(mlp[name])
        yield
    finally:
        for name, tensor in weights.items():
            tensor.copy_(before[name])


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for every domain, trained ones first."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        found.setdefault(line["domain"], {}).setdefault(line["model"], []).append(line)
    rows = [
        "| domain | dense: nats | bits per byte | expert alone: nats | SmolMoE: nats | bits per byte | top-1 is own | gate of own |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for domain, of in sorted(found.items(), key=lambda item: "expert" not in item[1]):
        (dense,), (moe,), alone = of["dense"], of["SmolMoE"], of.get("expert", [])
        expert = f"{sum(line['loss'] for line in alone) / len(alone):.3f}" if alone else ""
        shares = [f"{moe[key]:.0%}" if moe[key] is not None else "" for key in ("own_top1", "own_gate")]
        name = domain if alone else f"{domain} (not trained)"
        cells = [name, f"{dense['loss']:.3f}", f"{dense['bits_per_byte']:.3f}", expert]
        cells += [f"{moe['loss']:.3f}", f"{moe['bits_per_byte']:.3f}", *shares]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def task_table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for every task, by the metric that lm-eval calls acc_norm where there is one."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["task"], {})[line["model"], line["metric"]] = line
    experts = list(dict.fromkeys(line["model"] for line in lines if line["model"].startswith("expert ")))
    titles = ["task", "metric", "items", "dense", "SmolMoE", "difference [95%]"]
    titles += [name.removeprefix("expert ").removesuffix(" 0") for name in experts]
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for task, of in found.items():
        metrics = [metric for model, metric in of if model == "dense"]
        metric = "acc_norm" if "acc_norm" in metrics else metrics[0]
        dense, moe, delta = of["dense", metric], of["SmolMoE", metric], of["SmolMoE", f"{metric}_delta"]
        low, high = delta["interval"]
        cells = [task, metric, str(moe["items"]), f"{dense['value']:.3f}", f"{moe['value']:.3f}"]
        cells.append(f"{delta['value']:+.3f} [{low:+.3f}, {high:+.3f}]")
        cells += [f"{of[name, metric]['value']:.3f}" for name in experts]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _build_record(model: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]
    done, start = lines[-1], lines[0]
    return {
        "build_seconds": done["seconds"],
        "training_seconds": done["training_seconds"],
        "build_peak_bytes": done["peak_bytes"],
        "parameters": done["parameters"],
        "active_parameters": done["active_parameters"],
        "recipe": start["recipe"],
        "identity": start["identity"],
        "build_threads": start["threads"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "tasks", "table"))
    add_options(parser)
    parser.add_argument("--model", type=Path, help="folder of the model (default: in the cache)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of every domain ({TOKENS})")
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of every task ({ITEMS})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    options = parser.parse_args()
    try:
        recipe = recipe_of(options)
        model = options.model or cached_model(recipe)
        if not is_built(model, recipe, Sources()):
            raise BuildError(f"{model} is not there; build it with: python -m benchmarks.smolmoe.build build")
    except BuildError as error:
        print(f"smolmoe_results: {error}", file=sys.stderr)
        return 1
    record = _build_record(model)
    torch.set_num_threads(options.threads)
    if options.action == "measure":
        domains = [*recipe.domains, *(name for name in OTHERS if name not in recipe.domains)]
        specs = write_files(smolmoe_folder() / "text", domains)
        _append(options, record, measure(model, dense_parent(), recipe, specs, tokens=options.tokens))
    elif options.action == "tasks":
        _append(options, record, measure_tasks(model, dense_parent(), recipe, items=options.items))
    every = [json.loads(line) for line in options.results.read_text().splitlines()]
    of_model = [line for line in every if line["build"]["identity"] == record["identity"]]
    for key, to_table in (("domain", table), ("task", task_table)):
        if lines := [line for line in of_model if key in line]:
            print(to_table([line for line in lines if line["time"] == lines[-1]["time"]]), end="\n\n")
    return 0


def _append(options: argparse.Namespace, record: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    about = {"build": record, "split": "held out", "threads": options.threads, "commit": commit(), **environment()}
    about["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with options.results.open("a", encoding="ascii") as stream:
        stream.writelines(json.dumps({"benchmark": "smolmoe", **line, **about}) + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
