"""Does what was saved do what was promised? Opened in every engine that is there, compared with the model in memory.

The promise is the model before it was saved: the original with the plan carried out on it again, or, where that cannot be
had (after recovery, or without the original), the folder as Locum loads it. Engines are asked in processes of their own.
Logits are compared at every position of some prompts, in 16 bits the likeliest tokens in their place; greedy tokens up to
the first one that differs, which must be a tie within the tolerance.

Letters: B blocks (here prompts), S tokens of a block, V vocabulary, J likeliest tokens.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ..arguments import in_declared_forms
from ..bundled import sample_texts
from ..checkpoints.application import apply_plan
from ..checkpoints.load import load_model, open_model, set_dtype
from ..checkpoints.notes import original_of
from ..checkpoints.read import base_of, read_config
from ..checkpoints.skeleton import layouts_of
from ..checkpoints.weight_files import is_adapter
from ..engines.engines import ENGINES, Answer, Engine, ask, chosen_engines
from ..errors import CheckpointError, EngineError, LocumError, OptionError
from ..exports.target import TARGETS, Target, write_form
from ..files import describe_size
from ..formats.plain import COMPUTE_DTYPES
from ..models.families import opening_class
from ..options import make_options
from ..stages.application import statistics_for
from ..stages.options import Device, Help, Progress, Seed, check_number, device_of, silent
from ..stats.sums import Statistics
from .collapse import Questions
from .folder import FAILED, OK, SKIPPED, Check, Folder, check_files, run_check

PROMPT = 16  # tokens of a prompt
AGREE = 0.99  # of the positions, in 16 bits, have the same likeliest token
MEMORY = 0.05  # of the bytes of a plan that the weights may differ by in an engine's memory


@dataclass(frozen=True)
class Promise:
    """What the model in memory says."""

    of: str  # which model that is, in words
    ids_BS: Tensor
    logits_BSV: Tensor
    tokens: list[list[int]]
    steps_BSV: Tensor  # the logits behind each greedy token
    agree: float | None = None  # in 16 bits: the share of positions whose likeliest token has to be the same


@in_declared_forms
def verify(
    model: Path,
    *,
    engine: Annotated[
        str | None,
        Help(lambda: f"engines, separated by commas: {', '.join(ENGINES)}; default: those that are there"),
    ] = None,
    original: Annotated[Path | None, Help("the checkpoint this one was made from; default: as its notes say")] = None,
    statistics: Annotated[
        Path | Statistics | None, Help("statistics that the plan was applied with; default: those it was made from")
    ] = None,
    precision: Annotated[
        str,
        Help(
            f"{', '.join(COMPUTE_DTYPES)}: in which engines and promise compute; auto: fp32, or the checkpoint's own where its "
            f"packed numbers are computed in that"
        ),
    ] = "auto",
    prompts: Annotated[int, Help("prompts to compare on, from the bundled text")] = 8,
    new_tokens: Annotated[int, Help("greedy tokens to compare after each prompt")] = 32,
    long_tokens: Annotated[
        int, Help("greedy tokens after each prompt to look for loops in, as far as the context goes; 0: none")
    ] = 2048,
    seed: Seed = 0,
    device: Device = "auto",
    progress: Progress = silent,
) -> list[Check]:
    """Open a checkpoint in every engine that is there and compare it with what was promised: tensors, sizes, plan,
    tokenizer, logits, greedy tokens; and with the original where it may have collapsed: text that ends in a loop, experts that nothing
    is routed to, tool calls. Exit code 1 when anything fails."""
    model = Path(model)
    if not model.is_dir():
        raise CheckpointError(f"no such folder: {model}; give the path of a checkpoint folder")
    if precision not in ("auto", *COMPUTE_DTYPES):
        raise OptionError(f"--precision is {precision!r}; allowed: auto, {', '.join(COMPUTE_DTYPES)}")
    for name, value in (("prompts", prompts), ("new-tokens", new_tokens)):
        check_number(name, value, 1)
    check_number("long-tokens", long_tokens, 0)
    check_number("seed", seed, 0)
    chosen, device = chosen_engines(engine), device_of(device)
    source, checks = find_original(model, original)
    folder = Folder(model, source, device)
    progress("verify: files", 0, 3)
    checks += check_files(folder)
    if any(check.result == FAILED for check in checks):
        return checks + [Check("logits", name, SKIPPED, "the checkpoint itself is broken") for name in chosen]
    progress("verify: promise", 1, 3)
    precision = folder.precision if precision == "auto" else precision
    ids_BS = prompt_ids(folder.tokenizer, prompts)
    questions = Questions.of(folder.tokenizer, ids_BS, long_tokens, seed)
    promise, checked = make_promise(folder, questions, COMPUTE_DTYPES[precision], new_tokens, statistics)
    checks += checked
    progress("verify: engines", 2, 3)
    for item in chosen.values():
        checks += check_engine(item, folder, promise, precision, new_tokens, named=engine is not None)
    progress("verify: engines", 3, 3)
    return checks


def find_original(model: Path, given: Path | None) -> tuple[Path | None, list[Check]]:
    """The original, if it is there and still what it was, and a line about it."""
    try:
        found = original_of(model, given, "there is no original to compare with")
    except OptionError as error:
        return None, [Check("original", "", SKIPPED, " ".join(str(error).split()))]
    except LocumError as error:
        return None, [Check("original", "", FAILED, " ".join(str(error).split()))]
    return found, [Check("original", "", OK, str(found))]


def prompt_ids(tokenizer: Any, count: int) -> Tensor:
    """[B, S] the first tokens of stretches of the bundled text."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sample_texts(count)]
    return torch.tensor([row[:PROMPT] for row in rows])


