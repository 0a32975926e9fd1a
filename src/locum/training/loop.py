"""The training loop: AdamW on whatever is trainable, a log, and states from which it resumes exactly.

The caller says what is trained, which loss is lowered, and what happens at each step: `at_step(step)` is called before
every step (and once after the last) and returns what the log should say about it. Validation always measures the
cross entropy of the next token, so that runs with different losses can be compared.

The model runs in eval mode with gradients on. Training mode would switch on the jitter noise in the routers of Mixtral
and PhiMoE and load-balancing side effects of others: what is recovered is the model as it is used.

The log is a file of JSON lines. The `event` of a line says what it holds:

    start        options, provenance, trainable_parameters
    resume       the same, of a run that goes on, and resumed_at: the steps done before
    step         step (how many are done), loss, learning_rate, seconds, tokens, balance_loss and entropy_loss where there
                 are such, and what the way to recover says of the step
    validation   step, validation_loss; step 0 is the model as it came
    kept         kept_step and kept_loss: the step whose state the run ends with, and its validation loss

Ranks that have met share a run (sharding.py): each takes some blocks of every batch, the first one writes log and states, whose
tensors are whole. So any number of ranks goes on from them.

Where there is validation text, a run ends with its best validated state, which may be the model as it came: training never
makes a model worse there. A state counts if the model that runs is the one that the run would give (Way.is_result). With a
`patience`, a run ends early, after so many validations in a row that were no better.

Letters: B blocks of a batch, S tokens of a block, M positions with loss, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from .. import ranks
from ..checkpoints.streamed import give_back
from ..data.tokens import Batch, Tokens, batches, check_vocabulary, training_batches
from ..errors import DataError, OptionError
from ..files import write_text
from ..json_text import parse_json
from ..measure.memory import peak_bytes
from ..models.next_token_loss import loss_sum
from ..models.output_head import check_predicts
from .options import PRECISIONS, Recovery, learning_rate_at
from .router_losses import RouterLosses, router_losses
from .sharding import gather, like, shard, share_of, whole
from .states import Best, State, laid_aside, save_state


@contextlib.contextmanager
def accelerated(precision: str, device: torch.device) -> Iterator[Accelerator]:
    """An Accelerator for this device. Accelerate's state belongs to the process; what was not there is taken back."""
    had_partial, had_state = bool(PartialState._shared_state), bool(AcceleratorState._shared_state)
    try:
        accelerator = Accelerator(mixed_precision=PRECISIONS[precision], cpu=device.type == "cpu")
        if accelerator.num_processes != ranks.count():
            raise OptionError(
                f"this process is one of {accelerator.num_processes} that have not met; start locum recover by torchrun or "
                f"accelerate launch, or alone"
            )
        yield accelerator
    except ValueError as error:
        if "AcceleratorState" not in str(error):
            raise
        raise OptionError(
            f"this process uses accelerate with other settings already ({error}); run recovery in a process of its own"
        ) from error
    finally:
        if not had_state:
            AcceleratorState._reset_state(reset_partial_state=not had_partial)


Loss = Callable[[Batch], tuple[Tensor, int]]  # of a batch: summed over its positions with loss, and their number


