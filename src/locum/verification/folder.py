"""What can be wrong with a checkpoint folder, one check each, before any text goes through the model.

A check is a function of the folder: it returns what it found, or raises. `NotApplicable` says why there was nothing to
check; any error of Locum's is a failure, in its own words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..bundled import sample_texts
from ..checkpoints.inside import read_json
from ..checkpoints.load import load_model
from ..checkpoints.notes import plan_of, read_notes
from ..checkpoints.read import load_tokenizer, read_config, read_headers
from ..checkpoints.side_files import side_files
from ..checkpoints.skeleton import layouts_of, open_source, read_shape, skeleton
from ..checkpoints.weight_files import is_adapter, shard_files
from ..containers.layout import Layout
from ..errors import CheckpointError, LocumError, PlanError
from ..files import describe_size
from ..formats.int_packed import IntPacked
from ..formats.plain import COMPUTE_DTYPES
from ..formats.scaled import Scaled
from ..models.families import opening_class
from ..plans.plan import KEPT, LayerPlan, Plan
from ..shapes import ModelShape

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "How large?"},
]
ODD = "Tabs\tand  spaces, digits 1234567.89, naïve café, Здравствуй, 你好, emoji 🙂\n\n    if x != y:\n        return -1\n"
IGNORED = ("transformers_version", "_from_model_config")  # of a generation config: they say nothing of generation


@dataclass(frozen=True)
class Check:
    """One line of the table. `engine` is empty where the files alone were looked at."""

    check: str
    engine: str
    result: str  # ok, failed or skipped
    detail: str


class NotApplicable(Exception):
    """There is nothing to check; the message says why."""


class Folder:
    """A checkpoint under test. Every part is read when it is first needed, and raises what reading it raises."""

    def __init__(self, path: Path, original: Path | None, device: str) -> None:
        self.path, self.original, self.device = path, original, device

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        return read_notes(self.path)

    @functools.cached_property
    def plan(self) -> Plan | None:
        return plan_of(self.path)

    @functools.cached_property
    def headers(self) -> dict[str, dict[str, Any]]:
        return read_headers(self.path)

    @functools.cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.path)

    @functools.cached_property
    def before(self) -> ModelShape | None:
        """The original's shape: its own, or, where it is not there, as the notes say."""
        if self.original is not None:
            return read_shape(self.original)
        return ModelShape.from_json(self.notes["original_shape"]) if "original_shape" in self.notes else None

    @functools.cached_property
    def live(self) -> Any:
        return load_model(self.path, device=self.device)

    @functools.cached_property
    def is_quantised(self) -> bool:
        return bool(open_source(self.path).packed)

    @property
    def precision(self) -> str:
        """In which engines agree: float32; of packed numbers with scales in 16 bits the dtype of the checkpoint, in which engines make
        them numbers."""
        source = open_source(self.path)
        packed = any(isinstance(getattr(one, "format", None), (IntPacked, Scaled)) for one in source.packed.values())
        names = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
        return names.get(source.config.dtype, "fp32") if packed else "fp32"

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)


def check_headers(folder: Folder) -> str:
    size = sum(x["data_offsets"][1] - x["data_offsets"][0] for x in folder.headers.values())
    files = len(shard_files(folder.path))
    return f"{len(folder.headers)} tensors, {describe_size(size)}, in {files} file{'s' if files > 1 else ''}"


def check_config(folder: Folder) -> str:
    config = read_config(folder.path)
    layouts = layouts_of(folder.path)
    skeleton(config)
    count = f"{len(layouts) or 'no'} layer{'s' if len(layouts) != 1 else ''} in Locum's container"
    return f"{config.model_type}, opened by {opening_class(config)}, {count}"


def check_tensors(folder: Folder) -> str:
    count = len(folder.live.state_dict())
    where = "the files of base and adapter" if is_adapter(folder.path) else "the files"
    return f"all {count} tensors of the model are in {where}, and nothing else"