# --- the promise ----------------------------------------------------------------------------------------------------


def make_promise(
    folder: Folder, questions: Questions, dtype: torch.dtype, new_tokens: int, statistics: Path | Statistics | None
) -> tuple[Promise, list[Check]]:
    """What the model should say, and lines about collapse, which is looked for while model and original are in memory."""
    live, theirs = folder.live, None
    ours = questions.ask(live)
    of, why_not = "the original with the plan carried out again", not_repeatable(folder)
    if folder.original is not None:
        original = open_model(folder.original, device=folder.device)
        theirs = questions.ask(original)
        if not why_not:
            try:
                observed = _statistics_for(folder, statistics) if folder.plan.needs else None
                live = apply_plan(original, folder.plan, observed, folder.notes.get("seed", 0))
            except LocumError as error:
                why_not = str(error)
        del original
    of = f"the folder as Locum loads it ({why_not})" if why_not else of
    if folder.is_quantised:
        live = load_model(folder.path, dtype, folder.device)
    del folder.live  # the engines may need its memory
    promise = ask_in_memory(live, of, questions.ids_BS, dtype, new_tokens)
    return promise, questions.checks(ours, theirs)


def _statistics_for(folder: Folder, given: Path | Statistics | None) -> Statistics:
    return statistics_for(folder.plan, given, folder.original, Path(os.path.abspath(folder.path)).parent)


def not_repeatable(folder: Folder) -> str:
    """Why the folder cannot be made again from its original, if so."""
    if folder.plan is None:
        return "it has no plan"
    if folder.original is None:
        return "its original is not there"
    if folder.is_quantised:  # stand-ins were made from numbers in the dtype of the config
        return "its number formats are read at the precision asked for"
    return "it was trained since" if "recovery" in folder.notes else ""


def agreement(logits_BSV: Tensor, token_BS: Tensor, dtype: torch.dtype) -> float:
    """How often a token is the likeliest. In bfloat16 the two likeliest tie at some 2 % of positions, and rounding
    decides: a token whose logit is within one step of `dtype` of the largest counts."""
    largest_BS = logits_BSV.amax(-1)
    found_BS = logits_BSV.gather(-1, token_BS[..., None])[..., 0]
    return (found_BS >= largest_BS - torch.finfo(dtype).eps * largest_BS.abs()).float().mean().item()


