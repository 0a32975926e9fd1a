"""Times one model in a process of its own, so that its memory is its own and another model can be timed in turn:

    python -P -m locum.speed.run

Reads questions as lines of JSON, {"do": name, ...}, and answers each with a line: {"answer": ...}, or {"error": [type,
message]}. The first one is "load"; when there are no more, it ends. Programs that have a model already use `Subject`.

A measurement is one call of `generate` that goes on with a given text, whatever the model would have said: all models
then read the same tokens, and none is fast because it repeats itself.

Letters: B blocks (here prompts), S tokens of a block (a prompt and what follows it), V vocabulary.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..checkpoints.load import load_model
from ..checkpoints.skeleton import read_shape
from ..errors import UnsupportedModel
from ..json_text import parse_json
from ..kernels import few_rows
from ..measure.costs import Call, counted
from ..measure.memory import peak_bytes, start_peak
from ..models.families import find_layers, is_stock_experts
from ..models.optimization import optimize, restore

# transformers' implementations of experts that need no extra package. Off the CPU, its `generate` decodes with batched_mm
# where grouped_mm is asked for, and so does what is timed under that name.
STOCK = ("eager", "grouped_mm", "batched_mm")
OPTIMIZED = "optimized"  # by `locum.optimize`; what it leaves to transformers' experts, grouped_mm does
COPIED = 2 * 2**30  # most bytes of weights that batched_mm may copy: it takes a copy of an expert for every pair
READ = 2**28  # bytes that are read to measure the bandwidth, unless the model is smaller
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product gives the rate of operations


class Subject:
    """A model, and the text [B, S] that it is timed on: prompts of `prompt` tokens and what follows them."""

    def __init__(self, model: PreTrainedModel, ids_BS: Tensor, prompt: int) -> None:
        self.model, self.ids_BS, self.prompt = model.eval(), ids_BS.to(model.device), prompt
        self.layers = find_layers(model)
        self.settings = GenerationConfig(do_sample=False, max_new_tokens=ids_BS.shape[1] - prompt, pad_token_id=0)
        model.generation_config = self.settings  # the checkpoint's own may stop at an end of text, or repeat less

    @property
    def implementations(self) -> tuple[str, ...]:
        """Those that it can be switched between: transformers' own, where any layer is stock; on the processor also optimized."""
        stock = any(is_stock_experts(layer.experts) for layer in self.layers)
        optimized = (OPTIMIZED,) if self.model.device.type == "cpu" and few_rows.library() else ()
        return (*(STOCK if stock else ("container",)), *optimized)

    def choose(self, implementation: str, batch: int) -> None:
        """Raises UnsupportedModel for an implementation that cannot run here on so many prompts."""
        restore(self.model)
        stock = [layer for layer in self.layers if is_stock_experts(layer.experts)]
        if implementation == OPTIMIZED:
            if stock:
                self.model.set_experts_implementation("grouped_mm")
            optimize(self.model)
        if implementation not in STOCK or not stock:
            return
        size = max(x.shape.top_k * x.shape.parameters() * x.experts.down_proj.element_size() for x in stock)
        if implementation == "batched_mm" and (copied := batch * self.prompt * size) > COPIED:
            raise UnsupportedModel(
                f"would copy {copied / 2**30:.1f} GiB of weights for the prompts of one layer (limit {COPIED / 2**30:.0f})"
            )
        self.model.set_experts_implementation(implementation)

    def generate(self, batch: int) -> tuple[float, float]:
        """Seconds to the first token of every prompt, and from there to the last one."""
        forced = _Forced(self.ids_BS[:batch], self.prompt)
        ids_BS = self.ids_BS[:batch, : self.prompt]
        start = _now(self.model.device)
        processors = LogitsProcessorList([forced])
        self.model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), logits_processor=processors)
        first, last = forced.times
        return first - start, last - first

    def work(self, batch: int) -> list[Call]:
        """What must be read and computed: the pass over the prompts, then one for each token after the first."""
        with counted(self.model) as calls:
            self.generate(batch)
        return calls


