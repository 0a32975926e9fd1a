"""Train Locum's reference model: a small OLMoE language model on eight text domains, from scratch.

    python -m benchmarks.reference.train text                   # write the bundled held-out text
    python -m benchmarks.reference.train train --minutes 65     # train, export and evaluate
    python -m benchmarks.reference.train evaluate               # evaluate the exported model again

The model is made to have what large Mixture-of-Experts models have: experts that differ, unequal load, and routing
that depends on the domain. Data order is a function of seed and step alone, so a resumed run sees the same batches.

On a machine that others use too, take `--threads 1` and OMP_WAIT_POLICY=PASSIVE: threads meet at every operation and
wait for the slowest (measured beside other programs on two cores: 170 tokens per second with two threads, 1,000 to
2,800 with one; 4,650 with two threads and nothing beside).

Shapes: B rows of a batch, S positions, T = B*S tokens, E experts, K top-k, L layers, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from benchmarks.corpora.corpora import cache_folder
from benchmarks.reference.evaluate import (
    LONG_WINDOW,
    WINDOW,
    Record,
    environment,
    evaluate,
    evaluate_stream,
    load_all,
    pack,
    share_summary,
    token_bytes,
)
from benchmarks.reference.text import TEXT, write_text

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "src" / "locum" / "reference"
RECORD = ROOT / "benchmarks" / "results" / "reference_training.jsonl"
END = "<|endoftext|>"
VOCABULARY = 4096
MODEL_BYTES = 26_000_000
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}Answer: {{ message['content'] }}"
    + END
    + "{% else %}Question: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def model_config() -> OlmoeConfig:
    """Shape of the reference model: 11.6M parameters, of which about 3.3M work on a token."""
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


# Data


def train_tokenizer(corpora: dict[str, dict[str, list[str]]], per_domain: int = 3_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over an equal share of characters of every domain's train split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts():
        for parts in corpora.values():
            left = per_domain
            for document in parts["train"]:
                if left <= 0:
                    break
                yield document[:left]
                left -= len(document)

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


class Batches:
    """Batches mixed evenly over domains; batch `step` depends on the seed and the step alone."""

    def __init__(self, streams: dict[str, numpy.ndarray], rows: int, seed: int) -> None:
        self.streams, self.rows, self.seed = list(streams.values()), rows, seed
        self._orders: dict[tuple[int, int], tuple[int, numpy.ndarray]] = {}

    def _window(self, domain: int, number: int) -> numpy.ndarray:
        stream = self.streams[domain]
        windows = len(stream) // WINDOW - 1  # one window is left over so that an epoch can start at any offset
        epoch, place = divmod(number, windows)
        if (domain, epoch) not in self._orders:
            random = numpy.random.default_rng((self.seed, domain, epoch))
            self._orders[domain, epoch] = (int(random.integers(WINDOW)), random.permutation(windows))
        offset, order = self._orders[domain, epoch]
        start = offset + int(order[place]) * WINDOW
        return stream[start : start + WINDOW]

    def __call__(self, step: int) -> torch.Tensor:
        count = len(self.streams)
        rows_BS = []
        for row in range(step * self.rows, (step + 1) * self.rows):
            turn, place = divmod(row, count)
            domain = int(numpy.random.default_rng((self.seed, turn)).permutation(count)[place])
            rows_BS.append(self._window(domain, turn))
        return torch.from_numpy(numpy.stack(rows_BS)).long()

    def long(self, step: int) -> torch.Tensor:
        """Two long windows of different domains, so that the model learns to use its whole context."""
        random = numpy.random.default_rng((self.seed, step, LONG_WINDOW))
        rows_BS = []
        for domain in random.permutation(len(self.streams))[:2]:
            stream = self.streams[domain]
            start = int(random.integers(len(stream) - LONG_WINDOW))
            rows_BS.append(stream[start : start + LONG_WINDOW])
        return torch.from_numpy(numpy.stack(rows_BS)).long()


# Files


def replace_folder(made: Path, target: Path) -> None:
    """Put a finished folder in the place of another; readers see the old one or the new one."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(made, target)
    shutil.rmtree(old, ignore_errors=True)


def export(model, tokenizer: PreTrainedTokenizerFast, target: Path, card: str) -> int:
    """Write the bf16 checkpoint, tokenizer and model card as one folder; return its size in bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f".{target.name}.new-{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    copy = OlmoeForCausalLM(model_config()).to(torch.bfloat16)
    copy.load_state_dict({name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()})
    copy.tie_weights()
    copy.config.dtype = torch.bfloat16
    copy.generation_config.pad_token_id = tokenizer.pad_token_id
    copy.save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "README.md").write_text(card, encoding="ascii")
    for file in made.iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in made.iterdir())
    if size > MODEL_BYTES:
        raise SystemExit(f"{made} holds {size} bytes, more than {MODEL_BYTES}; make the model smaller")
    replace_folder(made, target)
    return size


# Commands


def learning_rate(progress: float, peak: float, warm_up: float = 0.015, floor: float = 0.01) -> float:
    """Linear warm-up, then cosine decay to `floor` of the peak; `progress` is the used fraction of the budget."""
    if progress < warm_up:
        return peak * max(progress, 1e-4) / warm_up
    along = min((progress - warm_up) / (1 - warm_up), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along)))


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of E * sum_e (share of the choices that fall on e) * (mean probability of e); 1 when even."""
    terms = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        count = probability_TE.shape[-1]
        chosen_TK = probability_TE.topk(top_k).indices
        share_E = torch.bincount(chosen_TK.flatten(), minlength=count) / chosen_TK.numel()
        terms.append(count * (share_E * probability_TE.mean(0)).sum())
    return torch.stack(terms).mean()