@torch.no_grad()
def ask_in_memory(model: Any, of: str, ids_BS: Tensor, dtype: torch.dtype, new_tokens: int) -> Promise:
    """Logits of the prompts, and of every greedy step, each computed from the whole text: no cache that could be wrong.

    In 16 bits an engine cannot be asked to agree more with the model than that does with itself in float32.
    """
    ids_BS, likeliest_BS = ids_BS.to(model.device), None
    if dtype != torch.float32:
        likeliest_BS = set_dtype(model, torch.float32)(ids_BS, use_cache=False).logits.argmax(-1)
    set_dtype(model, dtype)
    text_BS, logits_BSV, steps = ids_BS, None, []
    for _ in range(new_tokens):
        now_BSV = model(text_BS, use_cache=False).logits
        logits_BSV = now_BSV if logits_BSV is None else logits_BSV
        steps.append(now_BSV[:, -1].float().cpu())
        text_BS = torch.cat([text_BS, now_BSV[:, -1:].argmax(-1)], dim=1)
    tokens = text_BS[:, ids_BS.shape[1] :].tolist()
    logits_BSV, agree = logits_BSV.float(), None
    if likeliest_BS is not None:
        agree = min(AGREE, agreement(logits_BSV, likeliest_BS, dtype))
    return Promise(of, ids_BS.cpu(), logits_BSV.cpu(), tokens, torch.stack(steps, dim=1), agree)


# --- engines --------------------------------------------------------------------------------------------------------


def check_engine(
    engine: Engine, folder: Folder, promise: Promise, precision: str, new_tokens: int, named: bool
) -> list[Check]:
    """The lines of one engine. What an engine cannot be asked is a failure only where it was asked for by name."""
    unasked = FAILED if named else SKIPPED
    python = engine.python()
    if python is None:
        return [Check("logits", engine.name, unasked, engine.absence)]
    form = make_options(TARGETS[engine.form], dict(engine.form_options)) if engine.form else None
    if reason := _unreadable(engine, form, folder):
        return [Check("logits", engine.name, unasked, reason)]
    texts, dtype, adapted = sample_texts(4), COMPUTE_DTYPES[precision], is_adapter(folder.path)
    with tempfile.TemporaryDirectory(prefix="locum-verify-") as scratch:
        job = {
            "folder": str((base_of(folder.path) if adapted else folder.path).resolve()),
            "adapter": str(folder.path.resolve()) if adapted else None,
            "dtype": str(dtype).removeprefix("torch."),
            "device": folder.device,
            "import_locum": bool(layouts_of(folder.path)),
            "opens": opening_class(read_config(folder.path)),
            "prompts": promise.ids_BS.tolist(),
            "texts": texts,
            "new_tokens": new_tokens,
        }
        try:
            if form is not None:
                exported = Path(scratch) / f"model.{form.name}"
                write_form(form, folder.path, exported)
                job["folder"] = str(exported)
            answer = ask(engine, python, job, Path(scratch))
        except LocumError as error:
            said = " ".join(str(error).split())
            if form is None and (of_original := _refusal_of_original(engine, python, job, folder, Path(scratch))):
                return [Check("logits", engine.name, unasked, f"of the original {of_original}")]
            return [Check("logits", engine.name, FAILED, said)]
    tolerance = engine.tolerance if promise.agree is None else engine.tolerance_16

    def compare_values() -> str:
        if promise.agree is not None:
            return compare_likeliest(promise, answer, dtype)
        return compare_logits(promise, answer, tolerance)

    checks = [
        run_check("tensors", engine.name, lambda: compare_keys(answer)),
        run_check("logits", engine.name, compare_values),
        run_check("greedy tokens", engine.name, lambda: compare_tokens(promise, answer, tolerance)),
    ]
    if answer.texts is not None:
        checks.append(run_check("tokenizer", engine.name, lambda: compare_texts(folder, texts, answer)))
    if answer.bytes is not None and job["import_locum"]:
        checks.append(run_check("memory", engine.name, lambda: compare_memory(folder, answer, dtype)))
    return checks


def _refusal_of_original(engine: Engine, python: Path, job: dict[str, Any], folder: Folder, scratch: Path) -> str:
    """Why the engine takes the original no more than what was made of it: that says nothing of the checkpoint."""
    original = folder.original
    if original is None:
        return ""
    of_model = {"folder": str(original.resolve()), "adapter": None, "import_locum": bool(layouts_of(original))}
    of_model |= {"opens": opening_class(read_config(original)), "prompts": job["prompts"][:1], "new_tokens": 1}
    try:
        ask(engine, python, job | of_model, scratch / "original")
    except EngineError as error:
        return " ".join(str(error).split())
    return ""