class Loop:
    """One run. Its state between steps is `State`; everything else is fixed by the options, the data and the model."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tokens,
        validation: Tokens | None,
        options: Recovery,
        accelerator: Accelerator,
        objective: Loss,
        of_routers: RouterLosses | None = None,
    ) -> None:
        self.objective, self.of_routers = objective, of_routers or RouterLosses({}, None)
        self.router_losses = dict.fromkeys(self.of_routers.weights, 0.0)  # of the last step
        self.model = model.eval()
        self.tokens, self.validation_tokens, self.options, self.accelerator = tokens, validation, options, accelerator
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.step = self.tokens_seen = 0
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.validation: list[tuple[int, float]] = []
        self.loss: float | None = None
        self.best: Best | None = None

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def resume(self, state: State) -> None:
        if state.step == 0:
            return
        state.check_tensors(self.trained)
        self.step, self.tokens_seen, self.earlier_seconds = state.step, state.tokens, state.seconds
        self.validation, self.loss, self.best = list(state.validation), state.loss, state.best
        moments: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for key, tensor in state.tensors.items():
                kind, _, rest = key.partition("|")
                if kind == "parameter":
                    self.trained[rest].copy_(like(tensor, self.trained[rest]))
                else:
                    moments.setdefault(rest, {})[kind] = tensor
        for name, tensors in moments.items():
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            p = self.trained[name]
            self.optimizer.state[p] = {k: t.cpu() if k == "step" else like(t, p) for k, t in tensors.items()}
        state.tensors.clear()  # parameters were copied

    def save(self, workdir: Path, identity: dict[str, Any]) -> None:
        tensors = {f"parameter|{name}": whole(p).contiguous() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            tensors |= {f"{kind}|{name}": whole(t).contiguous() for kind, t in self.optimizer.state.get(p, {}).items()}
        bare = tuple(name for name, p in self.trained.items() if not self.optimizer.state.get(p))
        done = (self.step, tensors, self.tokens_seen, self.seconds, tuple(self.validation), self.loss, self.best, bare)
        if ranks.is_first():
            save_state(workdir, identity, State(*done))

    def one_step(self, parts: list[Batch]) -> None:
        """One optimizer step on these batches together; the loss is the mean over all of their positions with loss."""
        rate = learning_rate_at(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count = max(sum(int(part.loss_mask_BS[:, 1:].sum()) for part in parts), 1)
        total, added = 0.0, dict.fromkeys(self.of_routers.weights, 0.0)
        for part in parts:
            self.tokens_seen += int(part.attention_BS.sum())
            part = share_of(part)
            with self.accelerator.autocast():
                summed, positions = self.objective(part)
            loss = summed / count
            total += float(loss.detach())
            for name, more in self.of_routers.of(part.attention_BS.to(self.device)).items():
                more = more * (positions / count)
                added[name] += float(more.detach())
                loss = loss + self.of_routers.weights[name] * more
            self.accelerator.backward(loss)
        total, *sums = ranks.add_up(torch.tensor([total, *added.values()], dtype=torch.float64)).tolist()
        self.router_losses = dict(zip(added, sums, strict=True))
        if not math.isfinite(total):
            raise OptionError(
                f"the loss is {total} at step {self.step + 1}; lower --learning-rate "
                f"(it is {self.options.learning_rate:g}) or use --precision fp32"
            )
        if self.options.clip:
            self.accelerator.clip_grad_norm_(self.trained.values(), self.options.clip)
        if not self.optimizer.state:  # moments come to stay: not beside what was free before them
            give_back()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.loss = self.step + 1, total

    def remember(self, loss: float, workdir: Path | None) -> None:
        """Keep the trained parameters as they are now if no state before them had a lower validation loss."""
        if self.best is None or loss < self.best.loss:
            self.best, tensors = None, {}  # the room of an earlier one is free first
            for name, p in self.trained.items():
                tensor = whole(p).detach()
                if ranks.is_first():
                    tensors[name] = laid_aside(tensor, workdir)
            self.best = Best(self.step, loss, tensors)

    def is_stale(self, is_result: Callable[[int], bool]) -> bool:
        """Whether the last validations, as many as the patience, were no better than one before them. It follows from what a
        state holds, so a run that goes on ends where one that was not interrupted does."""
        if not self.options.patience or self.best is None:
            return False
        since = sum(step > self.best.step and is_result(step) for step, _ in self.validation)
        return since >= self.options.patience

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the best validated state, if it is not the last one. Parameters are whole again."""
        if self.best is not None and self.best.step < self.step:
            for name, tensor in self.best.tensors.items():
                self.model.get_parameter(name).copy_(tensor)


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tokens, options: Recovery, accelerator: Accelerator) -> float:
    """Mean cross entropy of the next token, nats, over all positions with loss."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    for batch in batches(tokens, options.batch_size):
        with accelerator.autocast():
            summed, positions = loss_sum(model, share_of(batch), device)
        total, count = total + float(summed), count + positions
    total, count = ranks.add_up(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / max(count, 1)


@dataclass(frozen=True)
class Hooks:
    """What a run tells and asks others."""

    at_step: Callable[[int], dict[str, float]]
    is_result: Callable[[int], bool]
    loss: Loss
    before: float | None = None  # validation loss of the model as it came, where its first step runs another
    workdir: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    log: Path | None = None
    header: dict[str, Any] = field(default_factory=dict)
    progress: Callable[[int, int, float], None] | None = None


def train(
    model: nn.Module, tokens: Tokens, validation: Tokens | None, options: Recovery, state: State, hooks: Hooks
) -> dict[str, Any]:
    """Run the steps that are left; the model ends as after the last. Returns the summary."""
    check_tokens(model, tokens, options)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    settings = accelerated(options.precision, device)
    with settings as accelerator, router_losses(model, options) as of_routers, ranks.meeting():
        shard(model)
        loop = Loop(model, tokens, validation, options, accelerator, hooks.loss, of_routers)
        loop.resume(state)
        give_back()  # narrow copies of what is trained in float32
        open_log(hooks.log, hooks.header, state.step, sum(p.numel() for p in loop.trained.values()))
        _run(loop, hooks)
        gather(model)
        loop.take_best()
        if loop.best is not None:
            write_log(hooks.log, {"event": "kept", "kept_step": loop.best.step, "kept_loss": loop.best.loss})
    return {
        "steps": loop.step,
        "loss": loop.loss,
        "kept_step": loop.step if loop.best is None else loop.best.step,
        "validation_loss_before": loop.validation[0][1] if loop.validation else None,
        "validation_loss": None if loop.best is None else loop.best.loss,
        "trainable_parameters": sum(p.numel() for p in loop.trained.values()),
        "tokens": loop.tokens_seen,
        "seconds": loop.seconds,
        "peak_bytes": peak_bytes(device),
    }


def _run(loop: Loop, hooks: Hooks) -> None:
    options = loop.options
    stream = training_batches(loop.tokens, options.batch_size, options.seed, loop.step * options.accumulate)
    said = hooks.at_step(loop.step)
    if loop.step == 0 and hooks.before is not None:
        _record(loop, hooks, hooks.before)
    elif loop.step == 0:
        _validate(loop, hooks)
    while loop.step < options.steps and not loop.is_stale(hooks.is_result):
        rate = learning_rate_at(loop.step, options)
        loop.one_step(list(islice(stream, options.accumulate)))
        done = {"event": "step", "step": loop.step, "loss": loop.loss, **said, "learning_rate": rate}
        done |= {f"{name}_loss": value for name, value in loop.router_losses.items()}
        write_log(hooks.log, done | {"seconds": round(loop.seconds, 3), "tokens": loop.tokens_seen})
        if hooks.progress is not None:
            hooks.progress(loop.step, options.steps, loop.loss)
        said = hooks.at_step(loop.step)
        last = loop.step == options.steps
        if last or (options.validate_every and loop.step % options.validate_every == 0):
            _validate(loop, hooks)
            last = last or loop.is_stale(hooks.is_result)
        # The last state stays until the caller has saved the result: a full disk then costs no training.
        if hooks.workdir and options.checkpoint_every and (last or loop.step % options.checkpoint_every == 0):
            loop.save(hooks.workdir, hooks.identity)


def _validate(loop: Loop, hooks: Hooks) -> None:
    if loop.validation_tokens is not None:
        loss = validation_loss(loop.model, loop.validation_tokens, loop.options, loop.accelerator)
        _record(loop, hooks, loss, hooks.is_result(loop.step))


def _record(loop: Loop, hooks: Hooks, loss: float, is_result: bool = True) -> None:
    loop.validation.append((loop.step, loss))
    write_log(hooks.log, {"event": "validation", "step": loop.step, "validation_loss": loss})
    if is_result:
        loop.remember(loss, hooks.workdir)


def open_log(
    log: Path | None, header: dict[str, Any], step: int, trainable: int, said_again: Sequence[str] = ("kept",)
) -> None:
    """Begin a log, or keep the lines up to the step from which the run resumes, but for the events that it will tell of again."""
    if log is None:
        return
    kept = []
    if step and log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _logged_step(line, said_again) <= step]
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text(log, "".join(line + "\n" for line in kept))
    first = {"event": "resume", "resumed_at": step} if step else {"event": "start"}
    write_log(log, first | header | {"trainable_parameters": trainable})


def _logged_step(line: str, said_again: Sequence[str]) -> float:
    """The step that a line tells of. What a run says at its end is said again by the run that goes on."""
    try:
        entry = parse_json(line)
        return math.inf if entry.get("event") in said_again else float(entry.get("step", 0))
    except (ValueError, AttributeError, TypeError, OverflowError):  # such as one that a killed run was writing
        return math.inf


def write_log(log: Path | None, entry: dict[str, Any]) -> None:
    if log is not None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def check_tokens(model: nn.Module, tokens: Tokens, options: Recovery) -> None:
    check_predicts(model, "next-token recovery cannot train it")
    check_vocabulary(tokens, model.get_input_embeddings().weight.shape[0])
    if not bool(tokens.loss_mask_BS[:, 1:].any()):
        raise DataError("no token of the training data has loss; give text, or prompts with completions")
