"""Evaluate the reference model: losses and bits per byte by domain, expert shares, samples, record and model card.

Shapes: B rows of a batch, S positions, T tokens, D domains, L layers, E experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.corpora.corpora import DOMAINS, CorpusUnavailable, load

WINDOW = 256
LONG_WINDOW = 1024


def load_all() -> dict[str, dict[str, list[str]]]:
    """Documents of every redistributable domain; a domain that cannot be had is named and left out."""
    corpora = {}
    for name, domain in DOMAINS.items():
        if not domain.redistributable:
            continue
        try:
            corpora[name] = load(domain)
        except CorpusUnavailable as error:
            print(f"left out: {error}", file=sys.stderr)
    if not corpora:
        raise SystemExit("no domain could be loaded; see the messages above")
    return corpora


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int, limit: int = 8_000_000) -> numpy.ndarray:
    """Token stream of shuffled documents, each followed by the end token; at most `limit` characters."""
    order = numpy.random.default_rng(seed).permutation(len(documents))
    chosen, size = [], 0
    for place in order:
        chosen.append(documents[place])
        size += len(documents[place])
        if size >= limit:
            break
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(chosen, add_special_tokens=False)
    return numpy.concatenate([numpy.array([*item.ids, end], dtype=numpy.int32) for item in encoded])


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Number of text bytes that each token stands for: byte-level tokens spell one character per byte."""
    sizes = [len(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))]
    sizes[tokenizer.eos_token_id] = 0
    return torch.tensor(sizes)