class _Forced(LogitsProcessor):
    """Lets `generate` go on with a given text, and notes when it asks for the first and the last token."""

    def __init__(self, ids_BS: Tensor, prompt: int) -> None:
        self.ids_BS, self.ends, self.times = ids_BS, (prompt, ids_BS.shape[1] - 1), []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1]
        if position in self.ends:
            self.times.append(_now(scores.device))
        return scores.scatter_(1, self.ids_BS[:, position, None], float("inf"))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- the machine ----------------------------------------------------------------------------------------------------


def bytes_per_second(device: torch.device, size: int, repeats: int = 1) -> float:
    """How fast memory of `size` bytes is read, at best: the sum of its numbers."""
    x_N = torch.ones(max(size // 4, 1), device=device)
    return x_N.nbytes / _fastest(x_N.sum, device, repeats)


def operations_per_second(device: torch.device, dtype: torch.dtype, repeats: int = 1, side: int | None = None) -> float:
    """How fast a product of large square matrices is, at best; a multiplication with its addition counts as two."""
    side = side or SIDE.get(device.type, SIDE["cpu"])
    one, two = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: one @ two, device, repeats)


def _fastest(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = _now(device)
        run()
        seconds.append(_now(device) - start)
    return min(seconds[1:])  # the first one warms up


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident_bytes(device: torch.device) -> int | None:
    """Memory in use now: of the accelerator by this process's tensors, or the process's resident set (Linux only)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * resource.getpagesize() if file.exists() else None


# --- questions ------------------------------------------------------------------------------------------------------


class Worker:
    """Answers questions about one model; each method is one."""

    def load(self, folder: str, ids: list[list[int]], prompt: int, **how: Any) -> dict[str, Any]:
        if how["threads"]:
            torch.set_num_threads(how["threads"])
        self.device = torch.device(how["device"])
        torch.empty(1, device=self.device)
        read_shape(folder)  # imports the code of the model, which is none of its weights
        before = resident_bytes(self.device)
        dtype = "auto" if how["dtype"] == "auto" else getattr(torch, how["dtype"])
        model = load_model(folder, dtype=dtype, device=how["device"])
        self.subject = Subject(model, torch.tensor(ids), prompt)
        for tensor in model.parameters():
            tensor.sum()  # what a file is mapped into is resident once it was read
        start_peak(self.device)
        after = resident_bytes(self.device)
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "implementations": self.subject.implementations,
            "weights_bytes": weights_bytes(model),
            "process_bytes": before,
            "resident_bytes": None if before is None else after - before,
        }

    def work(self, batch: int) -> list[dict[str, Any]]:
        self.subject.choose("eager", batch)
        calls = self.subject.work(batch)
        return [{k: getattr(call, k) for k in ("tokens", "bytes", "operations", "experts")} for call in calls]

    def machine(self) -> dict[str, float]:
        model = self.subject.model
        size = min(READ, weights_bytes(model))
        return {
            "bytes_per_second": bytes_per_second(self.device, size),
            "operations_per_second": operations_per_second(self.device, model.dtype),
        }

    def generate(self, implementation: str, batch: int) -> dict[str, Any]:
        self.subject.choose(implementation, batch)
        is_known = start_peak(self.device)
        prefill, decode = self.subject.generate(batch)
        peak = peak_bytes(self.device) if is_known else None
        return {"prefill": prefill, "decode": decode, "peak_bytes": peak}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks gets Ctrl-C, and ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker()
    for line in sys.stdin:
        question = parse_json(line)
        try:
            said = {"answer": getattr(worker, question.pop("do"))(**question)}
        except Exception as error:  # whoever asked wants to read why
            said = {"error": [type(error).__name__, str(error)]}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