def _unreadable(engine: Engine, form: Target | None, folder: Folder) -> str:
    if is_adapter(folder.path) and not engine.adapters:
        return "an adapter without weights of its own; recover it without --adapter-only to serve it there"
    return form.fault(folder.path) if form is not None else ""


def compare_keys(answer: Answer) -> str:
    if answer.keys:
        what, names = next(iter(answer.keys.items()))
        raise CheckpointError(f"{len(names)} {what.replace('_', ' ')} (first: {names[0]})")
    return f"{answer.version} takes the checkpoint as it is, in {answer.seconds:.0f} seconds"


def compare_logits(promise: Promise, answer: Answer, tolerance: float) -> str:
    """The largest difference: of logits, or of log-probabilities where the engine gives those of the likeliest tokens."""
    expected, what = promise.logits_BSV, "logits"
    if answer.ids is not None:
        expected, what = expected.log_softmax(-1).gather(-1, answer.ids), "log-probabilities"
    if expected.shape != answer.values.shape:
        raise CheckpointError(f"{what} have shape {list(answer.values.shape)}, {list(expected.shape)} was promised")
    apart = (expected - answer.values).abs()
    worst = float(apart.max()) if bool(apart.isfinite().all()) else float("inf")
    said = f"{what} of {expected.shape[0] * expected.shape[1]} positions differ by at most {worst:.2g} (allowed {tolerance:g})"
    if not worst <= tolerance:
        raise CheckpointError(f"{said} from {promise.of}")
    return f"{said} from {promise.of}"


def compare_likeliest(promise: Promise, answer: Answer, dtype: torch.dtype) -> str:
    """How often the engine's likeliest token is that of the promise, where rounding to 16 bits does not decide."""
    if not bool(answer.values.isfinite().all()):
        raise CheckpointError("logits are not finite numbers in this precision")
    token_BS = answer.values.argmax(-1) if answer.ids is None else answer.ids[..., 0]
    share = agreement(promise.logits_BSV, token_BS, dtype)
    said = (
        f"the likeliest token of {token_BS.numel()} positions is the same in {share:.1%} (at least {promise.agree:.1%})"
    )
    if share < promise.agree:
        raise CheckpointError(f"{said}, compared with {promise.of}")
    return f"{said}, compared with {promise.of}"


def compare_memory(folder: Folder, answer: Answer, dtype: torch.dtype) -> str:
    """What the engine holds for the weights, against the parameters of the files in this precision; what is in few bits stays so."""
    promised = folder.shape.model.parameters * dtype.itemsize
    for layout in layouts_of(folder.path).values():
        promised += layout.nbytes(dtype.itemsize) - layout.parameters() * dtype.itemsize
    said = (
        f"{describe_size(answer.bytes)} of weights in memory, {describe_size(promised)} in the files at this precision"
    )
    if abs(answer.bytes - promised) > MEMORY * promised:
        raise CheckpointError(said)
    return said


def compare_tokens(promise: Promise, answer: Answer, tolerance: float) -> str:
    """Where a continuation departs from the promise, the two tokens must have been equally likely, within tolerance."""
    ties, total = 0, sum(map(len, promise.tokens))
    for b, (ours, theirs) in enumerate(zip(promise.tokens, answer.tokens, strict=True)):
        step = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if step is None:
            continue
        step_V = promise.steps_BSV[b, step]
        margin = float(step_V[ours[step]] - step_V[theirs[step]])
        if margin > 2 * tolerance:
            raise CheckpointError(
                f"prompt {b} goes on with token {theirs[step]} in place of {ours[step]} after {step} tokens, whose logit is "
                f"{margin:.2g} lower (a tie of up to {2 * tolerance:g} is allowed)"
            )
        ties += 1
    tied = f", but for {ties} continuations that part at a tie" if ties else ""
    return f"{len(promise.tokens)} x {total // len(promise.tokens)} tokens are the same{tied}"


def compare_texts(folder: Folder, texts: list[str], answer: Answer) -> str:
    ours = [folder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for text, one, two in zip(texts, ours, answer.texts, strict=True):
        if one != two:
            first = next(
                (i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two))
            )
            raise CheckpointError(
                f"it cuts {text[:40]!r}... into other tokens than the checkpoint's tokenizer, from token {first} on; the "
                f"pre-tokenizer that was named to the converter does not fit"
            )
    return f"cuts {len(texts)} texts as the checkpoint's tokenizer does"