def check_plan(folder: Folder) -> str:
    """The plan is the one that was carried out, fits the original, and describes what config.json lays out."""
    plan, layouts = folder.plan, layouts_of(folder.path)
    if plan is None:
        if layouts:
            raise PlanError(f"{folder.path} has containers but no plan.json; apply the plan again")
        raise NotApplicable("no plan.json")
    made = folder.notes.get("plan")
    if made not in (None, plan.id):
        raise PlanError(
            f"plan.json is not what the checkpoint was made with (it is plan {plan.id}, the notes say {made}): it was "
            f"changed since; put the plan back"
        )
    if folder.before is None:
        return f"plan {plan.id}; the shape of the original is not known, so nothing more can be said"
    plan.validate(folder.before)
    if len(folder.shape.layers) != len(folder.before.layers) - (len(plan.layers) - len(plan.staying)):
        raise PlanError("plan.json leaves another number of layers than config.json has; one of the two was changed")
    for shape in folder.before.layers:
        layer = plan.layer(shape.name) or LayerPlan(shape.name, (KEPT,) * shape.num_experts)
        if layer.dropped:
            continue
        now = plan.numbering.name_after(shape.name)
        there = folder.shape.layer(now)
        if there.num_experts != len(layer.survivors):
            raise PlanError(
                f"plan.json leaves {len(layer.survivors)} experts in {shape.name}, config.json has {there.num_experts}; "
                f"one of the two was changed"
            )
        is_container = now in layouts
        if is_container and layouts[now] != Layout.of(layer, shape):
            raise PlanError(f"config.json lays {shape.name} out in another way than plan.json says; one was changed")
        if not (is_container or layer.is_dense):
            raise PlanError(
                f"plan.json has stand-ins in {shape.name}, config.json has none; one of the two was changed"
            )
    return f"plan {plan.id}, {plan.method}: {plan.removed(folder.before):.1%} of the experts' parameters removed"


def check_size(folder: Folder) -> str:
    if is_adapter(folder.path):
        raise NotApplicable("an adapter, whose weights are those of its base")
    if folder.plan is None or folder.before is None:
        raise NotApplicable("no plan.json that promises a size" if folder.plan is None else "the original is not known")
    if numbers := folder.notes.get("recovery", {}).get("numbers"):
        raise NotApplicable(f"training made numbers in {numbers} of what was packed, and no plan promises their bytes")
    saved = folder.notes.get("rest", {}).get("saved_bytes", 0)  # of weights outside of the experts, in few bits
    promised, of_model = (folder.plan.size(shape).bytes - saved for shape in (folder.before, folder.before.model))
    found = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in folder.headers.values())
    if found == of_model != promised:  # written by transformers, which has nothing else in memory
        return f"{found:,} bytes of tensors, as the plan promised for the model alone, without what is beside it"
    if found != promised:
        raise CheckpointError(f"the tensors in the files have {found:,} bytes, the plan promised {promised:,}")
    return f"{found:,} bytes of tensors, as the plan promised"


def check_tokenizer(folder: Folder) -> str:
    """The original's ids for the same text; text that the tokenizer cuts and joins again stays what it is."""
    tokenizer = folder.tokenizer
    vocabulary = read_config(folder.path).get_text_config().vocab_size
    texts = [*sample_texts(8), ODD]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if (most := max(map(max, ids))) >= vocabulary:
        raise CheckpointError(f"the tokenizer makes token {most}, the model has {vocabulary}; it is another model's")
    joined = [tokenizer.decode(row) for row in ids]
    again = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in joined]
    whole = joined == texts
    if folder.original is not None:
        theirs = load_tokenizer(folder.original)
        if ids != [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]:
            raise CheckpointError(
                "the tokenizer cuts text in another way than the original's; copy the original's files"
            )
        if joined != [theirs.decode(row) for row in ids]:
            raise CheckpointError("the tokenizer joins tokens in another way than the original's; copy its files")
    elif not whole and again != ids:
        raise CheckpointError("text does not survive the tokenizer: cut, joined and cut again it has other tokens")
    same = "as the original's; " if folder.original is not None else ""
    return f"{same}{len(texts)} texts {'come back whole' if whole else 'come back nearly whole, as its kind does'}"


