"""The kinds of file that Locum reads: which files of the world they are, what is in them, and the commands that read them.

A command line is run in a copy of the world, so paths in it are relative. `options` is the kind of the command lines
themselves (values.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from .world import CALIBRATE, MEASURE, PARTIAL, RECOVER, SEARCH, SHORT, VECTORS

OPTIONS = "options"
APPLY = "apply model --plan plan.json --out out --json"
INSPECT = "inspect {} --json"
EVAL = f"eval {{}} {MEASURE} --out out.jsonl --append --json"
REPORT = "report results.jsonl --out out.html --json"
STOCK = "export small --to stock --out out --json"
REMOTE = "export small --to remote-code --out out --json"
CALIBRATE_ON = f"calibrate model --data {{}} {SHORT} --out out.safetensors --json"


@dataclass(frozen=True)
class Reading:
    """Files of one content, and command lines each of which reads them."""

    files: tuple[str, ...]
    content: str  # the damages that know it (damages.py)
    lines: tuple[str, ...]


PLANNED = (
    "plan stats.safetensors --remove 0.4 --rank 2 --out out.json --json",
    "plan stats.safetensors --method mone --remove 0.25 --out out.json --json",
    "report stats.safetensors --out out.html --json",
    "compress model --data words.txt --statistics stats.safetensors --remove 0.4 --rank 2 --out out --json",
    "apply model --plan constants.json --out out --json",
)
WEIGHED = (
    "plan auto.safetensors --method auto --remove 0.5 --out out.json --json",
    "frontier auto.safetensors --points 2 --out out.json --json",
)
SEARCHED = ("plan searched.safetensors --method moe-i2 --remove 0.5 --out out.json --json",)
OF_MODEL = (INSPECT.format("model"), f"{CALIBRATE} --out out.safetensors --json", APPLY, EVAL.format("model"))
OF_SMALL = (INSPECT.format("small"), EVAL.format("small"), f"{RECOVER} --out out --json", STOCK, REMOTE)
OF_ADAPTER = (
    INSPECT.format("adapter"),
    EVAL.format("adapter"),
    f"{VECTORS} --out out".replace("vectors", "adapter", 1),
)

KINDS: dict[str, tuple[Reading, ...]] = {
    "plan": (
        Reading(("plan.json",), "json", (APPLY, "plan --diff plan.json prune.json --json")),
        Reading(("constants.json",), "json", ("apply model --plan constants.json --out out --json",)),
        Reading(("policy.json",), "json", ("apply model --plan policy.json --out out --json",)),
        Reading(
            ("prune.json",), "json", ("plan model --method compressed-experts --onto prune.json --out out.json --json",)
        ),
    ),
    "statistics": (
        Reading(("stats.safetensors",), "notes", PLANNED),
        Reading(("stats.safetensors",), "weights", PLANNED),
        Reading(("searched.safetensors",), "notes", SEARCHED),
        Reading(("auto.safetensors",), "notes", WEIGHED),
        Reading(("auto.safetensors",), "weights", WEIGHED),
        Reading(("searched.safetensors",), "weights", SEARCHED),
    ),
    "results": (
        Reading(
            ("results.jsonl",),
            "lines",
            (REPORT, EVAL.format("pruned").replace("out.jsonl", "results.jsonl")),
        ),
    ),
    "config": (
        Reading(("model/config.json",), "json", OF_MODEL),
        Reading(("small/config.json",), "json", OF_SMALL),
        Reading(("model/generation_config.json",), "json", (APPLY, EVAL.format("model"))),
    ),
    "layout": (
        Reading(("small/config.json",), "layout", OF_SMALL),
        Reading(("constants/config.json",), "layout", (INSPECT.format("constants"), EVAL.format("constants"))),
        Reading(("vectors/config.json",), "layout", (INSPECT.format("vectors"), EVAL.format("vectors"))),
    ),
    "weights": (
        Reading(("model/model.safetensors",), "weights", OF_MODEL),
        Reading(("small/model.safetensors",), "weights", OF_SMALL),
        Reading(("constants/model.safetensors",), "tensors", (EVAL.format("constants"),)),
    ),
    "index": (
        Reading(
            ("sharded/model.safetensors.index.json", "sharded/model-00002-of-00002.safetensors"),
            "json",
            tuple(line.replace("model", "sharded", 1) for line in OF_MODEL),
        ),
    ),
    "tokenizer": (
        Reading(("model/tokenizer.json",), "json", OF_MODEL[1:]),
        Reading(("model/tokenizer_config.json",), "json", OF_MODEL[1:]),
    ),
    "template": (Reading(("model/chat_template.jinja",), "template", (CALIBRATE_ON.format("chat.jsonl"), APPLY)),),
    "text": (
        Reading(
            ("words.txt",),
            "text",
            (CALIBRATE_ON.format("words.txt"), EVAL.format("pruned"), f"{RECOVER} --out out --json"),
        ),
    ),
    "json lines": (
        Reading(
            ("rows.jsonl", "chat.jsonl"),
            "lines",
            (CALIBRATE_ON.format("rows.jsonl"), CALIBRATE_ON.format("chat.jsonl")),
        ),
    ),
    "parquet": (Reading(("rows.parquet",), "parquet", (CALIBRATE_ON.format("rows.parquet"),)),),
    "datasets": (
        Reading(("dataset/state.json", "dataset/dataset_info.json"), "json", (CALIBRATE_ON.format("dataset"),)),
        Reading(("dataset/data-00000-of-00001.arrow",), "bytes", (CALIBRATE_ON.format("dataset"),)),
        Reading(("splits/dataset_dict.json", "splits/train/state.json"), "json", (CALIBRATE_ON.format("splits"),)),
    ),
    "training state": (
        Reading((".resumed.recover/state.safetensors",), "notes", (f"{RECOVER} --out resumed --json",)),
        Reading((".resumed.recover/state.safetensors",), "weights", (f"{RECOVER} --out resumed --json",)),
        Reading((".resumed.recover/recovery.jsonl",), "lines", (f"{RECOVER} --out resumed --json",)),
    ),
    "adapter": (
        Reading(("adapter/vectors.safetensors",), "weights", OF_ADAPTER),
        Reading(("adapter/config.json", "adapter/plan.json", "adapter/locum.json"), "json", OF_ADAPTER),
    ),
    "notes": (
        Reading(("small/locum.json", "small/plan.json"), "json", OF_SMALL),
        Reading(("recovered/locum.json",), "json", (INSPECT.format("recovered"), EVAL.format("recovered"))),
        Reading(("recovered/plan.json", "pruned/plan.json"), "json", (REPORT,)),
        Reading(("recovered/recovery.jsonl",), "lines", (REPORT,)),
    ),
    "partial calibration": (
        Reading((".resumed.safetensors.partial",), "notes", (f"{PARTIAL} --json",)),
        Reading((".resumed.safetensors.partial",), "weights", (f"{PARTIAL} --json",)),
    ),
    "search answers": (
        Reading((".resumed.search.answers",), "weights", (f"{SEARCH} --out resumed.search --json",)),
        Reading((".resumed.search.calibrated",), "notes", (f"{SEARCH} --out resumed.search --json",)),
    ),
}
# What each input is of, in turn: the options of the command line are many, so they come more often.
ROUND = tuple(name for i, kind in enumerate(KINDS) for name in ((kind, OPTIONS) if i % 3 == 2 else (kind,)))