@torch.no_grad()
def evaluate_stream(
    model, stream: numpy.ndarray, windows: int, sizes_V: torch.Tensor, precision, window: int = WINDOW
) -> dict:
    """Mean loss (nats per token), bits per byte and expert shares over evenly spaced windows of a stream."""
    model.eval()
    device = next(model.parameters()).device
    most = len(stream) // window
    starts = numpy.linspace(0, most - 1, min(windows, most)).astype(int) * window
    total, tokens, size = 0.0, 0, 0
    shares_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for at in range(0, len(starts), 8):
        ids_BS = torch.from_numpy(numpy.stack([stream[s : s + window] for s in starts[at : at + 8]])).long().to(device)
        with precision():
            out = model(input_ids=ids_BS, output_router_logits=True, use_cache=False)
        target_T = ids_BS[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), target_T, reduction="sum"
        ).item()
        tokens += target_T.numel()
        size += int(sizes_V[target_T.cpu()].sum())
        for layer, logits_TE in enumerate(out.router_logits):
            chosen = logits_TE.topk(model.config.num_experts_per_tok).indices.flatten().cpu()
            shares_LE[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
    model.train()
    return {
        "loss": total / tokens,
        "bits_per_byte": total / math.log(2) / size,
        "tokens": tokens,
        "shares_LE": shares_LE / shares_LE.sum(1, keepdim=True),
    }


def share_summary(shares: list[torch.Tensor]) -> list[dict]:
    """Per layer: least and greatest expert share, dead experts, and how far domains differ in routing."""
    all_DLE = torch.stack(shares)
    mean_LE = all_DLE.mean(0)
    variation_L = (all_DLE - mean_LE).abs().sum(-1).mean(0) / 2
    return [
        {
            "layer": layer,
            "min": round(mean_E.min().item(), 5),
            "max": round(mean_E.max().item(), 5),
            "below_a_tenth_of_uniform": int((mean_E < 0.1 / len(mean_E)).sum()),
            "domain_total_variation": round(variation_L[layer].item(), 4),
        }
        for layer, mean_E in enumerate(mean_LE)
    ]


class Record:
    """The training record, one JSON object a line, flushed at once."""

    def __init__(self, path: Path, fresh: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run makes again."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(kept), encoding="ascii")
        os.replace(scratch, self.path)

    def __call__(self, event: str, **values) -> None:
        line = {"event": event, **values}
        with self.path.open("a", encoding="ascii") as stream:
            stream.write(json.dumps(line) + "\n")
        brief = {key: value for key, value in line.items() if not isinstance(value, dict | list) or len(value) < 12}
        print(json.dumps(brief), flush=True)


def environment() -> dict:
    """Versions and hardware of this run."""
    cpu = (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


PROMPTS = {
    "code": "def get_",
    "docs": "The SELECT statement",
    "dictionary": "tree (noun):",
    "math": "Question: Solve for x: 3*x = 12\nAnswer:",
    "plays": "SCENE II. A room in the palace.",
    "speeches": "My fellow Americans,",
    "novels": "CHAPTER I\n\nIt was",
    "scripture": "The king said to",
}


def evaluate(options: argparse.Namespace) -> None:
    """Load the exported folder as a user would; write losses, shares, samples and the model card."""
    torch.set_num_threads(options.threads)
    record = Record(options.record, fresh=False)
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    sizes_V = token_bytes(tokenizer)
    domains, shares = {}, []
    for name, parts in load_all().items():
        found = {}
        for split in ("validation", "test"):
            stream = pack(tokenizer, parts[split], 0, 400_000)
            result = evaluate_stream(model, stream, options.windows, sizes_V, torch.no_grad)
            found[f"{split}_loss"] = round(result["loss"], 4)
            found[f"{split}_bits_per_byte"] = round(result["bits_per_byte"], 4)
            found[f"{split}_tokens"] = result["tokens"]
        shares.append(result["shares_LE"])
        few = max(1, options.windows * WINDOW // LONG_WINDOW)
        result = evaluate_stream(model, stream, few, sizes_V, torch.no_grad, LONG_WINDOW)
        found["test_loss_long"] = round(result["loss"], 4)
        ids = tokenizer(PROMPTS[name], return_tensors="pt", add_special_tokens=False)
        made = model.generate(**ids, max_new_tokens=40, do_sample=False)
        found["sample"] = tokenizer.decode(made[0])
        domains[name] = found
    mean = {
        key: round(sum(d[key] for d in domains.values()) / len(domains), 4)
        for key in ("validation_loss", "test_loss", "test_bits_per_byte", "test_loss_long")
    }
    record(
        "final",
        mean=mean,
        domains=domains,
        expert_share=share_summary(shares),
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(file.stat().st_size for file in options.out.iterdir()),
        config=model.config.to_diff_dict(),
        seed=options.seed,
        command=" ".join(["-m benchmarks.reference.train", *sys.argv[1:]]),
        **environment(),
    )
    (options.out / "README.md").write_text(model_card(options.record), encoding="ascii")


def model_card(path: Path) -> str:
    """Model card of the exported model, from the training record."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    start = next(line for line in lines if line["event"] in ("start", "resume"))
    done = [line for line in lines if line["event"] == "exported"]
    final = [line for line in lines if line["event"] == "final"][-1]
    tokens, minutes = (done[-1]["tokens"], done[-1]["seconds"] / 60) if done else (0, 0)
    resumed = sum(line["event"] == "resume" for line in lines)
    rows = "\n".join(
        f"| {name} | {DOMAINS[name].source} | `{DOMAINS[name].package}` {DOMAINS[name].version} "
        f"| {DOMAINS[name].licence} "
        f"| {d['validation_loss']:.3f} | {d['test_loss']:.3f} | {d['test_bits_per_byte']:.3f} |"
        for name, d in final["domains"].items()
    )
    shares = "\n".join(
        f"| {s['layer']} | {s['min']:.4f} | {s['max']:.4f} | {s['below_a_tenth_of_uniform']} "
        f"| {s['domain_total_variation']:.3f} |"
        for s in final["expert_share"]
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
tags: [moe, olmoe, locum]
---

# Locum reference model

A small OLMoE language model, trained from scratch for Locum's own tests, demo and benchmarks. It is a real trained
Mixture-of-Experts model with unequal expert load and domain-dependent routing. It is far too small to be useful as a
language model, and it knows nothing reliably.

{final["parameters"]:,} parameters (4 layers, hidden 256, 32 experts of width 96, top-4, gates not renormalised), bf16,
vocabulary {final["config"]["vocab_size"]} (byte-level BPE), context {LONG_WINDOW}
(trained on windows of {WINDOW}, late in the run also on windows of {LONG_WINDOW}).

## Training

{tokens:,} tokens in {minutes:.0f} minutes on {start["gpu"] or start["cpu"]}, AdamW, bf16 autocast with fp32 weights,
balance loss 0.01, seed {start["seed"]}, torch {start["torch"]}, transformers {start["transformers"]}. Command:
`python {start["command"]}`, resumed {resumed} times with `--resume`.
Full record: `benchmarks/results/reference_training.jsonl`.

Documents of each domain are split 80/10/10 by a hash of their text; domains are mixed evenly. Mean test loss
{final["mean"]["test_loss"]:.3f} nats per token, {final["mean"]["test_bits_per_byte"]:.3f} bits per byte in windows of
{WINDOW}; {final["mean"]["test_loss_long"]:.3f} nats per token in windows of {LONG_WINDOW}.

| domain | text | package | licence of the text | validation loss | test loss | test bits per byte |
|---|---|---|---|---|---|---|
{rows}

Share of the routed tokens per expert on held-out text (uniform: {1 / 32:.4f}); domain variation is the mean total
variation distance of a domain's expert distribution from the mean over domains:

| layer | least | greatest | experts below a tenth of uniform | domain variation |
|---|---|---|---|---|
{shares}
"""