def train(options: argparse.Namespace) -> None:
    """Train within the budget, exporting an early snapshot and the final model."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    work = options.work or cache_folder().parent / "reference"
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "checkpoint.pt"
    corpora = load_all()
    state = torch.load(saved, map_location="cpu", weights_only=True) if options.resume and saved.exists() else None
    if state:
        tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    else:
        tokenizer = train_tokenizer(corpora)
        tokenizer.save_pretrained(work / "tokenizer")
    streams = {name: pack(tokenizer, parts["train"], options.seed) for name, parts in corpora.items()}
    checks = {name: pack(tokenizer, parts["validation"], options.seed, 400_000) for name, parts in corpora.items()}
    batches = Batches(streams, options.rows, options.seed)
    sizes_V = token_bytes(tokenizer)

    model = OlmoeForCausalLM(model_config()).to(device)
    model.set_experts_implementation(options.experts)
    # transformers balances the sum over all layers, which leaves experts of single layers dead (measured: 8 to 15 of
    # 32 in each layer after 190 steps). OLMoE itself was trained with a balance term per layer, as below.
    model.router_aux_loss_coef = 0.0
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    step, tokens, before = 0, 0, 0.0
    record = Record(options.record, fresh=state is None)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, before = state["step"], state["tokens"], state["seconds"]
        record.forget_after(step)
    parameters = sum(p.numel() for p in model.parameters())
    record(
        "resume" if state else "start",
        step=step,
        command=" ".join(["-m benchmarks.reference.train", *sys.argv[1:]]),
        seed=options.seed,
        parameters=parameters,
        train_tokens={name: len(stream) for name, stream in streams.items()},
        device=device,
        **environment(),
    )

    def precision():
        return torch.autocast(device, torch.bfloat16)

    def validate(windows: int) -> dict:
        found = {name: evaluate_stream(model, s, windows, sizes_V, precision) for name, s in checks.items()}
        losses = {name: round(result["loss"], 4) for name, result in found.items()}
        mean = round(sum(losses.values()) / len(losses), 4)
        shares = share_summary([result["shares_LE"] for result in found.values()])
        return {"mean": mean, "loss": losses, "expert_share": shares}

    def keep() -> None:
        scratch = saved.with_suffix(".tmp")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "tokens": tokens,
                "seconds": elapsed(),
            },
            scratch,
        )
        os.replace(scratch, saved)

    started = time.monotonic()

    def elapsed() -> float:
        return before + time.monotonic() - started

    budget = options.minutes * 60
    next_check, next_keep = elapsed() + 60, elapsed() + options.keep_minutes * 60
    snapshot_due = before < options.snapshot_minutes * 60 < budget
    losses: list[float] = []
    model.train()
    while True:
        seconds = elapsed()
        progress = step / options.steps if options.steps else seconds / budget
        if progress >= 1:
            break
        rate = learning_rate(progress, options.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        lengthy = progress >= options.long_from and step % 3 == 0
        ids_BS = (batches.long(step) if lengthy else batches(step)).to(device)
        tokens += ids_BS.numel()
        with precision():
            out = model(input_ids=ids_BS, labels=ids_BS, output_router_logits=True, use_cache=False)
            balance = balance_loss(out.router_logits, model.config.num_experts_per_tok)
            loss = out.loss + options.balance * balance
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"the gradient norm at step {step} is {norm.item()}; resume with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(out.loss.item())
        step += 1
        if step % options.log_every == 0:
            record(
                "train",
                step=step,
                tokens=tokens,
                seconds=round(elapsed(), 1),
                lr=round(rate, 6),
                loss=round(sum(losses) / len(losses), 4),
                balance=round(balance.item(), 4),
                tokens_per_second=round(tokens / max(elapsed(), 1e-9)),
            )
            losses.clear()
        if elapsed() >= next_check:
            record("validation", step=step, tokens=tokens, seconds=round(elapsed(), 1), **validate(8))
            next_check = elapsed() + (180 if elapsed() > 300 else 60)
        if elapsed() >= next_keep:
            keep()
            next_keep = elapsed() + options.keep_minutes * 60
        if snapshot_due and elapsed() >= options.snapshot_minutes * 60:
            snapshot_due = False
            export(model, tokenizer, options.out, f"# Intermediate snapshot\n\nStep {step}; training goes on.\n")
            record("snapshot", step=step, seconds=round(elapsed(), 1))
    keep()
    size = export(model, tokenizer, options.out, "# Reference model\n\nNot evaluated yet.\n")
    record("exported", step=step, tokens=tokens, seconds=round(elapsed(), 1), bytes=size)
    evaluate(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("text", "train", "evaluate"))
    parser.add_argument("--minutes", type=float, default=65.0, help="wall-clock budget; the schedule follows it")
    parser.add_argument("--steps", type=int, default=0, help="budget in steps instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--experts", default="grouped_mm", help="experts implementation of transformers")
    parser.add_argument("--rows", type=int, default=4, help=f"windows of {WINDOW} tokens in a batch")
    parser.add_argument(
        "--long-from", type=float, default=0.6, help="used fraction from which long windows are mixed in"
    )
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss (1 when even)")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--keep-minutes", type=float, default=4.0, help="how often a checkpoint is kept")
    parser.add_argument("--snapshot-minutes", type=float, default=9.0, help="when an early model is exported")
    parser.add_argument("--windows", type=int, default=60, help="windows per domain and split in the final evaluation")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=REFERENCE / "model")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: in the cache)")
    options = parser.parse_args()
    if options.action == "text":
        write_text(TEXT)
    else:
        {"train": train, "evaluate": evaluate}[options.action](options)


if __name__ == "__main__":
    main()
