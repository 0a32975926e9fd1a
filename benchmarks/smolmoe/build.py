"""SmolMoE: a real Mixture-of-Experts language model that anyone can build, on two cores, without a model hub.

    python -m benchmarks.smolmoe.build build            # 8 domains, 8 experts, top-2, 0.7 billion parameters
    python -m benchmarks.smolmoe.build build --quick    # 4 domains, a few steps
    python -m benchmarks.smolmoe.build build --exact    # equal experts, no training: computes what the dense model does
    python -m benchmarks.smolmoe.build build --device cuda                # trained there, in a minute
    python -m benchmarks.smolmoe.build path [--quick]   # where the finished model is

SmolLM2-135M-Instruct is trained on each domain (its MLPs only), the MLPs become the experts of a Mixtral, and a router
per layer is fitted to tell the domains apart: see train.py and mixtral.py. Steps, not seconds, decide:
the same options, seed, number of threads, device and torch give the same bytes. Every finished expert is kept in the cache, so a
build that was stopped goes on with the next one; a finished model is not built again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM

from benchmarks.corpora.corpora import DOMAINS, load
from benchmarks.corpora.readers import CorpusUnavailable
from benchmarks.reference.evaluate import environment
from benchmarks.smolmoe.card import model_card
from benchmarks.smolmoe.dense import GGUF_SHA256, dense_parent, smolmoe_folder
from benchmarks.smolmoe.mixtral import assemble, load_mlps, mixtral_config, save_mlps, upcycled
from benchmarks.smolmoe.text import PIECE, TRAINED, WINDOW, part_of, source_of, windows, write_files
from benchmarks.smolmoe.train import fit_routers, train_expert, train_jointly
from locum.files import fingerprint, whole

VERSION = 1  # raise when the same options give another model: what was cached under an older number is not used
NOTES = "smolmoe.json"
ROWS = 2  # windows of a step
RATE = 3e-4
ACTIVE = 2  # MLPs for a token
ROUTER_WINDOWS = 40  # per expert; the more, the better on unseen text: going from 8 to 16 was worth 2 to 4 points
THREADS = 2
EXACT_TOLERANCE = 1e-4


class BuildError(Exception):
    """Options that give no model, or an output that is not to be replaced."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the model will be."""

    domains: tuple[str, ...] = TRAINED
    steps: int = 80  # of every expert
    experts_per_domain: int = 1
    granularity: int = 1
    joint_steps: int = 0
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if len(set(self.domains)) != len(self.domains) or len(self.classes) < ACTIVE:
            raise BuildError(
                f"domains are {', '.join(self.domains)}; give different ones, for {ACTIVE} experts or more"
            )
        least = {"steps": 1, "experts_per_domain": 1, "granularity": 1, "joint_steps": 0, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise BuildError(f"{name} is {getattr(self, name)}; allowed: {value} or more")

    @property
    def classes(self) -> list[tuple[str, int]]:
        """(domain, part) of every MLP, in the order of the experts."""
        return [(domain, part) for domain in self.domains for part in range(self.experts_per_domain)]


PRESETS = {
    "default": Recipe(),
    "quick": Recipe(domains=("code", "docs", "dictionary", "math"), steps=24),
    "exact": Recipe(exact=True),
}


@dataclass(frozen=True)
class Sources:
    """Where the dense model and the text come from, with marks that say which they are."""

    parent: Callable[[], Path] = dense_parent
    parent_mark: str = GGUF_SHA256
    documents: Callable[[str], list[str]] = lambda domain: load(domain)["train"]
    mark: Callable[[str], str] = source_of
    work: Callable[[], Path] = lambda: smolmoe_folder() / "experts"


def identity(recipe: Recipe, sources: Sources) -> str:
    """16 hex digits of all that decides what a model is; threads, device and versions only decide its last bits."""
    marks = [] if recipe.exact else [sources.mark(domain) for domain in recipe.domains]
    fixed = [VERSION, ROWS, RATE, ACTIVE, ROUTER_WINDOWS, WINDOW, PIECE]
    return fingerprint(json.dumps([dataclasses.asdict(recipe), marks, sources.parent_mark, fixed]))


def cached_model(recipe: Recipe, sources: Sources | None = None) -> Path:
    """Where the model of a recipe is, or will be, unless it is told otherwise."""
    name = next((name for name, preset in PRESETS.items() if preset == recipe), "custom")
    return smolmoe_folder() / f"{name}-{identity(recipe, sources or Sources())[:8]}"


def is_built(out: Path, recipe: Recipe, sources: Sources) -> bool:
    """Whether the model of a recipe is at `out`. Raises BuildError if something else is."""
    if not out.exists():
        return False
    notes = json.loads((out / NOTES).read_text()) if (out / NOTES).is_file() else {}
    if notes.get("identity") != identity(recipe, sources):
        what = f"a SmolMoE of other options ({notes['recipe']})" if "recipe" in notes else "something else"
        raise BuildError(f"{out} holds {what}, which is not replaced; remove it or choose another --out")
    return True


class Log:
    """What happened, as lines of JSON, printed as they come."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, event: str, **values: Any) -> None:
        self.lines.append({"event": event, **values})
        print(json.dumps(self.lines[-1]), flush=True)

    def dumps(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.lines)


def build(
    recipe: Recipe, out: Path, *, threads: int = THREADS, device: str = "cpu", sources: Sources | None = None
) -> Path:
    """Build the model of a recipe at `out`, or find it there. Raises BuildError, CorpusUnavailable or OutputError."""
    sources = sources or Sources()
    if is_built(out, recipe, sources):
        print(f"built before, used as it is: {out}")
        return out
    torch.set_num_threads(threads)
    started = time.monotonic()
    parent = sources.parent()
    dense = LlamaForCausalLM.from_pretrained(parent, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(parent)
    try:
        mixtral_config(dense.config, len(recipe.classes), ACTIVE, recipe.granularity)
    except ValueError as error:
        raise BuildError(str(error)) from error
    log = Log()
    log(
        "start", recipe=dataclasses.asdict(recipe), threads=threads, identity=identity(recipe, sources), **environment()
    )
    moe = _exact(recipe, dense, log) if recipe.exact else _trained(recipe, dense, tokenizer, sources, threads, log)
    parameters = sum(p.numel() for p in moe.parameters())
    idle = 1 - moe.config.num_experts_per_tok / moe.config.num_local_experts
    log(
        "finished",
        seconds=round(time.monotonic() - started, 1),  # of this run; an expert made before brought its own
        training_seconds=round(sum(line.get("seconds", 0) for line in log.lines), 1),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        parameters=parameters,
        active_parameters=round(
            parameters - idle * sum(p.numel() for n, p in moe.named_parameters() if ".experts." in n)
        ),
    )
    notes = {"identity": identity(recipe, sources), "recipe": dataclasses.asdict(recipe)}
    with whole(out, "folder") as folder:
        moe.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / NOTES).write_text(json.dumps(notes, indent=1) + "\n")
        (folder / "training.jsonl").write_text(log.dumps())
        (folder / "README.md").write_text(model_card(log.lines, moe.config))
    return out


def _exact(recipe: Recipe, dense: LlamaForCausalLM, log: Log) -> MixtralForCausalLM:
    """Equal experts; refused unless the logits are the dense model's."""
    moe = upcycled(dense, len(recipe.classes), ACTIVE, recipe.granularity, recipe.seed)
    ids_BS = torch.randint(dense.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(recipe.seed))
    dense = dense.cpu()
    with torch.no_grad():
        difference = float((moe(input_ids=ids_BS).logits - dense(input_ids=ids_BS).logits).abs().max())
    log("upcycled", greatest_logit_difference=difference)
    if not difference <= EXACT_TOLERANCE:
        raise BuildError(f"logits differ from the dense model's by {difference}; allowed: {EXACT_TOLERANCE}")
    return moe


def _trained(
    recipe: Recipe, dense: LlamaForCausalLM, tokenizer: Any, sources: Sources, threads: int, log: Log
) -> MixtralForCausalLM:
    """Experts by domain, then routers, then the whole model if asked for."""
    chosen = {
        (domain, part): part_of(sources.documents(domain), part, recipe.experts_per_domain)
        for domain, part in recipe.classes
    }
    files = [_expert(key, chosen[key], recipe, dense, tokenizer, sources, threads, log) for key in recipe.classes]
    start = time.monotonic()
    found = list(
        fit_routers(
            dense,
            [windows(tokenizer, texts, ROUTER_WINDOWS, ("router", recipe.seed, *key)) for key, texts in chosen.items()],
        )
    )
    accuracy = [round(value, 4) for _, value in found]
    log("routers", fitted_accuracy=accuracy, seconds=round(time.monotonic() - start, 1))
    moe = assemble(
        dense,
        (load_mlps(file)[0] for file in files),
        [weight_CD for weight_CD, _ in found],
        active=ACTIVE,
        granularity=recipe.granularity,
    )
    if recipe.joint_steps:
        start = time.monotonic()
        share = -(-recipe.joint_steps * ROWS // len(chosen))
        mixed_WCS = torch.stack(
            [windows(tokenizer, texts, share, ("joint", recipe.seed, *key)) for key, texts in chosen.items()], dim=1
        )
        moe = moe.float().to(dense.device)
        first, last = train_jointly(
            moe,
            mixed_WCS.flatten(0, 1),
            steps=recipe.joint_steps,
            rows=ROWS,
            progress=_progress("joint", recipe.joint_steps),
        )
        moe = moe.to("cpu", torch.bfloat16)
        log("joint", loss_first=first, loss_last=last, seconds=round(time.monotonic() - start, 1))
    return moe


def _expert(
    key: tuple[str, int],
    texts: list[str],
    recipe: Recipe,
    dense: LlamaForCausalLM,
    tokenizer: Any,
    sources: Sources,
    threads: int,
    log: Log,
) -> Path:
    """The file of one trained expert, made now or before; its name says all that it depends on."""
    domain, part = key
    depends = [VERSION, ROWS, RATE, WINDOW, PIECE, sources.parent_mark, sources.mark(domain), torch.__version__]
    depends += [threads, recipe.steps, recipe.seed, part, recipe.experts_per_domain]
    depends += [] if dense.device.type == "cpu" else [torch.cuda.get_device_name()]
    file = sources.work() / f"{domain}-{part}-{fingerprint(json.dumps(depends))}.safetensors"
    if file.is_file():
        log("expert", made="before", **load_mlps(file)[1])
        return file
    start = time.monotonic()
    rows_WS = windows(tokenizer, texts, recipe.steps * ROWS, ("train", recipe.seed, domain, part))
    done = train_expert(
        dense, rows_WS, steps=recipe.steps, rows=ROWS, rate=RATE, progress=_progress(f"{domain} {part}", recipe.steps)
    )
    notes = {
        "domain": domain,
        "part": part,
        "steps": recipe.steps,
        "tokens": rows_WS.numel(),
        "loss_first": round(done.first, 4),
        "loss_last": round(done.last, 4),
        "seconds": round(time.monotonic() - start, 1),
    }
    save_mlps(done.mlps, file, notes)
    log("expert", made="now", **notes)
    return file


def _progress(name: str, steps: int) -> Callable[[int, float], None]:
    start = time.monotonic()

    def show(step: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            each = (time.monotonic() - start) / step
            print(f"{name}: step {step} of {steps}, loss {loss:.3f}, {each:.2f} s a step", file=sys.stderr, flush=True)

    return show


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the options of a command mean. Raises BuildError."""
    preset = PRESETS["exact" if options.exact else "quick" if options.quick else "default"]
    names = [field.name for field in dataclasses.fields(Recipe) if field.name != "exact"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "domains" in given:
        given["domains"] = tuple(given["domains"].split(","))
        if unknown := [name for name in given["domains"] if name not in DOMAINS]:
            raise BuildError(f"unknown domains: {', '.join(unknown)}; known: {', '.join(DOMAINS)}")
    if options.exact and (options.quick or {"steps", "joint_steps"} & given.keys()):
        raise BuildError("--exact trains nothing: it goes with no --quick, --steps or --joint-steps")
    return dataclasses.replace(preset, **given)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a recipe, for every program that takes one."""
    default, quick = PRESETS["default"], PRESETS["quick"]
    parser.add_argument("--quick", action="store_true", help=f"domains {', '.join(quick.domains)}; {quick.steps} steps")
    parser.add_argument("--exact", action="store_true", help="equal experts without training, fp32")
    parser.add_argument("--domains", help=f"names of corpora.py with commas (default: {','.join(default.domains)})")
    parser.add_argument("--steps", type=int, help=f"of {ROWS} x {WINDOW} tokens for every expert ({default.steps})")
    parser.add_argument(
        "--experts-per-domain", type=int, help=f"each on a part of the text ({default.experts_per_domain})"
    )
    parser.add_argument("--granularity", type=int, help=f"experts that every MLP is cut into ({default.granularity})")
    parser.add_argument("--joint-steps", type=int, help=f"of routers and experts together ({default.joint_steps})")
    parser.add_argument("--seed", type=int, help=f"({default.seed})")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"({THREADS}; decides the last bits)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "path"))
    add_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is trained (cpu)")
    parser.add_argument("--out", type=Path, help="folder of the model (default: in the cache)")
    options = parser.parse_args()
    try:
        recipe = recipe_of(options)
        out = options.out or cached_model(recipe)
        if options.action == "path":
            if not is_built(out, recipe, Sources()):
                raise BuildError(f"{out} is not there; build it with the same options")
            print(out)
            return 0
        build(recipe, out, threads=options.threads, device=options.device)
        data = [] if recipe.exact else write_files(smolmoe_folder() / "text", list(recipe.domains))
    except CorpusUnavailable as error:
        print(f"smolmoe: {error} Others than {', '.join(recipe.domains)} are chosen with --domains.", file=sys.stderr)
        return 1
    except BuildError as error:
        print(f"smolmoe: {error}", file=sys.stderr)
        return 1
    print(f"\n{out}")
    if data:
        words = [f"locum calibrate {out}", *(f"--data {spec}" for spec in data), "--out stats.safetensors"]
        print("\nWith text that it was not trained on:\n\n" + " \\\n  ".join(words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