def check_template(folder: Folder) -> str:
    template = getattr(folder.tokenizer, "chat_template", None)
    if folder.original is not None:
        theirs = getattr(load_tokenizer(folder.original), "chat_template", None)
        if template != theirs:
            raise CheckpointError("the chat template is not the original's; copy chat_template.jinja from there")
        return "as the original's" if template else "none, as the original has"
    if not template:
        raise NotApplicable("there is none")
    try:
        folder.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and fail as they like
        raise CheckpointError(f"the chat template fails on a plain talk: {error!s:.200}") from error
    return "renders a plain talk"


def check_generation(folder: Folder) -> str:
    def read(path: Path) -> dict[str, Any] | None:
        if not (path / "generation_config.json").is_file():
            return None
        read_json(path / "generation_config.json")
        try:
            settings = GenerationConfig.from_pretrained(path, local_files_only=True).to_dict()
        except Exception as error:
            raise CheckpointError(f"{path / 'generation_config.json'} cannot be used: {error!s:.200}") from error
        return {key: value for key, value in settings.items() if key not in IGNORED}

    ours = read(folder.path)
    theirs = None if folder.original is None else read(folder.original)
    if theirs is not None and ours is None:
        raise CheckpointError("generation_config.json is missing; copy it from the original")
    if ours is None:
        raise NotApplicable("there is none")
    if theirs is not None and ours != theirs:
        name = min(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise CheckpointError(
            f"generation_config.json has {name}={ours.get(name)!r}, the original's {theirs.get(name)!r}; copy it from there"
        )
    return "as the original's" if theirs is not None else "can be read"


def check_side_files(folder: Folder) -> str:
    """Processors and whatever else the original has besides weights."""
    if folder.original is None:
        raise NotApplicable("the original is not there")
    names = [file.name for file in side_files(folder.original)]
    if gone := [name for name in names if not (folder.path / name).is_file()]:
        raise CheckpointError(
            f"{', '.join(gone)} of the original {'is' if len(gone) == 1 else 'are'} missing; copy from there"
        )
    return f"all {len(names)} that the original has"


# In this order; a check is skipped when one that it builds on has failed.
CHECKS: dict[str, tuple[Callable[[Folder], str], tuple[str, ...]]] = {
    "files": (check_headers, ()),
    "config": (check_config, ()),
    "plan": (check_plan, ("files", "config")),
    "tensors": (check_tensors, ("files", "config")),
    "size": (check_size, ("plan", "tensors")),
    "tokenizer": (check_tokenizer, ("config",)),
    "chat template": (check_template, ("tokenizer",)),
    "generation config": (check_generation, ()),
    "other files": (check_side_files, ("tokenizer", "generation config")),
}


def run_check(name: str, engine: str, work: Callable[[], str]) -> Check:
    """One line, from a function that returns what it found or raises."""
    try:
        return Check(name, engine, OK, work())
    except NotApplicable as reason:
        return Check(name, engine, SKIPPED, str(reason))
    except LocumError as error:
        return Check(name, engine, FAILED, " ".join(str(error).split()))


def check_files(folder: Folder) -> list[Check]:
    """All checks of the files."""
    done: list[Check] = []
    broken: set[str] = set()  # what failed, and what builds on that
    for name, (check, needs) in CHECKS.items():
        failed = next((need for need in needs if need in broken), None)
        if failed is None:
            found = run_check(name, "", lambda check=check: check(folder))
        else:
            found = Check(name, "", SKIPPED, f"after {failed} failed there is nothing to say")
        if failed is not None or found.result == FAILED:
            broken.add(name)
        done.append(found)
    return done
